"""Switch Transformers against transformers' own: read, run, trained and written."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import zoo
from zoo.moe import MoE
from zoo.pretrained import switch

SIZES = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 4}
SPARSE = {"num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "num_experts": 4}
SPARSE["decoder_start_token_id"] = 0


def theirs(**fields) -> SwitchTransformersForConditionalGeneration:
    torch.manual_seed(0)
    config = SwitchTransformersConfig(**{**SIZES, **SPARSE, "dropout_rate": 0.0, **fields})
    model = SwitchTransformersForConditionalGeneration(config).eval()
    for name, p in model.named_parameters():
        if "experts" in name or "classifier" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(2, 64, (3, 17)), "labels": torch.randint(2, 64, (3, 9))}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("fields", [{}, {"expert_capacity": 3}, {"router_bias": True, "dense_act_fn": "gelu"}], ids=str)
def test_outputs_generation_and_gradients_are_those_of_transformers(fields, tmp_path):
    if fields.get("expert_capacity") and tuple(map(int, version("transformers").split(".")[:2])) < (5, 23):
        pytest.skip("transformers counts places over the whole batch there, not in each sequence")
    expected, inputs = theirs(**fields), batch()
    expected.save_pretrained(tmp_path)
    ours = zoo.from_pretrained(tmp_path)
    assert sum(isinstance(module, MoE) for module in ours.modules()) == 4
    a, b = ours(**inputs), expected(**inputs)
    assert error(a.logits, b.logits) < 1e-5
    with zoo.moe.record(ours) as step:
        ours(**inputs)
    dropped = [17 * 3 - len(calls[0].token_index) for calls in step.routings.values()][:2]
    assert all(dropped) == (fields.get("expert_capacity") == 3)
    options = {"max_new_tokens": 6, "do_sample": False}
    generated = ours.generate(inputs["input_ids"], **options)
    assert torch.equal(generated, expected.generate(inputs["input_ids"], **options))
    for loss in (a.loss, b.loss):
        loss.backward()
    grads = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    for name, grad in switch.tensors_of_transformers(mine):
        other = grads.pop(name, None)  # none of an expert that no token came to
        assert error(grad, other) < 1e-4 if other is not None and other.any() else not grad.any(), name
    assert not grads


def test_what_was_read_is_written_again_and_more_than_once(tmp_path):
    theirs().save_pretrained(tmp_path / "a")
    ours = zoo.from_pretrained(tmp_path / "a", losses={"switch": 0.01, "z": 0.001})
    for _ in range(2):
        ours.save_pretrained(tmp_path / "b", max_shard_size="50KB")  # transformers' method, our layout
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[key]) for key, t in before.items())
    inputs = batch()
    with zoo.moe.record(ours.train()) as step:
        loss = ours(**inputs).loss
    (loss + sum(step.losses().values())).backward()
    assert len(step.losses()) == 2
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    zoo.save_pretrained(ours, tmp_path / "c")
    again = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "c")
    assert error(ours.eval()(**inputs).logits, again(**inputs).logits) < 1e-5
    assert torch.equal(copy.deepcopy(ours)(**inputs).logits, ours(**inputs).logits)


def test_another_capacity_or_gate_takes_over_the_weights(tmp_path):
    theirs(expert_capacity=2).save_pretrained(tmp_path / "a")
    free = zoo.from_pretrained(tmp_path / "a", capacity=float("inf"))
    inputs = batch()
    with zoo.moe.record(free) as step:
        free(**inputs)
    assert {len(calls[0].token_index) for calls in step.routings.values()} == {3 * 17, 3 * 9}
    both = zoo.from_pretrained(tmp_path / "a", router={"name": "TopKRouter", "k": 2})
    weights = [[m.router.weight for m in model.modules() if isinstance(m, MoE)] for model in (free, both)]
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    with pytest.raises(
        ValueError, match=r"mlp.router: k=2 cannot be expressed in switch_transformers; its configuration means 1"
    ):
        zoo.save_pretrained(both, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("freeze", [True, False])
def test_grown_and_shared_models_are_written_as_transformers_reads_them(freeze, tmp_path):
    theirs().save_pretrained(tmp_path / "a")
    ours, inputs = zoo.from_pretrained(tmp_path / "a"), batch()
    shared = zoo.share_depth(ours)
    assert (
        shared.encoder.block[3].layer[0].SelfAttention.q.weight
        is shared.encoder.block[0].layer[0].SelfAttention.q.weight
    )
    for name, made in {
        "grown": zoo.grow(ours, num_new=2, init="random", freeze_old=freeze),
        "shared": shared,
        "both": zoo.grow(shared, num_new=1, freeze_old=freeze, noise=0.5),
    }.items():
        zoo.save_pretrained(made, tmp_path / name)
        plain = SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / name)
        number = {"grown": 6, "shared": 4, "both": 5}[name]
        assert {c.num_experts for c in (made.config, made.encoder.config, made.decoder.config)} == {number}
        assert error(plain(**inputs).logits, made(**inputs).logits) < 1e-5


def test_what_is_not_supported_is_said(tmp_path):
    theirs().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="switch_transformers cannot be read in parts"):
        zoo.from_pretrained(tmp_path, mesh=object())
    model = zoo.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expert_0\.wi\.weight and 0 more are named as switch_transformers"):
        model.load_state_dict(
            {"encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight": torch.zeros(48, 32)}, strict=False
        )
    assert zoo.from_pretrained(tmp_path, dtype="bfloat16").dtype == torch.bfloat16
