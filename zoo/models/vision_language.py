"""Vision-language models: LIMoE, one tower for images and text, and the models of `image_text` that write text.

MODELS is data: the kind of a model, or transformers' family, and its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..nearest import unknown
from . import image_text
from .vision import VMOE_SIZES

if TYPE_CHECKING:
    from torch import nn


def _limoe(size: str, patch: int, moe_layers: str = "every-2") -> tuple[str, dict[str, Any]]:
    return "limoe", {**VMOE_SIZES[size], "patch_size": patch, "moe_layers": moe_layers, "num_experts": 32}


# LIMoE's (2206.02770), with 32 experts each. Of H/14 the paper says 5.6 billion parameters, 675 million of them active:
# experts in 12 of the 32 blocks, here the last odd ones, and a vocabulary of 32,000. Which blocks they are it leaves
# open, as the numbers of parameters of the others.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "limoe_small_patch32": _limoe("small", 32),
    "limoe_base_patch32": _limoe("base", 32),
    "limoe_base_patch16": _limoe("base", 16),
    "limoe_large_patch16": _limoe("large", 16),
    "limoe_huge_patch14": _limoe("huge", 14, "last-12"),
    "limoe_tiny": (
        "limoe",
        {
            "embed_dim": 64,
            "depth": 4,
            "num_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "channels": 1,
            "vocab_size": 128,
            "text_length": 16,
            "num_experts": 8,
        },
    ),
    **image_text.MODELS,
}


def build(name: str, **overrides: Any) -> nn.Module:
    """The model called `name`; overrides are those of `zoo.models.limoe.LIMoE`, or of `zoo.models.image_text.build`.

    Raises ValueError naming the nearest arguments for an unknown one.
    """
    if name in image_text.MODELS:
        return image_text.build(name, **overrides)
    import inspect

    from .limoe import LIMoE

    _, arguments = MODELS[name]
    known = set(inspect.signature(LIMoE).parameters)
    for key in overrides:
        if key not in known:
            raise unknown(f"argument of vision_language/{name}", key, known)
    model: Any = LIMoE(**{**arguments, **overrides})
    model.made_with = {"network": f"vision_language/{name}", "overrides": overrides}  # for `zoo.save_pretrained`
    return model
