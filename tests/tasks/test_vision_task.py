"""The vision task's losses, figures, optimizer and data, on tiny models and handwritten digits."""

import csv
import math
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch.nn import functional as F

import zoo
from tasks.vision import VisionData, VisionTask
from tasks.vision_data import channels_of
from zoo.data.images_rows import IGNORE
from zoo.pretrained.vmoe import Checkpoint

TESTS = Path(__file__).parents[1]
SIZES = {"patch_size": 2, "embed_dim": 16, "num_experts": 4}


def make_task(**arguments):
    overrides = {**SIZES, **arguments.pop("overrides", {})}
    return VisionTask(overrides=overrides, warmup_steps=2, **arguments)


def make_data(**arguments):
    return VisionData(**{"image_size": 8, "channels": 1, "batch_size": 16, **arguments})


def make_trainer(tmp_path, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_checkpointing": False}
    return pl.Trainer(**{**quiet, **defaults, "limit_val_batches": 0, "log_every_n_steps": 1, **arguments})


class KeepGradients(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.kept = {n: p.grad.clone() for n, p in pl_module.named_parameters()}


def gradients(tmp_path, task, data=None, **trainer):
    pl.seed_everything(3, verbose=False)
    keep = KeepGradients()
    make_trainer(tmp_path, max_steps=1, callbacks=[keep], **trainer).fit(make_task(**task), make_data(**(data or {})))
    return keep.kept


def assert_close(a, b, rtol=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * float(b[name].abs().max()), msg=name)


def test_figures_of_an_evaluation_are_sklearns(tmp_path):
    torch.manual_seed(0)
    task, data = make_task(capacity=8.0), make_data(batch_size=64)
    task._adopt_sizes(data)
    task.model = task.build()
    torch.nn.init.normal_(task.model.head.weight)  # zero at first, and then all classes are equally likely
    [result] = make_trainer(tmp_path, limit_test_batches=1.0).test(task, data, verbose=False)
    assert len(data.images.split("test")) > 2 * 64  # several batches, the last one short
    scores, labels = [], []
    task.model.eval()
    with torch.no_grad():
        for batch in data.batches("test"):
            scores.append(task.model(batch["image"]).softmax(-1))
            labels.append(batch["label"])
    scores, labels = torch.cat(scores).double().numpy(), torch.cat(labels).numpy()
    assert result["test/top1"] == pytest.approx(accuracy_score(labels, scores.argmax(1)))
    assert result["test/top5"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
    expected = log_loss(labels, scores / scores.sum(1, keepdims=True), labels=range(10))
    assert result["test/loss"] == pytest.approx(expected, rel=1e-5)
    assert result["test/skipped_images"] == 0


def test_a_sigmoid_objective_is_evaluated_and_predicts_by_sigmoids(tmp_path):
    torch.manual_seed(0)
    task, data = make_task(capacity=8.0, objective="sigmoid", label_smoothing=0.1), make_data(batch_size=64)
    task._adopt_sizes(data)
    task.model = task.build()
    torch.nn.init.normal_(task.model.head.weight)
    [result] = make_trainer(tmp_path, limit_test_batches=1.0).test(task, data, verbose=False)
    losses = []
    task.model.eval()
    with torch.no_grad():
        for batch in data.batches("test"):
            chances = task.model(batch["image"]).double().sigmoid()
            right = F.one_hot(batch["label"], 10).bool()
            losses += (-(torch.where(right, chances, 1 - chances).log().sum(1))).tolist()
    assert result["test/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_images_that_are_no_images_count_nowhere_in_an_evaluation(tmp_path):
    task, data = make_task(), make_data()
    make_trainer(tmp_path).validate(task, data, verbose=False)
    batch = next(iter(data.batches("val")))
    real = {name: torch.cat([value, value[:2]]) for name, value in batch.items()}
    real["label"][-2:] = IGNORE
    real["skipped"] = torch.tensor([0] * 16 + [1, 0])
    task.on_validation_epoch_start()
    task.validation_step(real, 0)
    loss, count, first, fifth, skipped = task._sums.tolist()
    assert (count, skipped) == (16, 1)
    assert first <= fifth <= 16
    assert 0 < loss / count < 10


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_the_loss_is_cross_entropy_with_smoothed_targets(objective):
    task = make_task(objective=objective, label_smoothing=0.2)
    logits, labels = torch.randn(5, 4, dtype=torch.double), torch.tensor([0, 3, 1, 1, 2])
    found = task.loss(logits, F.one_hot(labels, 4).double())
    for row, label, value in zip(logits.tolist(), labels.tolist(), found.tolist()):
        target = [0.2 / 4 + 0.8 * (i == label) for i in range(4)]
        if objective == "softmax":
            total = math.log(sum(map(math.exp, row)))
            expected = sum(t * (total - z) for t, z in zip(target, row))
        else:
            p = [1 / (1 + math.exp(-z)) for z in row]
            expected = -sum(t * math.log(q) + (1 - t) * math.log(1 - q) for t, q in zip(target, p))
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixed_targets_say_how_much_of_each_image_there_is(mixup, cutmix):
    pl.seed_everything(0, verbose=False)
    task = make_task(mixup=mixup, cutmix=cutmix)
    task._mix.num_classes = 2
    images = torch.zeros(2, 1, 8, 8)
    images[1] = 1.0  # so that the mean of a mixed image is its share of the second one
    mixed, targets = task._mix(images.clone(), torch.tensor([0, 1]))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets[:, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    assert 0 < float(targets[0, 1]) < 1
    assert (set(mixed.unique().tolist()) == {0.0, 1.0}) == bool(cutmix)  # CutMix pastes, mixup blends


def test_auxiliary_losses_are_added_once(tmp_path):
    losses = {"importance_vmoe": 1.0, "switch": 0.5}
    router = {"name": "TopKRouter", "noise": None}
    trained = gradients(tmp_path, {"losses": losses, "router": router})
    pl.seed_everything(3, verbose=False)
    task, data = make_task(losses=losses, router=router), make_data()
    make_trainer(tmp_path, max_steps=0).fit(task, data)
    batch = next(iter(data.train_dataloader()))
    with zoo.moe.record(task.model) as step:
        logits = task.model.train()(batch["image"])
    loss = F.cross_entropy(logits, batch["label"])
    [[routing]] = step.routings.values()
    (loss + routing.losses["importance_vmoe"] + routing.losses["switch"]).backward()
    assert_close(trained, {n: p.grad for n, p in task.named_parameters()})


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    alone = {"router": {"name": "TopKRouter", "noise": None, "losses": {}}, "capacity": 8.0}
    small = gradients(tmp_path, alone, {"batch_size": 8}, accumulate_grad_batches=4)
    assert_close(small, gradients(tmp_path, alone, {"batch_size": 32}))


def test_recomputation_changes_nothing_and_counts_losses_once(tmp_path):
    task = {"overrides": {"drop_path_rate": 0.3}}
    assert_close(gradients(tmp_path, {**task, "activation_checkpointing": True}), gradients(tmp_path, task), rtol=1e-6)


def test_a_compiled_model_gives_the_same_gradients(tmp_path, monkeypatch):
    # Traced, but not translated to machine code, which takes minutes.
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: whole(self, backend="aot_eager"))
    task = {"router": {"name": "TopKRouter", "noise": None}, "overrides": {"depth": 2}}
    assert_close(gradients(tmp_path, {**task, "compile": True}), gradients(tmp_path, task))


def test_two_processes_train_and_evaluate_as_one_does(tmp_path):
    task = {"router": {"name": "TopKRouter", "noise": None, "losses": {}}, "capacity": 8.0, "lr": 0.0}
    limits = {"limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": 0}

    class Save(KeepGradients):
        def on_fit_end(self, trainer, pl_module):
            if trainer.is_global_zero:
                figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
                torch.save((self.kept, figures), tmp_path / f"{trainer.world_size}.pt")

    for devices, batch_size in ((2, 8), (1, 16)):
        pl.seed_everything(3, verbose=False)
        strategy = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Save()], **limits, **strategy)
        trainer.fit(make_task(**task), make_data(batch_size=batch_size))
    (double, figures), (single, expected) = (torch.load(tmp_path / f"{n}.pt") for n in (2, 1))
    assert_close(double, single)
    for name in ("val/loss", "val/top1", "val/top5"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-5), name


def test_images_that_fill_up_a_batch_compete_with_none_in_an_evaluation():
    torch.manual_seed(0)
    router = {"name": "TopKRouter", "group_size": None}
    capacity = {"factor": 1.0, "eval_factor": 0.25, "drop": "priority"}
    task, data = make_task(router=router, capacity=capacity), make_data()
    task._adopt_sizes(data)
    task.model = task.build().eval()
    torch.nn.init.normal_(task.model.head.weight)
    rows = data.rows("val", model=task.model)
    chosen = [rows[i] for i in (4, -1, 9, 30, -1, -1)]
    batch = torch.utils.data.default_collate(chosen)
    batch["skipped"][1] = 1
    with torch.no_grad():
        task.on_validation_epoch_start()
        task.validation_step(batch, 0)
        scores = task.model(torch.stack([rows[i]["image"] for i in (4, 9, 30)])).double()
    labels = torch.tensor([rows[i]["label"] for i in (4, 9, 30)])
    loss, images, first, _, skipped = task._sums.tolist()
    assert loss == pytest.approx(F.cross_entropy(scores, labels, reduction="sum").item(), rel=1e-6)
    assert (images, first, skipped) == (3, int((scores.argmax(1) == labels).sum()), 1)
    # A process that has nothing else goes through the model with it, for the others' sake.
    nothing = torch.utils.data.default_collate([rows[-1], rows[-1]])
    task.on_validation_epoch_start()
    task.validation_step(nothing, 0)
    assert task._sums.tolist() == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("name", "options", "channels"),
    [
        ("vit_tiny_patch16_224", {"in_chans": 4, "depth": 1}, 4),
        ("naflexvit_base_patch16_gap", {"in_chans": 1, "depth": 1}, 1),  # no convolution
        ("tresnet_m", {}, 3),  # its first convolution has those of 16 pixels
    ],
)
def test_a_models_channels_are_those_of_its_images(name, options, channels):
    with torch.device("meta"):
        assert channels_of(zoo.create_model(f"vision/{name}", **options)) == channels


def test_layer_decay_slows_down_blocks_the_further_they_are_from_the_head(tmp_path):
    task = make_task(lr=0.1, layer_decay=0.5, weight_decay=0.3)
    make_trainer(tmp_path, max_steps=0).fit(task, make_data())
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    found = {names[p]: group for group in task.parameter_groups() for p in group["params"]}
    assert found.keys() == set(names.values())
    # 4 blocks: the head first, then the final norm with it, blocks 3..0, and what comes before them.
    rates = {"head.weight": 1, "blocks.3.mlp.experts.up_proj": 0.5, "blocks.3.mlp.router.weight": 0.5}
    rates |= {"blocks.0.mlp.fc1.weight": 0.5**4, "patch_embed.proj.weight": 0.5**5, "pos_embed": 0.5**5}
    for name, factor in rates.items():
        assert found[name]["lr"] == pytest.approx(0.1 * factor), name
    decays = {"head.weight", "blocks.3.mlp.experts.up_proj", "blocks.3.mlp.router.weight", "patch_embed.proj.weight"}
    for name in {*rates, "blocks.3.mlp.experts.up_proj_bias", "cls_token", "norm.weight", "head.bias"}:
        expected = 0.3 if name in decays or name.endswith("fc1.weight") else 0.0
        assert found[name]["weight_decay"] == expected, name


def test_sgd_has_momentum(tmp_path):
    task = make_task(optimizer="sgd", lr=0.25, schedule="constant")
    make_trainer(tmp_path, max_steps=1).fit(task, make_data())
    optimizer = task.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_logs_have_balance_layer_by_layer_and_speed_in_images(tmp_path):
    from tasks.lightning_cli import loggers

    trainer = make_trainer(tmp_path, max_steps=3, logger=loggers(tmp_path, "vision"), limit_val_batches=1)
    trainer.fit(make_task(overrides={"moe_layers": "every-2"}), make_data())
    folder = tmp_path / "vision" / "version_0"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(folder.glob("events.out.tfevents.*"))
    for layer in ("blocks.1.mlp", "blocks.3.mlp"):
        for figure in ("load_max", "entropy", "drop_rate"):
            values = [float(r[f"train/{figure}/{layer}"]) for r in rows if r.get(f"train/{figure}/{layer}")]
            assert len(values) == 3
            assert all(math.isfinite(v) for v in values)
    assert {"train/loss", "train/loss_importance_vmoe", "train/images_per_s"} <= rows[0].keys()
    assert {"loss", "images/s", "balance"} <= trainer.progress_bar_metrics.keys()


def test_ema_weights_are_what_is_evaluated(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    averaging = EMAWeightAveraging(decay=0.5)
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.model.head.weight.detach().clone())

    trainer = make_trainer(tmp_path, max_steps=3, callbacks=[averaging, Watch()])
    task = make_task(lr=0.1)
    trainer.fit(task, make_data())
    # The average starts as the first weights it sees.
    expected = 0.25 * seen[0] + 0.25 * seen[1] + 0.5 * seen[2]
    torch.testing.assert_close(task.model.head.weight.detach(), expected)


def test_a_checkpoint_is_a_model_again_without_trainer_or_data(tmp_path):
    task, data = make_task(), make_data()
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    again = VisionTask.load_from_checkpoint(tmp_path / "model.ckpt")
    images = next(iter(data.batches("val")))["image"]
    assert torch.equal(again.model.eval()(images), task.model.eval()(images))


@pytest.mark.parametrize(
    ("task", "data", "told"),
    [
        ({"num_classes": 7}, {}, "the model has 7 classes, but scikit-learn's digits has 10"),
        ({"channels": 3}, {}, "the model takes 3 channels, but data.channels is 1"),
        ({"image_size": 10}, {}, "the model takes images of 10x10, but data.image_size is 8"),
        ({"overrides": {"patch_size": 3}}, {}, "images of 8x8 do not divide into patches of 3x3"),
        ({"mixup": 0.2}, {"batch_size": 15}, "batch_size must be even, got 15"),
    ],
)
def test_what_does_not_fit_is_an_error_before_training(task, data, told):
    with pytest.raises(ValueError, match=told):
        make_task(**task).check(make_data(**data))


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    data = make_data()
    with pytest.raises(ValueError, match=r"trained on 3 classes, and scikit-learn's digits has 10.*'cat'"):
        data.load_state_dict({"classes": ["cat", "dog", "emu"]})
    data.load_state_dict({"classes": list("0123456789")})


def test_a_dense_timm_model_is_upcycled_and_starts_where_it_was():
    import timm

    torch.manual_seed(0)
    dense = timm.create_model("test_vit", img_size=32, num_classes=10, in_chans=3)
    task = VisionTask(
        upcycle={"model": "test_vit", "layers": "last-2", "num_experts": 4}, num_classes=10, image_size=32
    )
    model = task.build()
    sparse = [name for name, module in model.named_modules() if isinstance(module, zoo.moe.MoE)]
    assert sparse == ["blocks.3.mlp", "blocks.5.mlp"]
    own = model.state_dict()
    copied = {name: value for name, value in dense.state_dict().items() if name in own}
    model.load_state_dict(copied, strict=False)
    for i in (3, 5):
        fc1, experts = dense.blocks[i].mlp.fc1, model.blocks[i].mlp.experts
        with torch.no_grad():
            experts.up_proj.copy_(fc1.weight.expand_as(experts.up_proj))
            experts.up_proj_bias.copy_(fc1.bias.expand_as(experts.up_proj_bias))
            experts.down_proj.copy_(dense.blocks[i].mlp.fc2.weight.expand_as(experts.down_proj))
            experts.down_proj_bias.copy_(dense.blocks[i].mlp.fc2.bias.expand_as(experts.down_proj_bias))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), dense.eval()(images), rtol=1e-4, atol=1e-5)
    # A convolutional network takes images of any size, and has no argument for it.
    task = VisionTask(upcycle={"model": "test_convnext", "layers": "last-1"}, num_classes=10, image_size=32)
    assert task.build()(images).shape == (2, 10)
    with pytest.raises(ValueError, match="pretrained and upcycle exclude each other"):
        VisionTask(pretrained="x", upcycle={"model": "test_vit"})


def test_a_vmoe_checkpoint_is_fine_tuned_on_other_classes_and_larger_images(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TESTS / "pretrained")
    from vmoe_writer import write

    leaves = {key: leaf.read() for key, leaf in Checkpoint(TESTS / "reference/vmoe/vmoe_last2_k2_roomy").leaves.items()}
    leaves |= {"pre_logits/kernel": torch.randn(32, 32), "pre_logits/bias": torch.randn(32)}
    write(tmp_path / "original", leaves)
    # As the released models were fine-tuned: a new head, without the layer before it.
    task = VisionTask(
        pretrained=str(tmp_path / "original"), overrides={"new_head": True, "representation_size": 0}, lr=0.0
    )
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(task, make_data(image_size=40, channels=3, batch_size=8))
    assert trainer.logged_metrics["train/loss"] == pytest.approx(math.log(10), rel=0.3)  # a new head knows nothing
    model = task.model
    assert (model.num_classes, tuple(model.patch_embed.img_size)) == (10, (40, 40))
    experts = leaves["Encoder/encoderblock_3/Moe/Mlp/Dense_0/kernel"].transpose(1, 2)
    assert torch.equal(model.blocks[3].mlp.experts.up_proj.detach(), experts)
    with pytest.raises(ValueError, match="give new_head=True"):
        VisionTask(pretrained=str(tmp_path / "original"), num_classes=7).build()


def test_normalisation_is_the_models_own_unless_given():
    import timm

    model = timm.create_model("test_vit", img_size=32)
    data = VisionData(image_size=None, channels=3)
    theirs = model.pretrained_cfg
    ours = data.preparation(model)
    assert (ours.size, ours.mean, ours.interpolation) == (32, tuple(theirs["mean"]), theirs["interpolation"])
    given = VisionData(image_size=24, mean=[0.1], std=[0.2], crop_pct=0.5).preparation(model)
    assert (given.size, given.mean, given.std, given.crop_pct) == (24, (0.1,), (0.2,), 0.5)
    assert np.isclose(VisionData(channels=1).preparation(model).statistics(ours.mean)[0], np.mean(theirs["mean"]))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("convnext_base.clip_laiona_augreg_ft_in1k_384", {}),  # squashes
        ("test_vit", {"crop_mode": "border", "crop_pct": 0.8}),
        ("test_vit", {"crop_mode": "center", "crop_pct": 0.8}),
    ],
)
def test_images_are_made_square_as_the_model_was_evaluated(name, changed):
    import timm
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    with torch.device("meta"):
        model = timm.create_model(name, pretrained_cfg_overlay=changed)
    config = resolve_model_data_config(model)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8))
    ours = VisionData().preparation(model)
    torch.testing.assert_close(ours.evaluation()(picture), create_transform(**config)(picture))
    assert {name: ours.config()[name] for name in config} == config
    assert VisionData(crop_mode="squash").preparation(model).crop_mode == "squash"
    with pytest.raises(ValueError, match="unknown crop_mode 'squish'; did you mean squash"):
        VisionData(crop_mode="squish")


@pytest.mark.parametrize("network", ["vmoe_tiny_test", "convnext_moe_tiny_test"])
def test_what_is_exported_says_how_images_are_prepared(network, tmp_path):
    """An image goes the same way into the exported model, by ours and by timm's reading, as it went in training."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    sizes = SIZES if network.startswith("vmoe") else {}
    task = VisionTask(f"vision/{network}", overrides=sizes, warmup_steps=2, export=str(tmp_path / "out"))
    asked = {"mean": [0.3], "std": [0.2], "crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": "squash"}
    data = make_data(image_size=48, batch_size=8, **asked)
    make_trainer(tmp_path, max_steps=1).fit(task, data)
    read = zoo.from_pretrained(tmp_path / "out")
    found = VisionData(channels=1).preparation(read)
    assert (found.size, found.mean, found.std) == (48, (0.3,), (0.2,))
    picture = data.images.split("val").load(0)
    expected = data.rows("val", model=task.model)[0]["image"]
    torch.testing.assert_close(found.evaluation()(picture), expected)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    transform = create_transform(**resolve_model_data_config(theirs))
    torch.testing.assert_close(transform(picture), expected)


def test_what_cannot_be_exported_is_told_before_training(tmp_path):
    from tasks.lightning_cli import ArgumentMistake

    task = make_task(convert=[{"quantise": {"format": "int8"}}], export=str(tmp_path / "out"))
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.raises(ArgumentMistake, match="export: save_pretrained: no published layout has a place for blocks"):
        trainer.fit(task, make_data())
    assert trainer.global_step == 0


def test_the_logged_loss_is_that_of_all_images_of_a_step(tmp_path):
    task, seen = make_task(overrides={"dense": True}), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            with torch.no_grad():
                logits = module.model(batch["image"]).double()
            self.sums = [
                *(self.sums if batch_idx % 3 else []),
                F.cross_entropy(logits, batch["label"], reduction="sum"),
            ]

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            expected = float(sum(self.sums)) / (16 * len(self.sums))
            seen.append((float(trainer.callback_metrics["train/loss"]), expected))

    make_trainer(tmp_path, max_steps=2, accumulate_grad_batches=3, callbacks=[Watch()]).fit(task, make_data())
    assert len(seen) == 6
    for logged, expected in seen:
        assert logged == pytest.approx(expected, rel=1e-5)
