"""The operator as the rest of torch sees it: compile, autocast, checkpointing, FLOP counters, checks."""

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import make_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from zoo.moe import Experts, MoE, Routing
from zoo.moe.kernels import cpu, explain, moe_mlp
from zoo.moe.kernels.ops import moe_mlp_backward_op, moe_mlp_op
from zoo.moe.routers import TopKRouter

BACKENDS = ["reference", "cpu", "grouped_mm"]
KEYS = ("x", "w_in", "w_out", "b_in", "b_out", "weight")


def problem(tokens=24, dim=16, hidden_dim=8, experts=4, k=2, bias=True):
    """Float32 leaves and the routing indices."""
    case = make_case(tokens, dim, hidden_dim, experts, k, bias=bias)
    leaves = {n: None if v is None else v.float().requires_grad_() for n, v in case.inputs.items()}
    routing = Routing.from_choices(case.choice, leaves["weight"].detach(), experts)
    leaves["weight"] = routing.weight.requires_grad_()
    return leaves, routing


def run(leaves, routing, backend="cpu", weight=None, **kwargs):
    routing = Routing(routing.token_index, routing.offsets, leaves["weight"], routing.num_tokens)
    biases = {"b_in": leaves["b_in"], "b_out": leaves["b_out"]}
    return moe_mlp(leaves["x"], leaves["w_in"], leaves["w_out"], routing, backend=backend, **biases, **kwargs)


def gradients(y, leaves):
    return torch.autograd.grad(y.square().sum(), [leaves[k] for k in KEYS if leaves[k] is not None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [0, 1, 24])
def test_opcheck_finds_nothing(backend, tokens):
    leaves, routing = problem(tokens)
    inputs = [leaves[k] for k in KEYS]
    indices = (routing.token_index, routing.offsets, "swiglu", backend)
    torch.library.opcheck(moe_mlp_op, (*inputs, *indices, True))
    detached = [t.detach() for t in inputs]
    y, pre = moe_mlp_op(*detached, *indices, True)
    torch.library.opcheck(
        moe_mlp_backward_op,
        (torch.randn_like(y), *detached, pre, *indices, [True, False, True, True, True, True]),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tiny", [0, 1 << 60])
def test_gradients_lie_as_their_weights_do(monkeypatch, backend, tiny):
    monkeypatch.setattr(cpu, "TINY", tiny)
    leaves, routing = problem()
    for name in ("w_in", "w_out"):
        leaves[name] = leaves[name].detach().mT.contiguous().mT.requires_grad_()
    detached = [leaves[k].detach() for k in KEYS]
    indices = (routing.token_index, routing.offsets, "swiglu", backend)
    y, pre = moe_mlp_op(*detached, *indices, True)
    inputs = (torch.randn_like(y), *detached, pre, *indices, [True] * 6)
    torch.library.opcheck(moe_mlp_backward_op, inputs)
    for found, leaf in zip(moe_mlp_backward_op(*inputs), detached):
        assert found.stride() == leaf.stride()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_is_whole_and_gives_the_same(backend, dynamic):
    leaves, routing = problem()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(leaves, routing):
        return run(leaves, routing, backend) * 2

    expected = run(leaves, routing, backend) * 2
    got = compiled(leaves, routing)
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, leaves), gradients(expected, leaves)):
        torch.testing.assert_close(a, b)


def test_compile_takes_a_routing_made_inside_the_graph():
    leaves, _ = problem()
    logits = torch.randn(24, 4, requires_grad=True)

    def layer(leaves, logits):
        weight, choice = logits.softmax(-1).topk(2)
        routing = Routing.from_choices(choice, weight, 4)
        return moe_mlp(leaves["x"], leaves["w_in"], leaves["w_out"], routing)

    torch._dynamo.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(leaves, logits)
    expected = layer(leaves, logits)
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(y.sum(), (logits, leaves["w_in"])) for y in (got, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_those_of_the_three_matrices(backend):
    leaves, routing = problem(tokens=24, dim=16, hidden_dim=8, k=2)
    forward = 2 * 24 * 2 * 3 * 16 * 8
    with FlopCounterMode(display=False) as counter:
        y = run(leaves, routing, backend)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("wanted", "thirds"),
    [(("x",), 3), (("w_in",), 3), (("w_out",), 1), (("x", "w_out"), 4), (("x", "w_in"), 5), (("weight",), 1)],
    ids=str,
)
def test_flops_are_those_of_the_gradients_that_are_wanted(wanted, thirds, backend):
    """Of a forward's three matrices two go in: their gradients, and that of x, come by one more product, of w_out."""
    leaves, routing = problem(tokens=24, dim=16, hidden_dim=8, k=2)
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in leaves.items()}
    y = run(leaves, routing, backend)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 24 * 2 * 16 * 8 * thirds


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant):
    leaves, routing = problem()
    y = checkpoint(lambda x: run({**leaves, "x": x}, routing), leaves["x"], use_reentrant=reentrant)
    if reentrant:
        y.square().sum().backward()
        got = [leaves[k].grad for k in KEYS]
    else:
        got = gradients(y, leaves)
    for a, b in zip(got, gradients(run(leaves, routing), leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("policy", "times"), [(CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)])
def test_selective_checkpointing_saves_or_recomputes_the_operator_as_a_unit(policy, times, monkeypatch):
    leaves, routing = problem()
    expected = gradients(run(leaves, routing).sin(), leaves)
    calls = []
    forward = cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *args: calls.append(1) or forward(*args))

    def choose(ctx, op, *args, **kwargs):
        return policy if op is moe_mlp_op else CheckpointPolicy.PREFER_RECOMPUTE

    y = checkpoint(
        lambda x: run({**leaves, "x": x}, routing).sin(),
        leaves["x"],
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(choose),
    )
    for a, b in zip(gradients(y, leaves), expected):
        torch.testing.assert_close(a, b)
    assert len(calls) == times


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_low_and_keeps_gradients_in_the_parameters_dtype(backend):
    leaves, routing = problem(tokens=64)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(leaves, routing, backend)
    assert y.dtype == torch.bfloat16
    exact_leaves = {k: v.detach().bfloat16().double().requires_grad_() for k, v in leaves.items()}
    exact = run(exact_leaves, routing, "reference")
    assert (y - exact).norm() < 0.02 * exact.norm()
    for k, got, want in zip(KEYS, gradients(y, leaves), gradients(exact, exact_leaves)):
        assert got.dtype == torch.float32, k
        assert (got - want).norm() < 0.03 * want.norm(), k


def test_nothing_is_kept_where_no_gradient_is_wanted():
    leaves, routing = problem()
    inputs = [leaves[k].detach() for k in KEYS]
    _, pre = moe_mlp_op(*inputs, routing.token_index, routing.offsets, "swiglu", "cpu", False)
    assert pre.numel() == 0
    with torch.no_grad():
        assert run(leaves, routing).grad_fn is None


def test_combine_weights_made_from_tokens_have_second_derivatives():
    """Each of the two has its own part of the gradient, though one is made from the other."""
    leaves, routing = problem(bias=False)
    leaves = {name: t if t is None else t.detach().double().requires_grad_() for name, t in leaves.items()}
    expert = routing.expert_index

    def weighed(x):
        return leaves["weight"] * x.sum(-1).sigmoid()[routing.token_index]

    def by_loop(x, weight):
        rows = []
        for token, e, w in zip(routing.token_index, expert, weight):
            gate, up = (leaves["w_in"][e] @ x[token]).chunk(2)
            rows.append(w * (leaves["w_out"][e] @ (torch.nn.functional.silu(gate) * up)))
        return torch.zeros_like(x).index_add(0, routing.token_index, torch.stack(rows))

    x, wanted = leaves["x"], [leaves[k] for k in ("x", "w_in", "w_out", "weight")]
    results = []
    for y in (run({**leaves, "weight": weighed(x)}, routing), by_loop(x, weighed(x))):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), wanted))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_meta_tensors_pass_through():
    x = torch.empty(5, 16, device="meta")
    w_in, w_out = x.new_empty(4, 16, 16), x.new_empty(4, 16, 8)
    routing = Routing(x.new_empty(10).long(), x.new_empty(5).int(), x.new_empty(10), 5)
    assert moe_mlp(x, w_in, w_out, routing).shape == (5, 16)


def test_auto_says_what_it_took_and_why():
    x, w_in, w_out = torch.zeros(2, 8), torch.zeros(3, 8, 8), torch.zeros(3, 8, 4)
    assert explain(x, w_in, w_out) == ("cpu", "fastest backend for torch.float32 on cpu")
    name, why = explain(*(t.to("meta") for t in (x, w_in, w_out)))
    assert name == "reference"
    assert "meta" in why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_in": torch.zeros(4, 17, 16)}, r"w_in must be \[4, 16, 16\] for activation 'swiglu', got \[4, 17, 16\]"),
        ({"w_out": torch.zeros(4, 16)}, r"must be \[E, H, D\] and \[E, D, F\]"),
        ({"x": torch.zeros(2, 3, 16)}, r"x must be \[T, D\], got \[2, 3, 16\]"),
        ({"b_out": torch.zeros(4, 8)}, r"b_out must be \[4, 16\]"),
        ({"w_out": torch.zeros(4, 16, 8, device="meta")}, "x is on cpu, but w_out on meta"),
        ({"x": torch.zeros(24, 16).double()}, "must share a dtype, got torch.float64, torch.float32"),
    ],
)
def test_errors_name_the_tensor_and_what_was_expected(change, message):
    leaves, routing = problem()
    with pytest.raises(ValueError, match=message):
        run({**leaves, **change}, routing)


def test_unknown_names_list_the_known_ones():
    leaves, routing = problem()
    with pytest.raises(ValueError, match="unknown backend 'cuda'; known: auto, reference, cpu, grouped_mm, triton"):
        run(leaves, routing, "cuda")
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        run(leaves, routing, activation="swish")


def test_on_a_gpu_a_layer_is_one_graph_of_our_operators(monkeypatch):
    """Traced for a GPU that is only imagined, on tensors without memory: no kernel is launched."""
    if torch.version.cuda is None:
        pytest.skip("this torch knows no CUDA")
    pytest.importorskip("triton")
    torch._dynamo.reset()
    cuda, seen = torch.cuda, []
    # Said to be away, lest its random state be asked for; Lightning makes torch believe the number of devices.
    for name, value in {"_lazy_init": None, "device_count": 1, "current_device": 0, "is_available": False}.items():
        monkeypatch.setattr(cuda, name, lambda value=value: value)
    monkeypatch.setattr(cuda, "_get_device_properties", lambda *device: SimpleNamespace(major=9, minor=0), False)

    def keep(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph

    with FakeTensorMode(), torch.device("cuda"):
        layer = MoE(TopKRouter(32, 8, 2), Experts(8, 32, 16))
        x = torch.randn(20, 32)
        y = torch.compile(layer, fullgraph=True, backend=keep)(x)
    assert y.is_cuda
    assert y.shape == x.shape
    (names,) = seen
    assert [name for name in names if name.startswith("zoo.")] == [
        "zoo.top_k.default",
        "zoo.sort_choices.default",
        "zoo.moe_mlp.default",
    ]
