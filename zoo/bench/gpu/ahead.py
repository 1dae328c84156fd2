"""Compile kernels ahead of their first launch, on all cores and without the GPU, into Triton's cache on disk."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contestants import Shape
from .setting import Setting


@dataclass
class ImaginedGPU:
    """As much of a Triton driver as compiling needs; arch: 90 for an H200."""

    arch: int

    def get_current_target(self) -> Any:
        """What to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A number for each architecture, as Triton keeps what it compiled by device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """There is only one."""
        return 0


@contextmanager
def imagined(arch: int, seen: Callable[[Any, dict[str, Any], Any], object] | None = None) -> Iterator[None]:
    """Launches are compilations for a GPU that is only imagined; `seen` is given function, options and kernel."""
    import triton
    from triton.runtime.jit import JITFunction

    run, driver = JITFunction.run, triton.runtime.driver

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if seen is not None:
            seen(self, options, kernel)

    real, driver._active = driver._active, ImaginedGPU(arch)
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = real


@contextmanager
def planned(device: str | torch.device, key: Any, plan: Any) -> Iterator[None]:
    """Use `plan` for the shapes of a key (`tuned.Key`) on a device."""
    from ...moe.kernels.triton.tuned import tuned

    table = tuned(torch.device(device))
    before = dict(table)
    table[key] = plan
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def like(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, w_in and w_out without memory."""
    sizes = (
        (shape.tokens, shape.dim),
        (shape.experts, 2 * shape.hidden_dim, shape.dim),
        (shape.experts, shape.dim, shape.hidden_dim),
    )
    x, w_in, w_out = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    return x, w_in, w_out


@dataclass(frozen=True)
class Job:
    """A plan to compile for a shape: the types of x, of the routing's parts, and the GPU's number, 90 for an H200."""

    shape: Shape
    dtypes: dict[str, torch.dtype]
    key: Any
    plan: Any
    arch: int


def compile_plan(job: Job) -> str | None:
    """Compile what a forward and backward with a plan launch; the error in words, or None.

    The host code runs on tensors without memory, for a GPU that is only imagined.
    """
    from ...moe.kernels import triton as kernels

    shape = job.shape
    x, w_in, w_out = like(shape, job.dtypes["x"])
    rows = shape.tokens * shape.k
    sizes = {"weight": rows, "token_index": rows, "offsets": shape.experts + 1}
    weight, token_index, offsets = (torch.empty(n, dtype=job.dtypes[s], device="meta") for s, n in sizes.items())
    shared = (x, w_in, w_out, None, None, weight)
    routed = (token_index, offsets, "swiglu")
    try:
        with imagined(job.arch), planned("meta", job.key, job.plan):
            _, pre = kernels.forward(*shared, *routed, True)
            kernels.backward(x, *shared, pre, *routed, [True, True, True, False, False, True])
    except Exception as error:  # a tile may be more than the compiler can do
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


class Compiler:
    """`compile_plan` of many jobs, on as many processes as the setting has; they are kept until it is closed."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        several = setting.processes > 1
        self.pool = ProcessPoolExecutor(setting.processes, multiprocessing.get_context("spawn")) if several else None

    def __call__(self, jobs: list[Job]) -> list[str | None]:
        """The error of each job in words, or None."""
        if self.pool is None:
            return [compile_plan(job) for job in jobs]
        futures = [self.pool.submit(compile_plan, job) for job in jobs]
        # What is not compiled by then is compiled when it is timed.
        done, late = wait(futures, timeout=None if self.setting.left == float("inf") else max(self.setting.left / 2, 1))
        for future in late:
            future.cancel()
        return [_error(future) if future in done else "not compiled in time" for future in futures]

    def close(self) -> None:
        """End the processes."""
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def _error(future: Future[str | None]) -> str | None:
    error = future.exception()
    return future.result() if error is None else f"{type(error).__name__}: {str(error)[:200]}"
