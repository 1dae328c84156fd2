"""What gates balance by, as operators that torch.compile does not look into."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo.moe.routers  # noqa: F401  (registers them)

OPERATORS: dict[str, Any] = {
    "balanced_assignment": lambda scores, mask: (scores, 2e-3, 64, mask),
    "sinkhorn_plan": lambda logits, mask: (logits, 1e-4, mask),
    "capped_plan": lambda scores, mask: (scores.sigmoid().unflatten(0, (2, -1)), 4, 3, mask),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_operators_are_what_torch_takes_them_for(name: str, dtype: torch.dtype, masked: bool, turned: bool) -> None:
    scores = torch.randn(4, 12, dtype=dtype).T if turned else torch.randn(12, 4, dtype=dtype)
    mask = torch.rand(12) > 0.4 if masked else None
    if mask is not None and name == "capped_plan":
        mask = mask.view(2, -1)
    torch.library.opcheck(getattr(torch.ops.zoo, name).default, OPERATORS[name](scores, mask))
