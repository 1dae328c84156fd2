"""`model.convert`: what a config says is done to a model before it is trained."""

import pytest
import torch
import yaml

import zoo
from tasks import conversions
from tasks.__main__ import main
from tasks.language import LanguageTask
from tasks.recommendation import RecommendationTask
from tasks.vision import VisionTask
from zoo.moe import Experts, LoRAOfExperts, MoE, QuantisedExperts


@pytest.fixture
def dense(tmp_path):
    """A folder with a tiny Llama over bytes, and the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, num_key_value_heads=1, **sizes))
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense", model


def run(domain, subcommand, folder, model, *args):
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    trainer = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    where = ["--trainer.default_root_dir", str(folder)]
    return main([domain, subcommand, "--config", str(folder / "config.yaml"), *trainer, *where, *map(str, args)])


def test_a_dense_language_model_is_upcycled_trained_and_exported(dense, text, tmp_path, capsys):
    folder, model = dense
    convert = [{"upcycle": {"layers": "all", "num_experts": 4, "losses": {"switch": 0.01}}}]
    data = [f"--data.source={text}", "--data.sequence_length=32", "--data.batch_size=4"]
    data.append("--trainer.limit_val_batches=1")
    said = {"pretrained": str(folder), "convert": convert, "lr": 0.0, "weight_decay": 0.0}
    assert run("language", "fit", tmp_path, said, *data, "--model.export", tmp_path / "out") == 0
    again = zoo.from_pretrained(tmp_path / "out")
    assert again.config.model_type == "mixtral"
    ids = torch.randint(259, (2, 16))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)

    checkpoint = tmp_path / "language" / "version_0" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    assert run("language", "validate", tmp_path, said, *data, "--ckpt_path", checkpoint) == 0
    assert "val/bits_per_byte" in capsys.readouterr().out


def test_mlps_are_cut_by_what_training_batches_show(dense, text, tmp_path):
    folder, model = dense
    convert = [{"split": {"num_experts": 4, "k": 4, "method": "coactivation", "router": "TopKRouter", "calibrate": 2}}]
    data = [f"--data.source={text}", "--data.sequence_length=32", "--data.batch_size=4"]
    data.append("--trainer.limit_val_batches=1")
    said = {"pretrained": str(folder), "convert": convert, "lr": 0.0, "weight_decay": 0.0}
    assert run("language", "fit", tmp_path, said, *data, "--model.export", tmp_path / "out") == 0
    experts = zoo.from_pretrained(tmp_path / "out").model.layers[0].mlp.experts
    rows = model.model.layers[0].mlp.gate_proj.weight.detach()
    cut = experts.w_in[:, : rows.shape[0] // 4].flatten(0, 1)
    # Every hidden unit is in one expert, and not where it was.
    assert torch.equal(cut[cut[:, 0].argsort()], rows[rows[:, 0].argsort()])
    assert not torch.equal(cut, rows)


SPARSE = {
    "prune": ({"keep": 3, "calibrate": 2}, lambda model: model.config.num_local_experts == 3),
    "grow": ({"num_new": 2}, lambda model: model.config.num_local_experts == 6),
    "to_dense": ({"method": "average", "weights": "usage", "calibrate": 1}, lambda model: not has(model, MoE)),
    "quantise": ({"format": "int8"}, lambda model: has(model, QuantisedExperts) and not has(model, Experts)),
}


def has(model, kind):
    return any(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_model_is_converted_trained_and_taken_up_again(name, make):
    arguments, holds = SPARSE[name]
    task, data = make.task(convert=[{name: arguments}]), make.data(batch_size=2)
    trainer = make.trainer(max_steps=2)
    trainer.fit(task, data)
    assert holds(task.model)
    trainer.save_checkpoint(trainer.default_root_dir + "/kept.ckpt")
    again = make.task(convert=[{name: arguments}])
    make.trainer(max_steps=3).fit(again, make.data(batch_size=2), ckpt_path=trainer.default_root_dir + "/kept.ckpt")
    assert again.global_step == 3
    assert holds(again.model)


def test_a_conversion_without_arguments_is_its_name_alone(dense, text, tmp_path):
    data = [f"--data.source={text}", "--data.sequence_length=32", "--data.batch_size=4"]
    data.append("--trainer.limit_val_batches=1")
    said = {"pretrained": str(dense[0]), "convert": ["share_depth", {"upcycle": {"num_experts": 2, "layers": "all"}}]}
    assert run("language", "fit", tmp_path, said, *data, "--model.export", tmp_path / "out") == 0
    layers = zoo.from_pretrained(tmp_path / "out").model.layers
    assert torch.equal(layers[0].self_attn.q_proj.weight, layers[1].self_attn.q_proj.weight)


def test_experts_in_few_bits_are_tuned_inside(make):
    adapt = {"kind": "LoRA", "targets": ["query", "gate", "up", "down"], "rank": 2, "dtype": "float32"}
    convert = [{"quantise": {"format": "int8"}}, {"adapt": adapt}]
    task, data, trainer = make.task(convert=convert), make.data(batch_size=2), make.trainer(max_steps=2)
    trainer.fit(task, data)
    assert has(task.model, LoRAOfExperts)
    pairs = {n: t for n, t in task.model.state_dict().items() if ".experts.lora." in n}
    assert pairs
    assert all(t.any() for t in pairs.values())  # B is zero at first
    trainer.save_checkpoint(trainer.default_root_dir + "/kept.ckpt")
    again = make.task(convert=convert)
    make.trainer(max_steps=3).fit(again, make.data(batch_size=2), ckpt_path=trainer.default_root_dir + "/kept.ckpt")
    frozen = {n: t for n, t in task.model.state_dict().items() if "lora" not in n}
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in frozen.items())


def test_loras_are_composed_by_a_config(make, tmp_path):
    torch.manual_seed(0)
    base = make.task().build()
    for number in range(2):
        zoo.save_pretrained(zoo.adapt(base, "LoRA", targets="q_proj", rank=2 + number), tmp_path / str(number))
    sources = [str(tmp_path / str(number)) for number in range(2)]
    task = make.task(convert=[{"compose_adapters": {"sources": sources, "kind": "MoLE"}}])
    task.check(make.data())  # without memory, as the command line does
    torch.manual_seed(0)
    found = task.converted(task.build())
    learns = {n.rpartition("q_proj.")[2] for n, p in found.named_parameters() if p.requires_grad}
    assert learns == {"router.weight", "router.log_temperature"}


def test_adapters_are_merged_by_a_config(make, tmp_path):
    """A trained LoRA, read from its folder and merged: W + alpha/r B A in plain layers."""
    torch.manual_seed(0)
    adapted = zoo.adapt(make.task().build(), "LoRA", targets="q_proj", rank=2, alpha=6.0)
    pairs = {n: p for n, p in adapted.named_parameters() if "lora" in n}
    with torch.no_grad():
        for tensor in pairs.values():
            tensor.normal_()
    zoo.save_pretrained(adapted, tmp_path / "adapters")
    said = [{"adapt": {"source": str(tmp_path / "adapters")}}, "merge_adapters"]
    task = make.task(convert=said)
    task.check(make.data())  # without memory, as the command line does
    torch.manual_seed(0)
    model = task.converted(task.build())
    torch.manual_seed(0)
    plain = task.build()
    found, weights = model.state_dict(), plain.state_dict()
    assert found.keys() == weights.keys()
    for i in range(2):
        name = f"model.layers.{i}.self_attn.q_proj"
        first, second = (p.double().squeeze() for n, p in pairs.items() if n.startswith(f"{name}."))
        a, b = (first, second) if first.shape[0] == 2 else (second, first)
        expected = weights.pop(f"{name}.weight").double() + 6.0 / 2 * b @ a
        torch.testing.assert_close(found[f"{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def test_a_conversion_that_leaves_nothing_to_train_is_named(make):
    adapt = {"kind": "LoRA", "targets": "q_proj", "rank": 2}
    with pytest.raises(ValueError, match="fit: every parameter is frozen after merge_adapters"):
        make.trainer(max_steps=1).fit(make.task(convert=[{"adapt": adapt}, "merge_adapters"]), make.data())


def test_arguments_without_a_name_of_their_own_are_passed_on(monkeypatch):
    assert conversions.parse([{"merge_adapters": {"task": 3}}]) == [("merge_adapters", {"task": 3})]
    monkeypatch.setattr(zoo, "probe", lambda model, *others, size, **more: model, raising=False)
    monkeypatch.setattr(conversions, "CONVERSIONS", ("probe",))
    with pytest.raises(ValueError, match=r"probe needs size$"):
        conversions.parse([{"probe": {"colour": 1}}])


def test_frozen_experts_are_not_sent_with_every_step(make):
    task = make.task(convert=[{"quantise": {"format": "int8"}}])
    task.model = task.converted(task.build())
    names = set(task._ddp_params_and_buffers_to_ignore)  # which torch's DistributedDataParallel asks for
    buffers = {name for name, _ in task.named_buffers() if "_codes" in name or "_scales" in name}
    assert buffers
    assert names == buffers


def test_a_vision_model_is_converted(tmp_path):
    said = {"network": "vision/vit_tiny_patch16_224", "overrides": {"depth": 1, "embed_dim": 24}}
    said |= {"convert": [{"upcycle": {"num_experts": 2, "layers": "all"}}], "image_size": 32}
    data = ["--data.source=digits", "--data.image_size=32", "--data.channels=3", "--data.batch_size=8"]
    more = ["--trainer.limit_val_batches=1", "--trainer.val_check_interval=2"]
    assert run("vision", "fit", tmp_path, said, *data, *more, "--model.export", tmp_path / "out") == 0
    model = zoo.from_pretrained(tmp_path / "out")
    assert model.blocks[0].mlp.experts.num_experts == 2


def test_a_conversion_that_looks_at_data_gets_the_losses_of_training_batches(make, monkeypatch):
    seen = []

    def probe(model, *, calibrate=None, scale=1.0):
        assert not next(model.parameters()).is_meta
        for loss in calibrate(model):
            assert not model.training
            (gradient,) = torch.autograd.grad(loss, [model.get_input_embeddings().weight])
            seen.append((float(loss), float(gradient.norm())))
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(scale)
        return model

    monkeypatch.setattr(zoo, "probe", probe, raising=False)
    monkeypatch.setattr(conversions, "CONVERSIONS", ("upcycle", "probe"))
    task = make.task(convert=[{"probe": {"calibrate": 3}}, {"probe": {"scale": 0.0, "calibrate": 1}}])
    data = make.data(batch_size=2)
    make.trainer(max_steps=1).fit(task, data)
    assert len(seen) == 4
    assert all(norm > 0 for _, norm in seen)
    # The second conversion sees the first batch again, through what the first one gave.
    assert seen[3] == pytest.approx(seen[0])
    assert len({loss for loss, _ in seen[:3]}) == 3


def test_the_loss_of_a_language_batch_is_that_of_its_targets(make):
    task, data = make.task(), make.data(batch_size=2)
    task.model = task.build()
    data.prepare_data()
    batch = next(iter(data.train_dataloader()))
    total = count = 0
    for row in range(len(batch["labels"])):  # a row at a time, so that rows weigh by their targets
        nats = task.nats({name: value[row : row + 1] for name, value in batch.items()})
        total, count = total + nats.double().sum(), count + int((batch["labels"][row] >= 0).sum())
    torch.testing.assert_close(task.batch_loss(batch).double(), total / count, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        ([{"upcicle": {}}], "unknown conversion 'upcicle'; did you mean upcycle"),
        ([{"upcycle": {"num_expert": 2}}], "unknown argument of upcycle 'num_expert'; did you mean num_experts"),
        ([{"upcycle": {}, "split": {}}], "one conversion and its arguments"),
        ([{"upcycle": 3}], "upcycle: expected its arguments as a mapping, got 3"),
        ({"upcycle": {}}, "expected a list"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(convert, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LanguageTask(convert=convert)


def test_models_that_cannot_be_converted_are_refused():
    with pytest.raises(ValueError, match="made of experts already"):
        RecommendationTask(convert=[{"upcycle": {}}])
    with pytest.raises(ValueError, match="convert a module before"):
        VisionTask(torch.nn.Linear(1, 1), convert=[{"upcycle": {}}])


@pytest.mark.parametrize("prune", [{"drop_layers": 1}, {"keep": 2, "scope": "model"}, {"drop_blocks": 1}])
def test_what_data_decided_is_not_decided_again_for_a_checkpoint(prune, make, monkeypatch):
    convert, chosen = [{"prune": {**prune, "calibrate": 1}}], []
    # Other data would decide otherwise: it says in turn that one or the other layer does least.
    measured = {"layer_similarity": "model.layers.{}.mlp", "block_similarity": "model.layers.{}"}
    for name, layer in measured.items():
        similar = lambda *args, layer=layer: {layer.format(i): float(i == len(chosen) % 2) for i in range(2)}  # noqa: E731
        monkeypatch.setattr(f"zoo.convert.pruning.{name}", similar)
    task, data, trainer = make.task(convert=convert), make.data(batch_size=2), make.trainer(max_steps=1)
    trainer.fit(task, data)
    path = trainer.default_root_dir + "/kept.ckpt"
    trainer.save_checkpoint(path)
    chosen.append(1)
    torch.manual_seed(1)  # and other weights, which other experts suit
    again = make.task(convert=convert)
    make.trainer(max_steps=2).fit(again, make.data(batch_size=2), ckpt_path=path)
    assert again.global_step == 2
    shapes = [{name: tensor.shape for name, tensor in one.model.state_dict().items()} for one in (again, task)]
    assert shapes[0] == shapes[1]
    for one in (make.task(convert=convert), make.task(convert=convert)):
        make.trainer().validate(one, make.data(batch_size=2), ckpt_path=path)
        state = torch.load(path, weights_only=False)["state_dict"]
        assert all(torch.equal(value, state[f"model.{name}"]) for name, value in one.model.state_dict().items())
    rebuilt = task.rebuilt(task.model.state_dict())
    assert all(torch.equal(value, rebuilt.state_dict()[name]) for name, value in task.model.state_dict().items())
