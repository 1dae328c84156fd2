"""Which tiles are fastest: every kernel of the Triton backend with tiles around the table's, on every shape.

A kernel's time is that of the forward or backward around it, so that its neighbours' caches are as in use. Candidates
are compiled first, on all cores and without the GPU, into Triton's cache on disk; then one after another is timed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...moe.kernels import moe_mlp
from ..contestants import Problem, Shape
from .setting import Row, Setting, route, text, tried
from .times import seconds

# Kernels that walk one list of row tiles, and so have tiles of one height.
PAIRS = (("up", "down"), ("d_hidden", "d_x"))
FORWARD = ("up", "down")
# Values to try in place of the table's, beside half and double.
OTHERS = {"warps": (4, 8), "stages": (2, 3, 4, 5), "group": (4, 8, 16)}
SMALLEST, LARGEST = {"m": 16, "n": 32, "k": 16}, {"m": 256, "n": 256, "k": 128}
LARGEST_TILE = 128 * 256


@dataclass(frozen=True)
class Candidate:
    """A plan that differs from the table's in the tiles of `kernels`."""

    kernels: tuple[str, ...]
    plan: Any


def key_of(shape: Shape, dtype: torch.dtype, arch: str) -> tuple[str, int, str]:
    """The entry of the table that a shape uses."""
    from ...moe.kernels.triton.tiles import PLANS, plan_for

    x, w_in, w_out = _like(shape, dtype)
    plan = plan_for(shape.tokens * shape.k, w_in, w_out, x)
    return next(key for key, value in PLANS.items() if value is plan and key[:2] == (arch, dtype.itemsize))


def _like(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w_in and w_out without memory."""
    sizes = (
        (shape.tokens, shape.dim),
        (shape.experts, 2 * shape.hidden_dim, shape.dim),
        (shape.experts, shape.dim, shape.hidden_dim),
    )
    x, w_in, w_out = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    return x, w_in, w_out


@contextmanager
def planned(key: tuple[str, int, str], plan: Any) -> Iterator[None]:
    """Use `plan` for an entry of the table."""
    from ...moe.kernels.triton.tiles import PLANS

    before = PLANS[key]
    PLANS[key] = plan
    try:
        yield
    finally:
        PLANS[key] = before


def variations(tile: Any) -> Iterator[Any]:
    """Tiles that differ in one thing, heights apart."""
    for each in fields(tile):
        value = getattr(tile, each.name)
        if each.name in OTHERS:
            tried: tuple[Any, ...] = OTHERS[each.name]
        elif each.name in ("n", "k"):
            tried = tuple(v for v in (value // 2, 2 * value) if SMALLEST[each.name] <= v <= LARGEST[each.name])
        elif isinstance(value, bool):
            tried = (not value,)
        else:
            continue
        for other in tried:
            changed = replace(tile, **{each.name: other})
            if other != value and changed.m * changed.n <= LARGEST_TILE:
                yield changed


def candidates(plan: Any) -> list[Candidate]:
    """The plan itself, then each kernel's variations, then other heights for the kernels that share them."""
    found = [Candidate((), plan)]
    names = [each.name for each in fields(plan)]
    for name in names:
        found += [Candidate((name,), replace(plan, **{name: tile})) for tile in variations(getattr(plan, name))]
    paired = {name for pair in PAIRS for name in pair}
    for group in (*PAIRS, *((name,) for name in names if name not in paired)):
        for factor in (0.5, 2):
            tiles = {name: getattr(plan, name) for name in group}
            tiles = {name: replace(tile, m=int(tile.m * factor)) for name, tile in tiles.items()}
            if all(SMALLEST["m"] <= t.m <= LARGEST["m"] and t.m * t.n <= LARGEST_TILE for t in tiles.values()):
                found.append(Candidate(group, replace(plan, **tiles)))
    return found


@dataclass(frozen=True)
class Job:
    """A plan to compile for a shape: the types of x, of the routing's parts, and the GPU's number, 90 for an H200."""

    shape: Shape
    dtypes: dict[str, torch.dtype]
    key: tuple[str, int, str]
    plan: Any
    arch: int


def compile_plan(job: Job) -> str | None:
    """Compile what a forward and backward with a plan launch, into the cache on disk; the error in words, or None.

    Runs in a process of its own: the host code runs on tensors without memory, for a GPU that is only imagined.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from ...moe.kernels import triton as kernels

    shape = job.shape

    class Imagined:
        def get_current_target(self) -> Any:
            return GPUTarget("cuda", job.arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        run(self, *args, grid=grid, warmup=True, **options)

    x, w_in, w_out = _like(shape, job.dtypes["x"])
    rows = shape.tokens * shape.k
    sizes = {"weight": rows, "token_index": rows, "offsets": shape.experts + 1}
    weight, token_index, offsets = (torch.empty(n, dtype=job.dtypes[s], device="meta") for s, n in sizes.items())
    shared = (x, w_in, w_out, None, None, weight)
    routed = (token_index, offsets, "swiglu")
    driver = triton.runtime.driver
    real, driver._active = driver._active, Imagined()
    JITFunction.run = compile_only
    try:
        with planned(job.key, job.plan):
            _, pre = kernels.forward(*shared, *routed, True)
            kernels.backward(x, *shared, pre, *routed, [True, True, True, False, False, True])
    except Exception as error:  # a tile may be more than the compiler can do
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        JITFunction.run = run
        driver._active = real
    return None


def compile_all(setting: Setting, jobs: list[Job]) -> list[str | None]:
    """`compile_plan` of every job, on as many processes as the setting has."""
    if setting.processes <= 1:
        return [compile_plan(job) for job in jobs]
    pool = ProcessPoolExecutor(setting.processes, multiprocessing.get_context("spawn"))
    futures = [pool.submit(compile_plan, job) for job in jobs]
    # What is not compiled by then is compiled when it is timed.
    done, _ = wait(futures, timeout=None if setting.left == float("inf") else max(setting.left / 2, 1))
    pool.shutdown(wait=False, cancel_futures=True)
    return [_error(future) if future in done else "not compiled in time" for future in futures]


def _error(future: Future[str | None]) -> str | None:
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {str(error)[:200]}"


class Timer:
    """Forward or backward of one problem with any plan."""

    def __init__(self, setting: Setting, shape: Shape, key: tuple[str, int, str]) -> None:
        self.setting, self.key = setting, key
        self.problem: Problem = setting.problem(shape)
        self.routing = route(setting, self.problem)
        self.routing.weight = self.routing.weight.detach().requires_grad_()
        self.dy = torch.randn_like(self.problem.x)

    def __call__(self, candidate: Candidate, forward: bool) -> float:
        """Seconds."""
        p, routing = self.problem, self.routing
        leaves = [p.x, p.w_in, p.w_out, routing.weight]

        def run() -> Tensor:
            return moe_mlp(p.x, p.w_in, p.w_out, routing, "swiglu", "triton")

        with planned(self.key, candidate.plan):
            if forward:
                return seconds(self.setting, run, self.setting.repeats)
            y = run()
            step = lambda: torch.autograd.grad(y, leaves, self.dy, retain_graph=True)  # noqa: E731
            return seconds(self.setting, step, self.setting.repeats)


def tiles(setting: Setting) -> Iterator[Row]:
    """The fastest tile of each kernel on every shape, found one kernel at a time, and all of them together."""
    from ...moe.kernels.triton.numerics import INTERPRETED
    from ...moe.kernels.triton.tiles import PLANS, architecture

    arch = architecture(torch.device(setting.device))
    if not (setting.cuda or INTERPRETED):
        yield Row("table", None, "Triton's kernels run on a GPU, or with TRITON_INTERPRET=1")
        return
    if arch != "90":
        yield Row("table", None, f"candidates are those of Hopper; this GPU uses the table for {arch}")
        return
    few = [shape._replace(tokens=tokens) for shape in setting.shapes[:1] for tokens in setting.few[1:]]
    keys = {shape: key_of(shape, setting.dtype, arch) for shape in (*setting.shapes, *few)}
    plans = {shape: candidates(PLANS[key]) for shape, key in keys.items()}
    if not setting.cuda:  # each run takes the interpreter a while
        plans = {shape: each[:2] + each[-1:] for shape, each in plans.items()}
    if setting.cuda:
        jobs = [job for shape, each in plans.items() for job in jobs_of(setting, shape, keys[shape], each)]
        failed = [error for error in compile_all(setting, jobs) if error]
        yield Row("compiled", None, f"{len(jobs)} plans, of which {len(failed)} failed", {"errors": failed[:20]})
    for shape, key in keys.items():
        yield tried(text(shape), partial(best_tiles, setting, shape, key, plans[shape]))


def jobs_of(setting: Setting, shape: Shape, key: tuple[str, int, str], plans: list[Candidate]) -> list[Job]:
    """What to compile for the GPU that is here."""
    routing = route(setting, setting.problem(shape._replace(tokens=1, dim=1, hidden_dim=1)))
    dtypes = {name: getattr(routing, name).dtype for name in ("weight", "token_index", "offsets")}
    major, minor = torch.cuda.get_device_capability()
    return [Job(shape, dtypes | {"x": setting.dtype}, key, one.plan, 10 * major + minor) for one in plans]


def best_tiles(setting: Setting, shape: Shape, key: tuple[str, int, str], plans: list[Candidate]) -> Row:
    """Time every candidate of one shape."""
    timer, table = Timer(setting, shape, key), plans[0].plan
    base = {forward: timer(plans[0], forward) for forward in (True, False)}
    entries: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    for one in plans[1:]:
        if setting.left < 0:
            break
        entry: dict[str, Any] = {"kernels": one.kernels, **{n: asdict(getattr(one.plan, n)) for n in one.kernels}}
        forward = one.kernels[0] in FORWARD
        try:
            took = timer(one, forward)
        except Exception as error:  # more shared memory or registers than there are
            entries.append(entry | {"error": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        entries.append(entry | {"ms": 1e3 * took, "gain": base[forward] / took})
        for name in one.kernels if len(one.kernels) == 1 else ():
            if took < best.get(name, (base[forward],))[0]:
                best[name] = took, getattr(one.plan, name)
    together = replace(table, **{name: tile for name, (_, tile) in best.items()})
    after = {forward: timer(Candidate((), together), forward) for forward in (True, False)}
    names = {True: "forward", False: "backward"}
    gains = {names[f]: base[f] / after[f] for f in base}
    pairs = [e for e in entries if len(e["kernels"]) > 1 and e.get("gain", 0) > 1]
    figures = {
        "key": key,
        "table_ms": {names[f]: 1e3 * t for f, t in base.items()},
        "best_ms": {names[f]: 1e3 * t for f, t in after.items()},
        "best": asdict(together),
        "faster_heights": pairs,
        "candidates": entries,
    }
    speeds = ", ".join(f"{name} {gain:.2f}" for name, gain in gains.items())
    note = f"{key[2]}: {speeds} times the table's speed"
    changed = [f"{name} {tuple(asdict(tile).values())}" for name, (_, tile) in best.items()]
    return Row(text(shape), None, f"{note}; {'; '.join(changed) or 'nothing is faster'}", figures)
