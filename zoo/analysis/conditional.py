"""Which experts a key gets: token ids, positions, domains (OpenMoE 2402.01739, section 4 and appendix E).

V values of a key, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Decision, Routing, telemetry
from .walk import decisions, is_soft

Key = Callable[[Any], Tensor]


def expert_counts(
    model: nn.Module,
    batches: Iterable[Any],
    keys: Mapping[str, Key],
    run: Callable[[Any], object] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """How often tokens of each key met each expert: {layer: {key: [V, E] float64}}.

    keys[name](batch) gives every token's value, any shape with one whole number a token, negative to leave it out; V is
    one more than the largest seen. Kept assignments count one each; where a gate sends every token to all experts, the
    combine weights do.
    Raises ValueError when a key does not give one value a token.
    """
    tables: dict[str, dict[str, Tensor]] = {}
    for batch, layers in decisions(model, batches, run):
        values = {name: key(batch).reshape(-1).cpu() for name, key in keys.items()}
        for layer, calls in layers.items():
            for decision in calls:
                add_counts(tables.setdefault(layer, {}), decision, values, layer)
    return tables


def add_counts(tables: dict[str, Tensor], decision: Decision, values: Mapping[str, Tensor], layer: str) -> None:
    """Add a decision to a layer's tables of `expert_counts`; values[name] is [T]."""
    token, expert, amount = _assignments(decision)
    for name, value in values.items():
        if value.numel() != decision.num_tokens:
            raise ValueError(
                f"expert_counts: key {name!r} gives {value.numel()} values for the {decision.num_tokens} tokens of "
                f"layer {layer!r}"
            )
        table = tables.get(name, torch.zeros(0, decision.num_experts, dtype=torch.float64))
        tables[name] = _added(table, value[token], expert, amount)


def shares(counts: Tensor) -> Tensor:
    """Share of each key's assignments that each expert got, [V, E]; a row sums to one, or to zero for an unseen key."""
    return counts / counts.sum(1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)


def decision_std(counts: Tensor, minimum: float = 128) -> Tensor:
    """Routing decision std: the standard deviation over experts of each key's shares, for keys with more than `minimum`
    assignments, [V'].

    At most sqrt(E - 1) / E, where the key alone decides the expert; for a key that says nothing that of the load, 0
    where this is even. OpenMoE finds token ids far above positions. The paper gives no formula; this is the reading of
    its figure, with its bound of 128 occurrences taken as one of assignments.
    """
    given = shares(counts[counts.sum(1) > minimum])
    return (given - given.mean(1, keepdim=True)).square().mean(1).sqrt()


def chance_std(counts: Tensor, minimum: float = 128) -> Tensor:
    """What `decision_std` is by chance: its root mean square if every assignment were drawn uniformly, [V']."""
    totals, experts = counts.sum(1), counts.shape[1]
    return ((1 / experts) * (1 - 1 / experts) / totals[totals > minimum]).sqrt()


def explained(counts: Tensor, minimum: float = 20) -> float:
    """Share of the uncertainty about the expert that the key removes, I(expert; key) / H(expert), from counts [V, E].

    0: the key says nothing; 1: it decides alone. Keys with fewer than `minimum` assignments are left out, as they
    always seem to decide.
    """
    counts = counts[counts.sum(1) >= minimum]
    if not len(counts):
        return 0.0
    joint = counts / counts.sum()
    uncertainty = torch.special.entr(joint.sum(0)).sum()
    given = torch.special.entr(joint).sum() - torch.special.entr(joint.sum(1)).sum()
    return float((1 - given / uncertainty).clamp(0, 1)) if uncertainty > 0 else 0.0


def top_keys(counts: Tensor, expert: int, n: int = 10) -> list[tuple[int, float]]:
    """The n keys an expert computes most often, each with the share of the expert's assignments that it makes up."""
    mine = counts[:, expert]
    best = mine.topk(min(n, int((mine > 0).sum())))
    total = float(mine.sum())
    return [(int(key), float(count) / total) for count, key in zip(best.values, best.indices)]


def drop_by_position(
    model: nn.Module, batches: Iterable[Any], sequence_length: int, run: Callable[[Any], object] | None = None
) -> dict[str, Tensor]:
    """Share of the assignments asked for that capacity dropped at each position, {layer: [S]}: drop towards the end.

    Raises ValueError when a batch is no whole number of sequences of that length.
    """
    sums: dict[str, Tensor] = {}
    for _, layers in decisions(model, batches, run):
        for layer, calls in layers.items():
            for decision in calls:
                sums[layer] = sums.get(layer, 0) + asked_and_dropped(decision, sequence_length)
    return {layer: dropped / asked.clamp(min=1) for layer, (asked, dropped) in sums.items()}


def asked_and_dropped(decision: Decision, sequence_length: int) -> Tensor:
    """How many assignments were asked for at each position, and how many capacity dropped, [2, S] float64."""
    if decision.num_tokens % sequence_length:
        raise ValueError(
            f"drop_by_position: {decision.num_tokens} tokens are no whole number of sequences of {sequence_length}"
        )
    asked, kept = telemetry.asked_per_token(decision), telemetry.kept_per_token(decision)
    return torch.stack([asked, asked - kept]).view(2, -1, sequence_length).sum(1).double().cpu()


def _assignments(decision: Decision) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and amount of every assignment, [A] each."""
    if isinstance(decision, Routing) and not is_soft(decision):
        token, expert = decision.token_index.cpu(), decision.expert_index.cpu()
        return token, expert, torch.ones(token.numel(), dtype=torch.float64)
    dense = decision.dense().double().cpu()
    token, expert = dense.nonzero(as_tuple=True)
    return token, expert, dense[token, expert]


def _added(table: Tensor, key: Tensor, expert: Tensor, amount: Tensor) -> Tensor:
    """The table [V, E] with amounts added where key and expert say, grown to hold the largest key."""
    wanted = key >= 0
    key, expert, amount = key[wanted], expert[wanted], amount[wanted]
    missing = (int(key.max()) + 1 if key.numel() else 0) - table.shape[0]
    if missing > 0:
        table = torch.cat([table, table.new_zeros(missing, table.shape[1])])
    return table.index_put_((key, expert), amount, accumulate=True)
