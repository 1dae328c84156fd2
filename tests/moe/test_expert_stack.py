"""Stacked experts against one expert after the other, in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Routing
from zoo.moe.expert_stack import ExpertStack

DOUBLE = torch.float64
ACTIVATIONS = {"relu": lambda z: z.clamp(min=0), "silu": lambda z: z / (1 + (-z).exp())}


@pytest.fixture(autouse=True)
def seed() -> None:
    print("seed", torch.seed())  # pytest shows it with a failure


def normalised(z: Tensor, stack: ExpertStack, layer: int, e: int) -> Tensor:
    """z [T, H] over its tokens or over its units; outside training by the running statistics of a batch norm."""
    own: Any = stack.norms[layer]
    if not z.numel():
        return z
    if own.batch is None:
        mean, var = z.mean(1, keepdim=True), z.var(1, keepdim=True, correction=0)
    elif stack.training:
        mean, var = z.mean(0), z.var(0, correction=0)
    else:
        units = slice(e * z.shape[1], (e + 1) * z.shape[1])
        mean, var = own.batch.running_mean[units], own.batch.running_var[units]
    return (z - mean) / (var + 1e-5).sqrt() * own.weight[e] + own.bias[e]


def expert(stack: ExpertStack, x: Tensor, e: int, closest: list[float] | None = None) -> Tensor:
    """f_e of rows x by the definition; `closest` gets how near to 0 a unit comes, where ReLU has its kink."""
    for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases)):
        x = x @ weight[e].T + bias[e]
        if stack.norm:
            x = normalised(x, stack, layer, e)
        if closest is not None and x.numel():
            closest.append(x.abs().min().item())
        x = ACTIVATIONS[stack.activation](x)
    return x


def by_loop(stack: ExpertStack, x: Tensor, closest: list[float] | None = None) -> Tensor:
    own = [x if x.dim() == 2 else x[:, e] for e in range(stack.num_experts)]
    return torch.stack([expert(stack, rows, e, closest) for e, rows in enumerate(own)], 1)


def case(shape: tuple[int, ...], experts: int, hidden: Any, margin: float = 1e-5, **options: Any) -> Any:
    """A stack and inputs of which no unit is within the margin of ReLU's kink, where rounding decides the gradient."""
    while True:
        stack, x = ExpertStack(experts, shape[-1], hidden, **options).double(), torch.randn(shape, dtype=DOUBLE)
        for values in (
            value for norm in stack.norms for value in norm.state_dict().values() if value.is_floating_point()
        ):
            values.uniform_(0.5, 1.5)
        closest: list[float] = [margin]
        by_loop(stack, x, closest)
        if min(closest) >= margin:
            return stack, x.requires_grad_()


def gradients(y: Tensor, upstream: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, inputs, upstream, materialize_grads=True)


def check(found: Tensor, expected: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Errors relative to the largest value, or to a larger scale."""
    assert found.shape == expected.shape
    if expected.numel():
        error = (found.double() - expected).abs().max().item()
        assert error <= tolerance * max(expected.abs().max().item(), scale, 1e-3), error


def check_all(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Values and gradients in float64; gives the gradients of what was found."""
    check(found, expected, 1e-10)
    upstream = torch.randn_like(expected)
    slopes = gradients(found, upstream, inputs)
    for mine, theirs in zip(slopes, gradients(expected, upstream, inputs)):
        check(mine, theirs, 1e-10)
    return slopes


# Rows, widths and units that no tile divides, beside those that fill one; no row, one row, one expert, several layers.
SIZES = [((37, 13), 5, (7, 3)), ((16, 7), 4, (8,)), ((0, 5), 3, (4, 2))]
SIZES += [((1, 8), 3, (5,)), ((21, 6), 1, (9, 5, 1)), ((1, 1), 1, (1,))]
OPTIONS: list[Any] = [{}, {"activation": "silu"}, {"norm": "layer"}, {"norm": "batch", "activation": "silu"}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("own", [False, True], ids=["one input", "inputs of their own"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("shape", "experts", "hidden"), SIZES, ids=str)
def test_outputs_and_gradients_are_those_of_the_experts_one_by_one(
    shape: Any, experts: int, hidden: Any, options: Any, own: bool, training: bool, dtype: torch.dtype
) -> None:
    if options.get("norm") == "batch" and training and shape[0] < 2:
        pytest.skip("batch norm of fewer than two rows in training has a test of its own")
    if options.get("norm") == "layer":
        hidden = tuple(h + 2 for h in hidden)  # of two units what is left is a sign
    if own:
        shape = (shape[0], experts, shape[1])
    stack, x = case(shape, experts, hidden, **options)
    stack.train(training)
    narrow, narrow_x = copy.deepcopy(stack).to(dtype), x.detach().to(dtype).requires_grad_()
    reference, x = copy.deepcopy(narrow).double(), narrow_x.detach().double().requires_grad_()
    found, expected = narrow(narrow_x), by_loop(reference, x)
    assert found.dtype == dtype
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3 if stack.norm else 2e-5
    check(found, expected, tolerance)
    upstream = torch.randn_like(expected)
    mine = gradients(found, upstream.to(dtype), [narrow_x, *narrow.parameters()])
    theirs = gradients(expected, upstream, [x, *reference.parameters()])
    # A bias that batch norm takes away again has the gradient 0, a sum of what cancels.
    scale = max([0.0, *(slope.abs().max().item() for slope in theirs if slope.numel())])
    for one, other in zip(mine, theirs):
        check(one, other, tolerance, scale)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)], ids=str)
def test_gradients_of_the_cpu_path_are_finite_differences(shape: Any) -> None:
    stack, x = case(shape, 2, (4, 3), margin=1e-4)
    names = [name for name, _ in stack.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(stack, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *stack.parameters()))


@pytest.mark.parametrize("frozen", ["x", "weights.0", "biases.0", "weights.1", "all of layer 0", "parameters"])
@pytest.mark.parametrize("shape", [(9, 4), (9, 3, 4)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(shape: Any, frozen: str) -> None:
    stack, x = case(shape, 3, (5, 2))
    still = {"all of layer 0": ("x", "weights.0", "biases.0"), "parameters": [n for n, _ in stack.named_parameters()]}
    every = {"x": x, **dict(stack.named_parameters())}
    for name in still.get(frozen, (frozen,)):
        every[name].requires_grad_(False)
    wanted = [value for value in every.values() if value.requires_grad]
    assert 0 < len(wanted) < len(every)
    y, expected = stack(x), by_loop(stack, x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    for value, theirs in zip(wanted, gradients(expected, upstream, wanted)):
        check(value.grad, theirs, 1e-10)
    assert all(value.grad is None for value in every.values() if not value.requires_grad)


def test_large_results_are_not_overwritten_by_later_ones() -> None:
    """Blocks of more than a megabyte come from memory that is used again."""
    stack, x = case((1200, 5), 8, (16, 16), margin=0)
    first = stack(x)
    kept = first.detach().clone()
    assert kept.numel() * kept.itemsize > 1 << 20
    stack(torch.randn_like(x)).sum().backward()
    assert torch.equal(first, kept)
    check_all(first, by_loop(stack, x), [x, *stack.parameters()])


@pytest.mark.parametrize("apart", [False, True])
def test_a_stack_of_relu_experts_has_all_derivatives(apart: bool) -> None:
    stack = ExpertStack(3, 6, (5, 4)).double()
    x = torch.randn(7, 3, 6).double() if apart else torch.randn(7, 6).double()
    names = [name for name, _ in stack.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(stack, dict(zip(names, values)), (x,))

    inputs = (x.requires_grad_(), *stack.parameters())
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_running_statistics_are_those_of_batch_norm_and_one_row_is_not_normalised() -> None:
    stack, x = case((6, 3), 2, (4,), norm="batch")
    norm: Any = stack.norms[0]
    before = norm.batch.running_mean.clone(), norm.batch.running_var.clone()
    z = torch.cat([x @ stack.weights[0][e].T + stack.biases[0][e] for e in range(2)], 1)
    stack(x)
    check(norm.batch.running_mean, 0.9 * before[0] + 0.1 * z.mean(0), 1e-10)
    check(norm.batch.running_var, 0.9 * before[1] + 0.1 * z.var(0), 1e-10)

    kept = norm.batch.running_mean.clone()
    scaled = norm.bias + z[:1].view(1, 2, 4) * norm.weight
    check(stack(x[:1]), scaled.clamp(min=0), 1e-10)  # a row's deviation from its own mean is 0
    assert torch.equal(norm.batch.running_mean, kept)


def routing(tokens: int, experts: int) -> Routing:
    """The last expert is not asked for, the first is by all tokens, the others by some."""
    keep = torch.rand(tokens, experts) < 0.4
    keep[:, 0], keep[:, -1] = True, False
    return Routing.from_matrix(torch.rand(tokens, experts), keep)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [11, 1, 0])
def test_with_a_routing_only_its_assignments_are_computed(tokens: int, options: Any) -> None:
    stack, x = case((tokens, 5), 4, (6, 3), **options)
    stack.eval()
    asked = routing(tokens, 4)
    found = stack(x, asked)
    expected = torch.cat([expert(stack, x[asked.token_index[asked.expert_index == e]], e) for e in range(4)])
    slopes = check_all(found, expected, [x, *stack.parameters()])
    assert not any(slope[-1].any() for slope in slopes[1:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["one input", "inputs of their own", "routing"])
def test_dropout_zeroes_its_share_scales_the_rest_and_rests_in_evaluation(kind: str, activation: str) -> None:
    p, tokens, whole = 0.3, 20_000, ACTIVATIONS[activation](torch.tensor(2.0))
    stack = ExpertStack(2, 1, (1,), activation, dropout=p)
    for parameter in stack.parameters():
        parameter.data.fill_(1.0)  # f_e(1) = act(1 + 1)
    x = torch.ones(tokens, 2, 1) if kind == "inputs of their own" else torch.ones(tokens, 1)
    context = [Routing.from_matrix(torch.ones(tokens, 2), torch.ones(tokens, 2).bool())] if kind == "routing" else []
    y = stack(x, *context).flatten()
    share = (y == 0).double().mean().item()
    assert share == pytest.approx(p, abs=6 * math.sqrt(p * (1 - p) / y.numel()))
    torch.testing.assert_close(y[y != 0], (whole / (1 - p)).expand_as(y[y != 0]))
    torch.testing.assert_close(stack.eval()(x, *context).flatten(), whole.expand_as(y))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_computes_in_bfloat16(activation: str) -> None:
    stack, x = ExpertStack(3, 16, (24, 8), activation), torch.randn(50, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(x)
    assert y.dtype == torch.bfloat16
    reference, wide = copy.deepcopy(stack).double(), x.detach().double().requires_grad_()
    expected = by_loop(reference, wide)
    assert (y.double() - expected).norm() <= 0.02 * expected.norm()
    upstream = torch.randn_like(expected)
    mine = gradients(y, upstream.bfloat16(), [x, *stack.parameters()])
    for one, other in zip(mine, gradients(expected, upstream, [wide, *reference.parameters()])):
        assert one.dtype == torch.float32
        # A unit near ReLU's kink may be on in one and off in the other.
        assert activation == "relu" or (one.double() - other).norm() <= 0.03 * other.norm()


@pytest.mark.parametrize("shape", [(9, 5), (9, 3, 5)], ids=str)
def test_one_graph_of_torch_compile_does_the_same(shape: Any) -> None:
    stack, x = case(shape, 3, (6, 4))
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    check_all(compiled(x), by_loop(stack, x), [x, *stack.parameters()])


def test_vmap_over_models_does_what_a_loop_over_them_does() -> None:
    cases = [case((7, 5), 3, (6, 4)) for _ in range(4)]
    stacks, x = [stack for stack, _ in cases], torch.stack([x.detach() for _, x in cases])
    parameters, buffers = torch.func.stack_module_state(stacks)

    def energy(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(stacks[0], (parameters, buffers), (x,)).square().sum()

    slopes, values = torch.func.vmap(torch.func.grad_and_value(energy))(parameters, buffers, x)
    for i, stack in enumerate(stacks):
        expected = by_loop(stack, x[i]).square().sum()
        check(values[i], expected, 1e-10)
        for name, slope in zip(slopes, torch.autograd.grad(expected, [stack.get_parameter(n) for n in slopes])):
            check(slopes[name][i], slope, 1e-10)


def test_parameters_are_drawn_within_one_over_the_root_of_their_inputs() -> None:
    stack = ExpertStack(6, 25, (40, 4))
    for weight, bias, inputs in zip(stack.weights, stack.biases, (25, 40)):
        for drawn in (weight, bias):
            assert drawn.abs().max() <= inputs**-0.5
        assert weight.abs().max() > 0.95 * inputs**-0.5
        assert weight.mean().abs() < 6 * inputs**-0.5 / math.sqrt(3 * weight.numel())
    assert str(ExpertStack(2, 3, [4], "silu", "batch", 0.5)).startswith(
        "ExpertStack(\n  2, 3, [4], activation='silu', norm='batch', dropout=0.5"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, 3, [4]), "must be at least 1, got 0, 3"),
        ((2, 0, [4]), "must be at least 1, got 2, 0"),
        ((2, 3, []), r"must be at least 1, got 2, 3, \[\]"),
        ((2, 3, [4, 0]), r"got 2, 3, \[4, 0\]"),
        ((2, 3, [4], "swiglu"), "'swiglu', which is gated"),
        ((2, 3, [4], "rleu"), "unknown activation 'rleu'"),
        ((2, 3, [4], "relu", "group"), "norm must be None, 'batch' or 'layer', got 'group'"),
        ((2, 3, [4], "relu", None, 1.0), "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_what_does_not_fit_is_named(arguments: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ExpertStack(*arguments)


def test_batch_norm_in_training_wants_every_token() -> None:
    with pytest.raises(ValueError, match="leave out the routing"):
        ExpertStack(3, 4, [2], norm="batch")(torch.randn(5, 4), routing(5, 3))
