"""Experts of their own for each modality."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .layer import MoE
from .routers.context import per_token


class IsolatedMoE(nn.Module):
    """y = MoE_m(x) + shared(x) for a token of modality m: gates and experts that no other modality uses.

    ERNIE 4.5-VL's sparse block (ERNIE 4.5 Technical Report, section 2.1, modality-isolated routing): part 0 takes text,
    part 1 what was seen. Parts may differ in all but their width; `shared` is as in `MoE`. A token that is masked
    meets no part.
    """

    def __init__(self, parts: Iterable[MoE], shared: nn.Module | None = None) -> None:
        super().__init__()
        self.parts, self.shared = nn.ModuleList(parts), shared

    def forward(self, x: Tensor, modality: Any = None, mask: Tensor | None = None, **context: Any) -> Tensor:
        """Apply to tokens x [..., D]; modality says each token's part (see `per_token`), None that all are of part 0.

        Raises ValueError for a modality without a part.
        """
        if modality is None:
            y = self.parts[0](x, mask=mask, **context)
        else:
            label = per_token(
                type(self).__name__, {"modality": modality, "mask": mask}, "modality", x, limit=len(self.parts)
            )
            y = x.new_zeros(())
            for number, part in enumerate(self.parts):
                own = label == number
                if mask is not None:
                    own = own & mask.reshape(-1).bool()
                y = y + part(x, mask=own, modality=label, **context)
        return y if self.shared is None else y + self.shared(x)
