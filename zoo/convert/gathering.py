"""One MLP's weights from those of several experts: the knowledge gathering of OneS (2201.10890), and concatenation.

Experts come as `Stack`, the layout of `zoo.moe.Experts`; an MLP is a dictionary with the names of
`dense_mlps.DenseMLP.weights`. A neuron is a hidden unit: its row of w_in, two where there is a gate, and its column of
w_out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..moe import Experts
from ..nearest import unknown

Stack = dict[str, Tensor]  # w_in [E, 2F or F, D], w_out [E, D, F], and b_in [E, 2F or F], b_out [E, D] where biases are


def stack_of(experts: Experts) -> Stack:
    """The weights of an `Experts`, views."""
    parts = {"w_in": experts.w_in, "w_out": experts.w_out, "b_in": experts.b_in, "b_out": experts.b_out}
    return {name: tensor.detach() for name, tensor in parts.items() if tensor is not None}


def average(stack: Stack, weights: Sequence[float] | None = None, gated: bool = True) -> dict[str, Tensor]:
    """sum_e a_e W_e with a = weights / their sum, even by default. Experts that are equal give just what they are."""
    shares = _shares(weights, len(stack["w_in"]))
    found = {}
    for name, tensor in stack.items():
        first, total = tensor[0].to(_exact(tensor)), torch.zeros_like(tensor[0], dtype=_exact(tensor))
        for share, other in zip(shares[1:], tensor[1:]):
            total.add_(other.to(total.dtype) - first, alpha=share)
        found[name] = (first + total).to(tensor.dtype)
    return found


def add(stack: Stack, weights: Sequence[float] | None = None, gated: bool = True) -> dict[str, Tensor]:
    """sum_e a_e W_e, with a = 1 by default: OneS's summation."""
    factors = _factors(weights, len(stack["w_in"]))
    return {name: _sum(tensor, factors, lambda one: one) for name, tensor in stack.items()}


def top_k(stack: Stack, weights: Sequence[float] | None = None, gated: bool = True) -> dict[str, Tensor]:
    """F neurons: of each expert its share of them, those whose weights have the largest Euclidean norm (Top-KG).

    Shares are even or as weights are; neurons keep their order. b_out is the average by these shares.
    """
    number, width = len(stack["w_in"]), stack["w_out"].shape[2]
    shares, counts = _shares(weights, number), _apportion(_shares(weights, number), width)
    sides = 2 if gated else 1
    norms = stack["w_in"].float().square().sum(2).unflatten(1, (sides, width)).sum(1)
    norms = norms + stack["w_out"].float().square().sum(1)
    parts: list[dict[str, Tensor]] = []
    for e, count in enumerate(counts):
        chosen = norms[e].topk(count).indices.sort().values
        parts.append(_neurons({name: tensor[e] for name, tensor in stack.items()}, chosen, sides))
    found = side_by_side(parts, gated)
    if "b_out" in stack:
        found["b_out"] = average({"w_in": stack["b_out"], "b_out": stack["b_out"]}, shares)["b_out"]
    return found


def svd(stack: Stack, weights: Sequence[float] | None = None, gated: bool = True) -> dict[str, Tensor]:
    """sum_e a_e [W_e]_r, where [W]_r is the best approximation of rank r = full rank / E (SVD-KG); a = 1 by default.

    Gate and up are matrices of their own. Ranks that E does not divide go to the first experts; biases are summed.
    """
    number = len(stack["w_in"])
    factors, sides = _factors(weights, number), 2 if gated else 1
    found = {}
    for name, tensor in stack.items():
        if name.startswith("b"):
            found[name] = _sum(tensor, factors, lambda one: one)
            continue
        pieces = tensor.chunk(sides, dim=1) if name == "w_in" else (tensor,)
        ranks = _apportion([1 / number] * number, min(pieces[0].shape[1:]))
        found[name] = torch.cat([_sum(piece, factors, _low_rank, ranks) for piece in pieces])
    return found


def concatenate(stack: Stack, weights: Sequence[float] | None = None, gated: bool = True) -> dict[str, Tensor]:
    """All neurons of all experts, width E F, which computes sum_e a_e f_e(x): exact where a gate's weights are a."""
    factors = _factors(weights, len(stack["w_in"]))
    parts = [{name: tensor[e] for name, tensor in stack.items()} for e in range(len(factors))]
    return side_by_side([scaled(part, factor) for part, factor in zip(parts, factors)], gated)


def one(expert: int, stack: Stack, weights: Sequence[float] | None = None, gated: bool = True) -> dict[str, Tensor]:
    """A single expert."""
    return {name: tensor[expert] for name, tensor in stack.items()}


METHODS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "average": average,
    "sum": add,
    "topk": top_k,
    "svd": svd,
    "concatenate": concatenate,
}


def method_of(spec: Any) -> Callable[..., dict[str, Tensor]] | int | str:
    """The function of METHODS that a name means; of {"expert": e} the number e, or "used".

    Raises ValueError naming the nearest method for an unknown one.
    """
    if isinstance(spec, str):
        if spec not in METHODS:
            raise unknown("to_dense: method", spec, METHODS)
        return METHODS[spec]
    try:
        ((name, expert),) = dict(spec).items()
    except (TypeError, ValueError):
        name, expert = "", None
    right = expert == "used" or (isinstance(expert, int) and not isinstance(expert, bool))
    if name != "expert" or not right:
        known = f'{", ".join(METHODS)}, {{"expert": number}} or {{"expert": "used"}}'
        raise ValueError(f"to_dense: method is one of {known}; got {spec!r}")
    return expert


def side_by_side(mlps: Sequence[dict[str, Tensor]], gated: bool) -> dict[str, Tensor]:
    """One MLP with the neurons of several, which computes their sum; biases that one lacks are zero."""
    biased = any("b_out" in mlp for mlp in mlps)
    sides = 2 if gated else 1
    into = [mlp["w_in"].chunk(sides) for mlp in mlps]
    found = {
        "w_in": torch.cat([piece for side in zip(*into) for piece in side]),
        "w_out": torch.cat([mlp["w_out"] for mlp in mlps], dim=1),
    }
    if biased:
        rows = [mlp.get("b_in", mlp["w_in"].new_zeros(len(mlp["w_in"]))).chunk(sides) for mlp in mlps]
        found["b_in"] = torch.cat([piece for side in zip(*rows) for piece in side])
        outs = [mlp["b_out"] for mlp in mlps if "b_out" in mlp]
        found["b_out"] = outs[0] if len(outs) == 1 else torch.stack([out.to(_exact(out)) for out in outs]).sum(0)
        found["b_out"] = found["b_out"].to(found["w_out"].dtype)
    return found


def scaled(mlp: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """An MLP whose outputs are multiplied by a factor."""
    if factor == 1:
        return mlp
    return {name: tensor * factor if name.endswith("out") else tensor for name, tensor in mlp.items()}


def _neurons(mlp: dict[str, Tensor], chosen: Tensor, sides: int) -> dict[str, Tensor]:
    """Some neurons of an MLP, without its output's bias."""
    found = {"w_out": mlp["w_out"][:, chosen]}
    for name in mlp.keys() & {"w_in", "b_in"}:
        found[name] = torch.cat([side[chosen] for side in mlp[name].chunk(sides)])
    if "b_in" in found:
        found["b_out"] = mlp["b_out"]
    return found


def _sum(tensor: Tensor, factors: Sequence[float], part: Callable[..., Tensor], *each: Sequence[Any]) -> Tensor:
    total = torch.zeros_like(tensor[0], dtype=_exact(tensor))
    for own, factor, *more in zip(tensor, factors, *each):
        total.add_(part(own.to(total.dtype), *more), alpha=factor)
    return total.to(tensor.dtype)


def _low_rank(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _factors(weights: Sequence[float] | None, number: int) -> list[float]:
    return [1.0] * number if weights is None else list(weights)


def _shares(weights: Sequence[float] | None, number: int) -> list[float]:
    factors = _factors(weights, number)
    total = sum(factors)
    if not min(factors) >= 0 or not 0 < total < math.inf:
        raise ValueError(f"to_dense: weights of experts must not be negative, nor all zero; got {factors}")
    return [factor / total for factor in factors]


def _apportion(shares: Sequence[float], seats: int) -> list[int]:
    """Whole numbers that sum to `seats`, as near as can be to the shares of it (largest remainders)."""
    counts = [int(share * seats) for share in shares]
    order = sorted(range(len(shares)), key=lambda e: counts[e] - shares[e] * seats)
    for e in order[: seats - sum(counts)]:
        counts[e] += 1
    return counts
