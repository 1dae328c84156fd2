"""A teacher beside the labels: its loss, and that nothing else has it."""

import pytest
import torch
from torch.nn import functional as F

import zoo
from tasks.teacher import Teacher
from tasks.vision import VisionData, VisionTask
from zoo.distillation import distillation_loss

SPEC = {"network": "language/mixtral_tiny", "weight": 0.4, "temperature": 2.0}


@pytest.fixture
def folder(make, tmp_path):
    torch.manual_seed(5)
    zoo.save_pretrained(zoo.create_model("language/mixtral_tiny", vocab_size=259, **make.tiny), tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_language_model_learns_from_its_teacher_and_keeps_nothing_of_it(make, folder, tmp_path):
    seen = {}
    task = make.task(
        teacher={"pretrained": str(folder), "weight": 0.4, "temperature": 2.0}, export=str(tmp_path / "out")
    )
    original, training_step = task.logits, task.training_step

    def watched(batch, model=None):
        logits = original(batch, model)
        seen["student" if model is None else "teacher"] = logits.detach().clone()
        return logits

    def stepped(batch, batch_idx):
        loss = training_step(batch, batch_idx)
        seen.update(batch=batch, loss=loss.detach())
        return loss

    task.logits, task.training_step = watched, stepped
    trainer = make.trainer(max_steps=2)
    trainer.fit(task, make.data())
    labels = seen["batch"]["labels"]
    each = distillation_loss(seen["student"], seen["teacher"], labels, 0.4, 2.0, reduction="none")
    torch.testing.assert_close(seen["loss"], each.sum() / each.numel(), rtol=1e-4, atol=0)
    with torch.no_grad():
        again = original(seen["batch"], zoo.from_pretrained(folder))
    torch.testing.assert_close(seen["teacher"], again, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in task._teacher.model.parameters())
    assert not any("teacher" in name for name, _ in (*task.named_parameters(), *task.named_modules()))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    names = torch.load(tmp_path / "x.ckpt", weights_only=False)["state_dict"]
    assert set(names) == {f"model.{name}" for name in task.model.state_dict()}
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not held & {id(p) for p in task._teacher.model.parameters()}
    assert zoo.from_pretrained(tmp_path / "out").config.vocab_size == 259


def test_the_teacher_is_no_part_of_evaluation(make, folder):
    task = make.task(teacher={"pretrained": str(folder)})
    make.trainer(limit_val_batches=1).validate(task, make.data())
    assert task._teacher.model is None


def test_a_teacher_of_another_vocabulary_or_with_other_keys_is_refused(make, folder):
    task = make.task(teacher={"pretrained": str(folder)}, vocab_size=300)
    with pytest.raises(ValueError, match="teacher: its vocabulary has 259 tokens, the model's 300"):
        make.trainer(max_steps=1).fit(task, make.data())
    task = make.task(teacher={"pretrained": str(folder)}, vocab_size=300)
    with pytest.raises(ValueError, match="teacher: its vocabulary has 259 tokens"):
        task.check(make.data())
    for spec, message in (
        ({"pretraind": "x"}, "key of teacher 'pretraind'.*pretrained"),
        ({"weight": 0.5}, 'teacher: give either "pretrained"'),
        ({**SPEC, "pretrained": "x"}, 'teacher: give either "pretrained"'),
        ({**SPEC, "weight": 1.5}, "expected weight between 0 and 1"),
        ({**SPEC, "temperature": 0}, "temperature above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Teacher(spec)


@pytest.mark.parametrize("objective", ["softmax", "sigmoid"])
def test_an_image_classifier_learns_from_its_teacher(objective, tmp_path, make):
    sizes = {"patch_size": 2, "embed_dim": 16, "num_experts": 4}
    teacher = {"network": "vision/vmoe_tiny_test", "overrides": sizes, "weight": 0.5}
    task = VisionTask(overrides=sizes, warmup_steps=2, teacher=teacher, objective=objective, mixup=0.2)
    data = VisionData(image_size=8, channels=1, batch_size=16)
    seen, original = {}, task.soft_loss

    def watched(logits, of_teacher):
        seen.update(logits=logits.detach(), teacher=of_teacher, soft=original(logits, of_teacher))
        return seen["soft"]

    task.soft_loss = watched
    task.check(data)
    make.trainer(max_steps=1).fit(task, data)
    z, t = seen["logits"].double(), seen["teacher"].double()
    if objective == "softmax":
        expected = -(t.softmax(-1) * z.log_softmax(-1)).sum(-1)
    else:
        expected = -(t.sigmoid() * F.logsigmoid(z) + (1 - t.sigmoid()) * F.logsigmoid(-z)).sum(-1)
    torch.testing.assert_close(seen["soft"].detach().double(), expected, rtol=1e-4, atol=1e-5)
    wrong = VisionTask(overrides=sizes, teacher={**teacher, "overrides": {**sizes, "num_classes": 3}})
    with pytest.raises(ValueError, match="teacher: classes 3, the model's 10"):
        wrong.check(data)


def test_a_teacher_sees_images_normalised_as_it_was_trained(tmp_path, make):
    """The images that student and teacher saw are the same pixels, each with its own mean and deviation."""
    sizes = {"patch_size": 2, "embed_dim": 16, "num_experts": 4}
    first = VisionTask(overrides=sizes, warmup_steps=2, export=str(tmp_path / "teacher"))
    make.trainer(max_steps=1).fit(
        first, VisionData(image_size=8, channels=1, batch_size=16, mean=[0.2], std=[0.4], crop_pct=1.0)
    )
    task = VisionTask(
        overrides=sizes, warmup_steps=2, teacher={"pretrained": str(tmp_path / "teacher")}, mixup=0.5, cutmix=1.0
    )
    seen = {}
    trainer, data = make.trainer(max_steps=1), VisionData(image_size=8, channels=1, batch_size=16)
    build_teacher = task.build_teacher

    def watched(model):
        teacher = build_teacher(model)
        for key, module in (("student", model), ("teacher", teacher)):
            module.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0].detach().clone()}))
        return teacher

    task.build_teacher = watched
    trainer.fit(task, data)
    pixels = {"student": seen["student"] * 0.5 + 0.5, "teacher": seen["teacher"] * 0.4 + 0.2}
    torch.testing.assert_close(pixels["teacher"], pixels["student"])
