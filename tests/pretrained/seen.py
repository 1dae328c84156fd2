"""What a vision-language model may be given: images of each family's kind, with text around them."""

from __future__ import annotations

from typing import Any

import torch

IMAGE, START, END = 250, 252, 253
# How many tokens an image of the tiny models takes.
TOKENS = {"llava": 16, "llava_next": 16, "deepseek_ocr2": 145, "unlimited_ocr": 21}
AROUND = ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "ernie4_5_vl_moe")


def batch(family: str, texts: int = 7, padding: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two texts with an image each; the first is `padding` tokens shorter, filled up on the left."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((TOKENS.get(family, 4),), IMAGE)
    if family in AROUND:
        image = torch.cat([torch.tensor([START]), image, torch.tensor([END])])
    rows = []
    for short in (padding, 0):
        text = torch.randint(0, 240, (texts - short,), generator=generator)
        rows.append(torch.cat([torch.zeros(short, dtype=torch.long), text[:3], image, text[3:]]))
    ids = torch.stack(rows)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask, **pixels(family, ids, generator)}


def pixels(family: str, ids: torch.Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Images of the family's kind, one a row, and what else its processor says of them."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    n, kinds = len(ids), (ids == IMAGE).long()
    grid = torch.tensor([[1, 4, 4]] * n)
    if family in ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe"):
        return {"pixel_values": draw(16 * n, 96), "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if family == "ernie4_5_vl_moe":
        around = ((ids == IMAGE) | (ids == START) | (ids == END)).long()
        return {
            "pixel_values": draw(16 * n, 48),
            "image_grid_thw": grid,
            "mm_token_type_ids": kinds,
            "moe_mm_token_type_ids": around,
        }
    if family == "gemma4":
        places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(n, -1, -1)
        return {"pixel_values": draw(n, 36, 48), "image_position_ids": places, "mm_token_type_ids": kinds}
    if family == "kimi_k25":
        return {"pixel_values": draw(16 * n, 3, 4, 4), "image_grid_thw": grid}
    if family == "deepseek_ocr2":
        return {"pixel_values": draw(n, 3, 192, 192)}
    if family == "unlimited_ocr":
        return {"pixel_values": draw(n, 3, 64, 64)}
    return {"pixel_values": draw(n, 3, 16, 16)}
