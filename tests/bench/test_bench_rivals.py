"""Other projects' kernels in the benchmark, on stand-ins that lay weights out as the originals document it."""

import sys
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.bench import moe, rivals
from zoo.bench.contestants import Problem, Shape, everyone, ours

SHAPE = Shape(19, 24, 16, 5, 2)


def loop(x, w_in, w_out, choice, weight, halves):
    """Each token's experts, one by one; `halves` gives gate and up of an expert's pre-activations."""
    rows = []
    for token, experts, weights in zip(x, choice.long(), weight):
        y = 0
        for e, w in zip(experts, weights):
            gate, up = halves(w_in[e] @ token)
            y = y + w * (w_out[e] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


class Stacked(nn.Module):
    def __init__(self, experts, rows, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, rows, columns))


class GLUMLP(nn.Module):
    """ScatterMoE's: the activation is of the second half."""

    def __init__(self, input_size, hidden_size, num_experts, top_k):
        super().__init__()
        self.experts = Stacked(num_experts, 2 * hidden_size, input_size)
        self.output_experts = Stacked(num_experts, input_size, hidden_size)

    def forward(self, x, expert_p, expert_idxs):
        w_in, w_out = self.experts.weight, self.output_experts.weight
        return loop(x, w_in, w_out, expert_idxs, expert_p, lambda h: h.chunk(2)[::-1])


class Fused:
    """Liger-Kernel's: the activation is of the first half, indices are int32."""

    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.dtype == torch.int32
        return loop(x, gate_up_proj, down_proj, top_k_index, top_k_weights, lambda h: h.chunk(2))


class ActivationType(Enum):
    SWIGLU = "swiglu"


def general_routing(
    x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
    is_inference_mode_enabled=False,
):  # fmt: skip
    """SonicMoE's: weights [2F, D, E] and [D, F, E], the activation of every other row; tokens in order."""
    assert w1.shape[2] == w2.shape[2] == E
    assert activation_type is ActivationType.SWIGLU
    assert (token_indices.diff() >= 0).all()
    k = len(router_scores) // len(x)
    choice, weight = expert_indices.view(-1, k), router_scores.view(-1, k)
    y = loop(x, w1.permute(2, 0, 1), w2.permute(2, 0, 1), choice, weight, lambda h: (h[::2], h[1::2]))
    return y, expert_indices.bincount(minlength=E)


def put(monkeypatch, name, **contents):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def stand_ins(monkeypatch):
    """All three packages, and a device that suits them."""
    for name in ("scattermoe", "liger_kernel", "sonicmoe"):
        put(monkeypatch, name)
    put(monkeypatch, "scattermoe.mlp", GLUMLP=GLUMLP)
    put(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=Fused)
    put(monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=general_routing)
    put(monkeypatch, "sonicmoe.enums", ActivationType=ActivationType)
    monkeypatch.setattr(rivals, "_needs_gpu", lambda p: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))


@pytest.mark.parametrize("routing", [False, True])
@pytest.mark.parametrize("rival", rivals.RIVALS, ids=lambda r: r.__name__)
def test_a_rival_with_our_weights_gives_our_outputs_and_gradients(stand_ins, rival, routing):
    problem = Problem.random(SHAPE, torch.float32, "cpu", routing)
    mine, theirs = ours(problem, "reference"), rival(problem)
    rivals.check([mine, theirs], backward=True)
    assert theirs.refuses is None
    found = []
    for one in (mine, theirs):
        y = one.run()
        dy = torch.ones_like(y).cumsum(0)
        found.append([y, *torch.autograd.grad(y, [one.leaves[0], one.leaves[2]], dy)])
        (grad,) = torch.autograd.grad(one.run(), [one.leaves[1]], dy)
        found[-1].append(grad.norm(dim=-1).sort(1).values)  # rows of w_in are in another order
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_rival_with_another_result_is_left_out_and_named(stand_ins, monkeypatch, capsys):
    put(monkeypatch, "scattermoe.mlp", GLUMLP=type("Wrong", (GLUMLP,), {"forward": lambda s, x, p, i: x * 1.0}))
    arguments = ["--shape", "19,24,16,5,2", "--dtype", "float32", "--device", "cpu", "--repeats", "1"]
    assert moe.main([*arguments, "--routing"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "left out: gives another result" in lines["scattermoe"]
    assert "left out" not in lines["liger_kernel"] + lines["sonicmoe"]


class NoGradient(torch.autograd.Function):
    """The outputs, but a gradient of x alone."""

    @staticmethod
    def forward(ctx, x, *rest):
        return Fused.apply(x, *rest)

    @staticmethod
    def backward(ctx, dy):
        return dy, None, None, None, None


def fails(*args):
    raise RuntimeError("no such kernel image\nand more")


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        ({"LigerFusedMoEFunction": NoGradient}, "its backward gives no gradient of the leaves of shapes [[5, 32, 24]"),
        ({"LigerFusedMoEFunction": type("Fails", (), {"apply": fails})}, "it failed with RuntimeError: no such kernel"),
        ({}, "this version of liger_kernel has no LigerFusedMoEFunction"),
    ],
)
def test_what_is_missing_is_said(stand_ins, monkeypatch, ops, reason):
    put(monkeypatch, "liger_kernel.ops", **ops)
    field = everyone(Problem.random(SHAPE, torch.float32, "cpu"), ("reference",), backward=True)
    by_name = {one.name: one for one in field}
    assert reason in str(by_name["liger_kernel"].refuses)
    assert "and more" not in str(by_name["liger_kernel"].refuses)


def test_rivals_that_are_absent_or_need_a_gpu_say_so(monkeypatch):
    problem = Problem.random(SHAPE, torch.float32, "cpu")
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    assert all("is not installed" in str(rival(problem).refuses) for rival in rivals.RIVALS)
    monkeypatch.setattr(rivals, "find_spec", lambda name: True)
    put(monkeypatch, "liger_kernel")
    put(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=Fused)
    assert rivals.liger_kernel(problem).refuses == "it needs a CUDA device, x is on cpu"


def test_untuned_kernels_are_called_so(stand_ins, monkeypatch):
    monkeypatch.setenv("LIGER_FUSED_MOE_AUTOTUNE", "0")
    assert rivals.liger_kernel(Problem.random(SHAPE, torch.float32, "cpu")).name == "liger_kernel (untuned)"
