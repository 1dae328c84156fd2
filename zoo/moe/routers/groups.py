"""Which tokens are routed together: capacity, experts' choices and slots are matters of one group."""

from __future__ import annotations

from typing import Literal

import torch

GroupSize = int | Literal["sequence"] | None


def check_groups(router: str, group_size: GroupSize, group_sequences: int) -> None:
    """Raise ValueError, naming the router, for a group size that is none."""
    if isinstance(group_size, str) and group_size != "sequence":
        raise ValueError(f"{router}: group_size must be None, 'sequence' or a number, got {group_size!r}")
    if isinstance(group_size, int) and group_size < 1:
        raise ValueError(f"{router}: group_size must be at least 1, got {group_size}")
    if group_sequences < 1 or (group_sequences > 1 and group_size != "sequence"):
        raise ValueError(
            f"{router}: group_sequences must be at least 1, and 1 unless group_size='sequence'; got {group_sequences}"
        )


def group_tokens(router: str, group_size: GroupSize, group_sequences: int, tokens: int, batch: int | None) -> int:
    """N, how many of `tokens` tokens (in `batch` sequences, where known) make a group.

    None: all; a number: that many consecutive ones; "sequence": those of at most group_sequences consecutive sequences,
    the batch being cut into as few groups as that takes, all of one size but for a shorter last one.
    Raises ValueError for "sequence" where the tokens came as one list, and for several sequences a group where their
    number is left open in torch.export.
    """
    if group_size is None:
        return tokens
    if isinstance(group_size, int):
        return group_size
    if batch is None:
        raise ValueError(f"{router}: group_size='sequence' needs tokens as [B, S, D], got one list of tokens")
    if not batch:
        return 0
    if group_sequences == 1:
        return tokens // batch
    if isinstance(batch, torch.SymInt) and torch.compiler.is_exporting():
        raise ValueError(
            f"{router}: a graph for any number of sequences cannot have groups of {group_sequences}, which the batch "
            "is cut into; set group_sequences to 1 (group_images=1 of a vision model)"
        )
    groups = -(-batch // group_sequences)
    return -(-batch // groups) * (tokens // batch)
