"""Towers, and what their outputs mean: losses and predictions against closed forms, row by row."""

import itertools
import math
from decimal import Decimal, localcontext

import pytest
import torch

import zoo
from zoo.data.tables_batch import TableBatch
from zoo.data.tables_schema import Dense, Schema, Target
from zoo.models.recommendation_towers import Towers, log1mexp, log_joint, predictions, task_counts, task_losses

NAN = math.nan
KINDS = (Target("click"), Target("seconds", kind="regression"), Target("stars", kind="ordinal", classes=4))
# The order of tasks is not that of what happens: click, then cart, then buy.
CHAIN = (Target("buy", given="cart"), Target("click"), Target("cart", given="click"))


@pytest.fixture(autouse=True)
def seed():
    print("seed", torch.seed())  # pytest shows it with a failure


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def cross_entropy(p, y):
    return -math.log(p) if y else -math.log(1 - p)


def draw(tasks, rows):
    """Outputs of towers, with gradients, and labels of which some are missing."""
    outputs, labels = {}, torch.empty(rows, len(tasks), dtype=torch.double)
    for i, task in enumerate(tasks):
        shape = (rows,) if task.kind != "ordinal" else (rows, task.classes - 1)
        outputs[task.name] = torch.randn(shape, dtype=torch.double).requires_grad_()
        found = torch.randn(rows) if task.kind == "regression" else torch.randint(task.classes or 2, (rows,))
        labels[:, i] = found.double()
    labels[torch.rand(labels.shape) < 0.3] = NAN
    return outputs, labels


def row_loss(task, out, y):
    if task.kind == "regression":
        return (out - y) ** 2
    if task.kind == "ordinal":
        return sum(cross_entropy(sigmoid(z), y > c) for c, z in enumerate(out))
    return cross_entropy(sigmoid(out), y)


def mean(losses, weights):
    return sum(w * loss for w, loss in zip(weights, losses)) / sum(weights) if sum(weights) else 0.0


@pytest.mark.parametrize("hidden", [(), (5,), (6, 3)], ids=str)
@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("rows", [7, 1, 0])
def test_towers_are_an_mlp_a_task_and_domain(rows, domains, hidden):
    towers = Towers(KINDS, 4, hidden, domains=domains).double()
    for thresholds in towers.thresholds.values():
        thresholds.log_steps.data.normal_()
    y = torch.randn(3, rows, 4, dtype=torch.double, requires_grad=True)
    domain = torch.randint(domains, (rows,)) if domains > 1 else None
    found, expected = towers(y, domain), {}
    for k, task in enumerate(KINDS):
        scores = []
        for b in range(rows):
            e, x = k * domains + (0 if domain is None else int(domain[b])), y[k, b]
            for weight, bias in zip(*(() if not hidden else (towers.hidden.weights, towers.hidden.biases))):
                x = (weight[e] @ x + bias[e]).clamp(min=0)
            scores.append(towers.weight[e] @ x + towers.bias[e])
        score = torch.stack(scores) if scores else y[k].sum(1)
        if task.kind == "ordinal":
            part = towers.thresholds[str(k)]
            t = [part.first[0]]
            for step in part.log_steps:
                t.append(t[-1] + step.exp())
            score = torch.stack([score - threshold for threshold in t], 1)
        expected[task.name] = score
    assert list(found) == [task.name for task in KINDS]
    inputs = [y, *towers.parameters()]
    total = [0, 0]
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
        upstream = torch.randn_like(expected[name])
        total = [s + (out[name] * upstream).sum() for s, out in zip(total, (found, expected))]
    for mine, theirs in zip(*(torch.autograd.grad(s, inputs, materialize_grads=True) for s in total)):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_classes_of_an_ordinal_task_have_probabilities_that_sum_to_one(classes):
    task = Target("stars", kind="ordinal", classes=classes)
    towers = Towers((task,), 3, ()).double()
    part = towers.thresholds["0"]

    def probabilities():
        """P(y = c) = P(y > c - 1) - P(y > c) of rows with scores, and the expected class."""
        out = towers(torch.randn(1, 9, 3, dtype=torch.double))["stars"]
        above = torch.cat([torch.ones(9, 1), out.sigmoid(), torch.zeros(9, 1)], 1)
        return above[:, :-1] - above[:, 1:], predictions((task,), {"stars": out})["stars"]

    towers.weight.data.zero_(), towers.bias.data.zero_()
    torch.testing.assert_close(probabilities()[0], torch.full((9, classes), 1 / classes).double(), rtol=1e-6, atol=0)
    for parameter in towers.parameters():
        parameter.data.normal_()
    assert part().shape == (classes - 1,)
    assert (part().diff() > 0).all()
    p, expected = probabilities()
    assert (p >= -1e-12).all()
    torch.testing.assert_close(p.sum(1), torch.ones(9).double())
    torch.testing.assert_close(expected, (p * torch.arange(classes)).sum(1))


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_means_over_the_rows_that_have_a_label(weighted):
    outputs, labels = draw(KINDS, 23)
    weight = (torch.rand(23).double() + 0.1) / 100 if weighted else None  # that sum to less than one row's
    found = task_losses(KINDS, outputs, labels, weight)
    assert list(found) == [task.name for task in KINDS]
    for i, task in enumerate(KINDS):
        rows = [b for b in range(23) if not labels[b, i].isnan()]
        losses = [row_loss(task, outputs[task.name][b].tolist(), labels[b, i].item()) for b in rows]
        shares = [1.0 if weight is None else weight[b].item() for b in rows]
        assert found[task.name].item() == pytest.approx(mean(losses, shares), rel=1e-9)
        assert task_counts(KINDS, labels, weight)[i].item() == pytest.approx(sum(shares), rel=1e-6)
        # Only the rows with a label, and the task's own outputs, get a gradient.
        slopes = torch.autograd.grad(found[task.name], outputs.values(), retain_graph=True, allow_unused=True)
        for j, slope in enumerate(slopes):
            assert (slope is None) == (i != j)
        moved = slopes[i].view(23, -1).any(1)
        assert moved.nonzero().flatten().tolist() == rows


@pytest.mark.parametrize(
    ("tasks", "esmm"), [(KINDS, False), (CHAIN, False), (CHAIN, True)], ids=["kinds", "given", "esmm"]
)
def test_gradients_of_losses_are_finite_differences(tasks, esmm):
    outputs, labels = draw(tasks, 8)
    labels[0] = 1.0
    weight = torch.rand(8).double() + 0.1

    def run(*values):
        return tuple(task_losses(tasks, dict(zip(outputs, values)), labels, weight, esmm).values())

    assert torch.autograd.gradcheck(run, tuple(outputs.values()))


def joint(rows, task, label):
    """1 where a task and all it is given happened, 0 where that is known not to be, nan where it is not known."""
    if task.given is None:
        return label[task.name]
    before = joint(rows, next(t for t in CHAIN if t.name == task.given), label)
    return 0.0 if before == 0 else before * label[task.name]


def chain_of(task):
    return [task.name] + ([] if task.given is None else chain_of(next(t for t in CHAIN if t.name == task.given)))


def every_label():
    """All 27 ways to have three labels of 0, 1 or none."""
    return torch.tensor(list(itertools.product((0.0, 1.0, NAN), repeat=3)), dtype=torch.double)


@pytest.mark.parametrize("esmm", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_given_trains_where_it_happened_or_as_esmm_on_all_rows(esmm, weighted):
    """With ESMM the loss of a conversion is that of p(ctcvr) = p(ctr) p(cvr), and none is of p(cvr) alone."""
    labels = every_label()
    outputs = {task.name: torch.randn(27, dtype=torch.double, requires_grad=True) for task in CHAIN}
    weight = torch.rand(27).double() if weighted else None
    found, counts = task_losses(CHAIN, outputs, labels, weight, esmm), task_counts(CHAIN, labels, weight, esmm)
    for i, task in enumerate(CHAIN):
        losses, shares = [], []
        for b in range(27):
            label = {t.name: labels[b, j].item() for j, t in enumerate(CHAIN)}
            p = {t.name: sigmoid(outputs[t.name][b].item()) for t in CHAIN}
            names = chain_of(task)
            if esmm:
                y, p_task = joint(labels, task, label), math.prod(p[name] for name in names)
            else:
                happened = all(label[name] == 1 for name in names[1:])
                y, p_task = label[task.name] if happened else NAN, p[task.name]
            if not math.isnan(y):
                losses.append(cross_entropy(p_task, y))
                shares.append(1.0 if weight is None else weight[b].item())
        assert found[task.name].item() == pytest.approx(mean(losses, shares), rel=1e-9)
        assert counts[i].item() == pytest.approx(sum(shares), rel=1e-6)
        slopes = torch.autograd.grad(found[task.name], outputs.values(), retain_graph=True, materialize_grads=True)
        reached = {name for name, slope in zip(outputs, slopes) if slope.any()}
        assert reached == (set(chain_of(task)) if esmm else {task.name})


def test_predictions_are_probabilities_numbers_and_expected_classes():
    tasks = (*KINDS, *CHAIN[:1], CHAIN[2])
    outputs = {task.name: draw((task,), 5)[0][task.name] for task in tasks}
    outputs["stars"] = outputs["stars"].sort(descending=True).values
    found = predictions(tasks, outputs)
    assert list(found) == ["click", "seconds", "stars", "buy", "buy_joint", "cart", "cart_joint"]
    for b in range(5):
        p = {name: sigmoid(outputs[name][b].item()) for name in ("click", "cart", "buy")}
        above = [1.0, *(sigmoid(z) for z in outputs["stars"][b].tolist()), 0.0]
        expected = {**p, "seconds": outputs["seconds"][b].item()}
        expected["stars"] = sum(c * (above[c] - above[c + 1]) for c in range(4))
        expected |= {"cart_joint": p["cart"] * p["click"], "buy_joint": p["buy"] * p["cart"] * p["click"]}
        assert {name: values[b].item() for name, values in found.items()} == pytest.approx(expected, rel=1e-9)
    narrow = predictions(tasks, {name: out.bfloat16() for name, out in outputs.items()})
    assert {values.dtype for values in narrow.values()} == {torch.float32}


@pytest.mark.parametrize("esmm", [False, True])
def test_a_batch_without_labels_of_a_task_gives_zero_with_a_gradient_of_zero(esmm):
    tasks = (*CHAIN, *KINDS[1:])
    outputs, labels = draw(tasks, 6)
    for rows, kept in ((6, labels.clone().fill_(NAN)), (0, labels[:0])):
        some = {name: out.detach()[:rows].requires_grad_() for name, out in outputs.items()}
        losses = task_losses(tasks, some, kept, esmm=esmm)
        assert [loss.item() for loss in losses.values()] == [0.0] * 5
        sum(losses.values()).backward()
        assert all((out.grad == 0).all() for out in some.values())
        assert task_counts(tasks, kept, esmm=esmm).tolist() == [0.0] * 5


def test_esmm_is_finite_for_logits_of_any_size():
    size = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4])
    click, buy = (values.clone().requires_grad_() for values in torch.cartesian_prod(size, size).T)
    tasks, labels = (Target("click"), Target("buy", given="click")), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, NAN]])
    for label in labels:
        loss = task_losses(tasks, {"click": click, "buy": buy}, label.expand(49, 2), esmm=True)["buy"]
        slopes = torch.autograd.grad(loss, (click, buy))
        assert loss.isfinite()
        assert all(slope.isfinite().all() for slope in slopes)
    assert log_joint(tasks, {"click": click, "buy": buy}, tasks[1]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_is_exact_near_zero_and_far_from_it(dtype):
    values = [-1e-30, -1e-12, -1e-3, -0.5, -0.6931, -0.6932, -1.0, -10.0, -50.0]
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    with localcontext() as context:
        context.prec = 60
        expected = [float((1 - Decimal(v).exp()).ln()) for v in x.tolist()]
        slopes = [float(-1 / (Decimal(-v).exp() - 1)) for v in x.tolist()]
    y = log1mexp(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    rel = 4 * torch.finfo(dtype).eps
    assert y.tolist() == pytest.approx(expected, rel=rel, abs=0)
    assert slope.tolist() == pytest.approx(slopes, rel=10 * rel, abs=0)


def test_a_models_losses_are_those_of_its_tasks_and_missing_labels_move_no_tower():
    schema = Schema((Dense("x"), Dense("y")), CHAIN, weight="w")
    model = zoo.create_model("recommendation/mmoe", schema=schema, esmm=True)
    labels, weight = every_label().float(), torch.rand(27) + 0.5
    batch = TableBatch(torch.arange(27), torch.randn(27, 2), None, None, None, labels, weight=weight)
    outputs = model(batch)
    for found, expected in zip(
        (model.task_losses(outputs, batch), model.predictions(outputs)),
        (task_losses(CHAIN, outputs, labels, weight, True), predictions(CHAIN, outputs)),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(model.task_counts(batch), task_counts(CHAIN, labels, weight, True))
    batch.labels[:, 0] = NAN
    batch.labels[:, 1:] = 1.0  # whoever bought is not known, and nothing else tells
    sum(model.task_losses(model(batch), batch).values()).backward()
    assert [bool(slope.any()) for slope in model.towers.bias.grad] == [False, True, True]
