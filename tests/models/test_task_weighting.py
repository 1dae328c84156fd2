"""Each weighting against its paper's formula, gradients by hand or by finite differences."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from zoo.data.tables_schema import Target
from zoo.models.task_weighting import task_weighting

TASKS = (Target("click", weight=0.5), Target("seconds", kind="regression"), Target("stars", kind="ordinal", classes=5))


class Shared(nn.Module):
    """One shared layer and a linear tower a task; the losses are squared errors of different sizes."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.bottom, self.towers = nn.Linear(4, 3).double(), nn.Linear(3, len(TASKS)).double()

    def shared_parameters(self):
        return [self.bottom.weight]

    def forward(self, x):
        errors = (self.towers(torch.tanh(self.bottom(x))) - 1) ** 2
        return {task.name: errors[:, i].mean() * 3.0**i for i, task in enumerate(TASKS)}


def inputs(step, rows=6):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(step)).double()


def given(*values):
    losses = torch.tensor(values, dtype=torch.double, requires_grad=True)
    return losses, {task.name: loss for task, loss in zip(TASKS, losses)}


def test_fixed_weights_are_the_tasks_own():
    losses, by_task = given(2.0, 3.0, 5.0)
    total = task_weighting("fixed", TASKS).double()(by_task)
    total.backward()
    assert total.item() == pytest.approx(0.5 * 2 + 3 + 5)
    assert losses.grad.tolist() == [0.5, 1.0, 1.0]


def test_uncertainty_is_the_papers_formula_with_its_gradient():
    weighting = task_weighting("uncertainty", TASKS).double()
    s = torch.tensor([0.3, -0.7, 1.1], dtype=torch.double)
    weighting.log_variance.data = s.clone()
    losses, by_task = given(2.0, 3.0, 5.0)
    total = weighting(by_task)
    total.backward()
    sigma = [math.exp(value / 2) for value in s.tolist()]
    # Classification: L / sigma^2 + log sigma; regression: L / (2 sigma^2) + log sigma.
    scales = [0.5 / sigma[0] ** 2, 1 / (2 * sigma[1] ** 2), 1 / sigma[2] ** 2]
    assert total.item() == pytest.approx(sum(c * v + math.log(x) for c, v, x in zip(scales, (2, 3, 5), sigma)))
    assert losses.grad.tolist() == pytest.approx(scales)
    # d/ds of c exp(-s) L + s/2.
    assert weighting.log_variance.grad.tolist() == pytest.approx([0.5 - c * v for c, v in zip(scales, (2, 3, 5))])
    assert list(weighting.factors().values()) == pytest.approx([scales[0] / 0.5, *scales[1:]])


def test_uncertainty_settles_where_the_variance_is_the_loss():
    weighting = task_weighting("uncertainty", TASKS).double()
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(given(2.0, 3.0, 5.0)[1]).backward()
        optimizer.step()
    # c exp(-s) L = 1/2: twice the (weighted) loss of a classification, the loss of a regression.
    assert weighting.log_variance.exp().tolist() == pytest.approx([2.0, 3.0, 10.0], rel=1e-3)


def gradnorm_objective(model, x, factor, target):
    """sum_k |G_k - target_k| with G_k by finite differences of the loss in every shared weight."""
    weight, eps = model.bottom.weight, 1e-6
    slopes = torch.zeros(len(TASKS), weight.numel(), dtype=torch.double)
    for j in range(weight.numel()):
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.view(-1)[j] += sign * eps
                own = [task.weight for task in TASKS]
                sides.append(torch.stack([w * loss for w, loss in zip(own, model(x).values())]))
                weight.view(-1)[j] -= sign * eps
        slopes[:, j] = (sides[0] - sides[1]) / (2 * eps)
    lengths = factor * slopes.norm(dim=1)
    return lengths, (lengths - target(lengths)).abs().sum()


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_descends_the_papers_objective(alpha):
    model, lr = Shared(), 0.01
    weighting = task_weighting({"name": "gradnorm", "alpha": alpha, "lr": lr}, TASKS).double()
    weighting(model(inputs(0)), model)
    first = torch.stack([t.weight * loss for t, loss in zip(TASKS, model(inputs(0)).values())]).detach()
    before, x = weighting.factor.clone(), inputs(1)
    losses = torch.stack([t.weight * loss for t, loss in zip(TASKS, model(x).values())]).detach()
    total = weighting(model(x), model)
    assert total.item() == pytest.approx((before * losses).sum().item())  # weighed by what was before the step

    pace = losses / first / (losses / first).mean()
    constant = gradnorm_objective(model, x, before, lambda lengths: lengths)[0].mean() * pace**alpha
    slope = torch.zeros(3, dtype=torch.double)
    for k in range(3):
        sides = []
        for sign in (1, -1):
            moved = before.clone()
            moved[k] += sign * 1e-4
            sides.append(gradnorm_objective(model, x, moved, lambda _: constant)[1])
        slope[k] = (sides[0] - sides[1]) / 2e-4
    expected = before - lr * slope
    torch.testing.assert_close(weighting.factor, expected * 3 / expected.sum(), rtol=1e-4, atol=1e-6)
    assert weighting.factor.sum().item() == pytest.approx(3)
    total.backward()  # the graph is still there
    assert model.bottom.weight.grad is not None


def test_gradnorm_makes_gradients_equally_long_with_alpha_0():
    model, x = Shared(), inputs(0)
    weighting = task_weighting({"name": "gradnorm", "alpha": 0.0, "lr": 0.002}, TASKS).double()

    def spread():
        lengths = gradnorm_objective(model, x, weighting.factor, lambda lengths: lengths)[0]
        return (lengths.max() / lengths.min()).item()

    start = spread()
    for _ in range(600):
        weighting(model(x), model)
    assert start > 3
    assert spread() < 1.05


@pytest.mark.parametrize("name", ["uncertainty", "gradnorm"])
def test_a_task_without_labels_in_the_batch_moves_no_weight(name):
    model, weighting = Shared(), task_weighting(name, TASKS).double()
    losses = {**model(inputs(0)), "stars": (model.bottom.weight * 0).sum()}
    weighting(losses, model).backward()
    if name == "uncertainty":
        assert weighting.log_variance.grad[2] == 0
        assert (weighting.log_variance.grad[:2] != 0).all()
    else:
        assert weighting.initial.isnan().tolist() == [False, False, True]
        assert weighting.factor.isfinite().all()
        assert weighting.factor.sum().item() == pytest.approx(3)


def test_gradnorm_rests_in_evaluation():
    model, weighting = Shared(), task_weighting("gradnorm", TASKS).double().eval()
    weighting(model(inputs(0)), model)
    assert weighting.factor.tolist() == [1, 1, 1]
    assert weighting.initial.isnan().all()


def test_gradnorm_continues_from_its_state():
    model = Shared()
    straight, stopped = (task_weighting("gradnorm", TASKS).double() for _ in range(2))
    for step in range(4):
        straight(model(inputs(step)), model)
        if step == 1:
            stopped.load_state_dict(straight.state_dict())
        if step > 1:
            stopped(model(inputs(step)), model)
    assert torch.equal(stopped.factor, straight.factor)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save((moved(rank), uncertain(rank)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def moved(rank=None):
    """The weights after three steps, on one half of every batch or on all of it."""
    model, weighting = Shared(), task_weighting("gradnorm", TASKS).double()
    for step in range(3):
        x = inputs(step, 8)
        weighting(model(x if rank is None else x[4 * rank : 4 * rank + 4]), model)
    return weighting.factor


def uncertain(rank=None):
    """The gradient of the variances where the labels of one task are all on process 0, and nobody has any of another.

    Of several processes the mean of losses and gradients is that of all rows: those of the process with labels are
    twice as large.
    """
    weighting = task_weighting("uncertainty", TASKS).double()
    weighting.log_variance.data = torch.tensor([0.3, -0.7, 1.1], dtype=torch.double)
    only = {None: 3.0, 0: 6.0, 1: 0.0}[rank]
    weighting(given(2.0, only, 0.0)[1]).backward()
    return weighting.log_variance.grad


def test_two_processes_move_the_weights_as_one_does(tmp_path):
    mp.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="fork")
    (first, one), (second, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, moved(), rtol=1e-10, atol=0)
    torch.testing.assert_close((one + two) / 2, uncertain(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("gradnrm", "unknown weighting 'gradnrm'; did you mean gradnorm"),
        ({"name": "gradnorm", "alfa": 1}, "unknown argument of weighting gradnorm 'alfa'; did you mean alpha"),
        ({"alpha": 1}, "unknown weighting 'None'"),
    ],
)
def test_a_misspelt_weighting_is_named(spec, told):
    with pytest.raises(ValueError, match=told):
        task_weighting(spec, TASKS)
