"""What the demo runs on, and how to use it well."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Parameters of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def describe() -> dict[str, Any]:
    """Processor, cores and versions, for the report."""
    packages = ("moe-zoo", "torch", "transformers", "lightning")
    return {
        "processor": _processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: a training step allocates the same large blocks again and again.

    Handing them back costs fresh pages each time; on 2 cores, element-wise passes over new tensors were 2 to 3 times
    as slow. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 4096)
        mallopt(M_ARENA_MAX, 1)


def fast_precision() -> str:
    """Lightning's name of the precision in which matrix products are fastest here: found by trying."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        return min(times)

    return "bf16-mixed" if seconds(torch.bfloat16) < 0.7 * seconds(torch.float32) else "32-true"


def cores_each(models: int) -> int:
    """Cores of each of several trainings side by side."""
    return max(1, cores() // models)


def in_words(count: int) -> str:
    """Cores in words, for people."""
    return f"{count} core{'s' * (count > 1)} each"


class Stopwatch:
    """Seconds of training: it stands still in evaluations."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def go(self) -> None:
        """Run on."""
        self._since = time.perf_counter()

    def halt(self) -> None:
        """Stand still; harmless when it does."""
        if self._since:
            self.seconds += time.perf_counter() - self._since
            self._since = 0.0
