from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import balance
from zoo.moe.routers import TopKRouter


def one_hot(expert: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(*expert.shape[:-1], num_experts, dtype=torch.float64).scatter(-1, expert, 1.0)


def draw(tokens: int = 23, num_experts: int = 6, k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(tokens, num_experts, dtype=torch.float64)
    probs = logits.softmax(-1)
    return logits, probs, one_hot(probs.topk(k).indices, num_experts)


def close(actual: Tensor, expected: float) -> None:
    torch.testing.assert_close(
        actual.double(), torch.tensor(float(expected), dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


UNIFORM = torch.tensor(1 / 6, dtype=torch.float64)
EVEN = one_hot(torch.tensor([[0, 1], [2, 3], [4, 5]]), 6)


def squared_cv(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / (mean**2 + 1e-10)


def cdf(value: float) -> float:
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


@pytest.mark.parametrize(("normalization", "uniform"), [("assignments", 1.0), ("tokens", 2.0)])
def test_load_balance_against_a_loop_and_at_uniform_routing(normalization: str, uniform: float) -> None:
    _, probs, selected = draw()
    tokens, num_experts = probs.shape
    total = 0.0
    for e in range(num_experts):
        f = sum(float(selected[t, e]) for t in range(tokens)) / (tokens * (2 if normalization == "assignments" else 1))
        total += f * sum(float(probs[t, e]) for t in range(tokens)) / tokens
    close(balance.load_balance(probs, selected, normalization=normalization), num_experts * total)
    even = one_hot(torch.tensor([[0, 1], [2, 3], [4, 5]]), 6)
    close(balance.load_balance(UNIFORM.expand(3, 6), even, normalization=normalization), uniform)


def test_gshard_counts_first_choices_alone() -> None:
    _, probs, _ = draw()
    first = one_hot(probs.argmax(-1, keepdim=True), 6)
    close(balance.gshard(probs, first), 6 * float((first.mean(0) * probs.mean(0)).sum()))
    close(balance.gshard(UNIFORM.expand(6, 6), torch.eye(6).double()), 1.0)


@pytest.mark.parametrize("layers", [1, 3])
def test_transformers_form(layers: int) -> None:
    """`transformers` concatenates all layers, then counts choices a token: k when uniform."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = [torch.randn(20, 8, dtype=torch.float64) for _ in range(layers)]
    mask = torch.rand(2, 10) > 0.3
    router = TopKRouter(4, 8, 2, losses={"transformers": 1.0})
    # Theirs counts in float32 whatever the logits are.
    theirs = load_balancing_loss_func(tuple(logits), 8, 2, None)
    probs = torch.cat(logits).softmax(-1)
    ours = balance.load_balance(probs, one_hot(probs.topk(2).indices, 8), normalization="tokens")
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)
    if layers == 1:
        alone = router.route(logits[0]).losses["transformers"]
        torch.testing.assert_close(alone, theirs.double(), rtol=1e-6, atol=0)
        masked = load_balancing_loss_func((logits[0],), 8, 2, mask.long())
        alone = router.route(logits[0], mask=mask).losses["transformers"]
        torch.testing.assert_close(alone, masked.double(), rtol=1e-6, atol=0)


def test_importance_and_its_form_before_the_choice() -> None:
    _, probs, selected = draw()
    gates = probs * selected
    close(balance.importance(gates), squared_cv(gates.sum(0).tolist()))
    close(balance.importance_probs(probs), squared_cv(probs.sum(0).tolist()))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_smooth_load_against_a_loop(k: int) -> None:
    logits, _, _ = draw()
    std = torch.rand_like(logits) + 0.1
    noisy = logits + torch.randn_like(logits) * std
    loads = [0.0] * 6
    for t in range(23):
        ranked = sorted(noisy[t].tolist(), reverse=True)
        for e in range(6):
            threshold = ranked[k] if noisy[t, e] > ranked[k] else ranked[k - 1]
            loads[e] += cdf((float(logits[t, e]) - threshold) / float(std[t, e]))
    selected = one_hot(noisy.topk(k).indices, 6)
    close(balance.load(logits, noisy, std, k, selected), squared_cv(loads))


def test_load_without_noise_is_the_plain_count() -> None:
    logits, _, selected = draw()
    close(balance.load(logits, logits, None, 2, selected), squared_cv(selected.sum(0).tolist()))
    everyone = torch.ones_like(logits)
    close(balance.load(logits, logits, torch.ones_like(logits), 6, everyone), 0.0)


@pytest.mark.parametrize("width", [None, 0.3])
def test_vmoe_load_has_one_threshold(width: float | None) -> None:
    logits, _, _ = draw()
    noisy = logits if width is None else logits + torch.randn_like(logits) * width
    loads = [0.0] * 6
    for t in range(23):
        threshold = sorted(noisy[t].tolist())[-2]
        for e in range(6):
            margin = float(logits[t, e]) - threshold
            loads[e] += float(margin >= 0) if width is None else cdf(margin / width)
    std = None if width is None else torch.tensor(width, dtype=torch.float64)
    close(balance.load_vmoe(logits, noisy, std, 2), squared_cv([v / 23 for v in loads]))


def test_z_loss() -> None:
    logits, _, _ = draw()
    close(balance.z(logits), sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 23)


def test_device_level_against_the_paper() -> None:
    _, probs, selected = draw(num_experts=6)
    f = 6 / (2 * 23) * selected.sum(0)
    expected = sum(float(f[d : d + 2].mean() * probs.mean(0)[d : d + 2].sum()) for d in (0, 2, 4))
    close(balance.device_level(probs, selected, 3), expected)
    close(
        balance.device_level(UNIFORM.expand(3, 6), one_hot(torch.tensor([[0, 1], [2, 3], [4, 5]]), 6), 3),
        1.0,
    )
    with pytest.raises(ValueError, match="6 experts do not split evenly over num_devices=4"):
        balance.device_level(probs, selected, 4)


def test_groups_are_judged_apart_and_averaged() -> None:
    """DeepSeek's sequence-wise loss, with sigmoid scores divided by their sum."""
    logits = torch.randn(3, 7, 8, dtype=torch.float64)
    router = TopKRouter(4, 8, 2, score="sigmoid", losses={"sequence": 0.5})
    parts = []
    for row in logits:
        scores = row.sigmoid() / row.sigmoid().sum(-1, keepdim=True)
        f = 8 / (2 * 7) * one_hot(row.topk(2).indices, 8).sum(0)
        parts.append(float((f * scores.mean(0)).sum()))
    close(router.route(logits).losses["sequence"], 0.5 * sum(parts) / 3)


@pytest.mark.parametrize("options", [{"selection_bias": True}, {"num_groups": 4, "group_topk": 1}])
def test_the_sequence_loss_counts_the_best_scores_whatever_is_chosen(options: dict[str, Any]) -> None:
    """DeepSeek-V3, eq. 18: f counts the K largest s, without bias and groups."""
    logits = torch.randn(3, 7, 8, dtype=torch.float64)
    table: dict[str, Any] = {"sequence": 1.0, "load_balance": {"weight": 1.0, "scope": "sequence"}}
    router = TopKRouter(4, 8, 2, score="sigmoid", losses=table, **options)
    if router.selection_bias is not None:
        router.selection_bias.copy_(torch.randn(8))
    routing = router.route(logits)
    chosen = (routing.dense() != 0).double().view(3, 7, 8)
    best, asked = 0.0, 0.0
    for row, taken in zip(logits, chosen):
        scores = row.sigmoid() / row.sigmoid().sum(-1, keepdim=True)
        best += float((8 / 14 * one_hot(row.topk(2).indices, 8).sum(0) * scores.mean(0)).sum()) / 3
        asked += float((8 / 14 * taken.sum(0) * scores.mean(0)).sum()) / 3
    assert best != pytest.approx(asked)
    close(routing.losses["sequence"], best)
    close(routing.losses["load_balance"], asked)
    told = TopKRouter(4, 8, 2, score="sigmoid", losses={"sequence": {"weight": 1.0, "selected": "selected"}}, **options)
    told.load_state_dict(router.state_dict())
    close(told.route(logits).losses["sequence"], asked)


@pytest.mark.parametrize("size", [4, 5, 21, 40])
def test_a_short_last_group_counts_its_own_tokens_only(size: int) -> None:
    logits = torch.randn(21, 8, dtype=torch.float64)
    table: dict[str, Any] = {name: {"weight": 1.0, "scope": "group"} for name in ("switch", "z", "importance_vmoe")}
    losses = TopKRouter(4, 8, 2, group_size=size, losses=table).route(logits).losses
    alone = [TopKRouter(4, 8, 2, losses=dict.fromkeys(table, 1.0)).route(part).losses for part in logits.split(size)]
    for name in table:
        close(losses[name], sum(float(part[name]) for part in alone) / len(alone))


def test_masked_tokens_do_not_count_whatever_they_hold() -> None:
    logits, probs, selected = draw()
    mask = torch.rand(23) > 0.4
    noisy, std = logits + 0.1, torch.ones_like(logits)
    spoilt = [torch.where(mask[:, None], v, torch.nan) for v in (logits, probs, selected, noisy, std)]
    real = [v[mask] for v in (logits, probs, selected, noisy, std)]
    functions = (
        lambda lo, p, s, n, w, m: balance.load_balance(p, s, m),
        lambda lo, p, s, n, w, m: balance.load_balance(p, s, m, normalization="tokens"),
        lambda lo, p, s, n, w, m: balance.importance(p * s, m),
        lambda lo, p, s, n, w, m: balance.importance_probs(p, m),
        lambda lo, p, s, n, w, m: balance.load(lo, n, w, 2, s, m),
        lambda lo, p, s, n, w, m: balance.load_vmoe(lo, n, w, 2, m),
        lambda lo, p, s, n, w, m: balance.z(lo, m),
        lambda lo, p, s, n, w, m: balance.device_level(p, s, 2, m),
        lambda lo, p, s, n, w, m: balance.communication(p, s, 2, None, m),
    )
    for function in functions:
        close(function(*spoilt, mask), float(function(*real, None)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_choices_may_be_said_in_any_type(dtype: torch.dtype, masked: bool) -> None:
    logits, probs, selected = draw()
    mask = torch.rand(23) > 0.4 if masked else None
    real = selected[mask] if masked else selected
    share, mean = real.sum(0) / real.sum(), (probs[mask] if masked else probs).mean(0)
    counts = real.sum(0)
    close(balance.load_balance(probs, selected.to(dtype), mask), float(6 * (share * mean).sum()))
    close(
        balance.load(logits, logits, None, 2, selected.to(dtype), mask),
        float(counts.var(correction=0)) / float(counts.mean()) ** 2,
    )
    f = real.mean(0)
    f = torch.cat([f[:3], f[3:].mean().expand(3)])
    close(balance.null_load(probs, selected.to(dtype), 3, mask), float(6 * (f * mean).sum()))
    for function in (
        lambda s: balance.device_level(probs, s, 2, mask),
        lambda s: balance.communication(probs, s, 2, None, mask),
        lambda s: balance.relu_l1(logits.relu(), s, 2, mask),
        lambda s: balance.stable_balance(logits, s, mask),
        lambda s: balance.topology(probs, s, [1, 2, 4], mask, processes=2),
    ):
        torch.testing.assert_close(function(selected.to(dtype)), function(selected.double()), rtol=1e-12, atol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    logits, _, selected = draw(tokens=7, num_experts=4)
    logits.requires_grad_()
    noise, std = torch.randn_like(logits), torch.rand_like(logits) + 0.3
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0]).bool()
    for function in (
        lambda v: balance.load_balance(v.softmax(-1), selected, mask),
        lambda v: balance.importance(v.softmax(-1) * selected, mask),
        lambda v: balance.importance_probs(v.softmax(-1), mask),
        lambda v: balance.load(v, v + noise, std, 2, selected, mask),
        lambda v: balance.load_vmoe(v, v + noise, std, 2, mask),
        lambda v: balance.z(v, mask),
        lambda v: balance.device_level(v.softmax(-1), selected, 2, mask),
        lambda v: balance.communication(v.softmax(-1), selected, 2, 1, mask),
    ):
        assert torch.autograd.gradcheck(function, logits)


def test_losses_may_count_other_choices_than_those_made() -> None:
    """With a bias, Megatron's loss counts the best scores; first choices are another option."""
    logits = torch.randn(30, 8, dtype=torch.float64)
    table: dict[str, Any] = {
        "switch": 1.0,
        "zoo.moe.balance.load_balance": {"weight": 1.0, "selected": "unbiased"},
        "load_balance": {"weight": 1.0, "selected": "first"},
    }
    router = TopKRouter(4, 8, 2, score="sigmoid", selection_bias=True, losses=table)
    router.selection_bias.copy_(torch.randn(8))  # type: ignore[union-attr]
    routing = router.route(logits)
    scores = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    choice = logits.sigmoid() + router.selection_bias  # type: ignore[operator]
    for name, expert in (
        ("switch", choice.topk(2).indices),
        ("zoo.moe.balance.load_balance", logits.topk(2).indices),
        ("load_balance", choice.topk(1).indices),
    ):
        close(routing.losses[name], float(balance.load_balance(scores, one_hot(expert, 8))))


@pytest.mark.parametrize("limit", [None, 2])
def test_communication_by_loop(limit: int | None) -> None:
    """D / (M T) times how many tokens reach a device, times the summed probability of its experts."""
    _, probs, selected = draw(k=3)
    mask = torch.rand(23) > 0.3
    tokens = [t for t in range(23) if mask[t]]
    reach = [{e // 2 for e in range(6) if selected[t, e]} for t in tokens]
    sent = [sum(d in r for r in reach) for d in range(3)]
    mean = sum(sent) / len(tokens) if limit is None else limit
    p = [sum(float(probs[t, 2 * d : 2 * d + 2].sum()) for t in tokens) / len(tokens) for d in range(3)]
    expected = sum(3 / (mean * len(tokens)) * s * q for s, q in zip(sent, p))
    close(balance.communication(probs, selected, 3, limit, mask), expected)
    close(balance.communication(UNIFORM.expand(3, 6), EVEN, 3, 1), 1.0)
    router = TopKRouter(
        4, 6, 2, num_groups=3, group_topk=2, losses={"communication": {"weight": 0.5, "num_devices": 3}}
    )
    logits = torch.randn(30, 6, dtype=torch.float64)
    routing = router.route(logits)
    chosen = (routing.dense() > 0).double()
    close(routing.losses["communication"], 0.5 * float(balance.communication(logits.softmax(-1), chosen, 3)))
    with pytest.raises(ValueError, match="communication: 6 experts do not split evenly over num_devices=4"):
        balance.communication(probs, selected, 4)


def test_loss_free_update_moves_each_bias_towards_the_mean_load() -> None:
    counts = torch.tensor([10, 0, 5, 5])
    close_to = balance.updated_bias(torch.zeros(4), counts, 0.01).tolist()
    assert close_to == pytest.approx([-0.01, 0.01, 0.0, 0.0])
    router = TopKRouter(4, 4, 1, selection_bias=True, bias_update_rate=0.5)
    logits = torch.tensor([[9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 0]])
    router.route(logits[:2])
    router.route(logits[2:])
    assert router.load_since_update.tolist() == [2, 1, 1, 0]  # type: ignore[union-attr]
    balance.update_biases(router)
    assert router.selection_bias.tolist() == [-0.5, 0.0, 0.0, 0.5]  # type: ignore[union-attr]
    balance.update_biases(router)  # nothing was seen since
    assert router.selection_bias.tolist() == [-0.5, 0.0, 0.0, 0.5]  # type: ignore[union-attr]
    router.eval().route(logits)  # evaluation does not count
    balance.update_biases(router)
    assert router.selection_bias.tolist() == [-0.5, 0.0, 0.0, 0.5]  # type: ignore[union-attr]


def test_loss_free_update_evens_out_a_skewed_load() -> None:
    torch.manual_seed(0)
    router = TopKRouter(16, 8, 2, score="sigmoid", selection_bias=True, bias_update_rate=0.01)
    skew = torch.linspace(-1, 1, 8)

    def spread() -> float:
        counts = router.route(torch.randn(4000, 8) * 0.5 + skew).counts.double()
        return float(counts.max() / counts.mean())

    before = spread()
    for _ in range(60):
        router.route(torch.randn(500, 8) * 0.5 + skew)
        balance.update_biases(router)
    assert before > 2
    assert spread() < 1.2


def test_unknown_normalisation_is_named() -> None:
    _, probs, selected = draw()
    with pytest.raises(ValueError, match="'assignments' or 'tokens', got 'mean'"):
        balance.load_balance(probs, selected, normalization="mean")


def test_mutual_information_by_loop() -> None:
    probs = torch.randn(3, 20, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    mask = torch.rand(3, 20) > 0.3
    expected = torch.tensor(0.0).double()
    for g in range(3):
        rows = [probs[g, t] for t in range(20) if mask[g, t]]
        mean = sum(rows) / len(rows)
        entropies = [-(p * p.log()).sum() for p in (mean, *rows)]
        expected = expected - (entropies[0] - sum(entropies[1:]) / len(rows)) / 3
    found = balance.mutual_information(probs, mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, probs)[0] for loss in (found, expected)))
    sure = torch.eye(4).repeat(3, 1)
    torch.testing.assert_close(balance.mutual_information(sure), -torch.tensor(4.0).log())
    assert balance.mutual_information(torch.full((6, 4), 0.25)).abs() < 1e-6


def test_task_mutual_information_by_loop() -> None:
    """sum_{e, task} P(e, task) log(P(e, task) / (P(e) P(task))), tasks alike."""
    probs = torch.randn(40, 5, dtype=torch.float64).softmax(-1).requires_grad_()
    task, mask = torch.randint(3, (40,)), torch.rand(40) > 0.3
    given = [probs[(task == m) & mask].mean(0) for m in range(3)]
    mean = sum(given) / 3
    expected = -sum((p / 3 * (p / mean).log()).sum() for p in given)
    found = balance.task_mutual_information(probs, task, 4, mask)  # nobody has task 3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    grads = [torch.autograd.grad(loss, probs)[0] for loss in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)
