"""Levels of experts, sub-network routing and experts of domains, against the papers' formulas row by row in float64."""

import math

import pytest
import torch

import zoo
from zoo.data.tables_schema import Dense, Schema, Target
from zoo.models.recommendation_levels import Levels
from zoo.models.recommendation_m3oe import M3oE
from zoo.models.recommendation_snr import HardConcreteRouter, SNRTrans
from zoo.moe import record

DIM = 6


@pytest.fixture(autouse=True)
def seed():
    print("seed", torch.seed())  # pytest shows it with a failure


def relu(x):
    return x.clamp(min=0)


def mlp(stack, e, x):
    """relu(W x + b) of every layer of expert e, for one row."""
    for weight, bias in zip(stack.weights, stack.biases):
        x = relu(weight[e] @ x + bias[e])
    return x


def softmax(logits):
    return logits.exp() / logits.exp().sum()


def draw(rows):
    return torch.randn(rows, DIM, dtype=torch.double, requires_grad=True)


def check(found, expected, inputs):
    """Values and gradients."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    upstream = torch.randn_like(expected)
    pairs = (
        torch.autograd.grad(y, inputs, upstream, retain_graph=True, materialize_grads=True) for y in (found, expected)
    )
    for mine, theirs in zip(*pairs):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def ple(sharing, x, tasks, own, shared):
    """g^k_j = softmax(W g^k_(j-1)) [own experts; shared experts], the shared module over all of them (RecSys 2020)."""
    state = [x] * (tasks + 1)
    for level in sharing.levels:
        blocks = [
            [mlp(level.experts, k * own + i, state[k]) for i in range(own if k < tasks else shared)]
            for k in range(tasks + 1)
        ]
        selected = [blocks[k] + blocks[tasks] for k in range(tasks)] + [[e for block in blocks for e in block]]
        after = []
        for k, gate in enumerate(level.gates):
            w = softmax(gate.router.weight @ state[k])
            assert len(w) == len(selected[k])
            after.append(sum(w[i] * s for i, s in enumerate(selected[k])))
        state = after
    return torch.stack(state)


def adatt(sharing, x, tasks, own, shared):
    """f_t = softmax(W h_t) [all experts] + v_t [own experts], v_t = 1 where all have one (KDD 2023, section 4)."""
    state = [x] * (tasks + 1)
    for level in sharing.levels:
        blocks = [
            [mlp(level.experts, k * own + i, state[k]) for i in range(own if k < tasks else shared)]
            for k in range(tasks + 1)
        ]
        after = []
        for k, gate in enumerate(level.gates):
            w, v = softmax(gate.router.weight @ state[k]), None if level.own is None else level.own[k]
            fused = sum(w[i] * s for i, s in enumerate(e for block in blocks for e in block))
            after.append(fused + sum(s if v is None else v[i] * s for i, s in enumerate(blocks[k])))
        state = after
    return torch.stack(state)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(("tasks", "own", "shared"), [(2, 2, 1), (3, 1, 2), (1, 1, 1), (2, 1, 0), (2, 3, 0)])
@pytest.mark.parametrize(("sees", "formula"), [("own", ple), ("all", adatt)], ids=["cgc and ple", "adatt"])
def test_levels_compute_their_papers_formulas(sees, formula, tasks, own, shared, levels):
    sharing = Levels(DIM, tasks, own, shared, (5, 4), levels, sees, "DenseRouter").double()
    x = draw(4)
    expected = torch.stack([formula(sharing, row, tasks, own, shared) for row in x], 1)
    check(sharing(x), expected, [x, *sharing.parameters()])
    # The shared module has a gate on every level but the last, where no tower would see it.
    assert [len(level.gates) for level in sharing.levels] == [tasks + (shared > 0)] * (levels - 1) + [tasks]
    for level in sharing.levels:
        widths = [gate.router.num_experts for gate in level.gates]
        all_of_them = tasks * own + shared
        assert widths[:tasks] == [own + shared if sees == "own" else all_of_them] * tasks
        assert set(widths[tasks:]) <= {all_of_them}
        assert (level.own is not None) == (sees == "all" and max(own, shared) > 1)
    assert sharing(x[:0]).shape == (tasks, 0, 4)
    assert sharing.last_experts() is sharing.levels[-1].experts
    assert sharing.task_gates() == list(sharing.levels[-1].gates)


def test_sparse_gates_of_levels_weigh_the_experts_they_choose():
    router = {"name": "TopKRouter", "k": 1}
    sharing = Levels(DIM, 2, 2, 1, (4,), 1, "own", router).double()
    x, (level,) = draw(7), sharing.levels
    rows = []
    for k, gate in enumerate(level.gates):
        for row in x:
            w = softmax(gate.router.weight @ row)
            best = int(w.argmax())
            rows.append(w[best] * mlp(level.experts, [2 * k, 2 * k + 1, 4][best], row))
    check(sharing(x), torch.stack(rows).view(2, 7, 4), [x, *sharing.parameters()])


def test_tasks_of_cgc_do_not_reach_each_others_experts():
    sharing = Levels(DIM, 2, 1, 1, (16,), 1, "own", "DenseRouter").double()
    sharing(draw(20))[0].sum().backward()
    slopes = sharing.levels[0].experts.weights[0].grad
    assert [bool(slope.any()) for slope in slopes] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "levels", "sees", "experts"),
    [
        ("cgc", 1, "own", 6),
        ("ple", 2, "own", 6),
        ("adatt", 2, "all", 4),
        ("snr_trans", 2, None, 4),
        ("m3oe", 0, None, 4),
    ],
)
def test_models_by_name_have_their_levels_and_a_gate_a_task(name, levels, sees, experts):
    schema = Schema(tuple(Dense(f"x{i}") for i in range(DIM)), (Target("a"), Target("b")))
    model = zoo.create_model(f"recommendation/{name}", schema=schema)
    if sees is not None:
        assert [level.experts.num_experts for level in model.sharing.levels] == [experts] * levels
        assert [level.residual for level in model.sharing.levels] == [sees == "all"] * levels
    elif levels:
        assert [own.num_experts for own in model.sharing.subnetworks] == [experts] * levels
    assert list(model.task_gates()) == ["a", "b"]
    assert len(set(model.task_gates().values())) == 2
    last = model.sharing.last_experts()
    assert model.shared_parameters() == [last.weights[-1], last.biases[-1]]


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_snr_trans_adds_up_gated_transformations(levels, training):
    """Input j of what comes next is sum_i z_ij W_ij u_i (AAAI 2019); z as the gates drew it."""
    tasks, count = 2, 3
    sharing = SNRTrans(DIM, tasks, count, (5, 4), levels).double().train(training)
    x = draw(5)
    with record(sharing) as step:
        found = sharing(x)
    fed = [[row] * count for row in x]
    for level, (subnetworks, connections) in enumerate(zip(sharing.subnetworks, sharing.connections)):
        z = [step.routings[f"connections.{level}.gates.{j}"][0].dense() for j in range(len(connections.gates))]
        assert len(z) == (tasks if level == levels - 1 else count)
        assert all(torch.equal(own, own[:1].expand_as(own)) for own in z)  # one for all rows
        for b in range(5):
            u = [mlp(subnetworks, i, fed[b][i]) for i in range(count)]
            # W as a matrix applied from the left is the transpose of what multiplies rows.
            fed[b] = [sum(z[j][b, i] * connections.weight[j, i].T @ u[i] for i in range(count)) for j in range(len(z))]
    expected = torch.stack([torch.stack(own) for own in fed], 1)
    check(found, expected, [x, *sharing.parameters()])
    if not training:
        assert torch.equal(sharing(x), found)
    assert sharing(x[:0]).shape == (tasks, 0, 4)
    assert sharing.last_experts() is sharing.subnetworks[-1]
    assert sharing.task_gates() == list(sharing.connections[-1].gates)


BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def hard_concrete(count, log_alpha, **options):
    router = HardConcreteRouter(3, count, **options).double()
    router.log_alpha.data.fill_(log_alpha)
    return router


@pytest.mark.parametrize("log_alpha", [-1.5, 0.0, 2.0])
def test_gates_follow_the_hard_concrete_distribution(log_alpha):
    """P(z <= c) = sigmoid(beta logit((c - gamma) / (zeta - gamma)) - log alpha) for 0 <= c < 1 (1712.01312)."""
    count = 20_000
    router = hard_concrete(count, log_alpha)
    routing = router(torch.randn(1, 3, dtype=torch.double))
    z = routing.dense()[0]
    assert ((z >= 0) & (z <= 1)).all()
    for c in (0.0, 0.1, 0.5, 0.9, 1 - 1e-12):
        s = (c - GAMMA) / (ZETA - GAMMA)
        p = 1 / (1 + math.exp(log_alpha - BETA * math.log(s / (1 - s))))
        share = (z <= c).double().mean().item()
        assert share == pytest.approx(p, abs=6 * math.sqrt(p * (1 - p) / count))
    # The expected L0 is what of this lies above 0.
    above = 1 - 1 / (1 + math.exp(log_alpha - BETA * math.log(-GAMMA / ZETA)))
    assert routing.losses["l0"].item() == pytest.approx(1e-4 * count * above, rel=1e-9)


def test_the_gradient_of_gates_is_that_of_finite_differences():
    router = HardConcreteRouter(3, 6, l0=0.3).double()
    log_alpha = torch.linspace(-0.3, 0.3, 6, dtype=torch.double, requires_grad=True)
    start = torch.seed()

    def run(log_alpha):
        torch.manual_seed(start)  # the same u
        routing = torch.func.functional_call(router, {"log_alpha": log_alpha}, (torch.zeros(2, 3),))
        return routing.dense(), routing.losses["l0"]

    assert torch.autograd.gradcheck(run, log_alpha)


def test_gates_are_still_in_evaluation_and_cost_nothing():
    router = hard_concrete(5, 0.0).eval()
    router.log_alpha.data = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], dtype=torch.double)
    s = 1 / (1 + (-router.log_alpha).exp())
    routing = router(torch.randn(4, 3, dtype=torch.double))
    torch.testing.assert_close(routing.dense(), (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1).expand(4, 5))
    assert routing.dense()[0, [0, 4]].tolist() == [0.0, 1.0]
    assert routing.losses == {}
    assert hard_concrete(5, 0.0, l0=0.0)(torch.zeros(1, 3)).losses == {}


def m3oe(sharing, x, domain, task):
    """shared + a_d domain + a_t task for one row (SIGIR 2024), with layers linear, layer norm, ReLU."""

    def layer(stack, e, x):
        for weight, bias, norm in zip(stack.weights, stack.biases, stack.norms):
            z = weight[e] @ x + bias[e]
            z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()
            x = relu(z * norm.weight[e] + norm.bias[e])
        return x

    def balanced(experts, mine, keep):
        outputs = [layer(experts, e, h) for e in range(experts.num_experts)]
        others = [f for e, f in enumerate(outputs) if e != mine]
        return keep * outputs[mine] + ((1 - keep) * sum(others) / len(others) if others else 0)

    a_d, a_t, c_d, c_t = (
        1 / (1 + (-number).exp())
        for number in (sharing.weigh_domain, sharing.weigh_task, sharing.keep_domain, sharing.keep_task)
    )
    star = x @ (sharing.shared_weight * sharing.domain_weight[domain])
    star = star + sharing.shared_bias + sharing.domain_bias[domain]
    h = layer(sharing.layer, 0, star) + layer(sharing.skip, 0, x)
    gate = softmax(sharing.gates[task * sharing.num_domains + domain].router.weight @ h.detach())
    shared = sum(gate[e] * layer(sharing.experts, e, h) for e in range(len(gate)))
    by_domain, by_task = (
        balanced(*own) for own in ((sharing.domain_experts, domain, c_d), (sharing.task_experts, task, c_t))
    )
    return shared + a_d * by_domain + a_t * by_task


@pytest.mark.parametrize(("tasks", "domains"), [(2, 3), (3, 1), (1, 2), (1, 1)])
def test_m3oe_fuses_shared_domain_and_task_experts(tasks, domains):
    sharing = M3oE(DIM, tasks, domains, 3, (7, 5), (6, 4), "DenseRouter").double()
    for name, parameter in sharing.named_parameters():
        if "norms" in name or parameter.dim() == 0 or "bias" in name:
            parameter.data.add_(torch.randn_like(parameter) / 2)
    x, domain = draw(6), torch.randint(domains, (6,))
    expected = torch.stack(
        [torch.stack([m3oe(sharing, row, d, k) for k in range(tasks)]) for row, d in zip(x, domain)], 1
    )
    check(sharing(x, domain), expected, [x, *sharing.parameters()])
    assert sharing(x[:0], domain[:0]).shape == (tasks, 0, 4)
    assert sharing.task_gates() == [sharing.gates[k * domains] for k in range(tasks)]
    assert sharing.domain_gates() == [[sharing.gates[k * domains + d] for d in range(domains)] for k in range(tasks)]
    assert sharing.last_experts() is sharing.experts
    if domains == 1:
        assert torch.equal(sharing(x), sharing(x, domain))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Levels(4, 2, 1, 1, (3,), 0, "own", "DenseRouter"), "num_levels must be at least 1, got 0"),
        (lambda: Levels(4, 2, 0, 1, (3,), 1, "own", "DenseRouter"), "task_experts must be at least 1, got 0"),
        (lambda: Levels(4, 2, 1, -1, (3,), 1, "own", "DenseRouter"), "shared_experts must be at least 0, got -1"),
        (lambda: SNRTrans(4, 2, 3, (3,), 0), "num_levels must be at least 1, got 0"),
        (lambda: HardConcreteRouter(4, 2, l0=-1.0), "l0 must be at least 0, got -1.0"),
        (lambda: M3oE(4, 2, 3, 3, (7,), (6,), "DenseRouter"), r"two widths in bottom_dims, got \[7\]"),
    ],
)
def test_what_does_not_fit_is_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()
