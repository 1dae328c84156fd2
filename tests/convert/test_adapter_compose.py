"""Trained LoRAs as experts, ours and peft's."""

from __future__ import annotations

import json

import pytest
import torch
from adapted_models import batch, language, stir
from safetensors.torch import save_file
from torch.nn import functional as F

import zoo
from zoo.convert import compose_adapters
from zoo.moe import AdaptedLinear, record


def peft_folder(folder, model, names, r, alpha, **config):
    """A LoRA as peft writes it; returns what it adds to each layer's weight."""
    tensors, added = {}, {}
    for name in names:
        out, inputs = model.get_submodule(name).weight.shape
        a, b = torch.randn(r, inputs), torch.randn(out, r)
        key = f"base_model.model.{name}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        added[name] = alpha / (r**0.5 if config.get("use_rslora") else r) * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return added


def test_each_source_is_an_expert_of_its_own_rank(tmp_path):
    base = language()
    query, up = "model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"
    first = peft_folder(tmp_path / "first", base, [query], 3, 6.0)
    second = peft_folder(tmp_path / "second", base, [query, up], 5, 4.0, use_rslora=True)
    ours = stir(zoo.adapt(base, "LoRA", targets="q_proj", rank=2, alpha=3.0, layers=[0]))
    zoo.save_pretrained(ours, tmp_path / "third")
    lora = ours.get_submodule(query).lora
    third = {query: 3.0 / 2 * lora.b[0] @ lora.a[0]}
    made = compose_adapters(base, [tmp_path / "first", tmp_path / "second", tmp_path / "third"])
    assert {n for n, m in made.named_modules() if isinstance(m, AdaptedLinear)} == {query, up}
    assert {n for n, p in made.named_parameters() if p.requires_grad} == {
        f"{query}.router.weight",
        f"{up}.router.weight",
    }
    for name in (query, up):
        layer, x = made.get_submodule(name), torch.randn(6, 32)
        gate = (x @ layer.router.weight.T).softmax(-1)
        kept, index = gate.topk(2)
        gate = torch.zeros_like(gate).scatter(1, index, kept / kept.sum(-1, keepdim=True))
        expected = base.get_submodule(name)(x)
        for e, source in enumerate((first, second, third)):
            if name in source:
                expected = expected + gate[:, e : e + 1] * F.linear(x, source[name])
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    zoo.save_pretrained(made, tmp_path / "composed")
    again, (tokens, mask) = zoo.from_pretrained(tmp_path / "composed", base=base), batch()
    assert torch.equal(again(tokens, attention_mask=mask).logits, made(tokens, attention_mask=mask).logits)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in made.parameters()]


def test_mole_weighs_loras_by_what_they_make_of_a_token(tmp_path):
    base, (tokens, mask) = language(), batch()
    query, down = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    added = [
        peft_folder(tmp_path / "first", base, [query, down], 3, 6.0),
        peft_folder(tmp_path / "second", base, [query], 2, 4.0),
    ]
    made = compose_adapters(base, [tmp_path / "first", tmp_path / "second"], "MoLE", share=True).train()
    gates = {f"{name}.router.{part}" for name in (query, down) for part in ("weight", "log_temperature")}
    assert {n for n, p in made.named_parameters() if p.requires_grad} == gates
    layer, x = made.get_submodule(down), torch.randn(6, 48)
    outs = torch.stack([F.linear(x, added[0][down]), torch.zeros(6, 32)], 1)  # the second has nothing there
    gate = (F.layer_norm(outs.flatten(1), (64,)) @ layer.router.weight.T).softmax(-1)
    expected = base.get_submodule(down)(x) + torch.einsum("te,teo->to", gate, outs)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    with record(made) as step:
        loss = made(tokens, attention_mask=mask, labels=tokens).loss + sum(step.losses().values())
    assert step.losses().keys() == {"gating_balance"}
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in made.named_parameters() if n in gates)
    zoo.save_pretrained(made, tmp_path / "composed")
    again, made = zoo.from_pretrained(tmp_path / "composed", base=base), made.eval()
    assert torch.equal(again(tokens, attention_mask=mask).logits, made(tokens, attention_mask=mask).logits)
    with pytest.raises(ValueError, match=r"the gate of .*down_proj, a MoLERouter, weighs 2 experts by the token"):
        zoo.merge_adapters(made)
    one = compose_adapters(base, [tmp_path / "first"], "MoLE")
    merged = zoo.merge_adapters(one)
    torch.testing.assert_close(merged(tokens).logits, one(tokens).logits, rtol=1e-4, atol=1e-4)


def test_parts_of_a_fused_projection_are_put_together(tmp_path):
    base, (tokens, mask) = language("phi3 (fused)"), batch()
    loras = [stir(zoo.adapt(base, "LoRA"), 0.1) for _ in range(2)]
    for i, lora in enumerate(loras):
        zoo.save_pretrained(lora, tmp_path / str(i))
    made = compose_adapters(base, [tmp_path / "0", tmp_path / "1"], router={"k": 1})
    for module in made.modules():
        if isinstance(module, AdaptedLinear):
            torch.nn.init.zeros_(module.router.weight)  # of equal logits the first expert has it
    found, expected = (m(tokens, attention_mask=mask).logits[mask.bool()] for m in (made, loras[0]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_other_folders_are_refused(tmp_path):
    base, query = language(), "model.layers.0.self_attn.q_proj"
    zoo.save_pretrained(zoo.adapt(base, "MoLA"), tmp_path / "mola")
    peft_folder(tmp_path / "dora", base, [query], 2, 2.0, use_dora=True)
    peft_folder(tmp_path / "ia3", base, [query], 2, 2.0, peft_type="IA3")
    peft_folder(tmp_path / "other", language(num_hidden_layers=5), ["model.layers.4.self_attn.q_proj"], 2, 2.0)
    cases = {
        "mola": "holds MoLA, expected one LoRA",
        "dora": "use_dora=True is not supported",
        "ia3": "expected peft_type LORA",
        "other": r"model.layers.4.self_attn.q_proj is no layer of LlamaForCausalLM",
        "none": "has neither adapter_config.json nor adapters of ours",
    }
    for folder, message in cases.items():
        with pytest.raises(ValueError, match=message):
            compose_adapters(base, [tmp_path / folder])
    with pytest.raises(ValueError, match="unknown kind of compose_adapters 'LoRA'; did you mean MeteoRA"):
        compose_adapters(base, [tmp_path / "dora"], "LoRA")
    with pytest.raises(ValueError, match="at least one folder"):
        compose_adapters(base, [])
