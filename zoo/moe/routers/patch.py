"""pMoE: every expert takes the patches of an image that it scores highest."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..capacity import Capacity
from ..routing import Routing
from .expert_choice import ExpertChoiceRouter


class PatchRouter(ExpertChoiceRouter):
    """Patch-level routing (2306.04073): each expert takes the `patches`, l, of every image of largest w_e . x.

    Expert choice within an image, tokens [B, S, D] being its S patches; an image of fewer than l gives all. Weights are
        softmax="chosen"  the softmax over the l chosen: the paper's definition, and the code of its MNIST experiments
        softmax="tokens"  that over all patches of the image: the code of its experiments with a WideResNet
    Other options as in `ExpertChoiceRouter`, but capacity and groups. No loss is needed: experts are equally busy.

    Raises ValueError when an option is unknown, patches is below 1, or tokens come as one list.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        patches: int,
        *,
        softmax: Literal["chosen", "tokens"] = "chosen",
        **options: Any,
    ) -> None:
        if softmax not in ("chosen", "tokens"):
            raise ValueError(f"PatchRouter: softmax must be over 'chosen' or 'tokens', got {softmax!r}")
        if patches < 1:
            raise ValueError(f"PatchRouter: patches must be at least 1, got {patches}")
        for name in ("capacity", "group_size", "group_sequences"):
            if name in options:
                raise ValueError(f"PatchRouter: {name} has no meaning where an expert takes l patches of each image")
        options |= {"capacity": Capacity(tokens=patches), "group_size": "sequence"}
        super().__init__(dim, num_experts, softmax="tokens", **options)
        self.over_chosen = softmax == "chosen"

    def _choose(self, scores: Tensor, here: Tensor | None, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        token, offsets, weight = super()._choose(scores, here, tokens)
        if self.over_chosen and tokens:
            images, size, experts = scores.shape
            of_image = Routing(token, offsets, weight, tokens).expert_index * images + token // size
            total = weight.new_zeros(experts * images).index_add(0, of_image, weight)
            weight = weight / total.index_select(0, of_image)
        return token, offsets, weight
