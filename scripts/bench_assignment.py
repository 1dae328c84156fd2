"""Time of BASE's router in training as a multiple of one dense layer's: python scripts/bench_assignment.py --help."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from tasks.numbers import count
from zoo.moe.routers import BASERouter


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=count, default=8192)
    parser.add_argument("--experts", type=count, default=64)
    parser.add_argument("--width", type=count, default=1024)
    parser.add_argument("--repeats", type=count, default=11)
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(args.tokens, args.width)
    dense, router = torch.nn.Linear(args.width, args.width), BASERouter(args.width, args.experts)
    with torch.no_grad():
        dense(x), router(x)
        # In turn, so that whatever else the machine does meets both.
        ratios = [seconds(lambda: router(x)) / seconds(lambda: dense(x)) for _ in range(args.repeats)]
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"BASE, {args.tokens} tokens, {args.experts} experts: {middle:.2f} x one dense layer of width {args.width}")
    print(f"({args.repeats} pairs, {low:.2f} to {high:.2f}, {torch.get_num_threads()} threads, forward)")


if __name__ == "__main__":
    main()
