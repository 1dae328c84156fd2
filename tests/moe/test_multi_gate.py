"""Many gates over one set of experts: every sum over experts written out, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Capacity, Router, Routing, record, telemetry
from zoo.moe.expert_stack import ExpertStack
from zoo.moe.multi_gate import Gate, MultiGateMoE, combine_matrix, everywhere, mix
from zoo.moe.routers import DenseRouter, DSelectKRouter, ExpertChoiceRouter, SoftRouter, TopKRouter

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seed() -> None:
    print("seed", torch.seed())  # pytest shows it with a failure


def layer(routers: list[Router], dim: int, experts: int, hidden: Any = (6, 3), **options: Any) -> MultiGateMoE:
    """Smooth experts, so that rounding decides no gradient."""
    return MultiGateMoE(routers, ExpertStack(experts, dim, hidden, "silu", **options)).double()


def expert(stack: ExpertStack, x: Tensor, e: int) -> Tensor:
    """f_e of one row."""
    for weight, bias in zip(stack.weights, stack.biases):
        z = weight[e] @ x + bias[e]
        x = z / (1 + (-z).exp())
    return x


def by_loop(moe: MultiGateMoE, x: Tensor, weights: list[Tensor]) -> Tensor:
    """y_g of every row as a sum over the experts whose weight [T, E] is not zero."""
    ys = []
    for weight in weights:
        for t in range(len(x)):
            y = x.new_zeros(moe.experts.out_dim)
            for e in range(moe.experts.num_experts):
                if weight[t, e] != 0:
                    y = y + weight[t, e] * expert(moe.experts, x[t], e)
            ys.append(y)
    return torch.stack(ys).view(len(weights), len(x), -1) if ys else x.new_zeros(len(weights), 0, moe.experts.out_dim)


def softmax(moe: MultiGateMoE, g: int, x: Tensor) -> Tensor:
    """exp(W x)_e / sum_i exp(W x)_i."""
    router: Any = moe.gates[g].router
    logits = x @ router.weight.T
    return logits.exp() / logits.exp().sum(1, keepdim=True)


def the_largest(probs: Tensor, k: int) -> Tensor:
    """The k largest of every row; zeros for the rest."""
    rank = (probs[:, None, :] > probs[:, :, None]).sum(-1)
    return probs * (rank < k)


def check(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Errors relative to the largest value."""
    assert found.shape == expected.shape
    if expected.numel():
        error = (found.double() - expected).abs().max().item()
        assert error <= tolerance * max(expected.abs().max().item(), 1e-3), error


def check_all(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Values and gradients; gives the gradients of what was found."""
    check(found, expected)
    upstream = torch.randn_like(expected)
    slopes = torch.autograd.grad(found, inputs, upstream, retain_graph=True, materialize_grads=True)
    if not expected.requires_grad:  # of no rows
        theirs = tuple(torch.zeros_like(value) for value in inputs)
    else:
        theirs = torch.autograd.grad(expected, inputs, upstream, materialize_grads=True)
    for one, other in zip(slopes, theirs):
        check(one, other)
    return slopes


@pytest.mark.parametrize("gates", [1, 3])
@pytest.mark.parametrize(("tokens", "dim", "experts"), [(13, 7, 5), (1, 4, 3), (0, 4, 3), (6, 5, 1), (8, 8, 8)])
def test_every_gate_mixes_the_same_experts_by_its_softmax(tokens: int, dim: int, experts: int, gates: int) -> None:
    moe = layer([DenseRouter(dim, experts) for _ in range(gates)], dim, experts)
    x = torch.randn(tokens, dim, dtype=DOUBLE, requires_grad=True)
    check_all(moe(x), by_loop(moe, x, [softmax(moe, g, x) for g in range(gates)]), [x, *moe.parameters()])


def test_gates_may_see_inputs_of_their_own() -> None:
    moe = layer([DenseRouter(5, 3), DenseRouter(2, 3)], 4, 3)
    x, *seen = (torch.randn(6, dim, dtype=DOUBLE, requires_grad=True) for dim in (4, 5, 2))
    expected = by_loop(moe, x, [softmax(moe, g, own) for g, own in enumerate(seen)])
    check_all(moe(x, gate_inputs=seen), expected, [x, *seen, *moe.parameters()])
    with pytest.raises(ValueError, match="shorter"):
        moe(x, gate_inputs=seen[:1])


@pytest.mark.parametrize(("experts", "k", "sparse"), [(16, 1, True), (16, 3, True), (7, 2, False), (4, 4, False)])
@pytest.mark.parametrize("tokens", [11, 1, 0])
def test_sparse_gates_compute_what_they_ask_for_once(tokens: int, experts: int, k: int, sparse: bool) -> None:
    moe = layer([TopKRouter(5, experts, k) for _ in range(2)], 5, experts)
    x = torch.randn(tokens, 5, dtype=DOUBLE, requires_grad=True)
    weights = [the_largest(softmax(moe, g, x), k) for g in range(2)]
    computed: list[int] = []
    moe.experts.register_forward_hook(lambda module, inputs, output: computed.append(output.shape[:-1].numel()))
    slopes = check_all(moe(x), by_loop(moe, x, weights), [x, *moe.parameters()])

    met = (weights[0] != 0) | (weights[1] != 0)
    assert computed == [int(met.sum()) if sparse and tokens else tokens * experts]
    named = dict(zip([name for name, _ in moe.named_parameters()], slopes[1:]))
    for name in ("experts.weights.0", "experts.biases.1"):
        idle = ~met.any(0)
        assert not named[name][idle].any()
        assert named[name][~idle].flatten(1).any(1).all()


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_learns_from_every_token_whatever_sparse_gates_ask_for(training: bool) -> None:
    moe = layer([TopKRouter(5, 16, 1)], 5, 16, (6,), norm="batch").train(training)
    stack: Any = moe.experts
    batch = stack.norms[0].batch
    x = torch.randn(11, 5, dtype=DOUBLE)
    weights = the_largest(softmax(moe, 0, x), 1)
    z = torch.einsum("td,ehd->teh", x, stack.weights[0]) + stack.biases[0]
    mean, var = (z.mean(0), z.var(0, correction=0)) if training else (z[0] * 0, z[0] * 0 + 1)
    z = (z - mean) / (var + 1e-5).sqrt()
    check(moe(x)[0], (weights[:, :, None] * z / (1 + (-z).exp())).sum(1))
    share = 0.1 if training else 0.0
    check(batch.running_mean, share * mean.flatten())
    check(batch.running_var, 1 - share + share * var.flatten() * 11 / 10)


def settled(router: Router) -> Router:
    """A selector of every DSelect-k gate on one expert, so that most tokens meet few."""
    router.z_weight.data.mul_(200)  # type: ignore[union-attr,operator]
    return router


ROUTERS: dict[str, Any] = {
    "capacity": lambda: TopKRouter(5, 12, 2, capacity=Capacity(0.5)),
    "sigmoid": lambda: TopKRouter(5, 12, 2, score="sigmoid", normalize=True, selection_bias=True),
    "expert choice": lambda: ExpertChoiceRouter(5, 12, capacity=Capacity(2.0)),
    "dselect_k": lambda: settled(DSelectKRouter(5, 12, 1)),
    "threshold": lambda: DenseRouter(5, 12, eval_threshold=0.12),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("training", [True, False])
def test_any_router_of_the_core_is_a_gate(name: str, training: bool) -> None:
    moe = layer([ROUTERS[name]() for _ in range(2)], 5, 12).train(training)
    x = torch.randn(9, 5, dtype=DOUBLE, requires_grad=True)
    with record(moe) as step:
        y = moe(x)
    decisions = [step.routings[f"gates.{g}"][0] for g in range(2)]
    weights = []
    for decision in decisions:
        assert isinstance(decision, Routing)
        empty = torch.zeros(9, 12, dtype=DOUBLE)
        weights.append(empty.index_put((decision.token_index, decision.expert_index), decision.weight))
    check_all(y, by_loop(moe, x, weights), [x, *moe.parameters()])


def test_masked_tokens_meet_no_expert() -> None:
    moe = layer([TopKRouter(4, 16, 2), DenseRouter(4, 16)], 4, 16)
    x, mask = torch.randn(6, 4, dtype=DOUBLE), torch.tensor([True, False, True, True, False, True])
    y = moe(x, mask=mask)
    weights = [the_largest(softmax(moe, 0, x), 2), softmax(moe, 1, x)]
    check(y, by_loop(moe, x, [weight * mask[:, None] for weight in weights]))


def test_records_hold_each_gates_decision_and_losses() -> None:
    moe = layer([TopKRouter(4, 6, 1, losses={"importance": 0.5}) for _ in range(2)], 4, 6)
    x = torch.randn(10, 4, dtype=DOUBLE)
    with record(moe) as step:
        moe(x)
        moe(x[:4])
    assert list(step.routings) == ["gates.0", "gates.1"]
    loss = torch.zeros((), dtype=DOUBLE)
    for g in range(2):
        for routing, seen in zip(step.routings[f"gates.{g}"], (x, x[:4]), strict=True):
            weight = the_largest(softmax(moe, g, seen), 1)
            check(telemetry.load(routing).double(), (weight > 0).sum(0) / len(seen), 1e-6)
            mass = weight.sum(0)
            loss = loss + 0.5 * mass.var(correction=0) / mass.mean() ** 2
    check(step.losses()["importance"], loss, 1e-6)  # the core's divides by mean^2 + 1e-10
    inputs = [moe.get_parameter(f"gates.{g}.router.weight") for g in range(2)]
    mine = torch.autograd.grad(step.losses()["importance"], inputs, retain_graph=True)
    theirs = torch.autograd.grad(loss, inputs)
    for one, other in zip(mine, theirs):
        check(one, other, 1e-6)


@pytest.mark.parametrize("k", [None, 1], ids=["dense", "sparse"])
def test_autocast_computes_experts_in_bfloat16_and_gates_in_float32(k: int | None) -> None:
    router = (lambda: DenseRouter(8, 16)) if k is None else (lambda: TopKRouter(8, 16, k))
    moe = layer([router(), router()], 8, 16).float()
    x = torch.randn(20, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), record(moe) as step:
        y = moe(x)
    assert y.dtype == torch.bfloat16
    assert all(calls[0].weight.dtype == torch.float32 for calls in step.routings.values())  # type: ignore[union-attr]
    wide, rows = copy.deepcopy(moe).double(), x.detach().double().requires_grad_()
    weights = [softmax(wide, g, rows) if k is None else the_largest(softmax(wide, g, rows), k) for g in range(2)]
    expected, upstream = by_loop(wide, rows, weights), torch.randn(2, 20, 3)
    assert (y.double() - expected).norm() <= 0.02 * expected.norm()
    mine = torch.autograd.grad(y, [x, *moe.parameters()], upstream.bfloat16())
    theirs = torch.autograd.grad(expected, [rows, *wide.parameters()], upstream.double())
    for one, other in zip(mine, theirs):
        assert one.dtype == torch.float32
        assert (one.double() - other).norm() <= 0.05 * other.norm()


def test_one_graph_of_torch_compile_does_the_same() -> None:
    moe = layer([DenseRouter(5, 3), TopKRouter(5, 3, 2)], 5, 3)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 5, dtype=DOUBLE, requires_grad=True)
    weights = [softmax(moe, 0, x), the_largest(softmax(moe, 1, x), 2)]
    check_all(compiled(x), by_loop(moe, x, weights), [x, *moe.parameters()])


def test_vmap_over_models_does_what_a_loop_over_them_does() -> None:
    moes = [layer([DenseRouter(5, 3) for _ in range(2)], 5, 3) for _ in range(3)]
    x = torch.randn(3, 7, 5, dtype=DOUBLE)
    parameters, buffers = torch.func.stack_module_state(moes)

    def energy(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(moes[0], (parameters, buffers), (x,)).square().sum()

    slopes, values = torch.func.vmap(torch.func.grad_and_value(energy))(parameters, buffers, x)
    for i, moe in enumerate(moes):
        expected = by_loop(moe, x[i], [softmax(moe, g, x[i]) for g in range(2)]).square().sum()
        check(values[i], expected)
        for name, slope in zip(slopes, torch.autograd.grad(expected, [moe.get_parameter(n) for n in slopes])):
            check(slopes[name][i], slope)


def test_what_is_everywhere_is_a_matrix_and_back() -> None:
    weight = torch.rand(5, 3, dtype=DOUBLE)
    routing = everywhere(weight, losses={"l0": weight.sum()})
    for found in (routing.dense(), combine_matrix(routing)):
        assert torch.equal(found, weight)
    assert routing.counts.tolist() == [5, 5, 5]
    assert (routing.asked, list(routing.losses)) == (3, ["l0"])
    keep = weight > 0.5
    some = Routing.from_matrix(weight, keep)
    assert torch.equal(combine_matrix(some), weight * keep)
    weights, outputs = torch.rand(2, 5, 3, dtype=DOUBLE), torch.rand(5, 3, 4, dtype=DOUBLE)
    check(mix(weights, outputs), (weights[..., None] * outputs).sum(2))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="expected at least one router"):
        MultiGateMoE([], ExpertStack(2, 3, [4]))
    with pytest.raises(ValueError, match="a router routes 5 experts, but there are 2"):
        MultiGateMoE([DenseRouter(3, 2), DenseRouter(3, 5)], ExpertStack(2, 3, [4]))
    with pytest.raises(TypeError, match="got SoftRouter, which makes a Slots"):
        Gate(SoftRouter(3, 2, 1, group_size=None))(torch.randn(4, 3))
