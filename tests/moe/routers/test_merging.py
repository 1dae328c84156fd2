"""Gates that merge experts' weights: SMEAR, Lory and MEO, and the Blend they hand on."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from zoo.moe import Blend, Experts, MoE, record, telemetry
from zoo.moe.routers import LoryRouter, MEORouter, SMEARRouter

DIM, EXPERTS, HIDDEN = 6, 4, 5


def layer(router: Any, bias: bool = True) -> MoE:
    moe = MoE(router, Experts(EXPERTS, DIM, HIDDEN, "relu", bias=bias)).double()
    for parameter in moe.parameters():
        parameter.data.normal_()
    return moe


def merged_expert(moe: MoE, weight: Tensor, x: Tensor) -> Tensor:
    """One token through the expert that has the weighted sum of all experts' weights and biases."""
    experts = moe.experts
    up = sum(weight[e] * experts.up_proj[e] for e in range(EXPERTS))  # type: ignore[index]
    up_bias = sum(weight[e] * experts.up_proj_bias[e] for e in range(EXPERTS))  # type: ignore[index]
    down = sum(weight[e] * experts.down_proj[e] for e in range(EXPERTS))
    down_bias = sum(weight[e] * experts.down_proj_bias[e] for e in range(EXPERTS))  # type: ignore[index]
    return down @ (up @ x + up_bias).relu() + down_bias  # type: ignore[operator]


def by_loop(moe: MoE, x: Tensor, weights: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack([merged_expert(moe, w, t) for w, t in zip(ws, ts)]) for ws, ts in zip(weights, x)])


def same_with_gradients(found: Tensor, expected: Tensor, variables: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), variables, allow_unused=True) for out in (found, expected))
    for a, b in zip(ours, theirs):
        if a is None or b is None:  # no gradient at all is a gradient of zero
            assert all(g is None or not g.any() for g in (a, b))
        else:
            torch.testing.assert_close(a, b)


def normalised(v: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = v - v.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * scale + shift


def smear_probs(router: SMEARRouter, tokens: Tensor) -> Tensor:
    pooled = normalised(tokens.mean(0), router.input_norm.weight, router.input_norm.bias)
    rows = [normalised(w, router.weight_norm.weight, router.weight_norm.bias) for w in router.weight]
    logits = torch.stack([pooled @ w for w in rows])
    return logits.exp() / logits.exp().sum()


def test_smear_runs_each_sequence_through_one_merged_expert() -> None:
    moe, x = layer(SMEARRouter(DIM, EXPERTS)), torch.randn(3, 7, DIM, dtype=torch.float64, requires_grad=True)
    weights = [[smear_probs(moe.router, sequence)] * 7 for sequence in x]  # type: ignore[arg-type]
    same_with_gradients(moe(x), by_loop(moe, x, weights), (x, *moe.parameters()))


def test_smear_starts_as_the_authors_code_does() -> None:
    router = SMEARRouter(300, 40)
    assert router.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert router.weight_norm.weight.unique().tolist() == pytest.approx([0.01])
    assert router.input_norm.weight.unique().tolist() == [1.0]
    assert not any(norm.bias.any() for norm in (router.weight_norm, router.input_norm))


def test_expert_dropout_zeroes_and_divides_by_the_rest_in_training_only() -> None:
    router, x = SMEARRouter(DIM, EXPERTS, dropout=0.4).double(), torch.randn(500, 3, DIM, dtype=torch.float64)
    kept = router(x).weight
    full = router.eval()(x).weight
    dropped = (kept < 1e-6) | (kept == kept[:, :1]).all(-1, keepdim=True)  # all of them: then all are equal
    assert dropped.double().mean().item() == pytest.approx(0.4, abs=0.05)
    expected = full * ~dropped + 1e-10
    torch.testing.assert_close(kept, expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("make", [SMEARRouter, MEORouter])
def test_a_gate_that_looks_ahead_warns_once_in_a_causal_model(make: Any) -> None:
    router, x = make(DIM, EXPERTS), torch.randn(2, 3, DIM)
    with pytest.warns(UserWarning, match="depends on later ones"):
        router(x, causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router(x, causal=True)


def lory_weights(router: LoryRouter, x: Tensor, segment: int) -> list[list[Tensor]]:
    out = []
    for sequence in x:
        probs = []
        for part in sequence.split(segment):
            logits = router.weight @ part.mean(0)
            probs.append(logits.exp() / logits.exp().sum())
        used = [probs[0].detach(), *probs[:-1]]
        out.append([used[t // segment] for t in range(len(sequence))])
    return out


@pytest.mark.parametrize("length", [12, 11, 4, 3])
def test_lory_merges_by_the_segment_before(length: int) -> None:
    moe = layer(LoryRouter(DIM, EXPERTS, segment=4))
    x = torch.randn(2, length, DIM, dtype=torch.float64, requires_grad=True)
    expected = by_loop(moe, x, lory_weights(moe.router, x, 4))  # type: ignore[arg-type]
    same_with_gradients(moe(x), expected, (x, *moe.parameters()))


def test_lory_is_causal_beyond_the_first_segment() -> None:
    moe, x = layer(LoryRouter(DIM, EXPERTS, segment=4)), torch.randn(1, 14, DIM, dtype=torch.float64)
    y = moe(x)
    for t in range(1, 14):
        changed = x.clone()
        changed[:, t:] = torch.randn(1, 14 - t, DIM, dtype=torch.float64)
        after = moe(changed)
        first = 0 if t >= 4 else 4  # inside the first segment later tokens do matter: the paper's own compromise
        torch.testing.assert_close(after[:, first:t], y[:, first:t])
    assert not torch.allclose(after, y)


def test_lory_leaves_padding_out_on_either_side() -> None:
    moe, real = layer(LoryRouter(DIM, EXPERTS, segment=4)), torch.randn(1, 8, DIM, dtype=torch.float64)
    y = moe(real)
    for before, after in ((0, 3), (4, 0), (8, 4)):
        x = torch.full((1, before + 8 + after, DIM), float("nan"), dtype=torch.float64)
        mask = torch.zeros(1, x.shape[1], dtype=torch.bool)
        x[:, before : before + 8], mask[:, before : before + 8] = real, True
        torch.testing.assert_close(moe(x, mask=mask)[:, before : before + 8], y)


def test_lory_decides_once_by_the_prompt_in_generation() -> None:
    moe, x = layer(LoryRouter(DIM, EXPERTS, segment=4)).eval(), torch.randn(2, 9, DIM, dtype=torch.float64)
    logits = x[:, :5].mean(1) @ moe.router.weight.T  # type: ignore[operator]
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = by_loop(moe, x, [[p] * 9 for p in probs])
    torch.testing.assert_close(moe(x, prompt=5), expected)
    with record(moe) as step:
        moe(x[:, :5], prompt=5)
    (blend,) = step.routings[""]
    for t in range(5, 9):  # one token at a time, as with a cache
        torch.testing.assert_close(moe(x[:, t : t + 1], weights=blend.weight), expected[:, t : t + 1])


def meo_gates(router: MEORouter, pooled: Tensor, noise: Tensor | None) -> Tensor:
    logits = pooled @ router.weight.T
    if noise is not None:
        logits = logits + noise * ((pooled @ router.noise_weight.T).exp().log1p() + 0.01)  # type: ignore[union-attr]
    out = torch.zeros_like(logits)
    for b, row in enumerate(logits):
        best = sorted(range(EXPERTS), key=lambda e: -row[e].item())[: router.k]
        out[b, best] = row[best].exp() / row[best].exp().sum()
    return out


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_meo_merges_the_chosen_experts_of_a_sequence(attention: bool, training: bool) -> None:
    moe = layer(MEORouter(DIM, EXPERTS, token_attention=attention)).train(training)
    router: Any = moe.router
    x = torch.randn(3, 5, DIM, dtype=torch.float64, requires_grad=True)
    tokens = x
    if attention:
        down, up = router.attention_down, router.attention_up
        tokens = x + (x @ down.weight.T + down.bias).relu() @ up.weight.T + up.bias
    torch.manual_seed(4)
    noise = torch.randn(3, EXPERTS, dtype=torch.float64) if training else None
    gates = meo_gates(router, tokens.mean(1), noise)
    torch.manual_seed(4)
    same_with_gradients(moe(x), by_loop(moe, tokens, [[g] * 5 for g in gates]), (x, *moe.parameters()))


def test_meos_losses_are_importance_and_load_with_the_unbiased_variance() -> None:
    router = MEORouter(DIM, EXPERTS, token_attention=False).double()
    router.weight.data.normal_()
    x = torch.randn(7, 3, DIM, dtype=torch.float64)
    torch.manual_seed(2)
    losses = router(x).losses
    torch.manual_seed(2)
    noise = torch.randn(7, EXPERTS, dtype=torch.float64)
    gates = meo_gates(router, x.mean(1), noise)
    mass = gates.sum(0)
    assert losses["importance"].item() == pytest.approx(0.01 * (mass.var() / mass.mean() ** 2).item(), rel=1e-6)
    clean = x.mean(1) @ router.weight.detach().T
    std = math.log(2) + 0.01  # softplus(0)
    noisy = clean + noise * std
    load = torch.zeros(EXPERTS, dtype=torch.float64)
    for b in range(7):
        ranked = noisy[b].sort(descending=True).values
        for e in range(EXPERTS):
            threshold = ranked[2] if noisy[b, e] > ranked[2] else ranked[1]
            load[e] += 0.5 * (1 + math.erf((clean[b, e] - threshold) / std / math.sqrt(2)))
    assert losses["load"].item() == pytest.approx(0.01 * (load.var() / load.mean() ** 2).item(), rel=1e-6)
    assert router.eval()(x).losses == {}


def test_meos_attention_starts_as_nothing_at_all() -> None:
    router = MEORouter(130, 4)
    assert router.attention_down.weight.shape == (2, 130)  # type: ignore[union-attr]
    assert not router.attention_up.weight.any()  # type: ignore[union-attr]
    assert not router(torch.randn(2, 3, 130)).added.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [SMEARRouter, LoryRouter, MEORouter])
def test_telemetry_of_merged_experts(make: Any) -> None:
    moe, mask = layer(make(DIM, EXPERTS)), torch.tensor([[True] * 5, [False] * 5, [True] * 3 + [False] * 2])
    with record(moe) as step:
        moe(torch.randn(3, 5, DIM, dtype=torch.float64), mask=mask)
    (blend,) = step.routings[""]
    assert isinstance(blend, Blend)
    dense = blend.dense()
    assert not dense[~mask.flatten()].any()
    torch.testing.assert_close(dense[mask.flatten()].sum(-1), torch.ones(8, dtype=torch.float64))
    assert telemetry.load(blend).tolist() == pytest.approx((dense.sum(0) / 8).tolist(), rel=1e-5)
    assert telemetry.max_violation(blend).item() == pytest.approx(4 * (dense.sum(0) / 8).max().item() - 1, abs=1e-5)
    met = 2 if make is MEORouter else EXPERTS
    assert telemetry.kept_per_token(blend).tolist() == (met * mask.flatten()).tolist()
    assert telemetry.drop_rate(blend).item() == 0
    rows = dense[mask.flatten()]
    expected = -sum(p * math.log(p) for row in rows.tolist() for p in row if p > 0) / 8
    assert telemetry.entropy(blend).item() == pytest.approx(expected, rel=1e-5)


def test_autocast_merges_in_full_and_computes_low() -> None:
    moe, x = MoE(SMEARRouter(DIM, EXPERTS), Experts(EXPERTS, DIM, HIDDEN)), torch.randn(3, 5, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - moe(x)).norm() < 0.03 * moe(x).norm()


def test_experts_in_parts_are_refused(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        layer = MoE(SMEARRouter(8, 4), Experts(4, 8, 6))
        fully_shard(layer.experts, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"gate_up_proj lies in parts on processes: .* merges = True"):
            layer(torch.randn(2, 3, 8))
    finally:
        dist.destroy_process_group()


def test_experts_that_are_not_stacked_are_refused() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)

    blend = SMEARRouter(DIM, EXPERTS)(torch.randn(2, 3, DIM))
    with pytest.raises(ValueError, match=re.escape("linear.weight of Loose has shape [6, 6], expected [4, ...]")):
        blend.apply(torch.randn(6, DIM), Loose())


@pytest.mark.parametrize("make", [SMEARRouter, LoryRouter, MEORouter])
def test_one_list_of_tokens_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"expected tokens as \[B, S, D\], got \[5, 6\]"):
        make(DIM, EXPERTS)(torch.randn(5, DIM))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SMEARRouter(3, 4, dropout=1.0), r"dropout must be in \[0, 1\)"),
        (lambda: LoryRouter(3, 4, segment=0), "segment must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
