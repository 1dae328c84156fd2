"""What every backend that runs here must do; the Triton kernels have the like in test_triton.py."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_as_exact_as_a_loop, error, make_case

from zoo.moe import Routing
from zoo.moe.kernels import ACTIVATIONS, cpu, moe_mlp
from zoo.moe.kernels.ops import backend_module

BACKENDS = ("cpu", "grouped_mm")
LOW = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu:0.7", "swiglu_clamped:1.5"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_are_as_exact_as_a_loops(backend, activation):
    assert_as_exact_as_a_loop(make_case(93, 40, 24, 6, 2, activation, True), backend, torch.float32)


@pytest.mark.parametrize("limit", [0, 1 << 60])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_loops_over_small_experts_are_as_exact(monkeypatch, activation, limit):
    monkeypatch.setattr(cpu, "TINY", limit)
    for choice in (None, torch.randint(3, 5, (93, 2)), torch.full((93, 1), 2)):
        assert_as_exact_as_a_loop(make_case(93, 40, 24, 6, 2, activation, True, choice=choice), "cpu", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "swiglu_clamped", "relu2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_as_exact_as_a_loops(backend, activation, dtype):
    # 480 rows meet one expert: more than one block of the CPU backend.
    choice = torch.cat([torch.zeros(480, 1, dtype=torch.int64), torch.randint(1, 4, (20, 1))])
    assert_as_exact_as_a_loop(make_case(500, 64, 32, 4, 1, activation, True, dtype, choice), backend, dtype)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_cpu_computes_in_float64_too(activation):
    case = make_case(2100, 17, 7, 4, 2, activation, True, torch.float64)
    got = case.run("cpu", torch.float64)
    for name, expected in case.run("reference", torch.float64).items():
        assert error(got[name], expected) < 1e-14, name


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_shape_works(data):
    draw = data.draw
    backend, dtype = draw(st.sampled_from(BACKENDS)), draw(st.sampled_from(LOW))
    unit = 1 if backend == "cpu" else 16 // dtype.itemsize
    experts = draw(st.integers(1, 9))
    case = make_case(
        tokens=draw(st.integers(0, 70)),
        dim=unit * draw(st.integers(1, 65 // unit)),
        hidden_dim=unit * draw(st.integers(1, 65 // unit)),
        experts=experts,
        k=draw(st.integers(1, experts)),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        bias=draw(st.booleans()),
        dtype=dtype,
    )
    assert_as_exact_as_a_loop(case, backend, dtype)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "choice",
    [
        torch.zeros(0, 2, dtype=torch.int64),
        torch.tensor([[3, 1]]),
        torch.full((517, 1), 2),
        torch.tensor([[2, 2], [0, 2], [4, 4]]),
        torch.randint(3, 5, (40, 2)),
    ],
    ids=["no token", "one token", "all to one expert", "an expert twice", "idle experts"],
)
def test_lopsided_routing(backend, dtype, choice):
    assert_as_exact_as_a_loop(make_case(len(choice), 24, 16, 5, 2, "swiglu", True, dtype, choice), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_assignments_contribute_nothing(backend):
    case = make_case(20, 16, 8, 4, 2)
    keep = torch.rand(20, 2) < 0.5
    keep[0] = False
    t = {k: None if v is None else v.float() for k, v in case.inputs.items()}
    routing = Routing.from_choices(case.choice, t["weight"], 4, keep=keep)
    y = moe_mlp(t["x"], t["w_in"], t["w_out"], routing, backend=backend)
    masked = Routing.from_choices(case.choice, t["weight"] * keep, 4)
    expected = moe_mlp(t["x"].double(), t["w_in"].double(), t["w_out"].double(), masked, backend="reference")
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    assert y[0].abs().max() == 0


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("choice", [[[1, 3]], [[2, 2]], [[0, 1], [3, 3], [1, 2]]])
def test_decoding_without_gradients_gives_what_training_does(backend, dtype, choice):
    case = make_case(len(choice), 16, 24, 4, 2, "swiglu_clamped", True, dtype, torch.tensor(choice))
    t = {k: v.to(dtype) for k, v in case.inputs.items()}
    routing = Routing.from_choices(case.choice, t["weight"], 4)
    y = moe_mlp(t["x"], t["w_in"], t["w_out"], routing, case.activation, backend, b_in=t["b_in"], b_out=t["b_out"])
    limit = 2 * error(case.run("reference", dtype)["y"], case.run("reference", torch.float64)["y"])
    assert error(y, case.run("reference", torch.float64)["y"]) <= limit + torch.finfo(dtype).eps


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values with every second element of a larger tensor skipped."""
    out = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))[..., ::2]
    return out.copy_(t)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", [strided, lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2)])
def test_strided_inputs_and_gradients_change_nothing(backend, dtype, view):
    case = make_case(50, 16, 24, 4, 2, "swiglu", True, dtype)

    def run(layout):
        t = {k: layout(v.to(dtype)).detach().requires_grad_() for k, v in case.inputs.items()}
        routing = Routing.from_choices(case.choice, t["weight"], 4)
        y = moe_mlp(t["x"], t["w_in"], t["w_out"], routing, backend=backend, b_in=t["b_in"], b_out=t["b_out"])
        y.backward(layout(case.dy.to(dtype)))
        return [y.detach(), *(v.grad for v in t.values())]

    unit = torch.finfo(dtype).eps  # another layout may be added up in another order, and round the other way
    for got, expected in zip(run(view), run(lambda t: t)):
        torch.testing.assert_close(got, expected, rtol=4 * unit, atol=unit * float(expected.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_and_gradients_work(backend):
    case = make_case(30, 16, 8, 4, 2)
    row, weights = case.inputs["x"][:1].float().requires_grad_(), [case.inputs[k].float() for k in ("w_in", "w_out")]
    routing = Routing.from_choices(case.choice, case.inputs["weight"].float(), 4)
    y = moe_mlp(row.expand(30, 16), weights[0][:1].expand(4, -1, -1), weights[1], routing, backend=backend)
    y.sum().backward()
    exact = row.detach().double().requires_grad_()
    same = [weights[0][:1].repeat(4, 1, 1).double(), weights[1].double()]
    expected = moe_mlp(exact.repeat(30, 1), *same, routing, backend="reference")
    expected.sum().backward()
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(row.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["x", "w_in", "w_out", "b_in", "b_out", "weight"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_one_gradient_alone_is_the_same_as_among_all(backend, wanted):
    case = make_case(40, 16, 8, 4, 2, "swiglu", True)
    every = case.run("reference", torch.float64)
    t = {k: v.float().clone().requires_grad_(k == wanted) for k, v in case.inputs.items()}
    routing = Routing.from_choices(case.choice, t["weight"], 4)
    y = moe_mlp(t["x"], t["w_in"], t["w_out"], routing, backend=backend, b_in=t["b_in"], b_out=t["b_out"])
    y.backward(case.dy.float())
    torch.testing.assert_close(t[wanted].grad.double(), every[wanted], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [0.0, 1e-30, -0.3])
def test_combine_weights_of_nothing_or_less_have_gradients_too(backend, dtype, weight):
    case = make_case(30, 16, 8, 4, 2, "swiglu", True, dtype)
    case.inputs["weight"][::2, 0] = torch.tensor(weight).to(dtype).double()
    assert_as_exact_as_a_loop(case, backend, dtype)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_combine_weights_keep_float32_beside_low_precision_tokens(backend):
    case = make_case(60, 32, 16, 4, 2, dtype=torch.bfloat16)
    t = {k: None if v is None else v.bfloat16() for k, v in case.inputs.items()}
    weight = case.inputs["weight"].float().requires_grad_()
    routing = Routing.from_choices(case.choice, weight, 4)
    moe_mlp(t["x"], t["w_in"], t["w_out"], routing, backend=backend).backward(case.dy.bfloat16())
    exact = case.run("reference", torch.float64)["weight"]
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("backend", "dtype", "dim", "reason"),
    [
        ("grouped_mm", torch.float64, 16, "not torch.float64"),
        ("grouped_mm", torch.bfloat16, 23, "D = 23 in torch.bfloat16 has not"),
        ("cpu", torch.float32, 16, "x is on meta"),
    ],
)
def test_a_backend_says_what_it_cannot_do(backend, dtype, dim, reason):
    device = "meta" if "meta" in reason else "cpu"
    x = torch.empty(3, dim, dtype=dtype, device=device)
    w_in, w_out = x.new_empty(2, 32, dim), x.new_empty(2, dim, 16)
    assert reason in backend_module(backend).unsupported(x, w_in, w_out, "swiglu")
    routing = Routing.from_choices(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 2)
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot run this: .*{reason}"):
        moe_mlp(x, w_in, w_out, routing, backend=backend)


def test_case_inputs_are_exact_in_the_tested_dtype():
    case = make_case(5, 4, 3, 2, 1, dtype=torch.bfloat16)
    assert isinstance(case, Case)
    assert torch.equal(case.inputs["x"].bfloat16().double(), case.inputs["x"])
