"""EMoE: an expert is as near to a token as its own keys are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from ..experts import Experts
from .unweighted import UnweightedRouter


class EMoERouter(UnweightedRouter):
    """EMoE's avg-k gate (2310.10908): the k experts with the largest x . mean of their keys, each with weight one.

    Keys are the rows of an expert's input projection, of a gated one those of the gate, as in the authors' LLaMA code;
    biases have no part in them. The means are `weight` [E, D], which needs no gradient: the gate `follow`s its
    experts as they train (`zoo.moe.schedule.advance`, once an optimizer step, as the authors do).
    normalize_keys scales each mean to length one (the code's option). Other options as in `UnweightedRouter`.

    Before it has followed experts the means are drawn uniformly within 1/sqrt(dim). Context: mask.
    """

    def __init__(self, dim: int, num_experts: int, k: int = 2, *, normalize_keys: bool = False, **options: Any) -> None:
        super().__init__(dim, num_experts, k, **options)
        self.normalize_keys = normalize_keys
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def follow(self, experts: Experts) -> None:
        """Take the means of the experts' keys as they are now.

        Raises ValueError for experts of which this process holds a part, outside a mesh.
        """
        keys = mean_keys(experts, self.normalize_keys)
        if keys.shape != self.weight.shape:
            raise ValueError(f"EMoERouter: expected keys of {self.num_experts} experts, found {list(keys.shape)}")
        weight: Tensor = self.weight
        if isinstance(weight, DTensor):
            keys = distribute_tensor(keys, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(keys)


@torch.no_grad()
def mean_keys(experts: Experts, normalized: bool = False) -> Tensor:
    """Mean of each expert's rows of the input projection, of a gated one those of the gate, [E, D]; of length one
    where normalized."""
    rows = getattr(experts, experts._in)
    means = rows[:, : experts.hidden_dim].to(torch.promote_types(rows.dtype, torch.float32)).mean(1)
    if isinstance(means, DTensor):
        means = means.full_tensor()
    return F.normalize(means, dim=-1) if normalized else means
