import lightning.pytorch as pl
import pytest
import torch

from tasks.language import LanguageData, LanguageTask

# Dropout, router noise and losses on purpose: whatever is random or adds up must survive a resumption too.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}
NOISY = {"class_path": "zoo.moe.routers.TopKRouter", "init_args": {"jitter": 0.1, "selection_bias": True}}


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with enough text for a few dozen sequences a split."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    words = ["router", "expert", "token", "gate", "while", "return", "if", "else"]
    for i in range(40):
        picks = torch.randint(len(words), (60,), generator=generator).tolist()
        (folder / f"{i}.txt").write_text(" ".join(words[p] for p in picks))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """No test reads or leaves anything in the user's cache."""
    monkeypatch.setenv("MOE_ZOO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make(text, tmp_path):
    """make.task(...), make.data(...) and make.trainer(...), tiny ones."""

    class Make:
        tiny, noisy = TINY, NOISY

        @staticmethod
        def task(**arguments):
            overrides = {**TINY, **arguments.pop("overrides", {})}
            return LanguageTask("language/mixtral_tiny", overrides=overrides, warmup_steps=2, **arguments)

        @staticmethod
        def data(**arguments):
            return LanguageData(**{"source": str(text), "sequence_length": 32, "batch_size": 4, **arguments})

        @staticmethod
        def trainer(**arguments):
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
            defaults = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_checkpointing": False}
            return pl.Trainer(**{**quiet, **defaults, "limit_val_batches": 0, "log_every_n_steps": 1, **arguments})

    return Make
