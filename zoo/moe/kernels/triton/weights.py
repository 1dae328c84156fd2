"""Weights as kernels take them: a tensor, by its address or a descriptor, or codes and scales."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..codes import FORMATS
from .descriptors import described_weight
from .plans import Tile


@dataclass(frozen=True)
class Coded:
    """Frozen matrices [E, R, C] in one of `FORMATS`: contiguous codes and scales, of which `parts` follow one another.

    turned: it stands for their transposes [E, C, R].
    """

    codes: Tensor
    scales: Tensor
    format: str
    parts: int = 1
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the matrices it stands for."""
        experts, rows, columns = self.codes.shape
        columns *= 2 if FORMATS[self.format].woven else 1
        return (experts, columns, rows) if self.turned else (experts, rows, columns)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def transpose(self, *_: int) -> Coded:
        """The transposes of its matrices."""
        return replace(self, turned=not self.turned)


def weight_arguments(w: Tensor | Coded, tile: Tile) -> dict[str, Any]:
    """For w [E, N, K]: what a kernel is given of it."""
    strides: tuple[int, ...]
    of_scales: tuple[int | None, ...] = (None, None, None)
    scales = format = None
    if isinstance(w, Tensor):
        weight, along_k = described_weight(w, tile)
        strides = w.stride()
    else:
        weight, scales, format, along_k = w.codes, w.scales, w.format, not w.turned
        strides, of_scales = (t.transpose(1, 2).stride() if w.turned else t.stride() for t in (weight, scales))
    return {
        "w": weight,
        "scales": scales,
        **dict(zip(("stride_we", "stride_wn", "stride_wk"), strides)),
        **dict(zip(("stride_se", "stride_sn", "stride_sk"), of_scales)),
        "FORMAT": format,
        "DESCRIBED": tile.described,
        "ALONG_K": along_k,
    }
