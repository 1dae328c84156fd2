"""pMoE: small convolutional networks as experts, each on the patches of an image that it chose."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import Recorded
from ..routers.base import Router
from ..routing import Routing


class PatchMoE(Recorded):
    """Patch-level mixture of CNNs (pMoE, 2306.04073): the maps of all experts side by side, zero where not chosen.

    Images [B, C, H, W] are cut into patches of patch_size squared, P^2, and the router chooses among those of an image,
    flattened to tokens of width C P^2. Expert e turns a chosen patch [C, P, P] into [F, P', P'] (or [F]), which counts
    by its weight g_e, in channels e F .. (e+1) F - 1 of the output [B, E*F, H P'/P, W P'/P]. The paper's model is that,
    with patches of the image itself or, in a WideResNet, single places (patch_size=1) of its last map, then pooled:
        PatchMoE(PatchRouter(D, E, l), [nn.Sequential(nn.Conv2d(C, F, P), nn.ReLU()) for _ in range(E)], P)
    (2306.04073, eq. 2 and its code; that multiplies the patch by g_e, which for these experts is the same.)
    It stands for any convolution or stage that gives maps of this size. Routers other than `PatchRouter` will do too.

    An expert sees only what it chose; batch norm inside one is over that. Context: mask [B, S] of patches, row by row.
    Raises ValueError for images that do not split into patches of the router's width, and for too few experts.
    """

    def __init__(self, router: Router, experts: Iterable[nn.Module], patch_size: int) -> None:
        super().__init__()
        self.router, self.experts, self.patch_size = router, nn.ModuleList(experts), patch_size
        if len(self.experts) != router.num_experts:
            raise ValueError(f"PatchMoE: the router routes {router.num_experts} experts, got {len(self.experts)}")

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to images or maps x [B, C, H, W]; keywords go to the router."""
        size = self.patch_size
        if x.dim() != 4 or x.shape[2] % size or x.shape[3] % size or x.shape[1] * size**2 != self.router.dim:
            raise ValueError(
                f"PatchMoE: expected maps [B, C, H, W] of whole patches of {size} x {size}, C * {size**2} being the "
                f"router's width {self.router.dim}, got {list(x.shape)}"
            )
        batch, _, height, width = x.shape
        rows, columns = height // size, width // size
        patches = x.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        routing = self.router(patches.reshape(batch, rows * columns, self.router.dim), **context)
        if not isinstance(routing, Routing):
            raise ValueError(f"PatchMoE: expected a router that gives a Routing, got {type(routing).__name__}")
        self._keep(routing)
        maps = []
        for expert, (start, end) in zip(self.experts, pairwise(routing.offsets.tolist())):
            chosen = routing.token_index[start:end]
            out = expert(patches.index_select(0, chosen))
            out = out[..., None, None] if out.dim() == 2 else out
            out = out * routing.weight[start:end, None, None, None].to(out.dtype)
            maps.append(out.new_zeros(len(patches), *out.shape[1:]).index_add(0, chosen, out))
        y = torch.stack(maps, dim=1).flatten(1, 2)
        y = y.view(batch, rows, columns, *y.shape[1:]).permute(0, 3, 1, 4, 2, 5)
        return y.flatten(4, 5).flatten(2, 3)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"patch_size={self.patch_size}"
