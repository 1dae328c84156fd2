"""What the topology loss (TA-MoE) saves between nodes, and when it saves nothing, on simulated processes.

python scripts/bench_topology.py

Experts of one layer, a matrix each, are spread over processes in nodes; tokens come in clusters, each with a linear map
to learn. Gates are each process's own, as in the authors' runs, or one for all, as with data parallelism; data is alike
everywhere, or each process sees mostly two clusters. Rows are tokens that go to another process or node, each once, out
of those processed; a row is sent four times a step (there, back, and both gradients). "error" is the mean squared error
on fresh data, relative to that of predicting zero, "elsewhere" that of the same data with the gate of the process half
the group away, "load" the busiest expert's share against the mean over all processes. Everything runs in one process.
"""

import argparse

import torch
from torch import Tensor

from tasks.cli import run_script
from tasks.numbers import count
from zoo.moe import Routing
from zoo.moe.routers import TopKRouter

CASES = [  # gates, data, loss
    ("own", "alike", "load_balance"),
    ("own", "alike", "topology"),
    ("one", "alike", "load_balance"),
    ("one", "alike", "topology"),
    ("one", "by process", "load_balance"),
    ("one", "by process", "topology"),
]


class Task:
    """Clusters of tokens around a centre, each with a linear map to learn."""

    def __init__(self, args: argparse.Namespace, data: str) -> None:
        self.args, self.data, count = args, data, 2 * args.processes
        self.centre = 2 * torch.randn(count, args.dim)
        self.map = torch.randn(count, args.dim, args.dim) / args.dim**0.5

    def draw(self, rank: int) -> tuple[Tensor, Tensor]:
        """Tokens [T, D] of a process and what they should become."""
        args = self.args
        cluster = torch.randint(len(self.centre), (args.tokens,))
        if self.data == "by process":
            cluster = cluster.where(torch.rand(args.tokens) < 0.2, 2 * rank + cluster % 2)
        x = self.centre[cluster] + torch.randn(args.tokens, args.dim)
        return x, torch.einsum("td,tdf->tf", x, self.map[cluster])

    def everywhere(self) -> tuple[Tensor, Tensor]:
        """The same of all processes, [R, T, D]."""
        x, y = zip(*(self.draw(rank) for rank in range(self.args.processes)))
        return torch.stack(x), torch.stack(y)


def gates(args: argparse.Namespace, kind: str, loss: str) -> list[TopKRouter]:
    """One gate a process; all have the same weight where kind is "one"."""
    made = []
    for rank in range(args.processes):
        options: dict[str, object] = {"weight": args.weight}
        if loss == "topology":
            options |= {"costs": args.costs, "processes": args.processes, "rank": rank, "within": args.within}
        made.append(TopKRouter(args.dim, args.experts, args.k, normalize=True, losses={loss: options}))
        if kind == "one":
            made[rank].weight = made[0].weight
    return made


def crossing(routing: Routing, rank: int, args: argparse.Namespace) -> tuple[int, int]:
    """Rows to other processes, and to those of other nodes: a token goes once to each that has any of its experts."""
    there = routing.dense().ne(0).unflatten(1, (args.processes, -1)).any(-1)
    node = torch.arange(args.processes) // args.within
    there[:, rank] = False
    return int(there.sum()), int(there[:, node != rank // args.within].sum())


def run(args: argparse.Namespace, kind: str, data: str, loss: str) -> dict[str, float]:
    torch.manual_seed(args.seed)
    task = Task(args, data)
    experts = (torch.randn(args.experts, args.dim, args.dim) / args.dim**0.5).requires_grad_()
    routers = gates(args, kind, loss)
    weights = {id(router.weight): router.weight for router in routers}
    optimizer = torch.optim.Adam([experts, *weights.values()], lr=args.lr)
    for _ in range(args.steps):
        x, y = task.everywhere()
        routings = [router(part) for router, part in zip(routers, x)]
        losses = torch.stack([value for routing in routings for value in routing.losses.values()])
        optimizer.zero_grad()
        ((mixed(x, routings, experts) - y).square().mean() + losses.mean()).backward()
        optimizer.step()
    return measure(args, task, experts, routers)


def mixed(x: Tensor, routings: list[Routing], experts: Tensor) -> Tensor:
    """Weighted sum of what each token's experts [E, D, D] make of the tokens [R, T, D] of all processes."""
    dense = torch.stack([routing.dense() for routing in routings])
    each = x @ experts.transpose(0, 1).flatten(1)  # [R, T, E D]
    return (each.unflatten(-1, (len(experts), -1)) * dense.unsqueeze(-1)).sum(2)


@torch.no_grad()
def measure(args: argparse.Namespace, task: Task, experts: Tensor, routers: list[TopKRouter]) -> dict[str, float]:
    """Averages over fresh batches of all processes, and bytes of one step."""
    found = dict.fromkeys(("error", "elsewhere", "zero", "processes", "nodes"), 0.0)
    load, batches = torch.zeros(args.experts), 10
    for _ in range(batches):
        x, y = task.everywhere()
        routings = [router(part) for router, part in zip(routers, x)]
        half = args.processes // 2
        others = [router(part) for router, part in zip(routers[half:] + routers[:half], x)]
        found["error"] += float((mixed(x, routings, experts) - y).square().mean())
        found["elsewhere"] += float((mixed(x, others, experts) - y).square().mean())
        found["zero"] += float(y.square().mean())
        for rank, routing in enumerate(routings):
            processes, nodes = crossing(routing, rank, args)
            found["processes"] += processes
            found["nodes"] += nodes
            load += routing.counts
    zero, tokens = found.pop("zero"), batches * args.processes * args.tokens
    megabytes = 4 * found["nodes"] / batches * args.dim * 4 / 1e6
    return {
        "error": found["error"] / zero,
        "elsewhere": found["elsewhere"] / zero,
        "processes": found["processes"] / tokens,
        "nodes": found["nodes"] / tokens,
        "MB": megabytes,
        "load": float(load.max() / load.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"processes": 8, "within": 4, "experts": 16, "k": 2, "dim": 32, "tokens": 64, "steps": 300}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=count, default=default, help=f"{default} by default")
    parser.add_argument("--seed", type=int, default=0, help="0 by default")
    parser.add_argument("--weight", type=float, default=0.3, help="of either loss, 0.3 by default")
    parser.add_argument("--lr", type=float, default=1e-2, help="0.01 by default")
    parser.add_argument("--costs", type=float, nargs=3, default=[1, 2, 16], help="of a byte, by kind of link")
    args = parser.parse_args()
    if args.experts % args.processes or args.processes % args.within:
        parser.error(f"{args.experts} experts, {args.processes} processes, {args.within} in a node do not divide")
    torch.set_num_threads(1)
    print(f"{'gates':6}{'data':12}{'loss':14}{'error':>8}{'elsewhere':>11}{'to processes':>14}{'to nodes':>10}", end="")
    print(f"{'MB a step':>11}{'load':>7}")
    for kind, data, loss in CASES:
        r = run(args, kind, data, loss)
        print(f"{kind:6}{data:12}{loss:14}{r['error']:>8.3f}{r['elsewhere']:>11.3f}", end="")
        print(f"{r['processes']:>14.2f}{r['nodes']:>10.2f}{r['MB']:>11.3f}{r['load']:>7.2f}")


if __name__ == "__main__":
    run_script(main)
