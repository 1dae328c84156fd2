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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models gain nothing from more, and a fork of a process with more may hang in its first parallel region."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder with enough text for about a hundred sequences of 32 bytes."""
    folder = tmp_path_factory.mktemp("text")
    generator = torch.Generator().manual_seed(0)
    words = ["router", "expert", "token", "gate", "while", "return", "if", "else"]
    for i in range(40):
        # Short and uneven, so that batches differ in the number of targets.
        picks = torch.randint(len(words), (3 + i % 30,), generator=generator).tolist()
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
