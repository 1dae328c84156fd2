"""What all sections share: where they run, on which shapes, and the layer they try.

A section is a generator of `Row`s, so that what was found before it fails or runs out of time is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...moe import Experts, MoE, Routing
from ...moe.kernels import moe_mlp
from ...moe.routers import TopKRouter
from ..contestants import Problem, Shape
from ..moe import LARGE, shape_of


@dataclass
class Row:
    """One finding. `ok`: whether it is as it should be, None where there is no such judgement."""

    what: str
    ok: bool | None
    note: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Setting:
    """The device, our backend there, and the shapes: `few` are numbers of tokens when decoding, `far` passes 2^31."""

    device: str
    backend: str
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    few: tuple[int, ...]
    far: Shape
    repeats: int
    processes: int = 1
    deadline: float = float("inf")
    skip: int = 0

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.startswith("cuda")

    @property
    def left(self) -> float:
        """Seconds until the section must be over."""
        return self.deadline - time.monotonic()

    @property
    def decoding(self) -> list[Shape]:
        """Every shape with few tokens."""
        return [shape._replace(tokens=tokens) for shape in self.shapes for tokens in self.few]

    def problem(self, shape: Shape, routing: bool = True) -> Problem:
        """Fresh inputs of one layer."""
        return Problem.random(shape, self.dtype, self.device, routing)

    def layer(self, shape: Shape) -> MoE:
        """A top-k layer."""
        router = TopKRouter(shape.dim, shape.experts, shape.k)
        experts = Experts(shape.experts, shape.dim, shape.hidden_dim, backend=self.backend)
        return MoE(router, experts).to(self.device, self.dtype)

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.cuda:
            torch.cuda.synchronize()


def gpu(device: str = "cuda") -> Setting:
    """The real thing."""
    shapes = tuple(map(shape_of, LARGE))
    # Tokens, weights, pre-activations and expert outputs have more than 2^31 elements each.
    far = Shape(2**19 + 37, 4096, 1024, 264, 2)
    processes = max(1, (os.cpu_count() or 1) - 2)
    return Setting(device, "triton", torch.bfloat16, shapes, (1, 16, 128, 1024), far, repeats=7, processes=processes)


def cpu(backend: str) -> Setting:
    """The same in small, to try the sections themselves."""
    shapes = (Shape(37, 32, 16, 6, 2), Shape(24, 32, 48, 3, 1))
    far = Shape(21, 32, 16, 5, 2)
    return Setting("cpu", backend, torch.bfloat16, shapes, (1, 5), far, repeats=1)


def tried(setting: Setting, what: str, find: Callable[[], Row]) -> Iterator[Row]:
    """What `find` finds, or its error as a finding, so that the section goes on with the next.

    Nothing for as many as `setting.skip`, which an earlier process went through.
    """
    if setting.skip:
        setting.skip -= 1
        return
    try:
        row = find()
    except Exception as error:
        row = Row(what, False, f"{type(error).__name__}: {str(error)[:300]}")
    yield row


def text(shape: Shape) -> str:
    """T,D,F,E,K."""
    return ",".join(map(str, shape))


def distance(a: Tensor, b: Tensor, of: Tensor | None = None) -> float:
    """Of a from b, relative to the norm of b, or `of` something else; infinite for values that are not finite."""
    error = (a.double() - b.double()).norm() / (b if of is None else of).double().norm().clamp_min(1e-300)
    return float(error) if error.isfinite() else float("inf")


def differences(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], p: Problem) -> list[float]:
    """Distances of outputs and of gradients of tokens, of some experts from others with the same numbers."""
    dy, results = torch.randn_like(p.x), []
    for experts in (ours, theirs):
        y = experts(p.x, p.routing)
        results.append((y.detach(), *torch.autograd.grad(y, p.x, dy)))
    return [distance(a, b) for a, b in zip(*results)]


@lru_cache
def gate(experts: int, k: int, device: str) -> TopKRouter:
    """A softmax top-k gate whose logits are given to it; made once, as making it waits for the device."""
    return TopKRouter(1, experts, k).to(device)


def route(setting: Setting, p: Problem) -> Routing:
    """Our gate's decision from the problem's logits."""
    assert p.logits is not None
    return gate(p.shape.experts, p.shape.k, setting.device).route(p.logits)


def outputs_and_gradients(setting: Setting, p: Problem, dy: Tensor) -> dict[str, Tensor]:
    """What our kernels make of a problem with logits, and all its gradients, by name."""
    assert p.logits is not None
    y = moe_mlp(p.x, p.w_in, p.w_out, route(setting, p), "swiglu", setting.backend)
    grads = torch.autograd.grad(y, [p.x, p.w_in, p.w_out, p.logits], dy)
    return dict(zip(("y", "dx", "dw_in", "dw_out", "dlogits"), (y.detach(), *grads)))
