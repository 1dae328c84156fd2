"""What a merging router hands on: groups of tokens, and for each group weights by which experts become one expert.

T tokens in G groups of consecutive ones, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import autocast
from .routing import Routing


@dataclass
class Blend:
    """A soft decision about weights: group g runs through one expert, its weights sum_e weight[g, e] theta_e.

    weight [G, E]; offsets [G+1] int32, the tokens of group g being offsets[g]:offsets[g+1]. Tokens left out (mask [T],
    False) give zero. added [T, D], where there is one, is added to the tokens before they are computed. losses as in
    `Routing`. No token goes to any single expert, so an expert's only load is its share of the weights.
    """

    weight: Tensor
    offsets: Tensor
    num_tokens: int
    mask: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    added: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E, the number of experts."""
        return self.weight.shape[1]

    def dense(self) -> Tensor:
        """Weights of every token's group, [T, E]; zero for tokens left out."""
        rows = self.weight.repeat_interleave(self.offsets.diff().long(), dim=0, output_size=self.num_tokens)
        return rows if self.mask is None else rows * self.mask[:, None]

    def apply(self, x: Tensor, experts: nn.Module) -> Tensor:
        """Merge the stacked experts once a group, and run its tokens, of x [T, D], through the result.

        Raises ValueError when a parameter of `experts` is not stacked, [E, ...], or lies in parts on processes.
        """
        if self.added is not None:
            x = x + self.added.to(x.dtype)
        weight = x.new_ones(self.num_tokens, dtype=self.weight.dtype)
        if self.mask is not None:
            x = x.where(self.mask[:, None], 0)  # a weight of zero does not hide a nan
            weight = self.mask.to(weight.dtype)
        if not self.num_tokens:
            return x * self.weight.sum().to(x.dtype)
        index = torch.arange(self.num_tokens, device=x.device)
        routing = Routing(index, self.offsets, weight, self.num_tokens)
        return torch.func.functional_call(experts, self.merge(experts), (x, routing))

    def merge(self, experts: nn.Module) -> dict[str, Tensor]:
        """The parameters of one expert a group: [G, ...] from [E, ...], by name."""
        merged = {}
        with autocast.off(self.weight):
            for name, value in experts.named_parameters():
                if isinstance(value, DTensor) and not isinstance(self.weight, DTensor):
                    raise ValueError(
                        f"experts are merged whole, but {name} lies in parts on processes: for `zoo.parallel` the "
                        "gate's class must say merges = True, and FSDP must shard the layer, not its experts alone"
                    )
                if value.dim() < 1 or value.shape[0] != self.num_experts:
                    raise ValueError(
                        f"experts are merged by their stacked weights, but {name} of {type(experts).__name__} has "
                        f"shape {list(value.shape)}, expected [{self.num_experts}, ...]"
                    )
                flat = self.weight.to(value.dtype) @ value.flatten(1)
                merged[name] = flat.unflatten(1, value.shape[1:]) if value.dim() > 1 else flat
        return merged
