"""`zoo language ...` from start to end, in one process, on tiny models."""

import csv
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from tasks.__main__ import main
from tasks.language import LanguageTask
from tasks.lightning_cli import TaskCLI
from zoo.models import count_parameters

CONFIGS = Path(__file__).parents[2] / "configs" / "language"
TINY = sorted(CONFIGS.glob("*_tiny.yaml"))
# Total and active parameters in billions, as the papers and model cards give them.
PUBLISHED = {
    "mixtral_8x7b": (46.7, 12.9),
    "olmoe_1b_7b": (6.9, 1.3),
    "qwen3_30b_a3b": (30.5, 3.3),
    "deepseek_v3": (671, 37),
    "deepseek_v2_lite": (15.7, 2.4 + 0.21),  # which does not count the embeddings
    "gpt_oss_20b": (20.9, 3.61 + 0.58),  # nor does this
    "llama_moe_3_5b": (6.74, 3.5),
    # Llama 2 7B, LoRAs beside attention, and gates and 8 experts beside each MLP, of which a token meets 2.
    "mixlora_llama2_7b": tuple(6.738 + (32 * (4 * 16 * 8192 + 8 * 4096) + n * 48 * 32 * 15104) / 1e9 for n in (8, 2)),
}


def cli(subcommand, config, *args):
    return main(["language", subcommand, "--config", str(config), *map(str, args)])


def small(text, folder):
    """Arguments that make any tiny config quick."""
    data = ["--data.source", text, "--data.sequence_length=32", "--data.batch_size=4"]
    trainer = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    more = ["--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    return [*data, *trainer, *more, "--trainer.default_root_dir", folder, "--model.max_new_tokens=8"]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses_and_its_model_builds_without_memory(config, capsys):
    with pytest.raises(SystemExit) as done:
        cli("fit", config, "--print_config")
    assert done.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    task = LanguageTask(**parsed["model"])
    with torch.device("meta"):
        # Without the checkpoint, which is not here, the model that it is of.
        model = task.converted(LlamaForCausalLM(LlamaConfig()) if parsed["model"]["pretrained"] else task.build())
    total, active = (count / 1e9 for count in count_parameters(model))
    if config.stem in PUBLISHED:
        assert total == pytest.approx(PUBLISHED[config.stem][0], rel=0.01)
        assert active == pytest.approx(PUBLISHED[config.stem][1], rel=0.03)
    else:
        assert total < 0.1
    assert config.read_text().startswith("# ")  # what it is, and what it takes


@pytest.mark.parametrize("config", TINY, ids=lambda path: path.stem)
def test_every_tiny_config_trains(config, text, tmp_path):
    assert cli("fit", config, *small(text, tmp_path)) == 0
    folder = tmp_path / "language" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(r["val/bits_per_byte"]) for r in rows if r["val/bits_per_byte"]]
    assert losses
    assert all(0 < loss < 20 for loss in losses)
    assert (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_fit_validate_test_predict_and_resume(text, tmp_path, capsys):
    config, options = CONFIGS / "mixtral_tiny.yaml", small(text, tmp_path)
    assert cli("fit", config, *options, "--model.export", tmp_path / "out", "--trainer.precision", "bf16-mixed") == 0
    checkpoint = tmp_path / "language" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(checkpoint)["global_step"] == 3
    assert zoo.from_pretrained(tmp_path / "out").config.vocab_size == 259

    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*neither --ckpt_path")
        assert cli("validate", config, *options, "--ckpt_path", checkpoint) == 0
    with pytest.warns(UserWarning, match="validate: neither --ckpt_path nor model.pretrained is given"):
        assert cli("validate", config, *options) == 0
    with pytest.warns(UserWarning, match="predict: neither --ckpt_path nor model.pretrained is given"):
        assert cli("predict", config, *options) == 0
    assert "val/bits_per_byte" in capsys.readouterr().out
    assert cli("test", config, *options, "--ckpt_path", checkpoint) == 0
    assert "test/perplexity" in capsys.readouterr().out
    assert cli("predict", config, *options, "--ckpt_path", checkpoint, "--model.temperature", "0") == 0
    shown = capsys.readouterr().out
    assert "def " in shown
    assert "import " in shown

    # A second run neither overwrites the first one nor starts anew.
    assert cli("fit", config, *options, "--ckpt_path", checkpoint, "--trainer.max_steps=5") == 0
    assert torch.load(tmp_path / "language" / "version_1" / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert torch.load(checkpoint)["global_step"] == 3

    capsys.readouterr()
    for subcommand in ("fit", "validate"):  # the counters that it restores are no sign of a batch
        other = ["--model.overrides.num_hidden_layers=5", "--ckpt_path", checkpoint]
        assert cli(subcommand, config, *options, *other) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert (
            "the checkpoint is of another model: Error(s) in loading state_dict for LanguageTask: Missing key" in line
        )
        # Nor does it leave a folder of logs behind.
        assert {path.name for path in (tmp_path / "language").iterdir()} == {"version_0", "version_1"}
        assert len(line) < 600


def test_a_run_with_lightnings_average_goes_on_with_its_own_weights(text, tmp_path):
    average = ["--trainer.callbacks=lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay=0.5"]
    state = {}
    for name, steps, before in (("straight", 4, ""), ("half", 2, ""), ("whole", 4, "half")):
        args = [*small(text, tmp_path / name), *average, f"--trainer.max_steps={steps}", "--model.schedule_steps=4"]
        last = "language/version_0/checkpoints/last.ckpt"
        args += ["--ckpt_path", tmp_path / before / last] if before else []
        assert cli("fit", CONFIGS / "mixtral_tiny.yaml", *args) in (0, None)
        state[name] = torch.load(tmp_path / name / last, weights_only=False)
    for kind in ("state_dict", "current_model_state"):
        for key, value in state["straight"][kind].items():
            assert torch.equal(state["whole"][kind][key], value), (kind, key)


def test_a_run_that_ctrl_c_ended_says_so_by_its_status(text, tmp_path, monkeypatch, capsys):
    begin = LanguageTask.training_step

    def press(self, batch, batch_idx):
        if batch_idx == 1:
            signal.raise_signal(signal.SIGINT)
        return begin(self, batch, batch_idx)

    monkeypatch.setattr(LanguageTask, "training_step", press)
    assert cli("fit", CONFIGS / "mixtral_tiny.yaml", *small(text, tmp_path)) == 130
    assert "stopped after step 2" in capsys.readouterr().out


def test_a_gate_of_ones_own_is_named_by_class_path(text, tmp_path, monkeypatch):
    (tmp_path / "my_gates.py").write_text(
        "import zoo\n"
        "class Halving(zoo.moe.routers.TopKRouter):\n"
        "    def __init__(self, dim, num_experts, k=1, share=0.5):\n"
        "        super().__init__(dim, num_experts, k, scale=share)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "mine.yaml"
    router = {"class_path": "my_gates.Halving", "init_args": {"share": 0.25}}
    config.write_text(yaml.safe_dump({"model": {"network": "language/mixtral_tiny", "router": router}}))
    assert cli("fit", config, *small(text, tmp_path), "--trainer.max_steps=1") == 0
    again = LanguageTask.load_from_checkpoint(tmp_path / "language" / "version_0" / "checkpoints" / "last.ckpt")
    gate = again.model.model.layers[0].mlp.router
    assert (type(gate).__name__, gate.k, gate.scale) == ("Halving", 2, 0.25)


TOP1 = {"class_path": "TopKRouter", "init_args": {"k": 1}}


@pytest.mark.parametrize("ckpt", [False, True])
@pytest.mark.parametrize(
    ("said", "options", "expected"),
    [
        (None, [f"--model.router={TOP1}"], TOP1),
        (None, ["--model.router.class_path=TopKRouter", "--model.router.init_args.k", "1"], TOP1),
        (None, ["--model.router.name=XMoERouter", "--model.router.k=2"], {"name": "XMoERouter", "k": 2}),
        (TOP1, [], TOP1),
        (TOP1, ["--model.router={class_path: HashRouter, init_args: {vocab_size: 9}}"], "hash"),
        (TOP1, ["--model.router.class_path=HashRouter", "--model.router.init_args.vocab_size=9"], "hash"),
        (TOP1, ["--model.router.init_args.jitter=1e-2"], {**TOP1, "init_args": {"k": 1, "jitter": 0.01}}),
        (TOP1, [f"--model.router={[TOP1, TOP1]}"], [TOP1, TOP1]),
        ([TOP1, TOP1], [f"--model.router={TOP1}"], TOP1),
        (TOP1, ["--model.router=null"], None),
        (None, ["--model.router=HashRouter"], "HashRouter"),
        (TOP1, ["--model.router", "HashRouter"], "HashRouter"),
        ("HashRouter", ["--model.router.class_path=TopKRouter", "--model.router.init_args.k=1"], TOP1),
        ("HashRouter", [], "HashRouter"),
    ],
)
def test_options_say_a_gate_over_a_config(said, options, expected, ckpt, monkeypatch, tmp_path):
    if expected == "hash":
        expected = {"class_path": "HashRouter", "init_args": {"vocab_size": 9}}
    seen = []
    monkeypatch.setattr(TaskCLI, "instantiate_classes", lambda cli: seen.append(cli.config.fit.model.router))
    monkeypatch.setattr(TaskCLI, "_run_subcommand", lambda cli, name: None)
    monkeypatch.setattr(TaskCLI, "trainer", SimpleNamespace(callbacks=[]), raising=False)
    args = list(options)
    if said is not None:
        (tmp_path / "said.yaml").write_text(yaml.safe_dump({"model": {"router": said}}))
        args += ["--config", str(tmp_path / "said.yaml")]
        args = args[-2:] + args[:-2]
    if ckpt:  # its hyper-parameters fill in where there is no config
        content = {"hyper_parameters": {"router": {"class_path": "SinkhornRouter", "init_args": {"k": 2}}}}
        torch.save(content, tmp_path / "last.ckpt")
        args += ["--ckpt_path", str(tmp_path / "last.ckpt")]
    assert main(["language", "fit", *args]) in (0, None)
    assert seen == [expected]


@pytest.mark.parametrize("ckpt", [False, True])
def test_options_without_a_config_are_read_once(ckpt, monkeypatch, tmp_path):
    """Over what a checkpoint was made with, where one is given."""
    seen = []
    monkeypatch.setattr(TaskCLI, "instantiate_classes", lambda cli: seen.append(cli.config.fit))
    monkeypatch.setattr(TaskCLI, "_run_subcommand", lambda cli, name: None)
    monkeypatch.setattr(TaskCLI, "trainer", SimpleNamespace(callbacks=[]), raising=False)
    args = ["--trainer.callbacks+=tasks.averaging.RunningAverage", "--data.source=a", "--data.source+=b"]
    args += ["--model.convert+={share_depth: {}}", "--model.overrides.attention.name=MoH", "--model.lr", "2e-3"]
    args += ["--model.overrides.attention.k", "2", "--model.losses.switch.weight=1e-3", "--model.losses.z=0.1"]
    if ckpt:
        hyper = {"convert": ["share_depth"], "overrides": {"hidden_size": 8}, "lr": 0.1, "warmup_steps": 7}
        torch.save({"hyper_parameters": hyper}, tmp_path / "last.ckpt")
        args += ["--ckpt_path", str(tmp_path / "last.ckpt")]
    assert main(["language", "fit", *args]) in (0, None)
    [found] = seen
    assert [c.class_path for c in found.trainer.callbacks] == ["tasks.averaging.RunningAverage"]
    assert found.data.source == ["a", "b"]
    assert found.model.convert == [{"share_depth": {}}]
    assert found.model.overrides == {"attention": {"name": "MoH", "k": 2}, **({"hidden_size": 8} if ckpt else {})}
    assert found.model.losses == {"switch": {"weight": 0.001}, "z": 0.1}
    assert (found.model.lr, found.model.warmup_steps) == (0.002, 7 if ckpt else 100)


OTHER_LAYERS = {
    "experts": {"name": "ZeroComputationExperts", "constant": 1},
    "attention": {"class_path": "zoo.moe.MoH", "init_args": {"num_shared_heads": 1, "k": 2}},
    "mixture_of_depths": {"capacity": 0.5, "sampling": "predictor"},
}


def test_layers_of_other_kinds_are_named_in_a_config(text, tmp_path, capsys):
    overrides = {"num_hidden_layers": 2, "hidden_size": 32, **OTHER_LAYERS}
    model = {"overrides": overrides, "router": {"class_path": "zoo.moe.routers.TopKRouter", "init_args": {"k": 3}}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"model": model}))
    assert cli("fit", tmp_path / "other.yaml", *small(text, tmp_path), "--trainer.log_every_n_steps=1") == 0
    checkpoint = tmp_path / "language" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert "model.model.layers.0.self_attn.attention.mix.weight" in state
    assert "model.model.layers.1.depth.block.layer.mlp.experts.constant" in state
    with (checkpoint.parents[1] / "metrics.csv").open() as file:
        assert {"train/loss_depth", "train/loss_transformers"} <= set(next(csv.reader(file)))
    capsys.readouterr()
    # What it trains has no layout to be exported in: said before the training, not after.
    other = ["--model.export", tmp_path / "exported", *small(text, tmp_path / "again")]
    assert cli("fit", tmp_path / "other.yaml", *other) == 2
    assert "no published layout has a place" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--model.network", "language/mixtrl_tiny"], "did you mean language/mixtral_tiny"),
        (["--model.router.class_path", "zoo.moe.routers.TopKRoutr"], "did you mean TopKRouter"),
        (["--model.router", "{class_path: TopKRouter, init_args: {jiter: 0.1}}"], "did you mean jitter"),
        (["--model.losses", "{swich: 0.1}"], "switch"),
        (["--model.overrides.hidden_sizes", "12"], "did you mean hidden_size"),
        (["--model.lrr", "1"], "did you mean model.lr"),
        (["--trainer.max_stepz", "3"], "did you mean trainer.max_steps"),
        (["--data.tokenizer", "byts"], "did you mean bytes"),
        (["--data.source", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--ckpt_path", "/nowhere.ckpt"], "/nowhere.ckpt"),
        (["--model.lr", "fast"], "model.lr"),
        (["--model.schedule", "cosin"], "model.schedule"),
        (["--model.lr", "-1"], "lr must be at least 0, got -1.0"),
        (["--model.max_new_tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--model.temperature", "-1"], "temperature must be at least 0, got -1.0"),
        (["--model.top_p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--model.overrides.hidden_size", "-4"], "hidden_size must be at least 1, got -4"),
        (["--model.overrides.num_hidden_layers", "0"], "num_hidden_layers must be at least 1, got 0"),
        (["--model.overrides.num_attention_heads", "3"], "a multiple of num_key_value_heads, got 3 and 2"),
        (
            ["--model.overrides", "{hidden_size: 36, num_attention_heads: 4, num_key_value_heads: 2}"],
            "rotary positions need heads of an even size, got 9",
        ),
        (["--model.schedule_steps", "0"], "schedule_steps must be at least 1, got 0"),
        (["--model.min_lr_ratio", "-1"], "min_lr_ratio must be between 0 and 1, got -1.0"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches must be at least 1, got 0"),
        (["--data.prompts", "{law: [a]}"], "only where sources have names do prompts go by them"),
        (["--ckpt_path", str(CONFIGS)], "is a folder, and no checkpoint"),
        (["--trainer.max_steps=-1", "--trainer.max_time", "00:01:00:00"], "must know its end: set schedule_steps"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(args, told, tmp_path, capsys):
    assert cli("fit", CONFIGS / "mixtral_tiny.yaml", "--trainer.default_root_dir", tmp_path, *args) == 2
    shown = capsys.readouterr().err.splitlines()
    errors = [line for line in shown if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert shown[-1] == errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--model.pretrained", "MISSING"], "no such folder"),
        (["--model.router.class_path", "zoo.moe.routers.HashRouter"], "HashRouter: give vocab_size"),
        (
            ["--model.router", "{class_path: zoo.moe.routers.ExpertChoiceRouter}", "--model.export", "OUT"],
            "ExpertChoiceRouter cannot be expressed in the Mixtral layout",
        ),
        (["--data.tokenizer", "bytes"], "the tokenizer has 259 tokens, but the model's vocabulary only 256"),
    ],
)
def test_a_mistake_about_a_pretrained_model_is_one_line_before_any_work(args, told, tmp_path, capsys):
    model = zoo.create_model("language/mixtral_tiny", vocab_size=256, num_hidden_layers=1, hidden_size=32)
    zoo.save_pretrained(model, tmp_path / "model")
    (tmp_path / "text.txt").write_text("some text\n" * 100)
    options = {"MISSING": str(tmp_path / "missing"), "OUT": str(tmp_path / "out")}
    args = ["--model.pretrained", tmp_path / "model", *(options.get(arg, arg) for arg in args)]
    if "--data.tokenizer" not in args:
        args += ["--data.tokenizer", "bpe:260"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"source": str(tmp_path / "text.txt")}}))
    assert cli("fit", tmp_path / "config.yaml", "--trainer.default_root_dir", tmp_path / "runs", *args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {"netwrk": "language/mixtral_tiny"}}, "'model.netwrk'; did you mean model.network"),
        ({"data": {"batch_size": "many"}}, "data.batch_size"),
        ({"trainer": {"max_step": 3}}, "did you mean trainer.max_steps"),
    ],
)
def test_a_mistake_in_a_config_file_names_its_key(content, told, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(content))
    assert cli("fit", tmp_path / "bad.yaml") == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "more", "told"),
    [
        ("", [], "text.txt: 1 files, 0 bytes: nothing to train on; give more text"),
        ("hi", [], "text.txt: 1 files, 2 bytes: nothing to val on; give more text"),
        ("one, two, three. " * 500, ["--data.batch_size=5000"], "rows do not fill one batch of 5000"),
        ("one, two, three. " * 500, ["--data.sequence_length=90000"], "tokens do not fill one sequence of 90000"),
        ("one, two, three. " * 500, ["--data.num_workers=-1"], "num_workers option should be non-negative"),
        ("one, two, three. " * 500, ["--model.betas", "[2, 3]"], "Invalid beta parameter at index 0: 2.0"),
    ],
)
def test_a_mistake_that_the_data_shows_is_one_line(content, more, told, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(content)
    args = [*small(tmp_path / "text.txt", tmp_path / "runs"), *more]
    assert cli("fit", CONFIGS / "mixtral_tiny.yaml", *args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]


def test_prediction_without_prompts_is_a_mistake(tmp_path, capsys):
    (tmp_path / "none.yaml").write_text("model: {network: language/mixtral_tiny}\n")
    assert cli("predict", tmp_path / "none.yaml") == 2
    assert "give data.prompts" in capsys.readouterr().err


def test_fit_help_shows_options_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as done:
        main(["language", "fit", "--help"])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--model.schedule {cosine,wsd,constant}" in shown
    assert "peak learning rate" in shown
    # That a network may be a module does not list all kinds of modules; Lightning's own options list theirs.
    network = shown[shown.index("--model.network NETWORK") : shown.index("--model.pretrained PRETRAINED")]
    assert "torch.nn.Linear" not in network
    assert "EarlyStopping" in shown


@pytest.mark.parametrize("wanted", ["last", "auto"])
@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_no_last_checkpoint_to_evaluate_is_a_mistake(wanted, subcommand, text, tmp_path, capsys):
    args = [*small(text, tmp_path), "--data.prompts=[a]", "--ckpt_path", wanted]
    assert cli(subcommand, CONFIGS / "mixtral_tiny.yaml", *args) == 2
    told = capsys.readouterr()
    assert f"error: --ckpt_path {wanted}: no last.ckpt in {tmp_path / 'language'}" in told.err
    assert told.out == ""


@pytest.mark.parametrize("logger", [[], ["--trainer.logger=false"]])
def test_last_is_the_newest_checkpoint_there_is(logger, text, tmp_path, recwarn):
    config, options = CONFIGS / "mixtral_tiny.yaml", [*small(text, tmp_path), *logger, "--ckpt_path=last"]
    assert cli("fit", config, *options) == 0
    begins = [w for w in recwarn if "begins afresh" in str(w.message)]
    assert len(begins) == 1
    assert cli("fit", config, *options, "--trainer.max_steps=5") == 0
    assert cli("test", config, *options) == 0
    first, *more = sorted(tmp_path.rglob("last.ckpt"))
    assert [torch.load(path)["global_step"] for path in (first, *more)] == ([5] if logger else [3, 5])
    seen = [str(w.message) for w in recwarn]
    assert not any("neither --ckpt_path" in message or "no last checkpoint" in message for message in seen)


def test_last_is_that_of_a_callback_with_a_folder_of_its_own(text, tmp_path):
    own = ["--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    own += [f"--trainer.callbacks.dirpath={tmp_path / 'own'}", "--trainer.callbacks.every_n_train_steps=1"]
    own += ["--ckpt_path=last"]
    config, options = CONFIGS / "mixtral_tiny.yaml", small(text, tmp_path)
    assert cli("fit", config, *options, *own) == 0
    # A younger one, of another model, is not the callback's.
    assert cli("fit", config, *options, "--trainer.max_steps=1", "--model.overrides.num_hidden_layers=1") == 0
    assert cli("fit", config, *options, *own, "--trainer.max_steps=5") == 0
    assert torch.load(tmp_path / "own" / "last.ckpt", weights_only=False)["global_step"] == 5


def test_more_processes_are_started_with_the_users_own_arguments(monkeypatch, tmp_path):
    # Data parallelism runs sys.argv again for every further process.
    seen = []
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: seen.append(list(sys.argv)))
    monkeypatch.setattr(sys, "argv", ["/bin/zoo", "language", "fit", "--config", "mine.yaml"])
    assert cli("fit", CONFIGS / "mixtral_tiny.yaml", "--trainer.default_root_dir", tmp_path) == 0
    assert seen == [["/bin/zoo", "language", "fit", "--config", "mine.yaml"]]
