"""Losses that belong to one gate each; `zoo.moe.balance` has them too, with those that any gate may have."""

from __future__ import annotations

import torch
from torch import Tensor


def top_any_load(switches: Tensor, mask: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e of DYNMoE's switches [T, E] over the tokens with an expert, as in its code; 0 without any.

    P_e is the mean of the switches divided by their sum, f_e the share of tokens that chose e.
    """
    chosen = switches.detach() > 0
    some = chosen.any(-1) if mask is None else chosen.any(-1) & mask
    shares = switches / switches.sum(-1, keepdim=True).where(some.unsqueeze(-1), 1)
    tokens = some.sum().clamp(min=1)
    mean = shares.where(some.unsqueeze(-1), 0).sum(-2) / tokens
    return switches.shape[-1] * (mean * (chosen & some.unsqueeze(-1)).sum(-2) / tokens).sum(-1)


def top_any_cost(switches: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of DYNMoE's switches [T, E]: the share of all experts that a token meets, the code's efficiency loss."""
    real = switches if mask is None else switches.where(mask.unsqueeze(-1), 0)
    tokens = torch.full((), switches.shape[0], device=switches.device) if mask is None else mask.sum()
    return real.sum() / (tokens.clamp(min=1) * switches.shape[-1])


def diverse_and_simple(embeddings: Tensor) -> Tensor:
    """|C - I|_F + mean_e |w_e| of expert embeddings [E, D], C their cosines (DYNMoE 2405.14297, section 3)."""
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    off = unit @ unit.T - torch.eye(unit.shape[0], dtype=unit.dtype, device=unit.device)
    return off.norm() + embeddings.norm(dim=-1).mean()


def stable_balance(logits: Tensor, selected: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of (n_e - n) / n sigmoid(logit_e), e the token's expert, n_e its tokens, n the mean of all n_e.

    StableMoE (2204.08396, section 3.1): scores fall with too many tokens, and rise with too few.
    """
    selected = selected.to(logits.dtype)
    if mask is not None:
        selected = selected * mask.unsqueeze(-1)
    counts = selected.detach().sum(-2, keepdim=True)
    mean = counts.mean(-1, keepdim=True).clamp(min=1e-9)
    tokens = selected.sum().detach().clamp(min=1)
    return ((counts - mean) / mean * logits.sigmoid() * selected).sum() / tokens


def stable_distill(distilled_logits: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean cross entropy of the distilled router with the largest logit as its target (StableMoE 2204.08396)."""
    loss = torch.nn.functional.cross_entropy(distilled_logits, logits.detach().argmax(-1), reduction="none")
    if mask is None:
        return loss.sum() / max(loss.numel(), 1)
    return loss.where(mask, 0).sum() / mask.sum().clamp(min=1)


def conditional_budget(gates: Tensor, budget: float, mask: Tensor | None = None) -> Tensor:
    """|sum g / T - budget| of CMR's gates [T] over the tokens that are not padding (NLLB's code); 0 without any."""
    if mask is not None:
        gates = gates.where(mask, 0)
    tokens = torch.full((), gates.numel(), device=gates.device) if mask is None else mask.sum()
    return (gates.sum() / tokens.clamp(min=1) - budget).abs() * (tokens > 0)
