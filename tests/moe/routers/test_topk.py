from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Capacity
from zoo.moe.routers import TopKRouter


def chosen_by_loop(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    group_topk: int = 1,
    group_score: int | str = "max",
) -> Tensor:
    """Combine weights [T, E], one token and one expert at a time."""
    tokens, num_experts = logits.shape
    out = torch.zeros(tokens, num_experts, dtype=logits.dtype)
    for t in range(tokens):
        row = logits[t].tolist()
        exps = [math.exp(v - max(row)) for v in row]
        scores = {
            "softmax": [v / sum(exps) for v in exps],
            "sigmoid": [1 / (1 + math.exp(-v)) for v in row],
            "sqrt_softplus": [math.sqrt(math.log1p(math.exp(v))) for v in row],
            "softmax_topk": row,
        }[score]
        choice = [s + (0.0 if bias is None else float(bias[e])) for e, s in enumerate(scores)]
        size = num_experts // num_groups
        allowed = set(range(num_experts))
        if num_groups > 1:
            best = {"max": 1, "top2_sum": 2}.get(group_score, group_score)  # type: ignore[call-overload]
            sums = [sum(sorted(choice[g * size : (g + 1) * size])[-best:]) for g in range(num_groups)]
            groups = sorted(range(num_groups), key=lambda g: -sums[g])[:group_topk]
            allowed = {e for g in groups for e in range(g * size, (g + 1) * size)}
        picks = sorted(allowed, key=lambda e: -choice[e])[:k]
        weight = [scores[e] for e in picks]
        if score == "softmax_topk":
            exps = [math.exp(v - max(weight)) for v in weight]
            weight = [v / sum(exps) for v in exps]
        if normalize:
            weight = [v / sum(weight) for v in weight]
        for e, v in zip(picks, weight):
            out[t, e] = v * scale
    return out


def weights(router: TopKRouter, logits: Tensor, **context: Any) -> Tensor:
    return router.route(logits, **context).dense()


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(37, 8, 2), (5, 6, 6), (1, 3, 1), (0, 4, 2)])
def test_weights_match_a_loop(score: Any, normalize: bool, tokens: int, num_experts: int, k: int) -> None:
    logits = torch.randn(tokens, num_experts, dtype=torch.float64)
    router = TopKRouter(4, num_experts, k, score=score, normalize=normalize, scale=2.5)
    close(weights(router, logits), chosen_by_loop(logits, k, score=score, normalize=normalize, scale=2.5))


@pytest.mark.parametrize("group_score", ["max", "top2_sum", 1, 3])
@pytest.mark.parametrize(("num_groups", "group_topk", "k"), [(4, 2, 4), (2, 1, 3), (3, 3, 5)])
def test_group_limited_choice_matches_a_loop(group_score: Any, num_groups: int, group_topk: int, k: int) -> None:
    logits, bias = torch.randn(40, 12, dtype=torch.float64), torch.randn(12) * 0.5
    groups = {"num_groups": num_groups, "group_topk": group_topk, "group_score": group_score}
    router = TopKRouter(4, 12, k, score="sigmoid", normalize=True, selection_bias=True, **groups)  # type: ignore[arg-type]
    router.selection_bias.copy_(bias)  # type: ignore[union-attr]
    expected = chosen_by_loop(logits, k, score="sigmoid", normalize=True, bias=bias.double(), **groups)  # type: ignore[arg-type]
    close(weights(router, logits), expected)


def test_a_negative_bias_never_leads_outside_the_chosen_groups() -> None:
    router = TopKRouter(4, 8, 4, score="sigmoid", selection_bias=True, num_groups=4, group_topk=2)
    router.selection_bias.fill_(-3.0)  # type: ignore[union-attr]
    sent = weights(router, torch.randn(200, 8)) > 0
    assert (sent.view(200, 4, 2).any(-1).sum(-1) == 2).all()
    # As in transformers before 5.23: scores below zero lose to the zeros of the two groups that were left out.
    router.group_fill, logits = 0.0, torch.randn(200, 8)
    best = logits.view(200, 4, 2).amax(-1)
    left_out = best <= best.median(-1, keepdim=True).values  # the lower of the two in the middle
    assert torch.equal((weights(router, logits) > 0).view(200, 4, 2), left_out.unsqueeze(-1).expand(200, 4, 2))


def test_selection_bias_moves_the_choice_and_not_the_weight() -> None:
    logits = torch.randn(50, 6, dtype=torch.float64)
    router = TopKRouter(4, 6, 2, selection_bias=True)
    router.selection_bias[3] = 10.0  # type: ignore[index]
    out = weights(router, logits)
    close(out[:, 3], logits.softmax(-1)[:, 3])


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradient_of_the_weights_is_that_of_finite_differences(score: Any, normalize: bool, renormalize: bool) -> None:
    torch.manual_seed(1)
    capacity = Capacity(0.7, renormalize=renormalize)
    router = TopKRouter(4, 5, 2, score=score, normalize=normalize, scale=1.7, capacity=capacity, selection_bias=True)
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: weights(router, v), logits)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradient_reaches_input_weight_and_bias(score: Any) -> None:
    table = {
        "switch": 0.3,
        "z": 0.2,
        "gshard": 0.1,
        "importance": 0.2,
        "sequence": 0.5,
        "device_level": {"weight": 0.1},
    }
    table["device_level"]["num_devices"] = 2  # type: ignore[index]
    router = TopKRouter(3, 4, 2, score=score, bias=True, losses=table).double()  # type: ignore[arg-type]
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(router, {"weight": weight, "bias": bias}, (x,))
        return routing.dense(), *routing.losses.values()

    assert len(run(x, router.weight, router.bias)) == 7  # type: ignore[arg-type]
    assert torch.autograd.gradcheck(run, (x, router.weight, router.bias))


def test_masked_tokens_are_neither_routed_nor_counted() -> None:
    mask = torch.rand(2, 12) > 0.4
    table: dict[str, Any] = dict.fromkeys(("switch", "z", "gshard", "importance", "importance_vmoe", "load"), 1.0)
    for capacity in (None, Capacity(0.6, drop="choice", renormalize=True), Capacity(tokens=3, drop="probability")):
        router = TopKRouter(6, 4, 2, selection_bias=True, capacity=capacity, losses=table).double()
        x = torch.randn(2, 12, 6, dtype=torch.float64)
        real = router(x[mask])
        if capacity is not None and capacity.tokens is None:  # a factor counts the padding in; fix the places instead
            places = capacity.places(int(mask.sum()), 2, 4, True)
            router.capacity = Capacity(tokens=places, drop="choice", renormalize=True)
        counted = router.load_since_update
        router.load_since_update = None
        x[~mask] = float("nan")
        x.requires_grad_()
        masked = router(x, mask=mask)
        close(masked.dense()[mask.flatten()], real.dense())
        assert not masked.dense()[~mask.flatten()].any()
        for name, loss in real.losses.items():
            close(masked.losses[name], loss)
        assert torch.equal(router.load_since_update, counted)  # type: ignore[arg-type]
        (masked.dense().square().sum() + sum(masked.losses.values())).backward()
        assert router.weight.grad.isfinite().all()  # type: ignore[union-attr]
        assert x.grad.isfinite().all()  # type: ignore[union-attr]
        assert not x.grad[~mask].any()  # type: ignore[index]


def test_everything_masked_and_no_token_at_all() -> None:
    table: dict[str, Any] = dict.fromkeys(("switch", "z", "importance", "load", "load_vmoe", "gshard"), 1.0)
    for capacity in (None, Capacity(1.0, renormalize=True)):
        router = TopKRouter(6, 4, 2, capacity=capacity, losses=table, noise="fixed")
        for routing in (router(torch.randn(0, 6)), router(torch.randn(5, 6), mask=torch.zeros(5, dtype=torch.bool))):
            assert routing.token_index.numel() == 0
            assert routing.offsets.tolist() == [0] * 5
            assert all(loss.isfinite() for loss in routing.losses.values())


def test_jitter_multiplies_the_input_in_training_only() -> None:
    router = TopKRouter(1, 2, 2, jitter=0.1, score="sigmoid").double()
    router.weight.data.fill_(1.0)
    x = torch.ones(20000, 1, dtype=torch.float64)
    logits = router(x).dense().logit()
    assert logits.min() >= 0.9
    assert logits.max() <= 1.1
    # U(0.9, 1.1) has mean 1 and standard deviation 0.2 / sqrt(12).
    assert abs(logits[:, 0].mean() - 1) < 5 * 0.2 / math.sqrt(12 * 20000)
    assert abs(logits[:, 0].std() * math.sqrt(12) / 0.2 - 1) < 0.03
    close(logits[:, 0], logits[:, 1])  # one factor an input, not an expert
    close(router.eval()(x).dense(), torch.full((20000, 2), 1.0, dtype=torch.float64).sigmoid())


def test_fixed_noise_has_its_width_in_training_only() -> None:
    router = TopKRouter(4, 3, 3, score="sigmoid", noise="fixed", noise_std=0.5)
    logits = torch.zeros(20000, 3, dtype=torch.float64)
    noise = weights(router, logits).logit()
    assert abs(noise.mean()) < 5 * 0.5 / math.sqrt(60000)
    assert abs(noise.std() / 0.5 - 1) < 0.02
    close(weights(router.eval(), logits), torch.full((20000, 3), 0.5, dtype=torch.float64))


def test_learned_noise_has_the_width_softplus_gives() -> None:
    router = TopKRouter(2, 3, 3, score="sigmoid", noise="learned").double()
    assert not router.weight.any()
    assert not router.noise_weight.any()  # type: ignore[union-attr]
    router.noise_weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-3.0, 0.0]]).double()  # type: ignore[union-attr]
    noise = router(torch.ones(20000, 2, dtype=torch.float64)).dense().logit()
    expected = torch.tensor([math.log1p(math.exp(v)) + 1e-2 for v in (0.0, 1.0, -3.0)], dtype=torch.float64)
    torch.testing.assert_close(noise.std(0), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("options", [{"noise": "fixed"}, {"noise": "learned"}, {"jitter": 0.1}])
def test_randomness_follows_the_seed(options: dict) -> None:
    router, x = TopKRouter(4, 6, 2, **options), torch.randn(30, 4)
    router.weight.data.normal_()

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return router(x).dense()

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


@pytest.mark.parametrize("renormalize", [False, True])
def test_dropped_choices_contribute_nothing_and_the_rest_may_fill_up(renormalize: bool) -> None:
    logits = torch.randn(40, 4, dtype=torch.float64)
    capacity = Capacity(0.5, drop="choice", renormalize=renormalize)
    router = TopKRouter(4, 4, 2, scale=1.5, capacity=capacity)
    out = weights(router, logits)
    probs, expert = logits.softmax(-1).topk(2)
    expected, used = torch.zeros_like(out), [0] * 4
    for j in range(2):
        for t in range(40):
            e = int(expert[t, j])
            if used[e] < 10:
                used[e] += 1
                expected[t, e] = probs[t, j]
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True).clamp(min=1e-300)
    close(out, expected * 1.5)


@pytest.mark.parametrize("size", [5, 8, 24, 100, "sequence"])
def test_groups_have_a_capacity_each(size: Any) -> None:
    logits = torch.randn(3, 8, 4)
    router = TopKRouter(4, 4, 2, capacity=Capacity(0.5), group_size=size)
    length = 8 if size == "sequence" else size
    out = weights(router, logits)
    alone = TopKRouter(4, 4, 2, capacity=Capacity(tokens=Capacity(0.5).places(length, 2, 4, True)))
    close(out, torch.cat([weights(alone, part) for part in logits.view(24, 4).split(length)]), rtol=1e-6)


def test_priority_goes_by_confidence_even_when_weights_are_normalised() -> None:
    """Weights that sum to one do not tell tokens apart; with k=1 they are all equal."""
    logits = torch.randn(30, 4, dtype=torch.float64) * 2
    confidence, expert = logits.softmax(-1).max(-1)
    for options in ({"normalize": True}, {"score": "softmax_topk"}):
        router = TopKRouter(4, 4, 1, capacity=Capacity(tokens=2, drop="priority"), **options)  # type: ignore[arg-type]
        out = weights(router, logits)
        for e in range(4):
            mine = (expert == e).nonzero().flatten()
            best = mine[confidence[mine].argsort(descending=True)[:2]]
            assert set(out[:, e].nonzero().flatten().tolist()) == set(best.tolist())


def test_all_tokens_to_one_expert() -> None:
    logits = torch.zeros(50, 8)
    logits[:, 5] = 20.0
    routing = TopKRouter(4, 8, 1).route(logits)
    assert routing.counts.tolist() == [0, 0, 0, 0, 0, 50, 0, 0]
    assert routing.token_index.tolist() == list(range(50))


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_arithmetic_stays_float32_under_autocast_and_in_bfloat16(parameters: torch.dtype) -> None:
    torch.manual_seed(0)
    router = TopKRouter(32, 16, 4, losses={"z": 1.0}).to(parameters)
    x = torch.randn(64, 32).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x)
    assert routing.weight.dtype == routing.losses["z"].dtype == torch.float32
    logits = x.double() @ router.weight.double().T
    close(routing.dense().double(), chosen_by_loop(logits, 4), rtol=1e-6)
    routing.dense().square().sum().backward()
    assert router.weight.grad.dtype == parameters  # type: ignore[union-attr]


def test_arithmetic_in_the_input_dtype_when_asked() -> None:
    x = torch.randn(8, 4, dtype=torch.bfloat16)
    assert TopKRouter(4, 4, dtype=None)(x).weight.dtype == torch.bfloat16
    assert TopKRouter(4, 4)(x).weight.dtype == torch.float32


def test_scores_that_float16_cannot_tell_from_zero_give_no_weight() -> None:
    router = TopKRouter(6, 4, 2, score="sigmoid", normalize=True, dtype=None)
    logits = torch.full((3, 4), -100.0, dtype=torch.float16)
    logits[0] = torch.tensor([1.0, -2.0, -100.0, -100.0])
    logits.requires_grad_()
    routing = router.route(logits)
    expected = logits[0, :2].double().sigmoid()
    torch.testing.assert_close(routing.dense()[0, :2].double(), expected / expected.sum(), rtol=1e-3, atol=0)
    assert not routing.dense()[1:].any()
    assert not routing.probs[1:].any()  # type: ignore[index]
    routing.dense().square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_root_of_softplus_has_finite_gradients_where_it_is_zero_and_where_it_is_a_root() -> None:
    logits = torch.tensor([[-1e4, -200.0, -80.0, 0.0, 30.0, 1e4]]).requires_grad_()
    out = weights(TopKRouter(4, 6, 6, score="sqrt_softplus"), logits)
    expected = [0.0, 0.0, math.exp(-40.0), math.sqrt(math.log(2)), math.sqrt(30.0), 100.0]
    torch.testing.assert_close(out[0].tolist(), expected, rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(out.sum(), logits)
    half = 0.5 / math.sqrt(math.log(2)) / 2
    expected = [0.0, 0.0, math.exp(-40.0) / 2, half, 0.5 / math.sqrt(30.0), 0.5 / 100.0]
    torch.testing.assert_close(slope[0].tolist(), expected, rtol=1e-5, atol=0)


def test_the_selection_bias_stays_float32_in_a_bfloat16_model() -> None:
    router = TopKRouter(4, 4, selection_bias=True)
    router.selection_bias.fill_(1 + 1e-3)  # type: ignore[union-attr]
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.selection_bias.dtype == torch.float32  # type: ignore[union-attr]
    close(router.selection_bias, torch.full((4,), 1 + 1e-3), rtol=1e-7)  # type: ignore[arg-type]
    assert copy.deepcopy(router).selection_bias.dtype == torch.float32  # type: ignore[union-attr]
    assert router.double().selection_bias.dtype == torch.float64  # type: ignore[union-attr]


def test_losses_are_for_training() -> None:
    router = TopKRouter(4, 4, losses={"switch": 1.0})
    x = torch.randn(6, 4)
    assert set(router(x).losses) == {"switch"}
    assert router.eval()(x).losses == {}


def test_losses_in_evaluation_when_asked_but_not_those_on_noise() -> None:
    table = {"importance_vmoe": 1.0, "load_vmoe": 1.0}
    router = TopKRouter(4, 4, noise="fixed", losses=table, eval_losses=True)
    x = torch.randn(6, 4)
    assert set(router(x).losses) == set(table)
    routing = router.eval()(x)
    importance = routing.probs.sum(0)
    expected = importance.var(correction=0) / importance.mean() ** 2
    assert set(routing.losses) == {"importance_vmoe"}
    torch.testing.assert_close(routing.losses["importance_vmoe"], expected)


def test_built_on_the_meta_device_and_reset() -> None:
    with torch.device("meta"):
        router = TopKRouter(16, 8, selection_bias=True, noise="learned", bias=True)
    router.to_empty(device="cpu")
    router.reset_parameters()
    fresh = TopKRouter(16, 8, selection_bias=True, noise="learned", bias=True)
    assert {k: v.shape for k, v in router.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    assert not router.selection_bias.any()  # type: ignore[union-attr]
    assert router(torch.randn(5, 16)).dense().isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 9}, "k must be between 1 and num_experts=8, got 9"),
        ({"score": "relu"}, "score must be one of ('softmax', 'softmax_topk', 'sigmoid', 'sqrt_softplus'), got 'relu'"),
        ({"noise": "gumbel"}, "noise must be one of"),
        ({"num_groups": 3}, "8 experts do not split into num_groups=3"),
        ({"num_groups": 0}, "8 experts do not split into num_groups=0"),
        ({"num_groups": 4, "group_topk": 5}, "group_topk must be 1..num_groups=4, got 5"),
        ({"num_groups": 4, "group_topk": 1, "k": 3}, "k=3 experts do not fit in group_topk=1 groups"),
        ({"num_groups": 4, "group_score": 3}, "group_score must be 'max', 'top2_sum' or 1..2 (experts a group), got 3"),
        ({"group_size": "batch"}, "group_size must be None, 'sequence' or a number, got 'batch'"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"losses": {"swich": 1.0}}, "unknown auxiliary loss 'swich'; did you mean: switch"),
        ({"losses": {"switch": {"weight": 1.0, "scop": "batch"}}}, "auxiliary loss 'switch' has no option 'scop'"),
        ({"losses": {"switch": {"scope": "batch"}}}, "expected a number or a table with 'weight'"),
        ({"losses": {"z": {"weight": 1.0, "scope": "image"}}}, "unknown scope 'image'; known: batch, sequence, group"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TopKRouter(**{"dim": 4, "num_experts": 8, "k": 2, **options})


def test_sequences_are_needed_where_asked_for() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"needs tokens as \[B, S, D\]"):
        TopKRouter(4, 4, capacity=Capacity(), group_size="sequence")(x)
    with pytest.raises(ValueError, match="computed a sequence at a time, but the tokens came as one list"):
        TopKRouter(4, 4, losses={"sequence": 1.0})(x)


def test_state_and_copies() -> None:
    router = TopKRouter(4, 6, selection_bias=True, bias=True, noise="learned")
    assert set(router.state_dict()) == {"weight", "bias", "noise_weight", "selection_bias"}
    twin = TopKRouter(4, 6, selection_bias=True, bias=True, noise="learned")
    router.weight.data.normal_()
    twin.load_state_dict(router.state_dict())
    x = torch.randn(7, 4)
    for other in (twin, copy.deepcopy(router)):
        assert torch.equal(other.eval()(x).dense(), router.eval()(x).dense())
    assert repr(router).startswith("TopKRouter(4, num_experts=6, k=2, score='softmax'")


def test_normalized_logits_have_the_standard_deviation_asked_for() -> None:
    """Skywork-MoE: softmax(lambda (z - mean z) / std z), a token at a time."""
    logits = (torch.randn(20, 6, dtype=torch.float64) * 7 + 3).requires_grad_()
    rows = [1.5 * (row - row.mean()) / row.std() for row in logits]
    found = weights(TopKRouter(4, 6, 2, normalize_logits=1.5), logits)
    expected = chosen_by_loop(torch.stack(rows).detach(), 2)
    close(found, expected)
    probs = torch.stack(rows).softmax(-1)
    grads = [torch.autograd.grad(out.square().sum(), logits)[0] for out in (found, probs * (expected > 0))]
    close(*grads)
    flat = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    weights(TopKRouter(4, 4, 2, normalize_logits=1.0), flat).sum().backward()
    assert not flat.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("drop", ["choice", "position", "probability", "priority", "random", "unordered"])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_places_for_all_tokens_drop_nothing(drop: Any, masked: bool, tokens: int) -> None:
    logits, mask = torch.randn(tokens, 6), torch.rand(tokens) > 0.3 if masked else None
    wanted = TopKRouter(8, 6, k=3).route(logits, mask=mask)
    for size in (None, 10):
        capacity = Capacity(tokens=size or max(tokens, 1), drop=drop)
        found = TopKRouter(8, 6, k=3, capacity=capacity, group_size=size).route(logits, mask=mask)
        assert torch.equal(found.dense(), wanted.dense())
        assert torch.equal(found.counts, wanted.counts)
