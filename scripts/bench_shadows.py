"""What more copies of hot experts save between processes, on a trace of skewed choices: bytes, and the busiest process.

python scripts/bench_shadows.py --skew 1.5

Tokens choose k experts whose popularity falls by Zipf's law; which experts are popular drifts from step to step. Ways:
each expert once; in an order that puts experts chosen together on one process (`zoo.parallel.placement`); hot experts
lent to all for a step (`shadows` of `parallelize`, FasterMoE's); hot experts of an earlier trace kept by all (in the
manner of FlexMoE). Means over steps, all processes together; nothing is sent or computed.
"""

import argparse
import math

import torch
from torch import Tensor

from tasks.numbers import count
from zoo.parallel.placement import place
from zoo.parallel.replicas import Sent, kept, lent, step


def trace(args: argparse.Namespace, steps: int, generator: torch.Generator, order: Tensor) -> list[Tensor]:
    """Choices [T, E] of every step; `order`, which expert has which rank of popularity, drifts in place."""
    popularity = torch.arange(1, args.experts + 1, dtype=torch.double).pow(-args.skew)
    found = []
    for _ in range(steps):
        for _ in range(args.drift):
            a, b = torch.randint(args.experts, (2,), generator=generator).tolist()
            order[[a, b]] = order[[b, a]]
        weights = popularity[order].expand(args.tokens * args.processes, -1)
        picks = torch.multinomial(weights, args.k, generator=generator)
        chosen = torch.zeros(len(picks), args.experts, dtype=torch.bool)
        found.append(chosen.scatter_(1, picks, True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"processes": 8, "experts": 64, "k": 2, "tokens": 8192, "dim": 1024, "hidden": 512, "steps": 20}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=count, default=default, help=f"{default} by default")
    for name, default in {"limit": 4, "drift": 1, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{default} by default")
    parser.add_argument("--skew", type=float, default=1.2, help="exponent of Zipf's law, 1.2 by default")
    args = parser.parse_args()
    if args.experts % args.processes:
        parser.error(f"{args.processes} processes do not divide {args.experts} experts")
    if args.k > args.experts:
        parser.error(f"--k: expected at most --experts {args.experts}, got {args.k}")
    if not math.isfinite(args.skew):
        parser.error(f"--skew: expected a finite number, got {args.skew}")
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(args.experts, generator=generator)
    before, after = (trace(args, args.steps, generator, order) for _ in range(2))
    row, expert = 2 * args.dim, 2 * 3 * args.dim * args.hidden  # bytes of bfloat16, gated experts
    costs = (args.processes, row, expert)
    placed = place(torch.cat(before[-4:]), args.processes)
    for_good = kept(before, *costs, args.limit)
    ways: dict[str, list[Sent]] = {
        "each expert once": [step(chosen, *costs) for chosen in after],
        "placed": [step(chosen[:, placed], *costs) for chosen in after],
        "lent for a step": [step(chosen, *costs, lent(chosen, *costs, args.limit)) for chosen in after],
        "kept by all": [step(chosen, *costs, for_good) for chosen in after],
    }
    even = args.tokens * args.k
    print(f"{'way':18}{'rows, MB':>10}{'experts, MB':>13}{'of plain':>10}{'busiest / mean':>16}")
    plain = sum(s.rows for s in ways["each expert once"])
    for name, found in ways.items():
        rows, weights = (sum(getattr(s, what) for s in found) for what in ("rows", "weights"))
        busiest = sum(s.busiest for s in found) / len(found) / even
        print(f"{name:18}{rows / len(found) / 1e6:>10.1f}{weights / len(found) / 1e6:>13.1f}", end="")
        print(f"{(rows + weights) / plain:>10.2f}{busiest:>16.2f}")


if __name__ == "__main__":
    main()
