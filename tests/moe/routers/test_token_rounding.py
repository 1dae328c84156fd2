from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import zoo
from zoo.moe import Capacity, Experts, MoE, Routing, telemetry
from zoo.moe.routers import TokenRoundingRouter, TopKRouter

ROUNDINGS = ("nearest", "up", "down", "balanced")


def balanced_target(counts: list[int], multiple: int) -> list[int]:
    """The paper's Balance-f: expert after expert, up or down, whichever leaves less of a residual z; up where equal."""
    found, z = [], 0
    for f in counts:
        down = f // multiple * multiple
        up = down if down == f else down + multiple
        n = up if abs(up - f + z) <= abs(down - f + z) else down
        z += n - f
        found.append(n)
    return found


def targets(counts: list[int], tokens: int, multiple: int, rounding: str) -> list[int]:
    """How many tokens each expert is to take."""
    found = []
    balanced = balanced_target(counts, multiple)
    for e, f in enumerate(counts):
        down, up = f // multiple * multiple, -(-f // multiple) * multiple
        if rounding == "nearest":
            # Of two as near the one that is an even number of tiles.
            nearer_up = up - f < f - down or (up - f == f - down and up // multiple % 2 == 0)
            n = up if nearer_up else down
        else:
            n = {"up": up, "down": down, "balanced": balanced[e]}[rounding]
        found.append(n if n <= tokens else down)
    return found if any(found) else counts


def by_hand(
    logits: Tensor, k: int, multiple: int, rounding: str, normalize: bool, mask: list[bool], sigmoid: bool = False
) -> tuple[list[list[int]], dict[tuple[int, int], float]]:
    """The tokens of each expert in order, and the weight of each (token, expert): the paper's algorithm in loops."""
    score = logits.double().sigmoid() if sigmoid else logits.double().softmax(-1)
    s, experts = score.tolist(), logits.shape[1]
    weight: dict[tuple[int, int], float] = {}
    chose: list[list[int]] = [[] for _ in range(experts)]
    for t, row in enumerate(s):
        if not mask[t]:
            continue
        best = sorted(range(experts), key=lambda e: -row[e])[:k]
        total = sum(row[e] for e in best) if normalize else 1.0
        everything = sum(row) if normalize and sigmoid else 1.0
        for e in range(experts):
            weight[t, e] = row[e] / (total if e in best else everything)
        for e in best:
            chose[e].append(t)
    present = [t for t in range(len(s)) if mask[t]]
    taken = []
    for e, n in enumerate(targets([len(c) for c in chose], len(present), multiple, rounding)):
        # A single choice's weight is one where normalised: then scores rank tokens.
        first = sorted(chose[e], key=lambda t: -(s[t][e] if k == 1 else weight[t, e]))
        others = sorted((t for t in present if t not in chose[e]), key=lambda t: -weight[t, e])
        taken.append(sorted((first + others)[:n]))
    return taken, weight


def same(routing: Routing, taken: list[list[int]], weight: dict[tuple[int, int], float], scale: float = 1.0) -> None:
    assert routing.counts.tolist() == [len(tokens) for tokens in taken]
    assert routing.token_index.tolist() == [t for tokens in taken for t in tokens]
    expected = [scale * weight[t, e] for e, tokens in enumerate(taken) for t in tokens]
    torch.testing.assert_close(routing.weight.double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "multiple"),
    [(64, 8, 2, 4), (97, 5, 3, 7), (50, 12, 1, 4), (200, 6, 6, 16), (40, 16, 4, 1), (33, 4, 2, 16)],
)
def test_it_is_the_papers_algorithm(
    tokens: int, experts: int, k: int, multiple: int, rounding: str, normalize: bool
) -> None:
    router = TokenRoundingRouter(
        3,
        experts,
        k,
        multiple=multiple,
        rounding=rounding,
        normalize=normalize,
        scale=1.5,  # type: ignore[arg-type]
    )
    # Some experts are liked more than others, so that counts lie far apart.
    logits = torch.randn(tokens, experts, dtype=torch.float64) + torch.randn(experts, dtype=torch.float64)
    for mask in ([True] * tokens, (torch.rand(tokens) > 0.3).tolist()):
        given = None if all(mask) else torch.tensor(mask)
        taken, weight = by_hand(logits, k, multiple, rounding, normalize, mask)
        same(router.route(logits, mask=given), taken, weight, 1.5)


@pytest.mark.parametrize("normalize", [False, True])
def test_with_sigmoid_scores(normalize: bool) -> None:
    router = TokenRoundingRouter(3, 6, 2, multiple=8, score="sigmoid", normalize=normalize, selection_bias=True)
    logits = torch.randn(70, 6, dtype=torch.float64)
    same(router.route(logits), *by_hand(logits, 2, 8, "nearest", normalize, [True] * 70, sigmoid=True))
    counts = logits.topk(2).indices.flatten().bincount(minlength=6)
    assert torch.equal(router.load_since_update, counts)  # the bias follows what tokens chose


def test_softmax_over_the_choices_is_softmax_normalised() -> None:
    logits = torch.randn(90, 7, dtype=torch.float64)
    one, other = (
        TokenRoundingRouter(3, 7, 3, multiple=8, **options).route(logits)
        for options in ({"score": "softmax_topk"}, {"normalize": True})
    )
    torch.testing.assert_close(one.dense(), other.dense())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_counts_are_multiples_less_than_a_tile_from_token_choice(rounding: str) -> None:
    for _ in range(20):
        k, experts = int(torch.randint(1, 5, ())), int(torch.randint(5, 20, ()))
        logits = torch.randn(2016, experts) + torch.randn(experts)
        chosen = TopKRouter(3, experts, k).route(logits).counts
        counts = TokenRoundingRouter(3, experts, k, multiple=32, rounding=rounding).route(logits).counts  # type: ignore[arg-type]
        assert not (counts % 32).any()
        assert ((counts - chosen).abs() < 32).all()
        if rounding == "nearest":
            assert ((counts - chosen).abs() <= 16).all()
        if rounding == "balanced":
            assert ((counts - chosen).cumsum(0).abs() <= 16).all()
        assert rounding != "up" or (counts >= chosen).all()
        assert rounding != "down" or (counts <= chosen).all()


def test_choices_come_before_others_and_the_best_of_each_first() -> None:
    logits = torch.randn(300, 6, dtype=torch.float64)
    scores, routing = logits.softmax(-1), TokenRoundingRouter(3, 6, 2, multiple=32).route(logits)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(2).indices, True)
    taken = routing.dense() > 0
    for e in range(6):
        kept, dropped = scores[chosen[:, e] & taken[:, e], e], scores[chosen[:, e] & ~taken[:, e], e]
        added, left = scores[~chosen[:, e] & taken[:, e], e], scores[~chosen[:, e] & ~taken[:, e], e]
        assert not (dropped.numel() and added.numel())
        assert not dropped.numel() or dropped.max() < kept.min()
        assert not added.numel() or added.min() > left.max()


def test_scores_that_lie_close_together_keep_their_order() -> None:
    """Probabilities of 1e-12 differ as well as any: the authors' s - 1 in float32 would lose their order."""
    logits = torch.full((40, 3), -28.0)
    logits[:, 0] = 0.1 * torch.rand(40)
    logits[:7, 1] = 5.0  # one short of a tile
    logits[23, 1] = -27.5
    routing = TokenRoundingRouter(3, 3, 1, multiple=8, rounding="up").route(logits)
    assert routing.token_index[routing.expert_index == 1].tolist() == [*range(7), 23]


def test_equal_scores_are_no_reason_to_take_more_or_fewer() -> None:
    logits = torch.tensor([[1.0, 0.0]]).expand(11, 2)
    for rounding, counts in (("down", [8, 0]), ("nearest", [8, 0]), ("up", [8, 0])):
        routing = TokenRoundingRouter(3, 2, 1, multiple=4, rounding=rounding).route(logits)  # type: ignore[arg-type]
        assert routing.counts.tolist() == counts  # there are no 12
    routing = TokenRoundingRouter(3, 2, 1, multiple=4, rounding="up").route(torch.zeros(13, 2))
    assert sorted(routing.counts.tolist()) == [0, 12]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_too_few_tokens_for_a_tile_are_left_alone(rounding: str) -> None:
    for tokens in (0, 1, 2, 31):
        logits = torch.randn(tokens, 8)
        router = TokenRoundingRouter(3, 8, 2, multiple=32, rounding=rounding)  # type: ignore[arg-type]
        plain = TopKRouter(3, 8, 2).route(logits)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(router.route(logits).dense(), plain.dense())
    mask = torch.arange(100) < 31  # what counts is how many are there
    masked = router.route(torch.randn(100, 8), mask=mask)
    assert torch.equal(masked.counts.sum(), torch.tensor(62))


def test_nothing_is_rounded_where_no_tile_would_be_left_and_it_is_said_once() -> None:
    router, logits = TokenRoundingRouter(3, 64, 2, rounding="down"), torch.randn(256, 64)
    with pytest.warns(UserWarning, match="256 tokens are 8 an expert on average, less than half of multiple=128"):
        routing = router.route(logits)
    assert torch.equal(routing.dense(), TopKRouter(3, 64, 2).route(logits).dense())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.route(logits)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("tokens", [64, 70])
def test_all_to_one_expert(tokens: int, rounding: str) -> None:
    logits = torch.randn(tokens, 4)
    logits[:, 2] += 50
    routing = TokenRoundingRouter(3, 4, 1, multiple=16, rounding=rounding).route(logits)  # type: ignore[arg-type]
    assert routing.counts.tolist() == [0, 0, 64, 0]  # there are no 80


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_one_expert(rounding: str) -> None:
    for tokens in (5, 24, 29):
        routing = TokenRoundingRouter(3, 1, 1, multiple=8, rounding=rounding).route(torch.randn(tokens, 1))  # type: ignore[arg-type]
        assert routing.counts.tolist() == [tokens if tokens < 8 else 24]
        assert torch.equal(routing.weight, torch.ones_like(routing.weight))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_masked_tokens_are_never_added(rounding: str) -> None:
    router = TokenRoundingRouter(4, 6, 1, multiple=16, rounding=rounding, losses={"switch": 1.0})  # type: ignore[arg-type]
    x, mask = torch.randn(4, 60, 4), torch.rand(4, 60) > 0.4
    routing = router(x.where(mask[..., None], float("nan")), mask=mask)
    assert mask.flatten()[routing.token_index].all()
    assert not (routing.counts % 16).any()
    assert routing.losses["switch"].isfinite()
    assert not router(x, mask=torch.zeros(4, 60)).token_index.numel()


def test_evaluation_is_token_choice_unless_asked() -> None:
    x = torch.randn(200, 4)
    for eval_rounding in (False, True):
        router = TokenRoundingRouter(4, 6, 2, multiple=16, eval_rounding=eval_rounding)
        trained, evaluated = router.train()(x), router.eval()(x)
        assert not (trained.counts % 16).any()
        expected = trained.dense() if eval_rounding else TopKRouter.route(router, x @ router.weight.T).dense()
        torch.testing.assert_close(evaluated.dense(), expected)
        assert eval_rounding or evaluated.counts.sum() == 400


def test_losses_and_probabilities_are_those_of_token_choice() -> None:
    options = {"losses": {"switch": 1.0, "z": 0.1, "importance": 1.0}, "normalize": True}
    rounded, plain = TokenRoundingRouter(4, 6, multiple=32, **options), TopKRouter(4, 6, **options)
    plain.load_state_dict(rounded.state_dict())
    x = torch.randn(150, 4)
    ours, theirs = rounded(x), plain(x)
    assert not torch.equal(ours.counts, theirs.counts)
    torch.testing.assert_close(ours.probs, theirs.probs)
    assert ours.losses.keys() == theirs.losses.keys()
    for name, value in theirs.losses.items():
        torch.testing.assert_close(ours.losses[name], value)


def test_the_drop_rate_is_the_share_that_was_dropped() -> None:
    logits = torch.randn(300, 8)
    for rounding in ROUNDINGS:
        chosen = TopKRouter(3, 8, 2).route(logits).dense() > 0
        routing = TokenRoundingRouter(3, 8, 2, multiple=32, rounding=rounding).route(logits)  # type: ignore[arg-type]
        taken = routing.dense() > 0
        dropped, asked = (chosen & ~taken).sum(), (chosen | taken).sum()
        torch.testing.assert_close(telemetry.drop_rate(routing), dropped / asked)


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_of_the_weights_are_those_of_finite_differences(score: str, normalize: bool) -> None:
    router = TokenRoundingRouter(3, 5, 2, multiple=8, score=score, normalize=normalize)  # type: ignore[arg-type]
    logits = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    routing = router.route(logits)
    assert not torch.equal(routing.counts, TopKRouter(3, 5, 2).route(logits).counts)
    assert torch.autograd.gradcheck(lambda z: router.route(z).weight, logits)


def test_a_layer_trains_through_added_tokens() -> None:
    """The gradient of a score that an expert added is <dL/dy, the expert's output>."""
    layer = MoE(TokenRoundingRouter(4, 6, 2, multiple=16, rounding="up"), Experts(6, 4, 8, "silu")).double()
    x, out = torch.randn(100, 4, dtype=torch.float64), torch.randn(100, 4, dtype=torch.float64)
    (layer(x) * out).sum().backward()
    weight = layer.router.weight.detach().clone().requires_grad_()
    scores = (x @ weight.T).softmax(-1)
    taken = layer.router(x).dense() != 0
    outputs = torch.stack([_expert(layer.experts, e, x) for e in range(6)], dim=1)
    (torch.einsum("te,ted->td", scores * taken, outputs) * out).sum().backward()
    torch.testing.assert_close(layer.router.weight.grad, weight.grad)


@pytest.mark.parametrize("key", ["class_path", "name"])
def test_a_configuration_may_name_it(key: str) -> None:
    options = {"multiple": 16, "rounding": "balanced"}
    spec = {"name": "TokenRoundingRouter", **options}
    if key == "class_path":
        spec = {"class_path": "zoo.moe.routers.TokenRoundingRouter", "init_args": options}
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, router=spec, losses={"switch": 0.01})
    tokens = torch.randint(0, 1024, (4, 32))
    with zoo.moe.record(model) as step:
        loss = model(tokens, labels=tokens).loss
    (loss + step.losses()["switch"]).backward()
    routings = [routing for found in step.routings.values() for routing in found]
    assert len(routings) == 2
    assert not any((routing.counts % 16).any() for routing in routings)
    assert all(m.router.weight.grad.any() for m in model.modules() if isinstance(m, MoE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    """Where many scores are equal, too, counts are whole tiles and no token comes twice."""
    router = TokenRoundingRouter(8, 6, 2, multiple=16, dtype=None, normalize=True).to(dtype)
    routing = router(torch.randn(400, 8, dtype=dtype))
    assert routing.weight.dtype == dtype
    assert not (routing.counts % 16).any()
    pairs = routing.expert_index * 400 + routing.token_index
    assert torch.equal(pairs, pairs.unique())


def _expert(experts: Experts, e: int, x: Tensor) -> Tensor:
    """What one expert makes of all tokens."""
    tokens = torch.arange(len(x))
    offsets = torch.tensor([0] * (e + 1) + [len(x)] * (experts.num_experts - e), dtype=torch.int32)
    return experts(x, Routing(tokens, offsets, torch.ones(len(x), dtype=x.dtype), len(x))).detach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "stochastic"}, "rounding must be one of"),
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"capacity": Capacity()}, "capacity has no meaning"),
        ({"k": 9}, "k must be between 1 and num_experts=6"),
    ],
)
def test_what_cannot_be_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenRoundingRouter(4, 6, **options)
