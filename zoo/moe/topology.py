"""A balance loss that knows of the network: tokens go where the link to the experts is cheap (TA-MoE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .masked import choice_count, token_count, token_sum

LINKS = ("own process", "own node", "other nodes")


def topology(
    probs: Tensor,
    selected: Tensor,
    costs: Sequence[float],
    mask: Tensor | None = None,
    penalty: str = "cost",
    within: int = 1,
    processes: int | None = None,
    rank: int = 0,
    parallel: Any = None,
) -> Tensor:
    """E * sum_e p_e f_e P_e over probs and selected [.., T, E]: `load_balance`, each expert at its own price.

    TA-MoE (2302.09915): a process that sends c_e tokens to expert e over a link of `costs` seconds (or any unit) a byte
    does best with c_e inversely proportional to the link's cost (`target`). P_e is the mean probability and f_e the
    share of the choices, as in `zoo.moe.balance.load_balance`, which this is exactly where all links cost the same.
    p has mean 1 over the experts. penalty="cost" takes p proportional to the costs, to 1 / target: with f = P the least
    loss is then at P = target. "softmax" is the authors' code (github.com/Chen-Chang/TA-MoE, gshard_gate.py): softmax
    of the costs over processes; its loss is this one times k / processes, and its least is not at the target.

    costs has three numbers above zero, a byte to an expert of one's own process, of another process of the node, of
    another node; experts are spread over processes as `ExpertParallel` does. Where they are, the layer says so and this
    process's place is known; `within` is how many processes of a group are in a node, unless they travel by nodes
    (`HierarchicalExpertParallel`). A simulation says `processes` and `rank`. With neither, experts are all at hand, and
    this is `load_balance`. YAML: losses: {topology: {weight: 0.01, costs: [1, 2, 16], within: 8}}.

    What it costs: an expert learns mostly from tokens of near processes, and a token's expert comes to depend on where
    it was seen, which says nothing about it where the model is used. It acts through what is particular to a process.
    In the authors' runs (run.sh: --gate_reduce_freq 1000) that is the gate, whose gradients are not averaged; a gate
    that all processes share, as with `zoo.parallel`, can only follow differences of their data (languages, domains):
    on data that is everywhere alike the processes' prices cancel out, and `load_balance` is left.

    Raises ValueError for costs that are not three numbers above zero, an unknown penalty, or a place that is none.
    """
    tokens, num_experts = token_count(probs, mask), probs.shape[-1]
    counts = choice_count(selected, mask, probs)
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    if processes is not None:
        levels = expert_links(expert_bounds(num_experts, processes), rank, within)
    else:
        levels = [0] * num_experts if parallel is None else parallel.links(within)
    price = share.new_tensor(prices(costs, levels, penalty))
    return (num_experts * (price * share * (token_sum(probs, mask) / tokens.clamp(min=1))).sum(-1)).mean()


def target(costs: Sequence[float], levels: Sequence[int]) -> list[float]:
    """The share of its choices that a process should give each expert, in inverse proportion to its link's cost."""
    _check(costs)
    inverse = [1 / costs[level] for level in levels]
    return [value / sum(inverse) for value in inverse]


def prices(costs: Sequence[float], levels: Sequence[int], penalty: str = "cost") -> list[float]:
    """What each expert's share is multiplied by: `penalty` of `topology`, with mean 1."""
    _check(costs)
    each = torch.tensor([float(costs[level]) for level in levels], dtype=torch.float64)
    # Against the largest: equal costs are ones, to the last digit.
    if penalty == "softmax":
        each = (each - each.max()).exp()
    elif penalty == "cost":
        each = each / each.max()
    else:
        raise ValueError(f"topology: penalty must be 'cost' or 'softmax', got {penalty!r}")
    return (each / each.mean()).tolist()


def expert_bounds(num_experts: int, processes: int, part: int | None = None) -> list[int]:
    """Where each process's experts begin, [R + 1]: neighbours together, a part each, the last ones the rest.

    A part is ceil(E / R) where none is said.
    """
    part = part or -(-num_experts // processes)
    return [min(part * r, num_experts) for r in range(processes + 1)]


def expert_links(bounds: Sequence[int], rank: int, within: int = 1) -> list[int]:
    """For every expert the place in LINKS of what leads to it from process `rank`, with `within` processes a node."""
    processes = len(bounds) - 1
    if within < 1 or not 0 <= rank < processes:
        raise ValueError(f"topology: rank {rank} of {processes} processes, within={within} of them in a node")
    levels: list[int] = []
    for other in range(processes):
        level = 0 if other == rank else 1 if other // within == rank // within else 2
        levels += [level] * (bounds[other + 1] - bounds[other])
    return levels


def _check(costs: Sequence[float]) -> None:
    numbers = isinstance(costs, Sequence) and all(isinstance(c, (int, float)) for c in costs)
    if not numbers or len(costs) != len(LINKS) or not all(0 < c < float("inf") for c in costs):
        raise ValueError(f"topology: costs must be three numbers above zero ({', '.join(LINKS)}), got {costs!r}")
