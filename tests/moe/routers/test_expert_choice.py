from __future__ import annotations

import copy
import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Capacity, Experts, MoE, balance, record, telemetry
from zoo.moe.routers import ExpertChoiceRouter
from zoo.moe.routers.capped import capped_plan


def chosen_by_loop(
    logits: Tensor, groups: list[list[int]], places: int, softmax: str = "experts", normalize: bool = False
) -> Tensor:
    """Combine weights [T, E] of tokens in `groups`, one expert at a time; tokens in no group get none."""
    weight = torch.zeros_like(logits)
    for group in groups:
        scores = logits[group].softmax(-1 if softmax == "experts" else 0)
        for e in range(logits.shape[1]):
            best = sorted(range(len(group)), key=lambda i: -float(scores[i, e].detach()))[:places]
            for i in best:
                weight[group[i], e] = scores[i, e]
    if normalize:
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    return weight


def router(num_experts: int = 4, factor: float = 1.0, **options: Any) -> ExpertChoiceRouter:
    return ExpertChoiceRouter(6, num_experts, capacity=Capacity(factor), **options).double()


@pytest.mark.parametrize("softmax", ["experts", "tokens"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("tokens", "num_experts", "factor"), [(12, 4, 1.0), (13, 3, 2.0), (9, 2, 0.5), (5, 8, 8.0)])
def test_weights_are_those_of_a_loop(
    softmax: Any, normalize: bool, tokens: int, num_experts: int, factor: float
) -> None:
    logits = torch.randn(tokens, num_experts, dtype=torch.float64)
    places = min(math.ceil(tokens * factor / num_experts), tokens)
    found = router(num_experts, factor, softmax=softmax, normalize=normalize).route(logits)
    expected = chosen_by_loop(logits, [list(range(tokens))], places, softmax, normalize)
    torch.testing.assert_close(found.dense(), expected)
    assert found.counts.tolist() == [places] * num_experts


def test_assignments_are_in_token_order_within_an_expert() -> None:
    found = router(group_size=5).route(torch.randn(15, 4, dtype=torch.float64))
    for e in range(4):
        tokens = found.token_index[found.offsets[e] : found.offsets[e + 1]]
        assert torch.equal(tokens, tokens.sort().values)


@pytest.mark.parametrize("softmax", ["experts", "tokens"])
@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({"group_size": "sequence"}, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        ({"group_size": "sequence", "group_sequences": 2}, [[0, 1, 2, 3, 4, 5], [6, 7, 8]]),
        ({"group_size": 4}, [[0, 1, 2, 3], [4, 5, 6, 7], [8]]),
    ],
)
def test_each_group_is_chosen_from_apart(softmax: Any, options: dict[str, Any], groups: list[list[int]]) -> None:
    logits = torch.randn(3, 3, 2, dtype=torch.float64)
    found = router(2, softmax=softmax, **options).route(logits)
    places = math.ceil(len(groups[0]) / 2)
    torch.testing.assert_close(found.dense(), chosen_by_loop(logits.flatten(0, 1), groups, places, softmax))


@pytest.mark.parametrize("softmax", ["experts", "tokens"])
def test_masked_tokens_are_never_taken(softmax: Any) -> None:
    logits = torch.randn(2, 5, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, False, False], [True, True, True, True, False]])
    choice = router(3, 2.0, group_size="sequence", softmax=softmax)
    expected = chosen_by_loop(logits.flatten(0, 1), [[0, 2], [5, 6, 7, 8]], 4, softmax)
    logits[~mask] = math.nan
    found = choice.route(logits, mask=mask)
    torch.testing.assert_close(found.dense(), expected)
    assert not (telemetry.kept_per_token(found) > 0)[~mask.flatten()].any()
    assert telemetry.entropy(found).isfinite()


def test_everything_masked_and_no_token_at_all() -> None:
    moe = MoE(router(), Experts(4, 6, 5, "gelu").double())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(moe(x, mask=torch.zeros(2, 3, dtype=torch.bool)), torch.zeros_like(x))
    for shape in ((0, 6), (0, 4, 6), (2, 0, 6)):
        empty = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        moe(empty).sum().backward()
        assert empty.grad is not None


def test_one_token_goes_to_every_expert() -> None:
    found = router().route(torch.randn(1, 4, dtype=torch.float64))
    assert found.token_index.tolist() == [0] * 4


@pytest.mark.parametrize("softmax", ["experts", "tokens"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_of_the_layer_are_those_of_the_equations(softmax: Any, normalize: bool) -> None:
    gate = router(3, 2.0, softmax=softmax, normalize=normalize)
    moe = MoE(gate, Experts(3, 6, 5, "gelu").double())
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *moe.parameters()]
    weight = chosen_by_loop(x @ gate.weight.T, [list(range(8))], 6, softmax, normalize)
    outputs = [torch.nn.functional.gelu(x @ w.T) @ v.T for w, v in zip(moe.experts.w_in, moe.experts.down_proj)]
    expected = sum(weight[:, e : e + 1] * out for e, out in enumerate(outputs))
    y = moe(x)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    for found, wanted in zip(*(torch.autograd.grad((v * direction).sum(), inputs) for v in (y, expected))):
        torch.testing.assert_close(found, wanted)


def test_capacity_counts_tokens_not_choices_and_is_capped_by_them() -> None:
    logits = torch.randn(50 * 8, 8)
    choice = ExpertChoiceRouter(6, 8, capacity=Capacity(1.05, eval_factor=100.0, multiple_of=4))
    assert choice.train().route(logits).counts.tolist() == [56] * 8  # ceil(52.5) to a multiple of four
    assert choice.eval().route(logits).counts.tolist() == [400] * 8
    assert ExpertChoiceRouter(6, 8, capacity=Capacity(tokens=7)).route(logits).counts.tolist() == [7] * 8
    with pytest.raises(ValueError, match="expected at least 1"):
        ExpertChoiceRouter(6, 8, capacity=Capacity(0.5, rounding="floor")).route(logits[:8])


def test_noise_is_for_training_and_moves_choice_and_weight() -> None:
    choice = ExpertChoiceRouter(6, 2, noise_std=0.5, capacity=Capacity(2.0))
    logits = torch.zeros(4000, 2)
    weight = choice.train().route(logits).dense()
    noise = weight.log()[:, 0] - weight.log()[:, 1]
    assert noise.std().item() == pytest.approx(0.5 * math.sqrt(2), rel=0.05)
    assert torch.equal(choice.eval().route(logits).dense(), torch.full((4000, 2), 0.5))


def test_a_z_loss_leaves_masked_tokens_out_and_losses_on_choices_are_refused() -> None:
    choice = ExpertChoiceRouter(6, 4, losses={"z": 0.1}).train()
    logits, mask = torch.randn(7, 4), torch.tensor([True] * 5 + [False] * 2)
    expected = 0.1 * balance.z(logits[:5])
    torch.testing.assert_close(choice.route(logits, mask=mask).losses["z"], expected)
    assert choice.eval().route(logits).losses == {}
    with pytest.raises(ValueError, match="loss 'switch' reads selected"):
        ExpertChoiceRouter(6, 4, losses={"switch": 0.01})


def test_a_causal_model_is_warned_once() -> None:
    choice, logits = router(), torch.randn(8, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="depends on later ones"):
        choice.route(logits, causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice.route(logits, causal=True)
        router().route(logits)


def test_arithmetic_stays_float32_under_autocast_and_in_bfloat16() -> None:
    x, choice = torch.randn(9, 6).bfloat16().float(), ExpertChoiceRouter(6, 3).bfloat16()
    expected = copy.deepcopy(choice).float()(x).dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(choice(x.bfloat16()).dense(), expected)
    assert torch.equal(choice(x.bfloat16()).dense(), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_and_checkpointed_layers_are_the_same(masked: bool) -> None:
    torch._dynamo.reset()
    moe = MoE(router(3, 2.0, noise_std=0.0, group_size="sequence"), Experts(3, 6, 5, "gelu").double())
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 4) < 0.7 if masked else None
    y = moe(x, mask=mask)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=not masked)(x, mask=mask)
    repeated = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False, mask=mask)
    inputs = [x, *moe.parameters()]
    expected = torch.autograd.grad(y.square().sum(), inputs)
    for other in (compiled, repeated):
        torch.testing.assert_close(other, y)
        for found, wanted in zip(torch.autograd.grad(other.square().sum(), inputs), expected):
            torch.testing.assert_close(found, wanted)


def test_recording_and_telemetry() -> None:
    moe = MoE(router(), Experts(4, 6, 5, "gelu").double())
    with record(moe) as step:
        moe(torch.randn(12, 6, dtype=torch.float64))
    ((routing,),) = step.routings.values()
    assert telemetry.load(routing).tolist() == [0.25] * 4
    assert telemetry.drop_rate(routing) == 0
    assert routing.probs.shape == (12, 4)


def test_state_round_trip_and_the_meta_device() -> None:
    choice, x = router(), torch.randn(12, 6, dtype=torch.float64)
    with torch.device("meta"):
        other = router()
    other = other.to_empty(device="cpu")
    other.load_state_dict(choice.state_dict())
    assert torch.equal(other(x).dense(), choice(x).dense())
    other.reset_parameters()
    assert other.weight.abs().max() <= 1 / math.sqrt(6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax": "both"}, "softmax must be over"),
        ({"capacity": Capacity(drop="priority")}, "no meaning where experts choose"),
        ({"capacity": Capacity(renormalize=True)}, "no meaning where experts choose"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"group_sequences": 2}, "group_sequences"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertChoiceRouter(**{"dim": 4, "num_experts": 2, **options})


def best_within_cap(scores: Tensor, places: int, cap: int) -> float:
    """The largest sum where every expert takes `places` tokens and no token meets more than `cap`, by trying all."""
    tokens, experts = scores.shape
    ways = list(itertools.combinations(range(tokens), places))
    best = -float("inf")
    for choice in itertools.product(ways, repeat=experts):
        met = [sum(t in way for way in choice) for t in range(tokens)]
        if max(met) <= cap:
            best = max(best, sum(float(scores[t, e]) for e, way in enumerate(choice) for t in way))
    return best


@pytest.mark.parametrize(("tokens", "experts", "places", "cap"), [(6, 3, 2, 1), (5, 3, 3, 2), (6, 3, 4, 2)])
def test_the_capped_plan_finds_the_best_choice(tokens: int, experts: int, places: int, cap: int) -> None:
    torch.manual_seed(0)  # near ties are not told apart at the last temperature
    for _ in range(5):
        scores = (2 * torch.randn(tokens, experts)).softmax(-1)
        plan = capped_plan(scores[None], places, cap)[0]
        chosen = plan.topk(places, dim=0).indices
        found = float(scores.gather(0, chosen).sum())
        assert chosen.flatten().bincount().max() <= cap
        assert found == pytest.approx(best_within_cap(scores, places, cap), abs=0.02)


def test_the_capped_plan_is_feasible() -> None:
    scores = (2 * torch.randn(2, 64, 8) + 3 * torch.randn(2, 64, 1) * torch.randn(8)).softmax(-1)
    mask = torch.rand(2, 64) > 0.2
    plan = capped_plan(scores, 12, 3, mask).exp()
    assert (plan.sum(1) > 11.5).all()
    assert plan.sum(1).max() < 12.01
    assert plan.sum(2).max() < 3.01
    assert not plan[~mask].any()


@pytest.mark.parametrize("cap", [2, 3])
def test_no_token_meets_more_experts_than_the_cap(cap: int) -> None:
    router = ExpertChoiceRouter(4, 8, capacity=Capacity(1.5), max_experts=cap)
    # Every expert has fewer tokens that want it alone than places, so it also takes those that want all the same.
    logits = torch.rand(3, 50, 8) + 6 * torch.eye(8)[torch.arange(50) % 8]
    logits[:, ::25] = 0
    mask = torch.rand(3, 50) > 0.1
    for options in ({}, {"mask": mask}):
        routing = router.route(logits, **options)
        met = torch.bincount(routing.token_index, minlength=150)
        free = ExpertChoiceRouter(4, 8, capacity=Capacity(1.5)).route(logits, **options)
        assert met.max() <= cap < torch.bincount(free.token_index).max()
        assert met.sum() > 0.6 * torch.bincount(free.token_index).sum()
        dense, probs = routing.dense(), logits.view(-1, 8).softmax(-1)
        torch.testing.assert_close(dense, probs * (dense > 0))
        assert torch.equal(routing.offsets, torch.cat([torch.zeros(1), (dense > 0).sum(0).cumsum(0)]).int())


def test_a_cap_below_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match="meet 2 experts on average, so that max_experts must be at least that, got 1"):
        ExpertChoiceRouter(4, 8, max_experts=1)
