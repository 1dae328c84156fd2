"""Losses on what experts compute; those on routing are in `zoo.moe.balance`."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .lora import LoRAExperts
from .routing import Routing

LEAST = 1e-3  # outputs shorter than this count as that long: experts of low rank start at zero


def contrastive(
    experts: LoRAExperts, x: Tensor, routing: Routing, temperature: float = 0.1, samples: int = 256
) -> Tensor:
    """MoELoRA's contrast between experts (2402.12851): outputs of one expert alike, of different experts apart.

    The mean over pairs (i, j) of outputs z of one expert of -log(e^{z_i z_j / t} / (e^{z_i z_j / t} + sum_n e^{z_i z_n
    / t})), n going over the outputs of other experts, z of unit length. Of A assignments every ceil(A / samples)-th
    takes part. That one expert's outputs are positives and others' negatives is the paper's; scale, temperature and
    sampling are not checked against it. Zero where no expert has two outputs, or only one has any.
    """
    step = max(1, math.ceil(routing.token_index.numel() / samples))
    rows = experts.reads(x.index_select(0, routing.token_index[::step]))
    # Multiples of step below an offset.
    offsets = torch.div(routing.offsets + (step - 1), step, rounding_mode="floor").to(torch.int32)
    return contrast(experts.each(rows, offsets), routing.expert_index[::step], temperature)


def contrast(outputs: Tensor, expert: Tensor, temperature: float) -> Tensor:
    """The same of outputs [A, O] and their experts [A]."""
    z = F.normalize(outputs.to(torch.promote_types(outputs.dtype, torch.float32)), dim=-1, eps=LEAST)
    logits = z @ z.T / temperature
    same = expert[:, None] == expert
    positive = same & ~torch.eye(expert.numel(), dtype=torch.bool, device=expert.device)
    negatives = logits.masked_fill(same, -math.inf)
    counts = positive & (~same).any(-1, keepdim=True)
    # No negatives: -inf everywhere, whose gradient would be nan.
    rest = negatives.where((~same).any(-1, keepdim=True), 0).logsumexp(-1, keepdim=True)
    loss = torch.nn.functional.softplus(rest - logits)
    return loss.where(counts, 0).sum() / counts.sum().clamp(min=1)
