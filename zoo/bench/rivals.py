"""Kernels of other projects in `zoo bench moe`, where they are installed: ScatterMoE, Liger-Kernel, SonicMoE.

Each is given our weights, rearranged as it lays them out, and must give our outputs and a gradient for every leaf
(`check`); whoever is not here, or computes something else, is left out with the reason in words.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .turns import Contestant

if TYPE_CHECKING:
    from .contestants import Problem

# How far a rival's outputs may be from ours, relative to their norm: float32 products may be computed in TF32.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def _module(package: str, name: str) -> ModuleType | str:
    """A module of an optional package, or in words why there is none."""
    if find_spec(package) is None:
        return f"the package {package} is not installed"
    try:
        return importlib.import_module(name)
    except Exception as error:  # such packages compile, or look for GPUs, when imported
        return f"{name} cannot be imported: {_words(error)}"


def _words(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _absent(name: str, refuses: str) -> Contestant:
    def run() -> Tensor:
        raise RuntimeError(f"{name} was left out: {refuses}")

    return Contestant(name, name, run, [], refuses)


def _needs_gpu(p: Problem) -> str | None:
    return None if p.x.is_cuda else f"it needs a CUDA device, x is on {p.x.device.type}"


def scattermoe(p: Problem) -> Contestant:
    """ScatterMoE's gated MLP (2403.08245). Its input weights are [E, 2F, D] as [up; gate]."""
    name = "scattermoe"
    module = _module("scattermoe", "scattermoe.mlp")
    if isinstance(module, str):
        return _absent(name, module)
    with torch.device("meta"):
        mlp = module.GLUMLP(p.shape.dim, p.shape.hidden_dim, p.shape.experts, p.shape.k)
    gate, up = p.w_in.detach().chunk(2, dim=1)
    mlp.experts.weight = nn.Parameter(torch.cat([up, gate], dim=1))
    mlp.output_experts.weight = p.w_out

    def run() -> Tensor:
        choice, weight = p.chosen()
        return mlp(p.x, weight, choice)

    return Contestant(name, name, run, [p.x, mlp.experts.weight, p.w_out, p.weigher], _needs_gpu(p))


def liger_kernel(p: Problem) -> Contestant:
    """Liger-Kernel's fused experts, in releases from 0.8 on; weights as ours.

    It times dozens of variants of each kernel when it meets new widths, for minutes; with LIGER_FUSED_MOE_AUTOTUNE=0
    in the environment it takes one, and is called so.
    """
    tuned = os.environ.get("LIGER_FUSED_MOE_AUTOTUNE", "1").lower() not in ("0", "false", "no")
    name = "liger_kernel" if tuned else "liger_kernel (untuned)"
    module = _module("liger_kernel", "liger_kernel.ops")
    if isinstance(module, str):
        return _absent(name, module)
    function = getattr(module, "LigerFusedMoEFunction", None)
    if function is None:
        return _absent(name, "this version of liger_kernel has no LigerFusedMoEFunction")

    def run() -> Tensor:
        choice, weight = p.chosen()
        return function.apply(p.x, p.w_in, p.w_out, choice.int(), weight)

    return Contestant(name, name, run, [p.x, p.w_in, p.w_out, p.weigher], _needs_gpu(p))


def sonicmoe(p: Problem) -> Contestant:
    """SonicMoE (2512.14080) given a routing. Its input weights are [2F, D, E], gate and up rows taking turns."""
    name = "sonicmoe"
    module = _module("sonicmoe", "sonicmoe.functional")
    enums = _module("sonicmoe", "sonicmoe.enums")
    if isinstance(module, str) or isinstance(enums, str):
        return _absent(name, module if isinstance(module, str) else str(enums))
    function: Callable[..., tuple[Tensor, Tensor]] = module.moe_general_routing_inputs
    w_in = nn.Parameter(p.w_in.detach().unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous())
    tokens = torch.arange(p.shape.tokens, dtype=torch.int32, device=p.x.device).repeat_interleave(p.shape.k)
    # Later versions can be told the layout; theirs is the first one's.
    options = {"concat_layout": False} if "concat_layout" in inspect.signature(function).parameters else {}

    def run() -> Tensor:
        choice, weight = p.chosen()
        y, _ = function(
            p.x,
            weight.flatten(),
            tokens,
            choice.flatten().int(),
            w_in.permute(1, 2, 0),
            None,
            p.w_out.permute(1, 2, 0),
            None,
            E=p.shape.experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=enums.ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            **options,
        )
        return y

    return Contestant(name, name, run, [p.x, w_in, p.w_out, p.weigher], _needs_gpu(p))


RIVALS: tuple[Callable[[Problem], Contestant], ...] = (scattermoe, liger_kernel, sonicmoe)


def check(field: list[Contestant], backward: bool) -> None:
    """Make everyone in `field` refuse who fails, gives another result than our first backend, or lacks a gradient."""
    able = [one for one in field if one.refuses is None]
    first = next((one for one in able if one.group == "zoo"), None)
    expected = None
    for one in sorted(able, key=lambda one: one is not first):
        try:
            with torch.set_grad_enabled(backward):
                y = one.run()
            if one is first:
                expected = y.detach()
            elif one.group != "limit" and expected is not None:
                one.refuses = _difference(y.detach(), expected)
            if backward and one.refuses is None:
                one.refuses = _lacking(one, y)
        except Exception as error:  # another project's kernels may fail in any way; the others are measured
            one.refuses = f"it failed with {_words(error)}"
        for leaf in one.leaves:
            leaf.grad = None


def _difference(y: Tensor, expected: Tensor) -> str | None:
    if y.shape != expected.shape:
        return f"gives another result: of shape {list(y.shape)}, not {list(expected.shape)}"
    error = float((y.double() - expected.double()).norm() / expected.double().norm())
    if error <= TOLERANCE.get(y.dtype, 1e-8):  # a nan is no small number
        return None
    return f"gives another result: {error:.1e} away from zoo's, relative to its norm"


def _lacking(one: Contestant, y: Tensor) -> str | None:
    """Which leaves its backward gives no gradient, in words; None where it gives all."""
    for leaf in one.leaves:
        leaf.grad = None
    y.backward(torch.ones_like(y))
    shapes = [list(leaf.shape) for leaf in one.leaves if leaf.grad is None]
    return f"its backward gives no gradient of the leaves of shapes {shapes}" if shapes else None
