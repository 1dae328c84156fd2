"""Vision-language checkpoints written by transformers, read onto our layers and written back."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from seen import IMAGE, batch
from torch import nn
from transformers import AutoModelForImageTextToText

import zoo
from zoo.models.image_text import MODELS, configuration
from zoo.moe import IsolatedMoE, MoE
from zoo.pretrained.context import decoder_of
from zoo.pretrained.image_text import class_of

NAMES = sorted(name for name in MODELS if name.endswith("_tiny") and name != "moe_llava_tiny")
WITH_LOSS = ("qwen3_vl_moe_tiny", "ernie4_5_vl_tiny")
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def family(name: str) -> str:
    return MODELS[name][0]


def theirs(name: str) -> nn.Module:
    """transformers' own model, with weights large enough that every expert counts."""
    model = class_of(family(name))._from_config(configuration(name)).eval()
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "correction_bias" in key:
            tensor.data.normal_(std=0.3)
        elif isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
            tensor.data.normal_(std=0.2)
    return model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder a model."""
    folders = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        folders[name] = tmp_path_factory.mktemp(name)
        theirs(name).save_pretrained(folders[name])
    return folders


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def tensors(folder) -> dict[str, torch.Tensor]:
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def moes(model: nn.Module) -> list[MoE]:
    return [m for m in model.modules() if isinstance(m, MoE)]


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_generation_are_those_of_transformers(checkpoints, name):
    expected = AutoModelForImageTextToText.from_pretrained(checkpoints[name])
    ours = zoo.from_pretrained(checkpoints[name])
    assert type(ours) is type(expected)
    assert moes(ours)
    assert not any(hasattr(layer, "gate") for layer in decoder_of(ours).modules())
    inputs = batch(family(name), padding=2)
    with torch.no_grad():
        a, b = (model(**inputs).logits for model in (ours, expected))
    real = inputs["attention_mask"].bool()
    assert error(a[real], b[real]) < 1e-5
    assert torch.equal(ours.generate(**inputs, **GENERATE), expected.generate(**inputs, **GENERATE))
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].clamp(max=IMAGE - 1)
    assert error(ours(**text).logits[real], expected(**text).logits[real]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_saving_writes_the_same_tensors_that_were_read(checkpoints, name, tmp_path):
    zoo.save_pretrained(zoo.from_pretrained(checkpoints[name]), tmp_path / "saved", max_shard_size="200KB")
    before, after = tensors(checkpoints[name]), tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = AutoModelForImageTextToText.from_pretrained(checkpoints[name]).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers(checkpoints, name):
    expected = AutoModelForImageTextToText.from_pretrained(checkpoints[name])
    ours = zoo.from_pretrained(checkpoints[name])
    inputs = batch(family(name))
    for model in (expected.train(), ours.train()):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = dict(expected.named_parameters())
    gate = decoder_of(ours).layers[-1]
    moe = next(m for m in gate.modules() if isinstance(m, MoE))
    where = next(key for key, module in ours.named_modules() if module is moe)
    where = where.replace("parts.0", "text_moe").removesuffix(".experts")  # which are Gemma 4's layer's own
    gates = ("gate", "router", "proj") if name == "gemma4_tiny" else ("gate", "router")
    theirs_gate = next(
        p for key, p in grads.items() if key.startswith(f"{where}.") and key.split(".")[-2] in gates and p.dim() > 1
    )
    assert error(moe.router.weight.grad, theirs_gate.grad) < 1e-4
    down, other = moe.experts.down_proj.grad, grads[f"{where}.experts.down_proj"].grad
    assert error(down, other if other.shape == down.shape else other.transpose(1, 2)) < 1e-4
    embedding = ours.get_input_embeddings().weight.grad
    assert error(embedding, expected.get_input_embeddings().weight.grad) < 1e-4


@pytest.mark.parametrize("name", [*WITH_LOSS, "glm4v_moe_tiny"])
def test_transformers_own_auxiliary_loss_is_transformers(checkpoints, name):
    expected = AutoModelForImageTextToText.from_pretrained(checkpoints[name])
    ours = zoo.from_pretrained(checkpoints[name])
    inputs = batch(family(name), padding=2)
    a, b = (m(**inputs, labels=inputs["input_ids"], output_router_logits=True) for m in (ours, expected))
    torch.testing.assert_close(a.aux_loss, b.aux_loss)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-5)


MIXTRAL = {**MODELS["llava_mixtral_tiny"][1]["text_config"]}
QWEN2 = {**MIXTRAL, "model_type": "qwen2_moe", "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
PIXTRAL = {**MODELS["llava_mixtral_tiny"][1]["vision_config"], "model_type": "pixtral", "head_dim": 16}
TILES = {"image_grid_pinpoints": [[16, 16]], "vision_config": MODELS["llava_mixtral_tiny"][1]["vision_config"]}
# How many tokens an image takes: LLaVA-NeXT's whole and one tile, with a line break after each of its rows.
WRAPPERS = {
    "llava_next": ({"text_config": QWEN2, **TILES}, 16 + 4 * 5, (2, 2, 3, 16, 16)),
    "mistral3": ({"text_config": MIXTRAL, "vision_config": PIXTRAL, "spatial_merge_size": 2}, 4, (2, 3, 16, 16)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_any_wrapper_takes_any_language_model_of_ours(wrapper, tmp_path):
    fields, tokens, shape = WRAPPERS[wrapper]
    torch.manual_seed(0)
    found = class_of(wrapper)
    expected = found._from_config(found.config_class(image_token_index=IMAGE, **fields)).eval()
    for parameter in expected.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    expected.save_pretrained(tmp_path / "a")
    ours = zoo.from_pretrained(tmp_path / "a", losses={"switch": 0.01})
    ids = torch.cat([torch.randint(0, 240, (2, 3)), torch.full((2, tokens), IMAGE), torch.randint(0, 240, (2, 3))], 1)
    sizes = torch.tensor([[16, 16]] * 2)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(shape), "image_sizes": sizes}
    assert error(ours(**inputs).logits, expected(**inputs).logits) < 1e-5
    assert torch.equal(ours.generate(**inputs, **GENERATE), expected.generate(**inputs, **GENERATE))
    with zoo.moe.record(ours.train()) as step:
        ours(**inputs)
    step.losses()["switch"].backward()
    assert all(moe.router.weight.grad.abs().max() > 0 for moe in moes(ours))
    zoo.save_pretrained(ours, tmp_path / "b")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_our_loss_is_the_familys_own_where_there_is_one_layer(tmp_path):
    """transformers averages over the layers inside the product, we over each: with one layer they are the same."""
    torch.manual_seed(0)
    fields = {"text_config": {"num_hidden_layers": 1}}
    model = class_of("qwen3_vl_moe")._from_config(configuration("qwen3_vl_moe_tiny", **fields)).train()
    model.save_pretrained(tmp_path)
    inputs = batch("qwen3_vl_moe", padding=3)
    expected = model(**inputs, output_router_logits=True).aux_loss
    ours = zoo.from_pretrained(tmp_path, losses={"transformers": 1.0}).train()
    with zoo.moe.record(ours) as step:
        ours(**inputs)
    torch.testing.assert_close(step.losses()["transformers"], expected)
    expected.backward()
    step.losses()["transformers"].backward()
    gate = model.model.language_model.layers[0].mlp.gate.weight.grad
    assert error(moes(ours)[0].router.weight.grad, gate) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_balance_loss_of_every_family_reaches_its_gates(checkpoints, name):
    model = zoo.from_pretrained(checkpoints[name], losses={"switch": 0.01}).train()
    inputs = batch(family(name), padding=2)
    with zoo.moe.record(model) as step:
        model(**inputs)
    loss = step.losses()["switch"]
    loss.backward()
    assert loss > 0
    assert all(moe.router.weight.grad.abs().max() > 0 for moe in moes(model))
    # Padding is not routed: each real token once, whichever part it belongs to.
    k = moes(model)[0].router.k
    layers = {key.split(".parts.")[0] for key in step.routings}
    sent = sum(len(routing.token_index) for calls in step.routings.values() for routing in calls)
    assert sent == len(layers) * k * int(inputs["attention_mask"].sum())


def test_a_wrapped_language_model_has_the_balance_loss_it_has_alone(checkpoints, tmp_path):
    """transformers' Llava drops its language model's router logits, and with them the loss."""
    name = "llava_mixtral_tiny"
    wrapped = zoo.from_pretrained(checkpoints[name], losses={"transformers": 0.1}).train()
    inputs = batch("llava", padding=2)
    seen: dict[str, torch.Tensor] = {}
    decoder = decoder_of(wrapped)
    hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with zoo.moe.record(wrapped) as step:
        wrapped(**inputs, labels=inputs["input_ids"])
    hook.remove()
    fields = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4}
    alone = zoo.create_model(
        "language/mixtral_tiny", vocab_size=256, max_position_embeddings=512, losses={"transformers": 0.1}, **fields
    ).train()
    alone.model.load_state_dict(decoder.state_dict())
    with zoo.moe.record(alone) as lonely:
        alone(inputs_embeds=seen["inputs_embeds"].detach(), attention_mask=inputs["attention_mask"])
    loss, expected = step.losses()["transformers"], lonely.losses()["transformers"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for ours, theirs_alone in zip(moes(wrapped), moes(alone)):
        assert ours.router.weight.grad.abs().max() > 0
        torch.testing.assert_close(ours.router.weight.grad, theirs_alone.router.weight.grad)


class Spy(zoo.moe.routers.TopKRouter):
    """Keeps what it was told."""

    def forward(self, x, **context):
        self.told = context
        return super().forward(x, **context)


@pytest.mark.parametrize("name", NAMES)
def test_gates_hear_which_tokens_were_seen(checkpoints, name):
    model = zoo.from_pretrained(checkpoints[name], router=Spy).train()
    inputs = batch(family(name), padding=2)
    model(**inputs)
    for moe in moes(model):
        told = moe.router.told
        modality = told["modality"].reshape(inputs["input_ids"].shape).bool()
        where = inputs.get("moe_mm_token_type_ids", inputs["input_ids"] == IMAGE).bool()
        assert torch.equal(modality & inputs["attention_mask"].bool(), where)
        assert torch.equal(told["token_ids"], inputs["input_ids"])
        assert told["causal"] is True
    model.generate(**inputs, **GENERATE)
    assert moes(model)[0].router.told["token_ids"].shape == (2, 1)


def test_a_domain_given_by_the_caller_reaches_the_gates(checkpoints):
    model = zoo.from_pretrained(checkpoints["qwen3_vl_moe_tiny"], router="DomainRouter")
    with zoo.moe.record(model) as step:
        model(**batch("qwen3_vl_moe"), moe_context={"domain": torch.tensor([5, 2])})
    for (routing,) in step.routings.values():
        assert routing.dense().argmax(-1).view(2, -1)[:, 0].tolist() == [5, 2]


@pytest.mark.parametrize("name", ["qwen3_vl_moe_tiny", "ernie4_5_vl_tiny", "llama4_tiny"])
def test_checkpointing_gives_the_same_gradients(checkpoints, name):
    model = zoo.from_pretrained(checkpoints[name], losses={"switch": 1.0}, capacity=1.0).train()
    inputs, found = batch(family(name), padding=2), []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable() if hasattr(
                model, "activation_checkpointing_enable"
            ) else model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with zoo.moe.record(model) as step:
            loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        (loss + step.losses()["switch"]).backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], msg=key)


def test_copies_are_whole(checkpoints, tmp_path):
    model = zoo.from_pretrained(checkpoints["ernie4_5_vl_tiny"])
    inputs = batch("ernie4_5_vl_moe")
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**inputs).logits, expected)
    other.save_pretrained(tmp_path / "x")
    assert tensors(tmp_path / "x").keys() == tensors(checkpoints["ernie4_5_vl_tiny"]).keys()


def test_the_dtype_is_the_checkpoints_unless_given(tmp_path):
    dense = theirs("glm4v_moe_tiny").to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    model = zoo.from_pretrained(tmp_path)
    kept = {p.dtype for p in type(dense).from_pretrained(tmp_path, dtype="auto").parameters()}
    assert {p.dtype for p in model.parameters()} == kept  # newer transformers reads gates in float32
    assert torch.bfloat16 in kept
    assert moes(model)[0].router.selection_bias.dtype == torch.float32
    assert {p.dtype for p in zoo.from_pretrained(tmp_path, dtype="float32").parameters()} == {torch.float32}
    assert all(p.is_meta for p in zoo.from_pretrained(tmp_path, device="meta").parameters())


def test_a_dense_model_is_transformers_own(tmp_path):
    fields = {"text_config": {"model_type": "llama", "intermediate_size": 96}}
    dense = class_of("llava")._from_config(configuration("llava_mixtral_tiny", **fields)).eval()
    dense.save_pretrained(tmp_path / "a")
    ours, inputs = zoo.from_pretrained(tmp_path / "a"), batch("llava")
    torch.testing.assert_close(ours(**inputs).logits, dense(**inputs).logits)
    zoo.save_pretrained(ours, tmp_path / "b")
    assert all(torch.equal(t, tensors(tmp_path / "b")[key]) for key, t in tensors(tmp_path / "a").items())
    with pytest.raises(ValueError, match="llama: router, losses and capacity are for sparse blocks"):
        zoo.from_pretrained(tmp_path / "a", losses={"switch": 0.01})


@pytest.fixture
def broken(checkpoints, tmp_path):
    shutil.copytree(checkpoints["qwen3_vl_moe_tiny"], tmp_path / "broken")
    return tmp_path / "broken"


def raises(folder, error_type, *parts):
    with pytest.raises(error_type) as caught:
        zoo.from_pretrained(folder)
    for part in (folder, *parts):
        assert str(part) in str(caught.value)


def change(folder, edit) -> None:
    held = load_file(folder / "model.safetensors")
    edit(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "model.language_model.layers.1.mlp.experts.down_proj"


def test_what_is_wrong_with_a_checkpoint_is_named(broken):
    change(broken, lambda held: held.update(odd=torch.ones(2)))
    raises(broken, ValueError, "odd", "unknown to qwen3_vl_moe")
    change(broken, lambda held: held.pop("odd"))
    change(broken, lambda held: held.update({"lm_head.weight": torch.ones(3, 64)}))
    raises(broken, ValueError, "lm_head.weight", "[3, 64], expected [256, 64]")
    change(broken, lambda held: held.pop("lm_head.weight"))
    raises(broken, ValueError, "lm_head.weight", "missing")
    (broken / "model.safetensors").write_bytes(b"PK" * 40)
    raises(broken, ValueError, "not a safetensors file")
    (broken / "model.safetensors").unlink()
    raises(broken, FileNotFoundError, "no weights")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    raises(broken, ValueError, "quant_method='hqq'")
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl_mo"}))
    raises(broken, ValueError, "vision-language family", "'qwen3_vl_mo'; did you mean qwen3_vl")


def test_a_gate_that_the_layout_cannot_express_is_not_saved(checkpoints, tmp_path):
    model = zoo.from_pretrained(checkpoints["llama4_tiny"], router={"name": "TopKRouter", "k": 2})
    with pytest.raises(ValueError, match=r"k=2 cannot be expressed in the Llama4 layout"):
        zoo.save_pretrained(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llava_mixtral_tiny", "qwen3_vl_moe_tiny"])
def test_image_tokens_that_do_not_match_the_images_are_an_error(checkpoints, name):
    model = zoo.from_pretrained(checkpoints[name])
    inputs = batch(family(name))
    inputs["input_ids"][0, 4] = 7
    with pytest.raises(Exception, match="mage features and image tokens do not match"):
        model(**inputs)


def test_isolated_experts_leave_each_other_alone(checkpoints):
    model = zoo.from_pretrained(checkpoints["ernie4_5_vl_tiny"]).train()
    isolated = [m for m in model.modules() if isinstance(m, IsolatedMoE)]
    text = {key: batch("ernie4_5_vl_moe")[key].clamp(max=240) for key in ("input_ids", "attention_mask")}
    model(**text).logits.sum().backward()
    assert all(m.parts[0].experts.down_proj.grad.abs().max() > 0 for m in isolated)
    assert all(p.grad is None or not p.grad.any() for m in isolated for p in m.parts[1].parameters())
