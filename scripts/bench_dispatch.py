"""What the ways of bringing tokens to experts of other processes cost, against the same layer with whole experts.

python scripts/bench_dispatch.py --processes 4

Every process runs a layer with a shared expert, forward and backward, by turns with: whole experts (no exchange: the
limit), the exchange, the exchange in two chunks, by nodes of two processes, and in messages of fixed size. Times are
medians of the slowest process; bytes are those that all processes sent, beside the closed form. On gloo, so that it
runs anywhere: processes share this machine's cores and memory.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tasks.numbers import count
from zoo.moe import ExpertParallel, Experts, HierarchicalExpertParallel, MoE, StaticExpertParallel
from zoo.moe.routers import TopKRouter


def layer(args: argparse.Namespace, way: str, nodes: Any) -> tuple[MoE, Any]:
    """A layer whose experts are spread in one of the ways, and what brings tokens to them."""
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(args.dim, args.hidden), nn.SiLU(), nn.Linear(args.hidden, args.dim))
    moe = MoE(TopKRouter(args.dim, args.experts, args.k), Experts(args.experts, args.dim, args.hidden), shared=shared)
    if way == "whole experts":
        return moe, None
    parallel: Any
    if way == "by nodes of two":
        parallel = HierarchicalExpertParallel(args.experts, *nodes)
    elif way == "fixed messages":
        parallel = StaticExpertParallel(args.experts, 2 * args.tokens * args.k // args.experts)
    else:
        parallel = ExpertParallel(args.experts, chunks=2 if way == "two chunks" else 1)
    moe.experts.keep_own(parallel)
    return moe, parallel


def sent(parallel: Any) -> int:
    """Bytes of rows that this process has sent."""
    if isinstance(parallel, HierarchicalExpertParallel):
        return parallel.traffic_between.rows + parallel.traffic_within.rows
    return parallel.traffic.rows if parallel is not None else 0


def closed_form(args: argparse.Namespace, way: str, moe: MoE, x: torch.Tensor) -> int:
    """Bytes of rows that the exchange of this process's tokens should take, in all processes."""
    if way == "fixed messages":
        places = 2 * args.tokens * args.k // args.experts
        return 4 * (args.experts - args.experts // args.processes) * places * args.dim * 4
    if way not in ("the exchange", "two chunks"):
        return 0
    holder = moe.router(x).dense().view(len(x), args.processes, -1).ne(0).any(-1)
    holder[:, dist.get_rank()] = False
    return 4 * int(holder.sum()) * args.dim * 4


def worker(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=args.processes)
    ways = ["whole experts", "the exchange", "two chunks", "fixed messages"]
    nodes = None
    if args.processes % 2 == 0 and args.processes > 2:
        mesh = init_device_mesh("cpu", (args.processes // 2, 2), mesh_dim_names=("between", "within"))
        nodes = mesh["between"].get_group(), mesh["within"].get_group()
        ways.append("by nodes of two")
    torch.manual_seed(1 + rank)
    x = torch.randn(args.tokens, args.dim, requires_grad=True)
    made = {way: layer(args, way, nodes) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(args.repeats + 1):
        for way, (moe, _) in made.items():
            dist.barrier()
            start = time.perf_counter()
            moe(x).sum().backward()
            took = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if turn:  # the first warms up
                times[way].append(float(took))
    rows = []
    for way, (moe, parallel) in made.items():
        found = torch.tensor([sent(parallel) / (args.repeats + 1), closed_form(args, way, moe, x)])
        dist.all_reduce(found)
        rows.append((way, statistics.median(times[way]), *found.tolist()))
    if rank == 0:
        limit = rows[0][1]
        print(f"{'':18}{'ms':>9}{'of the limit':>14}{'MB sent':>10}{'closed form':>13}")
        for way, seconds, found, expected in rows:
            shown = f"{expected / 1e6:>13.2f}" if expected else ""
            print(f"{way:18}{1e3 * seconds:>9.1f}{limit / seconds:>14.2f}{found / 1e6:>10.2f}{shown}")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"processes": 2, "tokens": 2048, "dim": 256, "hidden": 512, "experts": 16, "k": 2, "repeats": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=count, default=default, help=f"{default} by default")
    args = parser.parse_args()
    if args.experts % args.processes:
        parser.error(f"{args.processes} processes do not divide {args.experts} experts")
    if args.k > args.experts:
        parser.error(f"--k: expected at most --experts {args.experts}, got {args.k}")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(worker, args=(args, folder), nprocs=args.processes, start_method="fork")


if __name__ == "__main__":
    main()
