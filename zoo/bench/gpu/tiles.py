"""Which tiles are fastest: those of every kernel of the Triton backend, searched for on every shape.

A kernel's time is that of the forward or backward around it, so that its neighbours' caches are as in use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...moe.kernels import moe_mlp
from ..contestants import Problem, Shape
from .ahead import Compiler, Job, planned
from .search import Found, search
from .setting import Row, Setting, route, text, tried
from .times import seconds

# Candidates a round without a GPU, where the interpreter takes a while for each.
FEW = 2


def key_of(shape: Shape, dtype: torch.dtype) -> Any:
    """The key (`tuned.Key`) of a shape's plan."""
    from ...moe.kernels.triton.tiles import rows_name
    from ...moe.kernels.triton.tuned import Key

    return Key(dtype.itemsize, shape.dim, shape.hidden_dim, rows_name(shape.tokens * shape.k / shape.experts))


def table_plan(shape: Shape, dtype: torch.dtype, arch: str) -> Any:
    """What the table has for a shape, whatever was measured."""
    from ...moe.kernels.triton.plans import PLANS

    return PLANS[arch, dtype.itemsize, key_of(shape, dtype).rows]


class Timer:
    """Seconds of the forward or backward of one problem with any plan."""

    def __init__(self, setting: Setting, shape: Shape) -> None:
        self.setting, self.key = setting, key_of(shape, setting.dtype)
        self.problem: Problem = setting.problem(shape)
        self.routing = route(setting, self.problem)
        self.routing.weight = self.routing.weight.detach().requires_grad_()
        self.dy = torch.randn_like(self.problem.x)

    def __call__(self, plan: Any, forward: bool) -> float:
        """Seconds, a median."""
        p, routing = self.problem, self.routing
        leaves = [p.x, p.w_in, p.w_out, routing.weight]

        def run() -> Tensor:
            return moe_mlp(p.x, p.w_in, p.w_out, routing, "swiglu", "triton")

        with planned(p.x.device, self.key, plan):
            if forward:
                return seconds(self.setting, run, self.setting.repeats)
            y = run()
            step = lambda: torch.autograd.grad(y, leaves, self.dy, retain_graph=True)  # noqa: E731
            return seconds(self.setting, step, self.setting.repeats)


def refusal(setting: Setting) -> str | None:
    """Why tiles cannot be timed here, or None."""
    from ...moe.kernels import triton as kernels

    return kernels.unavailable(torch.empty(0, device=setting.device))


def best_tiles(setting: Setting, shape: Shape, compiler: Compiler, rounds: int) -> Found:
    """The fastest plan for a shape, from the table's on."""
    from ...moe.kernels.triton.tiles import architecture

    arch = architecture(torch.device(setting.device))
    timer, key = Timer(setting, shape), key_of(shape, setting.dtype)

    def prepare(plans: Sequence[Any]) -> None:
        if setting.cuda:
            compiler(jobs_of(shape, timer, key, plans))

    return search(
        table_plan(shape, setting.dtype, arch),
        timer,
        prepare,
        rounds,
        more=lambda: setting.left > 0,
        described=arch == "90",
        most=None if setting.cuda else FEW,
    )


def jobs_of(shape: Shape, timer: Timer, key: Any, plans: Sequence[Any]) -> list[Job]:
    """What to compile for the GPU that is here."""
    dtypes = {name: getattr(timer.routing, name).dtype for name in ("weight", "token_index", "offsets")}
    major, minor = torch.cuda.get_device_capability()
    return [Job(shape, dtypes | {"x": timer.problem.x.dtype}, key, plan, 10 * major + minor) for plan in plans]


def tiles(setting: Setting, rounds: int = 2) -> Iterator[Row]:
    """The fastest tile of each kernel on every shape."""
    if (reason := refusal(setting)) is not None:
        yield Row("tiles", None, reason)
        return
    few = [shape._replace(tokens=tokens) for shape in setting.shapes[:1] for tokens in setting.few[1:]]
    compiler = Compiler(setting)
    try:
        for shape in (*setting.shapes, *few):
            yield from tried(setting, text(shape), partial(finding, setting, shape, compiler, rounds))
    finally:
        compiler.close()


def finding(setting: Setting, shape: Shape, compiler: Compiler, rounds: int) -> Row:
    """What the search found for one shape, in words and figures."""
    found = best_tiles(setting, shape, compiler, rounds)
    names = {True: "forward", False: "backward"}
    key = key_of(shape, setting.dtype)
    figures = {
        "key": key._asdict(),
        "gain": {names[forward]: found.gain(forward) for forward in names},
        "table_ms": {names[forward]: 1e3 * took for forward, took in found.before.items()},
        "best_ms": {names[forward]: 1e3 * took for forward, took in found.after.items()},
        "best": asdict(found.plan),
        "rounds": found.rounds,
        "whole": found.whole,
        "candidates": found.tried,
    }
    speeds = ", ".join(f"{names[forward]} {found.gain(forward):.2f}" for forward in names)
    return Row(
        text(shape), None, f"{key.rows}: {speeds} times the table's speed; {_changes(setting, shape, found)}", figures
    )


def _changes(setting: Setting, shape: Shape, found: Found) -> str:
    from ...moe.kernels.triton.tiles import architecture

    table = table_plan(shape, setting.dtype, architecture(torch.device(setting.device)))
    names = [each.name for each in fields(table) if getattr(table, each.name) != getattr(found.plan, each.name)]
    changed = [f"{name} {tuple(asdict(getattr(found.plan, name)).values())}" for name in names]
    left = "" if found.whole else f" (not all tried: {found.rounds} rounds)"
    return ("; ".join(changed) or "nothing is faster") + left
