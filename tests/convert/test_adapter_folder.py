"""Adapters as folders, and merged into the weights they stand beside."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from adapted_models import GATES, LABELS, OWN, batch, language, stir, vision
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.convert.adapting import adapter_state, base_of
from zoo.moe import AdaMix, LoRALinear
from zoo.moe.routers import DenseRouter


def outputs(model, tokens, mask, kind=None, **more):
    with torch.no_grad():
        torch.manual_seed(0)
        context = {"moe_context": LABELS} if kind in GATES else {}
        return model(tokens, attention_mask=mask, **context, **more).logits[mask.bool()]


@pytest.mark.parametrize("kind", [*OWN, "UniPELT"])
def test_a_folder_holds_the_adapters_alone_and_gives_them_back_exactly(kind, tmp_path):
    base, (tokens, mask) = language(), batch()
    made = stir(zoo.adapt(base, kind, router=GATES.get(kind)))
    zoo.save_pretrained(made, tmp_path / "adapters")
    assert {p.name for p in (tmp_path / "adapters").iterdir()} == {"adapters.json", "adapters.safetensors"}
    stored = load_file(tmp_path / "adapters" / "adapters.safetensors")
    assert stored.keys() == adapter_state(made).keys()
    before = copy.deepcopy(base.state_dict())
    for again in (
        zoo.from_pretrained(tmp_path / "adapters", base=base),
        zoo.adapt(base, source=tmp_path / "adapters"),
    ):
        assert all(torch.equal(t, again.state_dict()[n]) for n, t in made.state_dict().items())
        assert torch.equal(outputs(again, tokens, mask, kind), outputs(made, tokens, mask, kind))
        assert {n for n, p in again.named_parameters() if p.requires_grad} == {
            n for n, p in made.named_parameters() if p.requires_grad
        }
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())
    # The same bytes again, and over themselves.
    zoo.save_pretrained(again, tmp_path / "adapters", overwrite=True)
    assert all(torch.equal(t, stored[n]) for n, t in load_file(tmp_path / "adapters" / "adapters.safetensors").items())


def test_stacked_experts_are_read_in_the_order_they_were_written(tmp_path):
    """What is read is held against each expert's own product, as unstacked when it was written."""
    base, x = language(), torch.randn(5, 32)
    made = stir(zoo.adapt(base, "LoRAMoE", num_experts=5, rank=3, alpha=7.0))
    zoo.save_pretrained(made, tmp_path / "adapters")
    stored = load_file(tmp_path / "adapters" / "adapters.safetensors")
    again = zoo.from_pretrained(tmp_path / "adapters", base=base)
    for at, layer in enumerate(again.model.layers):
        for name in ("gate_proj", "up_proj"):
            key, linear = f"model.layers.{at}.mlp.{name}", getattr(base.model.layers[at].mlp, name)
            gate = F.softmax(x @ stored[f"{key}.router.weight"].T, dim=-1)
            expected = linear(x)
            for e in range(5):
                a, b = stored[f"{key}.lora.a"][e], stored[f"{key}.lora.b"][e]
                expected = expected + gate[:, e : e + 1] * F.linear(x, 7.0 / 3 * b @ a)
            torch.testing.assert_close(getattr(layer.mlp, name)(x), expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_and_all_arguments_are_kept(tmp_path):
    base, (tokens, mask) = language(), batch()
    made = zoo.adapt(
        base, "MoLA", num_experts=(1, 3), targets=["q_proj"], layers="every-2", dropout=0.1, dtype="float64"
    )
    made = stir(zoo.adapt(made, "AdaMix", shared="up", layers=[0]))
    gate = {"name": "TopKRouter", "k": 3, "capacity": {"factor": 2.0}, "losses": {"z": 0.5}}
    made = stir(zoo.adapt(made, "MixLoRA", router=gate, num_experts=4, layers=[-1], targets=("up",)))
    zoo.save_pretrained(made, tmp_path / "adapters")
    again = zoo.from_pretrained(tmp_path / "adapters", base=base)
    assert torch.equal(outputs(again, tokens, mask), outputs(made, tokens, mask))
    assert str(again) == str(made)


def test_a_base_that_was_read_from_a_folder_is_found_again(tmp_path):
    (tokens, mask), base = batch(), language()
    base.save_pretrained(tmp_path / "base")
    base = zoo.from_pretrained(tmp_path / "base")
    made = stir(zoo.adapt(base, "MoELoRA"))
    made.save_pretrained(tmp_path / "adapters")  # as transformers' Trainer does
    again = zoo.from_pretrained(tmp_path / "adapters")
    assert torch.equal(outputs(again, tokens, mask), outputs(made, tokens, mask))
    half = zoo.from_pretrained(tmp_path / "adapters", base=tmp_path / "base", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(FileExistsError, match="holds a model; adapters need a folder of their own"):
        zoo.save_pretrained(made, tmp_path / "base", overwrite=True)
    zoo.save_pretrained(zoo.adapt(language(), "LoRA"), tmp_path / "other")
    with pytest.raises(ValueError, match="was read from nowhere; give base"):
        zoo.from_pretrained(tmp_path / "other")


def test_vision_and_sparse_models_have_folders_too(tmp_path):
    base, images = vision(), torch.randn(2, 3, 32, 32)
    made = stir(zoo.adapt(base, "MixLoRA"))
    zoo.save_pretrained(made, tmp_path / "vision")
    with torch.no_grad():
        assert torch.equal(zoo.from_pretrained(tmp_path / "vision", base=base)(images), made(images))
    sparse = zoo.upcycle(language(), num_experts=2)
    made, (tokens, mask) = stir(zoo.adapt(sparse, "MoELoRA")), batch()
    zoo.save_pretrained(made, tmp_path / "sparse")
    again = zoo.from_pretrained(tmp_path / "sparse", base=sparse)
    assert torch.equal(outputs(again, tokens, mask), outputs(made, tokens, mask))


def test_a_head_that_is_trained_too_is_in_the_folder(tmp_path):
    base, images = vision(), torch.randn(2, 3, 32, 32)
    made = zoo.adapt(base, "MoELoRA")
    made.head.requires_grad_(True)
    made.blocks[1].attn.qkv.base.base.bias.requires_grad_(True)
    zoo.save_pretrained(stir(made), tmp_path / "adapters")
    assert len(load_file(tmp_path / "adapters" / "adapters.safetensors")) == len(adapter_state(made)) + 3
    before = copy.deepcopy(base.state_dict())
    again = zoo.from_pretrained(tmp_path / "adapters", base=base)
    with torch.no_grad():
        assert torch.equal(again(images), made(images))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in made.parameters()]
    assert all(torch.equal(before[n], t) for n, t in base.state_dict().items())


def test_running_statistics_are_in_the_folder(tmp_path):
    base, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), torch.randn(8, 4)
    made = zoo.adapt(base.eval(), "LoRA", targets="0").train()
    made(x)
    zoo.save_pretrained(made.eval(), tmp_path / "adapters")
    again = zoo.from_pretrained(tmp_path / "adapters", base=base)
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
        assert not torch.equal(again(x), base(x))


def test_another_base_and_damaged_files_are_named(tmp_path):
    base, folder = language(), tmp_path / "adapters"
    zoo.save_pretrained(zoo.adapt(base, "LoRA"), folder)
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[64, 32\], the model's has \[65, 32\]"):
        zoo.from_pretrained(folder, base=language(vocab_size=65))
    with pytest.raises(ValueError, match="one that has adapters"):
        zoo.from_pretrained(folder, base=zoo.adapt(base, "LoRA"))
    with pytest.warns(UserWarning, match="were trained beside other weights"):
        zoo.from_pretrained(folder, base=language())
    zoo.adapt(copy.deepcopy(base).bfloat16(), source=folder)  # the same weights, narrower: no warning
    tensors = load_file(folder / "adapters.safetensors")
    first, value = tensors.popitem()
    save_file(tensors, folder / "adapters.safetensors")
    with pytest.raises(ValueError, match=f"tensor {first} is missing"):
        zoo.from_pretrained(folder, base=base)
    save_file({**tensors, first: value[:, :1]}, folder / "adapters.safetensors")
    with pytest.raises(ValueError, match=f"tensor {first} has shape"):
        zoo.from_pretrained(folder, base=base)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapters.safetensors: no such file"):
        zoo.from_pretrained(folder, base=base)
    (folder / "adapters.json").write_text("{}")
    with pytest.raises(ValueError, match="expected an object with adapted, more and base"):
        zoo.from_pretrained(folder, base=base)
    with pytest.raises(ValueError, match="cannot be stored"):
        zoo.save_pretrained(
            zoo.adapt(base, "MoLA", router=lambda dim, num_experts: DenseRouter(dim, num_experts)),
            folder,
            overwrite=True,
        )


@pytest.mark.filterwarnings("error:.*trained beside other weights")
def test_on_the_meta_device_nothing_is_read(tmp_path):
    base = language()
    made = zoo.adapt(base, "MixLoRA")
    zoo.save_pretrained(made, tmp_path / "adapters")
    thin = zoo.adapt(copy.deepcopy(base).to("meta"), source=tmp_path / "adapters")
    assert {n: (t.shape, t.is_meta) for n, t in thin.state_dict().items()} == {
        n: (t.shape, True) for n, t in made.state_dict().items()
    }


def test_a_state_dict_goes_round():
    base, (tokens, mask) = language(), batch()
    made, other = (zoo.adapt(base, "MixLoRA") for _ in range(2))
    stir(made)
    other.load_state_dict(made.state_dict())
    assert torch.equal(outputs(other, tokens, mask), outputs(made, tokens, mask))


@pytest.mark.parametrize(
    ("kind", "options", "context"),
    [
        ("LoRA", {}, {}),
        ("LoRA", {"targets": ("query", "down")}, {}),
        ("MoLoRA", {"num_experts": 1}, {}),
        ("MoLA", {"num_experts": 1}, {}),
        ("MixLoRA", {"num_experts": 1}, {}),
        ("MoV", {"num_experts": 1}, {}),
        ("MOELoRA", {"router": {"num_tasks": 3}}, {"task": 2}),
        ("MoCLE", {"router": {"num_clusters": 3}}, {"cluster": 1}),
    ],
)
@pytest.mark.parametrize("name", ["llama", "phi3 (fused)", "gpt2 (transposed, fused)"])
def test_what_is_linear_merges_into_the_weights(kind, options, context, name):
    base, (tokens, mask) = language(name), batch()
    made = stir(zoo.adapt(base, kind, **options), std=0.1)
    merged = zoo.merge_adapters(made, **context)
    with torch.no_grad():
        found = merged(tokens, attention_mask=mask).logits[mask.bool()]
        expected = made(tokens, attention_mask=mask, moe_context=context).logits[mask.bool()]
        plain = base(tokens, attention_mask=mask).logits[mask.bool()]
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2 * scale
    assert not any(base_of(m) for m in merged.modules())
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_a_merged_model_is_saved_as_what_it_is(tmp_path):
    from transformers import AutoModelForCausalLM

    (tokens, mask), base = batch(), language()
    merged = zoo.merge_adapters(stir(zoo.adapt(base, "LoRA")))
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(plain, tokens, mask), outputs(merged, tokens, mask))


def test_adamix_becomes_the_mean_of_its_adapters(tmp_path):
    base, (tokens, mask) = language(), batch()
    made = stir(zoo.adapt(base, "AdaMix"))
    merged = zoo.merge_adapters(made)
    torch.testing.assert_close(outputs(merged, tokens, mask), outputs(made, tokens, mask))
    adapters = [m for m in merged.modules() if isinstance(m, AdaMix)]
    assert len(adapters) == 4
    assert all(m.down.shape[0] == m.up.shape[0] == 1 for m in adapters)
    zoo.save_pretrained(merged, tmp_path / "mean")
    again = zoo.from_pretrained(tmp_path / "mean", base=base)
    assert torch.equal(outputs(again, tokens, mask), outputs(merged, tokens, mask))
    assert json.loads((tmp_path / "mean" / "adapters.json").read_text())["adapted"][0]["num_experts"] == 1


def test_what_cannot_be_merged_is_named():
    base = language()
    cases = [
        (zoo.adapt(base, "MoLA"), r"down_proj, a TopKRouter, weighs 8 experts by the token"),
        (zoo.adapt(base, "MixLoRA", router="LabelRouter"), "needs label in the context"),
        (zoo.adapt(base, "LLaVA-MoLE"), "stands beside a whole MLP, which is no linear map"),
        (base, "merge_adapters: LlamaForCausalLM has no adapters"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            zoo.merge_adapters(model)
    with pytest.raises(ValueError, match="mixes MLPs, which is no linear map"):
        zoo.merge_adapters(zoo.adapt(base, "MixLoRA", router="LabelRouter"), label=1)
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    model = nn.Sequential(LoRALinear(quantised, zoo.moe.LoRAExperts(1, 4, 2)))
    with pytest.raises(ValueError, match=r"0 has quantised weights \(torch.uint8\)"):
        zoo.merge_adapters(model)


@pytest.mark.parametrize("name", ["vision/vit_tiny_patch16_224", "vision_language/limoe_tiny"])
def test_adapters_find_the_folder_of_any_model_that_they_stand_beside(name, tmp_path):
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 4}
    sizes |= {"img_size": 32} if name.startswith("vision/") else {"dense": True}
    zoo.save_pretrained(zoo.create_model(name, **sizes), tmp_path / "base")
    made = stir(zoo.adapt(zoo.from_pretrained(tmp_path / "base"), "MixLoRA", num_experts=2))
    zoo.save_pretrained(made, tmp_path / "adapters")
    again = zoo.from_pretrained(tmp_path / "adapters")
    assert made.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in made.state_dict().items())
