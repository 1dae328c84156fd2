"""`zoo vision ...` from start to end, in one process, on tiny models and handwritten digits."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import zoo
from tasks.__main__ import main
from tasks.vision import VisionTask
from zoo.data.images import open_images

CONFIGS = Path(__file__).parents[2] / "configs" / "vision"
DIGITS = sorted(CONFIGS.glob("*_digits.yaml"))
# Millions of parameters: V-MoE's from the shapes of the released models, Soft MoE's from the paper's table, with the
# 29,593 classes of JFT-4B; the upcycled model's are counted in the test.
PUBLISHED = {"vmoe_s32_imagenet": 57.0, "vmoe_b16_finetune": 285.24, "soft_moe_s16": 933.0}
JFT_CLASSES = 29_593


def cli(subcommand, config, *args):
    return main(["vision", subcommand, "--config", str(config), *map(str, args)])


def quick(folder, steps=3):
    """Arguments that make any tiny config quick."""
    trainer = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}", "--trainer.accelerator=cpu"]
    return [*trainer, "--trainer.enable_progress_bar=false", "--trainer.default_root_dir", folder]


def model_of(config, capsys, *args):
    """The model that a config describes, without memory."""
    with pytest.raises(SystemExit) as done:
        cli("fit", config, "--print_config", *args)
    assert done.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    data, arguments = parsed["data"], parsed["model"]
    sizes = {"image_size": data["image_size"], "channels": data["channels"]}
    sizes["num_classes"] = 10 if data["source"] == "digits" else None
    arguments.update({name: value for name, value in sizes.items() if arguments[name] is None})
    # Without the checkpoint, which is not here, the network that it would fill.
    (arguments["overrides"] or {}).pop("new_head", None)
    with torch.device("meta"):
        return VisionTask(**{**arguments, "pretrained": None}).build()


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses_and_its_model_has_the_published_size(config, capsys):
    classes = [f"--model.num_classes={JFT_CLASSES}"] if config.stem == "soft_moe_s16" else []
    count = sum(p.numel() for p in model_of(config, capsys, *classes).parameters())
    if config.stem in PUBLISHED:
        assert count / 1e6 == pytest.approx(PUBLISHED[config.stem], rel=1e-3)
    elif config.stem == "upcycled_vit_b16":
        mlp, router = 2 * 768 * 3072 + 3072 + 768, 32 * 768
        assert count == 86_567_656 + 6 * (31 * mlp + router)  # timm's own ViT-B/16, and six times 31 more experts
    else:
        assert count < 2e6
    assert config.read_text().startswith("# ")  # what it is, and what it takes


def test_a_dense_twin_has_the_active_parameters_of_its_mixture(capsys):
    from zoo.models import count_parameters

    moe, dense = (model_of(CONFIGS / f"{kind}_digits.yaml", capsys) for kind in ("vmoe", "dense"))
    active, twin = count_parameters(moe)[1], count_parameters(dense)[0]
    # The twin has no routers, and one bias of the output where two experts have one each.
    assert active - twin == 2 * (8 * 64) + 2 * 64


@pytest.mark.parametrize("config", DIGITS, ids=lambda path: path.stem)
def test_every_digits_config_trains(config, tmp_path):
    assert cli("fit", config, *quick(tmp_path)) == 0
    folder = tmp_path / "vision" / "version_0"
    with (folder / "metrics.csv").open() as file:
        figures = [row for row in csv.DictReader(file) if row["val/top1"]]
    assert figures
    assert all(0 <= float(row["val/top1"]) <= float(row["val/top5"]) <= 1 for row in figures)
    assert (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


OTHER_LAYERS = {
    "blocks": (
        {"name": "vision/vmoe_tiny_test", "embed_dim": 16},
        {
            "experts": {"class_path": "zoo.moe.ZeroComputationExperts", "init_args": {"zero": 2}},
            "num_experts": 6,
            "router": {"name": "MoEPlusPlusRouter", "zero": 2},
            "attention": {"name": "SwitchHead", "num_experts": 2},
            "mixture_of_depths": {"capacity": 0.5, "sampling": "loss"},
        },
        "train/loss_depth",
    ),
    "channels": ({"name": "vision/resnet10t"}, {"convolutions": {"name": "DeepMoE"}}, "train/loss_embedding"),
}


@pytest.mark.parametrize(("network", "layers", "loss"), OTHER_LAYERS.values(), ids=OTHER_LAYERS.keys())
def test_layers_of_other_kinds_are_named_in_a_config(network, layers, loss, tmp_path):
    overrides = {name: value for name, value in network.items() if name != "name"} | layers
    model = {"network": network["name"], "overrides": overrides, "export": str(tmp_path / "exported")}
    data = {"source": "digits", "image_size": 32 if layers.get("convolutions") is None else 8}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    assert cli("fit", tmp_path / "other.yaml", *quick(tmp_path, 10)) == 0
    with (tmp_path / "vision" / "version_0" / "metrics.csv").open() as file:
        assert loss in next(csv.reader(file))
    state = torch.load(tmp_path / "vision/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    again = zoo.from_pretrained(tmp_path / "exported").state_dict()
    for name, value in again.items():
        assert torch.equal(value, state[f"model.{name}"])


def test_fit_validate_test_and_predict(tmp_path, capsys):
    """A tiny V-MoE learns digits, far above chance and above its own start, and says so of images in files."""
    config, smaller = CONFIGS / "vmoe_digits.yaml", ["--model.overrides.embed_dim=32", "--model.warmup_steps=10"]
    smaller += ["--model.lr=4e-3", "--data.augment.crop=null"]  # learns faster, if less in the end
    options = [*quick(tmp_path, 120), *smaller, "--trainer.val_check_interval=60"]
    assert cli("fit", config, *options, "--trainer.precision=bf16-mixed") == 0
    assert "scikit-learn's digits: 10 classes; 1439 train, 179 val, 179 test images" in capsys.readouterr().out
    with (tmp_path / "vision" / "version_0" / "metrics.csv").open() as file:
        first, *_, last = [float(row["val/top1"]) for row in csv.DictReader(file) if row["val/top1"]]
    assert last > 0.5  # chance is 0.1
    assert last > first
    checkpoint = tmp_path / "vision" / "version_0" / "checkpoints" / "last.ckpt"

    assert cli("validate", config, *options, "--ckpt_path", checkpoint) == 0
    assert "val/top1" in capsys.readouterr().out
    assert cli("test", config, *options, "--ckpt_path", checkpoint) == 0
    assert "test/top5" in capsys.readouterr().out

    digits = open_images("digits").split("test")
    (tmp_path / "in").mkdir()
    for i in range(60):
        digits.load(i).save(tmp_path / "in" / f"{i:02}.png")
    written = tmp_path / "out" / "found.csv"
    where = ["--data.images", f"[{tmp_path / 'in'}]", "--model.predictions", written]
    assert cli("predict", config, *options, *where, "--ckpt_path", checkpoint) == 0
    with written.open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["path"]).name for row in rows] == [f"{i:02}.png" for i in range(60)]
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)
    right = sum(row["class"] == str(digits.labels[i]) for i, row in enumerate(rows))
    assert right > 0.4 * len(rows)
    before = written.read_text()
    assert cli("predict", config, *options, *where, "--ckpt_path", checkpoint) == 2
    assert "exists; name another file" in capsys.readouterr().err
    assert written.read_text() == before


def test_training_goes_without_held_out_images_and_with_one_callback_alone(tmp_path):
    options = ["--data.held_out=0", "--trainer.callbacks=tasks.averaging.RunningAverage", "--trainer.max_epochs=1"]
    assert cli("fit", CONFIGS / "vmoe_digits.yaml", *quick(tmp_path, 2), *options) == 0
    assert (tmp_path / "vision" / "version_0" / "checkpoints" / "last.ckpt").is_file()


def test_an_exported_model_predicts_its_own_classes_without_the_images_it_was_trained_on(tmp_path, capsys):
    for name, value in (("black things", 0), ("very white", 255), ("grey", 128)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 24), (value, value, abs(value - i))).save(tmp_path / "images" / name / f"{i}.png")
    data = ["--data.source", tmp_path / "images", "--data.image_size=32", "--data.batch_size=8"]
    model = ["--model.network=vision/convnext_moe_tiny_test", "--model.lr=0.01", "--model.warmup_steps=5"]
    quickly = ["--trainer.check_val_every_n_epoch=null"]
    export = tmp_path / "exported"
    assert (
        main(["vision", "fit", *map(str, [*data, *model, *quick(tmp_path, 40), *quickly, "--model.export", export])])
        == 0
    )
    found = tmp_path / "found.csv"
    where = ["--data.images", f"[{tmp_path / 'images'}]", "--model.predictions", found, "--data.image_size=32"]
    assert main(["vision", "predict", "--model.pretrained", str(export), *map(str, where)]) == 0
    with found.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    assert {row["class"] for row in rows} <= {"black things", "very white", "grey"}
    assert sum(Path(row["path"]).parent.name == row["class"] for row in rows) > 20

    # A fine-tuned head has the classes of the data, whatever those of the model that it started from.
    for name in ("a", "b"):
        (tmp_path / "other" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 24), (25 * i, 0, 0)).save(tmp_path / "other" / name / f"{i}.png")
    other = ["--data.source", tmp_path / "other", "--data.image_size=32", "--data.batch_size=8"]
    start = ["--model.pretrained", export, "--model.overrides.new_head=true", *quick(tmp_path / "second", 2), *quickly]
    assert main(["vision", "fit", *map(str, [*other, *start])]) == 0
    last = tmp_path / "second" / "vision" / "version_0" / "checkpoints" / "last.ckpt"
    where = ["--data.images", f"[{tmp_path / 'other'}]", "--model.predictions", tmp_path / "second.csv"]
    # What the checkpoint was trained with stands where nothing else is said; what is said goes first.
    assert main(["vision", "predict", *map(str, [*other, *where, "--ckpt_path", last])]) == 0
    with (tmp_path / "second.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} <= {"a", "b"}


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--model.network", "vision/vmoe_tiny_tets"], "did you mean vision/vmoe_tiny_test"),
        (["--model.router", "{name: TopKRoutr}"], "did you mean TopKRouter"),
        (["--model.losses", "{importanc: 0.1}"], "importance"),
        (["--model.overrides.patch_size", "3"], "do not divide into patches of 3x3"),
        (["--model.num_classes", "7"], "the model has 7 classes, but scikit-learn's digits has 10"),
        (["--model.mixp", "0.2"], "did you mean model.mixup"),
        (["--data.source", "digts"], "did you mean digits"),
        (["--data.batch_size", "5000"], "1439 images to train on do not fill one batch: batch_size is 5000"),
        (["--data.source", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--data.channels", "2"], "channels must be 1 (grey) or 3 (colour), got 2"),
        (["--data.augment.flip", "7"], "augment.flip is a probability, got 7"),
        (["--data.interpolation", "bicubical"], "unknown interpolation 'bicubical'; did you mean bicubic"),
        (["--data.mean", "[0.5, 0.5]"], "mean must have a value for all channels or three, got [0.5, 0.5]"),
        (["--data.std", "[0]"], "std must be above 0, got [0.0]"),
        (["--data.crop_pct", "0"], "crop_pct must be above 0 and at most 1, got 0.0"),
        (["--model.label_smoothing", "7"], "label_smoothing is a share of the target, from 0 to 1, got 7.0"),
        (["--data.augment.ratio", "[2, 1]"], "augment.ratio is a range of shapes such as [0.75, 1.33], got [2.0, 1.0]"),
        (["--model.layer_decay", "-1"], "layer_decay must be at least 0, got -1.0"),
        (["--model.upcycle", "{layers: all}"], "expected a table that names the dense model of timm under 'model'"),
        (
            ["--model.network=vision/test_vit", "--model.overrides=null", "--model.losses={z: 0.1}"],
            "losses: test_vit has no experts; say which blocks get some, in moe_layers",
        ),
        (["--model.mixup", "-1"], "mixup must be at least 0, got -1.0"),
        (["--model.overrides.num_experts", "0"], "num_experts must be at least 1, got 0"),
        (["--model.overrides.embed_dim", "7"], "dim should be divisible by num_heads"),
        (["--model.upcycle", "{model: vit_tniy}"], "unknown model of timm 'vit_tniy'; did you mean"),
        (["--model.weight_decay", "-1"], "weight_decay must be at least 0, got -1.0"),
        (["--model.warmup_steps", "-1"], "warmup_steps must be at least 0, got -1"),
        (["--seed_everything", "-1"], "-1 is not in bounds"),
        (["--data.augment.flp", "0.5"], "did you mean data.augment.flip"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(args, told, tmp_path, capsys):
    assert cli("fit", CONFIGS / "vmoe_digits.yaml", "--trainer.default_root_dir", tmp_path, *args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "args", "told"),
    [
        ("vmoe_digits", ["--model.pretrained", "nowhere"], "nowhere: no such folder, and no repository id"),
        ("vmoe_digits", ["--model.pretrained", "."], "config.json: no such file"),
        ("vmoe_digits", ["--model.capacity", "-1"], "factor=-1.0 leave 0 places an expert"),
        (
            "soft_moe_digits",
            ["--model.convert", "[{prune: {keep: 4}}]"],
            "SoftRouter of blocks.2.mlp has no probabilit",
        ),
        ("vmoe_digits", ["--data.num_workers", "-1"], "num_workers"),
        ("vmoe_digits", ["--data.augment.rand", "randm9"], "timm has no policy 'randm9'; expected one such as"),
        ("vmoe_digits", ["--data.augment.rand", "rand-z9"], "timm has no policy 'rand-z9'; expected one such as"),
    ],
)
def test_a_mistake_that_shows_before_the_first_batch_is_one_line(config, args, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli("fit", CONFIGS / f"{config}.yaml", "--trainer.enable_progress_bar=false", *args) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]


@pytest.mark.parametrize(
    ("start", "held"),
    [
        ("vision vmoe_digits", "vision_language/limoe_tiny"),
        ("vision vmoe_digits", "vision_language/moe_llava_tiny"),
        ("vision_language limoe_digits", "vision/vmoe_tiny_test"),
        ("language mixtral_tiny", "vision/vmoe_tiny_test"),
        ("language mixtral_tiny", "vision_language/limoe_tiny"),
    ],
)
def test_a_folder_of_another_kind_of_model_is_a_mistake(start, held, tmp_path, capsys):
    domain, config = start.split()
    zoo.save_pretrained(zoo.create_model(held), tmp_path / "held")
    file = CONFIGS.parent / domain / f"{config}.yaml"
    assert main([domain, "fit", "--config", str(file), "--model.pretrained", str(tmp_path / "held")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "pretrained: expected a" in errors[0]
    assert f"{tmp_path / 'held'} holds a" in errors[0]
    if domain == "vision":
        assert cli("fit", file, f"--model.teacher={{pretrained: {tmp_path / 'held'}}}") == 2
        assert "teacher: expected an image classifier" in capsys.readouterr().err


def test_what_fails_in_the_middle_of_training_is_told_with_a_traceback(tmp_path, monkeypatch):
    """Not taken for a mistake in the arguments."""
    whole = VisionTask.training_step

    def fails(self, batch, batch_idx):
        if batch_idx == 2:
            raise ValueError("in the middle")
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(VisionTask, "training_step", fails)
    with pytest.raises(ValueError, match="in the middle"):
        cli("fit", CONFIGS / "vmoe_digits.yaml", *quick(tmp_path, 4))


def test_a_class_without_images_is_a_mistake_before_training(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
    for i in range(4):
        Image.new("L", (8, 8), i).save(tmp_path / "in" / "cat" / f"{i}.png")
    assert cli("fit", CONFIGS / "vmoe_digits.yaml", "--data.source", tmp_path / "in") == 2
    assert "no image to train on of 1 classes: dog" in capsys.readouterr().err


def test_prediction_without_images_is_a_mistake(capsys):
    assert cli("predict", CONFIGS / "vmoe_digits.yaml") == 2
    assert "give data.images" in capsys.readouterr().err


def test_prediction_in_forked_processes_is_a_mistake_before_any_work(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
    options = ["--data.images", f"[{tmp_path / 'one.png'}]", "--model.predictions", tmp_path / "found.csv"]
    forked = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    assert cli("predict", CONFIGS / "vmoe_digits.yaml", *options, *forked) == 2
    assert "keep their predictions to themselves; use ddp" in capsys.readouterr().err


def test_fit_help_shows_options_with_their_meaning(capsys):
    with pytest.raises(SystemExit) as done:
        main(["vision", "fit", "--help"])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "alpha of mixup, 0 for none" in shown
    assert "peak learning rate" in shown  # of what all tasks share
    assert "--data.augment" in shown


def test_training_can_do_without_logs(tmp_path):
    # The monitor of the learning rate, which needs a logger, must then stay away.
    assert cli("fit", CONFIGS / "vmoe_digits.yaml", *quick(tmp_path, 1), "--trainer.logger=false") == 0
    assert not (tmp_path / "vision").exists()
