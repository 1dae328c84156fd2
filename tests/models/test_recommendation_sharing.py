"""What tasks share, against the papers' formulas: row by row and expert by expert, in float64."""

import pytest
import torch

import zoo
from zoo.data.tables_batch import TableBatch
from zoo.data.tables_schema import Dense, Schema, Target
from zoo.moe import record

DIM = 7
TASKS = ("watch", "like", "share")
SCHEMA = Schema(tuple(Dense(f"x{i}") for i in range(DIM)), tuple(Target(name, kind="regression") for name in TASKS))


@pytest.fixture(autouse=True)
def seed():
    print("seed", torch.seed())  # pytest shows it with a failure


def mlp(stack, e, x):
    """relu(W x + b) of every layer of expert e, for one row."""
    for weight, bias in zip(stack.weights, stack.biases):
        x = (weight[e] @ x + bias[e]).clamp(min=0)
    return x


def softmax(logits):
    return logits.exp() / logits.exp().sum()


def shared_bottom(sharing, x, k):
    return mlp(sharing.experts, 0, x)


def single_task(sharing, x, k):
    return mlp(sharing.experts, k, x)


def multi_gate(sharing, x, k, weights):
    """f^k(x) = sum_i g^k(x)_i f_i(x): KDD 2018, equation 6."""
    gate = sharing.moe.gates[0 if sharing.one_gate else k].router
    g = weights(gate, x)
    return sum(g[i] * mlp(sharing.moe.experts, i, x) for i in range(len(g)))


def linear_gate(gate, x):
    """softmax(W x): equation 7."""
    return softmax(gate.weight @ x)


def top_k_gate(gate, x):
    """The k largest of softmax(W x), the rest 0."""
    g = softmax(gate.weight @ x)
    return torch.stack([p if (g > p).sum() < gate.k else p * 0 for p in g])


def dselect_k_gate(gate, x):
    """sum_k softmax(w)_k r(z^k), r(z)_i the product of S(z_j) where bit j of i is set, 1 - S(z_j) where not."""
    share = softmax(gate.w_weight @ x + gate.w_bias)
    z = (gate.z_weight @ x + gate.z_bias).view(gate.k, gate.bits)
    g = []
    for i in range(gate.num_experts):
        code = format(i, f"0{gate.bits}b")
        selected = 0
        for k in range(gate.k):
            r = share[k]
            for j, bit in enumerate(code):
                t = z[k, j].clamp(-gate.gamma / 2, gate.gamma / 2)
                step = -2 * t**3 / gate.gamma**3 + 3 * t / (2 * gate.gamma) + 0.5
                r = r * (step if bit == "1" else 1 - step)
            selected = selected + r
        g.append(selected)
    return torch.stack(g)


def gated(weights):
    return lambda sharing, x, k: multi_gate(sharing, x, k, weights)


EXPERTS = {"num_experts": 6, "expert_dims": (5, 3)}
MODELS = {
    "shared_bottom": ({"bottom_dims": (9, 4)}, shared_bottom),
    "single_task": ({"bottom_dims": (9, 4)}, single_task),
    "omoe": (EXPERTS, gated(linear_gate)),
    "mmoe": (EXPERTS, gated(linear_gate)),
    "dselect_k_mmoe": (EXPERTS, gated(dselect_k_gate)),
    "sparse_mmoe": (EXPERTS, gated(top_k_gate)),
}


def build(name, **arguments):
    model = zoo.create_model(f"recommendation/{name}", schema=SCHEMA, **arguments).double()
    for parameter_name, parameter in model.named_parameters():
        if "z_weight" in parameter_name:
            parameter.data.mul_(60)  # so that some selectors are at the ends of the smooth step
    return model


def batch(x):
    labels = torch.randn(len(x), len(TASKS), dtype=torch.double)
    return TableBatch(torch.arange(len(x)), x, None, None, None, labels)


def by_formula(model, x, sees):
    """y_k = h^k(f^k(x)) of every task, h^k a tower: KDD 2018, equation 5."""
    towers, found = model.towers, {}
    for k, name in enumerate(TASKS):
        scores = []
        for row in x:
            y = sees(model.sharing, row, k)
            y = y if towers.hidden is None else mlp(towers.hidden, k, y)
            scores.append(towers.weight[k] @ y + towers.bias[k])
        found[name] = torch.stack(scores) if scores else x.new_zeros(0, requires_grad=True)
    return found


def check(model, x, found, expected):
    """Outputs, and the gradients of all parameters and of the inputs."""
    assert list(found) == list(expected) == list(TASKS)
    found, expected = (torch.stack(list(outputs.values())) for outputs in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    upstream, inputs = torch.randn_like(expected), [x, *model.parameters()]
    pairs = (torch.autograd.grad(y, inputs, upstream, materialize_grads=True) for y in (found, expected))
    for mine, theirs in zip(*pairs):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("towers", [(4,), (5, 3), ()], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [5, 1, 0])
def test_models_compute_their_papers_formulas(name, towers, rows):
    arguments, sees = MODELS[name]
    model = build(name, tower_dims=towers, **arguments)
    x = torch.randn(rows, DIM, dtype=torch.double, requires_grad=True)
    check(model, x, model(batch(x)), by_formula(model, x, sees))


def test_a_gate_that_asks_for_few_of_many_experts_changes_nothing_but_the_work():
    model = build("mmoe", num_experts=20, expert_dims=(4,), router={"name": "TopKRouter", "k": 2})
    x = torch.randn(6, DIM, dtype=torch.double, requires_grad=True)
    computed = []
    model.sharing.moe.experts.register_forward_hook(lambda module, inputs, output: computed.append(output.shape))
    check(model, x, model(batch(x)), by_formula(model, x, gated(top_k_gate)))
    assert len(computed) == 1
    assert computed[0][0] <= 6 * 2 * len(TASKS)


@pytest.mark.parametrize("name", ["single_task", "mmoe"])
def test_a_task_moves_only_what_it_shares(name):
    model = build(name)
    outputs = model(batch(torch.randn(20, DIM, dtype=torch.double)))
    model.zero_grad()
    outputs["like"].sum().backward()
    for k in range(len(TASKS)):
        own = [model.towers.weight.grad[k], model.towers.hidden.weights[0].grad[k]]
        if name == "single_task":
            own += [part.grad[k] for part in model.sharing.experts.parameters()]
        else:
            gate = model.sharing.moe.gates[k].router.weight.grad
            own.append(torch.zeros(1) if gate is None else gate)
        assert all(bool(slope.any()) == (k == 1) for slope in own)


def test_default_sizes_are_those_of_the_papers_synthetic_experiment():
    """Section 5.1: the experts and towers of MMoE have 100*16*8 + 16*8*2 weights; a bottom of 113 has as many."""
    multi, bottom = (zoo.create_model(f"recommendation/{name}") for name in ("mmoe", "shared_bottom"))
    weights = multi.sharing.moe.experts.weights[0].numel() + multi.towers.hidden.weights[0].numel()
    assert weights == 13056
    shared = bottom.sharing.experts.weights[0].numel() + bottom.towers.hidden.weights[0].numel()
    assert shared == 113 * (100 + 8 * 2)
    assert round(13056 / (100 + 8 * 2)) == bottom.sharing.out_dim
    assert [gate.router.weight.shape for gate in multi.sharing.moe.gates] == [(8, 100), (8, 100)]
    assert len(zoo.create_model("recommendation/omoe").sharing.moe.gates) == 1


@pytest.mark.parametrize("name", MODELS)
def test_gates_and_shared_parameters_are_named(name):
    model = build(name, **MODELS[name][0])
    gates, shared = model.task_gates(), model.shared_parameters()
    if "mmoe" in name:
        assert list(gates.values()) == list(model.sharing.moe.gates)
        assert len(set(gates.values())) == len(TASKS)
    elif name == "omoe":
        assert list(gates.values()) == [model.sharing.moe.gates[0]] * len(TASKS)
    assert list(gates) == ([] if name in ("single_task", "shared_bottom") else list(TASKS))
    if name == "single_task":
        assert shared == []
    else:
        experts = model.sharing.experts if name == "shared_bottom" else model.sharing.moe.experts
        assert shared[0] is experts.weights[1]
        assert shared[1] is experts.biases[1]


def test_recorded_gates_hold_the_papers_weights_and_their_losses_add_up():
    model = build("sparse_mmoe", num_experts=6)
    x = torch.randn(12, DIM, dtype=torch.double)
    with record(model) as step:
        model(batch(x))
    loss = 0.0
    for gate in model.task_gates().values():
        (name,) = [name for name, module in model.named_modules() if module is gate]
        expected = torch.stack([top_k_gate(gate.router, row) for row in x])
        torch.testing.assert_close(step.routings[name][0].dense(), expected)
        mass = expected.sum(0)
        loss += 0.01 * (mass.var(correction=0) / mass.mean() ** 2).item()
    assert step.losses()["importance"].item() == pytest.approx(loss, rel=1e-6)


def test_losses_by_name_go_to_every_gate():
    model = build("mmoe", num_experts=4, losses={"z": 0.1})
    x = torch.randn(9, DIM, dtype=torch.double)
    with record(model) as step:
        model(batch(x))
    logits = [x @ gate.router.weight.T for gate in model.sharing.moe.gates]
    expected = sum(0.1 * z.logsumexp(1).square().mean() for z in logits)
    assert step.losses()["z"].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("name", ["shared_bottom", "single_task", "mmoe"])
def test_options_reach_experts_and_towers(name):
    model = build(name, expert_activation="silu", expert_norm="layer", tower_norm="batch", dropout=0.5)
    experts, towers = model.sharing.moe.experts if name == "mmoe" else model.sharing.experts, model.towers.hidden
    assert (experts.activation, experts.norm, experts.dropout) == ("silu", "layer", 0.5)
    assert (towers.activation, towers.norm, towers.dropout) == ("relu", "batch", 0.5)
    x = batch(torch.randn(40, DIM, dtype=torch.double))
    assert not torch.equal(model(x)["like"], model(x)["like"])
    model.eval()
    assert torch.equal(model(x)["like"], model(x)["like"])


@pytest.mark.parametrize("autocast", [True, False])
def test_outputs_are_float32_where_bfloat16_computes(autocast):
    model, x = build("mmoe").float(), torch.randn(30, DIM)
    exact = torch.stack(list(model(batch(x)).values()))
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = torch.stack(list(model(batch(x)).values()))
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("mmoe", {"num_expert": 4}, "argument of recommendation/mmoe 'num_expert'; did you mean num_experts"),
        ("shared_bottom", {"num_experts": 4}, "unknown argument of recommendation/shared_bottom 'num_experts'"),
        ("omoe", {"one_gate": False}, "unknown argument of recommendation/omoe 'one_gate'"),
        ("mmoe", {"router": "TopRouter"}, "unknown router 'TopRouter'; did you mean TopKRouter"),
        ("mmoe", {"router": {"name": "TopKRouter", "K": 2}}, "unknown argument of TopKRouter 'K'"),
        ("mmoe", {"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ("mmoe", {"esmm": True}, "esmm: expected a task that is `given` another"),
    ],
)
def test_what_does_not_fit_is_named(name, arguments, told):
    with pytest.raises(ValueError, match=told):
        build(name, **arguments)
