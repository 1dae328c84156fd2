"""Mixture of depths: which tokens go through a block, with what weight, and what the others see of it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.moe import record, telemetry
from zoo.moe.depth import DepthRouter, MixtureOfDepths

DIM = 6


class Attention(nn.Module):
    """One causal head and a linear map: what a token becomes depends on the tokens that come with it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Attend to what is here, and add the positions."""
        scores = self.query(x) @ x.transpose(1, 2)
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if mask is not None:
            allowed = allowed & mask[:, None, :]
            allowed = allowed | torch.eye(x.shape[1], dtype=torch.bool)
        out = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ self.value(x)
        return out if position_ids is None else out + position_ids.unsqueeze(-1)


def layer(capacity: float = 0.4, residual: bool = False, **options: Any) -> MixtureOfDepths:
    torch.manual_seed(0)
    made = MixtureOfDepths(Attention(), DepthRouter(DIM, capacity, **options), residual=residual).double()
    for parameter in made.parameters():
        parameter.data.normal_(std=0.5)
    return made


def by_loop(made: MixtureOfDepths, x: Tensor, chosen: list[list[int]], **positions: Any) -> Tensor:
    """Each sequence apart: the chosen tokens through the block, each result times its score and added."""
    out = []
    for b, indices in enumerate(chosen):
        rows = list(x[b])
        if indices:
            kept = x[b, indices]
            context = {name: value[b : b + 1, indices] for name, value in positions.items()}
            update = made.block(kept[None], **context)[0]
            update = update - kept if made.residual else update
            for place, i in enumerate(indices):
                rows[i] = x[b, i] + (made.router.weight[0] @ x[b, i]) * update[place]  # type: ignore[index]
        out.append(torch.stack(rows))
    return torch.stack(out)


def largest(made: MixtureOfDepths, x: Tensor, places: int) -> list[list[int]]:
    scores = x @ made.router.weight[0]  # type: ignore[index]
    return [sorted(sorted(range(x.shape[1]), key=lambda i: -row[i].item())[:places]) for row in scores]


def same_with_gradients(made: MixtureOfDepths, x: Tensor, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected)
    variables = (x, made.router.weight, *made.block.parameters())
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), variables) for out in (found, expected))):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("capacity", "places"), [(0.4, 4), (0.125, 2), (1.0, 10), (0.31, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_the_largest_scores_go_through_and_count_by_their_score(
    capacity: float, places: int, residual: bool, training: bool
) -> None:
    made = layer(capacity, residual).train(training)
    x = torch.randn(3, 10, DIM, dtype=torch.float64, requires_grad=True)
    positions = torch.rand(3, 10, dtype=torch.float64)
    expected = by_loop(made, x, largest(made, x, places), position_ids=positions)
    same_with_gradients(made, x, made(x, position_ids=positions), expected)


@pytest.mark.parametrize("sampling", ["loss", "predictor"])
def test_sampling_decides_for_each_token_by_itself(sampling: Any) -> None:
    made = layer(sampling=sampling).eval()
    router: Any = made.router
    x = torch.randn(5, 8, DIM, dtype=torch.float64, requires_grad=True)
    odds = x @ router.weight[0] if sampling == "loss" else router.predictor(x).squeeze(-1)
    chosen = [[i for i in range(8) if odds[b, i] > 0] for b in range(5)]
    assert len({len(c) for c in chosen}) > 1
    y = made(x)
    same_with_gradients(made, x, y, by_loop(made, x, chosen))
    changed = x.detach().clone()
    changed[:, 5:] = torch.randn(5, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(made(changed)[:, :5], y[:, :5])


def test_the_largest_scores_are_no_causal_choice() -> None:
    made, x = layer(), torch.randn(1, 8, DIM, dtype=torch.float64)
    with pytest.warns(UserWarning, match="depends on later ones"):
        made.router(x, causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.router(x, causal=True)
        layer(sampling="loss").router(x, causal=True)


@pytest.mark.parametrize("sampling", ["loss", "predictor"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_cross_entropy_on_being_chosen(sampling: Any, masked: bool) -> None:
    made = layer(sampling=sampling, loss_weight=0.3)
    router: Any = made.router
    x = torch.randn(2, 10, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 10, dtype=torch.bool)
    if masked:
        mask[1, 6:] = False
    scores = x @ router.weight[0]
    odds = scores if sampling == "loss" else router.predictor(x.detach()).squeeze(-1)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(2):
        real = [i for i in range(10) if mask[b, i]]
        chosen = sorted(real, key=lambda i: -scores[b, i].item())[:4]
        for i in real:
            p = 1 / (1 + torch.exp(-odds[b, i]))
            total = total - torch.log(p if i in chosen else 1 - p)
    expected = 0.3 * total / mask.sum()
    found = router(x, **({"mask": mask} if masked else {})).losses["depth"]
    torch.testing.assert_close(found, expected)
    variables = (x, *router.parameters())
    for a, b in zip(*(torch.autograd.grad(loss, variables, allow_unused=True) for loss in (found, expected))):
        assert (a is None) == (b is None)
        torch.testing.assert_close(a, b)
    if sampling == "predictor":  # neither the tokens nor the scores learn from it
        assert torch.autograd.grad(router(x).losses["depth"], (x, router.weight), allow_unused=True) == (None, None)
    assert router.eval()(x).losses == {}


@pytest.mark.parametrize("sampling", [None, "loss", "predictor"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_never_chosen(sampling: Any, training: bool) -> None:
    made = layer(0.5, sampling=sampling).train(training)
    mask = torch.tensor([[True] * 8, [True] * 3 + [False] * 5, [False] * 8])
    outs, grads = [], []
    base = torch.randn(3, 8, DIM, dtype=torch.float64)
    for filler in (float("nan"), 5.0):
        x = base.where(mask[..., None], filler).requires_grad_()
        made.zero_grad()
        with record(made) as step:
            y = made(x, mask=mask)
        torch.testing.assert_close(y[~mask], x[~mask], equal_nan=True)  # it passes by
        (y[mask].square().sum() + sum(step.losses().values())).backward()
        outs.append(y[mask].detach())
        grads.append([p.grad.clone() for p in made.parameters() if p.grad is not None])
        (routing,) = step.routings[""]
        assert not telemetry.kept_per_token(routing)[~mask.flatten()].any()
    torch.testing.assert_close(*outs)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()
    if sampling is None:
        lone = made(base[1:2, :3])  # three tokens alone: two of them chosen, where with padding all three are
        assert telemetry.kept_per_token(routing).view(3, 8).sum(1).tolist() == [4, 3, 0]
        assert lone.shape == (1, 3, DIM)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("sampling", [None, "loss", "predictor"])
@pytest.mark.parametrize("training", [True, False])
def test_no_token_and_one_token(shape: tuple[int, int], sampling: Any, training: bool) -> None:
    made = layer(sampling=sampling).train(training)
    x = torch.randn(*shape, DIM, dtype=torch.float64, requires_grad=True)
    with record(made) as step:
        y = made(x)
    assert y.shape == x.shape
    (y.sum() + sum(step.losses().values())).backward()
    assert x.grad is not None


def test_telemetry_and_state() -> None:
    made, x = layer(sampling="predictor"), torch.randn(4, 10, DIM, dtype=torch.float64)
    with record(made) as step:
        y = made(x)
    (routing,) = step.routings[""]
    assert telemetry.kept_per_token(routing).view(4, 10).sum(1).tolist() == [4] * 4
    assert telemetry.load(routing).tolist() == [1.0]
    assert telemetry.drop_rate(routing).item() == 0
    with pytest.raises(ValueError, match="carries no probabilities"):
        telemetry.entropy(routing)
    other = layer(sampling="predictor")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x), y)
    assert "capacity=0.4, sampling='predictor'" in repr(made)


def step_of(made: MixtureOfDepths, run: Any, x: Tensor) -> list[Tensor]:
    made.zero_grad()
    with record(made) as step:
        y = run(x)
        losses = step.losses()
        (y.square().sum() + sum(losses.values())).backward()
    assert [len(calls) for calls in step.routings.values()] == [1]
    return [y.detach(), *losses.values(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]


@pytest.mark.parametrize("sampling", ["loss", "predictor"])
def test_compiled_and_checkpointed_it_does_the_same(sampling: Any) -> None:
    torch._dynamo.reset()
    made, x = layer(sampling=sampling), torch.randn(2, 10, DIM, dtype=torch.float64)
    expected = step_of(made, made, x)
    for run in (
        torch.compile(made, backend="aot_eager"),
        lambda x: checkpoint(made, x, use_reentrant=False),
    ):
        for a, b in zip(step_of(made, run, x), expected):
            torch.testing.assert_close(a, b)


def test_it_learns_which_tokens_need_the_block() -> None:
    """Half of the tokens are to be changed; a router that cannot see them would leave half of the error."""
    torch.manual_seed(0)
    x = torch.randn(16, 12, DIM)
    needs = torch.stack([torch.randperm(12) < 6 for _ in range(16)])
    x[..., 0] = 3.0 * needs - 1.5
    change = torch.where(needs[..., None], x @ torch.randn(DIM, DIM), 0)
    made = MixtureOfDepths(nn.Linear(DIM, DIM), DepthRouter(DIM, 0.5, sampling="loss"))
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    for _ in range(400):
        with record(made) as step:
            loss = (made(x) - x - change).square().mean() + sum(step.losses().values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = {}
    for training in (True, False):
        with torch.no_grad():
            error[training] = ((made.train(training)(x) - x - change).square().mean() / change.square().mean()).item()
    assert error[True] < 0.25
    assert error[False] < 0.25  # and sampling agrees with the choice


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DepthRouter(3, 0.0), r"capacity must be in \(0, 1\]"),
        (lambda: DepthRouter(3, sampling="random"), "sampling must be None"),  # type: ignore[arg-type]
        (lambda: DepthRouter(3)(torch.randn(4, 3)), r"expected tokens as \[B, S, D\], got \[4, 3\]"),
        (lambda: DepthRouter(3)(torch.randn(2, 4, 5)), r"expected tokens \[B, S, 3\], got \[2, 4, 5\]"),
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampling", [None, "loss"])
def test_how_many_go_through_is_known_without_a_look(sampling: Any) -> None:
    """A GPU's host would wait for it; the meta device, which has no values, cannot look."""
    made = MixtureOfDepths(nn.Linear(DIM, DIM), DepthRouter(DIM, 0.4, sampling=sampling)).to("meta")
    assert made(torch.empty(3, 7, DIM, device="meta")).shape == (3, 7, DIM)
