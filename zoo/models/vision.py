"""Vision models: V-MoE, Soft MoE, Swin-MoE and a ConvNeXt with experts, and any of timm's with experts put in.

MODELS is data: the architecture that builds a model, and its arguments. The names are timm's too, once both timm and
zoo are imported: `timm.create_model("vmoe_small_patch32_224")`. Those ending in "_test" are for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Widths, depths and heads of V-MoE (2106.05974); its S is not DeiT's. Soft MoE (2308.00951) has DeiT's.
VMOE_SIZES: dict[str, dict[str, Any]] = {
    "small": {"embed_dim": 512, "depth": 8, "num_heads": 8},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
_SOFT_SIZES = {**VMOE_SIZES, "small": {"embed_dim": 384, "depth": 12, "num_heads": 6}}
_TINY = {"embed_dim": 32, "depth": 4, "num_heads": 4, "img_size": 32, "patch_size": 8, "num_experts": 4}


def _vmoe(size: str, patch: int, moe_layers: str, num_experts: int) -> tuple[str, dict[str, Any]]:
    sizes = VMOE_SIZES[size]
    published = {"representation_size": sizes["embed_dim"], "moe_layers": moe_layers, "num_experts": num_experts}
    return "vit", {**sizes, "patch_size": patch, **published}


def _soft_moe(size: str, patch: int, num_experts: int) -> tuple[str, dict[str, Any]]:
    sizes = _SOFT_SIZES[size]
    depth = sizes["depth"]
    published = {"moe_layers": list(range(depth // 2, depth)), "num_experts": num_experts, "qk_norm": True}
    return "vit", {**sizes, "patch_size": patch, **_SOFT, **published}


_SOFT = {"router": "SoftRouter", "class_token": False, "global_pool": "avg"}


def _swin_moe(embed_dim: int) -> tuple[str, dict[str, Any]]:
    heads = embed_dim // 32
    sizes = {"embed_dim": embed_dim, "depths": (2, 2, 18, 2), "num_heads": tuple(heads * 2**i for i in range(4))}
    # Every second block of the last two stages.
    return "swin", {**sizes, "img_size": 192, "window_size": 12, "moe_layers": "last-10", "router": _SWIN_GATE}


def _convnext_moe(depth: int, width: int) -> tuple[str, dict[str, Any]]:
    widths = tuple(width * 2**i for i in range(4))
    return "convnext", {"depths": (3, 3, depth, 3), "dims": widths, "moe_layers": "last-2", "router": _PRIORITY}


# Swin-MoE (2206.03382) as its authors trained it on ImageNet-22k: all images of a device are one group.
_SWIN_GATE = {
    "name": "TopKRouter",
    "k": 1,
    "group_size": None,
    "capacity": {"factor": 1.25, "drop": "priority"},
    "losses": {"importance_vmoe": 0.005, "load_vmoe": 0.005},
}
# V-MoE's gate with batch priority routing, as in "What's the sweet spot" (2411.18322).
_PRIORITY = {
    "name": "TopKRouter",
    "capacity": {"factor": 1.05, "eval_factor": 4.0, "multiple_of": 4, "drop": "priority"},
}

_TINY_SWIN = {
    "depths": (1, 2),
    "embed_dim": 16,
    "num_heads": (2, 4),
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "moe_layers": [1, 2],
    "num_experts": 4,
    "router": _SWIN_GATE,
}
_TINY_CONVNEXT = {
    "depths": (1, 1, 2, 1),
    "dims": (8, 16, 32, 32),
    "moe_layers": [2, 3],
    "num_experts": 4,
    "router": _PRIORITY,
}

# The released V-MoEs have 8 experts; the others here the 32 of the paper.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vmoe_small_patch32_224": _vmoe("small", 32, "last-2", 8),
    "vmoe_base_patch32_224": _vmoe("base", 32, "every-2", 32),
    "vmoe_base_patch16_224": _vmoe("base", 16, "every-2", 8),
    "vmoe_large_patch32_224": _vmoe("large", 32, "every-2", 32),
    "vmoe_large_patch16_224": _vmoe("large", 16, "every-2", 32),
    "vmoe_huge_patch14_224": _vmoe("huge", 14, "last-5", 32),
    "soft_moe_small_patch16_224": _soft_moe("small", 16, 128),
    "soft_moe_small_patch14_224": _soft_moe("small", 14, 256),
    "soft_moe_base_patch16_224": _soft_moe("base", 16, 128),
    "soft_moe_large_patch16_224": _soft_moe("large", 16, 128),
    "soft_moe_huge_patch14_224": _soft_moe("huge", 14, 256),
    "vmoe_tiny_test": ("vit", {**_TINY, "moe_layers": "last-1"}),
    "soft_moe_tiny_test": ("vit", {**_TINY, **_SOFT, "moe_layers": [3]}),
    "swin_moe_small_window12_192": _swin_moe(96),
    "swin_moe_base_window12_192": _swin_moe(128),
    "swin_moe_tiny_test": ("swin", _TINY_SWIN),
    "convnext_moe_tiny": _convnext_moe(9, 96),
    "convnext_moe_small": _convnext_moe(27, 96),
    "convnext_moe_base": _convnext_moe(27, 128),
    "convnext_moe_tiny_test": ("convnext", _TINY_CONVNEXT),
}


def build(
    name: str,
    *,
    attention: Any = None,
    mixture_of_depths: Any = None,
    convolutions: Any = None,
    share_depth: bool = False,
    **overrides: Any,
) -> nn.Module:
    """The model called `name`, ours or any of timm's; overrides are timm's arguments, and `VisionTransformerMoE`'s.

    Names may have a tag as timm's, "vit_small_patch16_224.augreg_in21k": it says whose weights pretrained=True fetches.

    For timm's own models moe_layers puts experts in place of the MLPs of these blocks, copies of them (`zoo.upcycle`):
    with pretrained=True of the trained ones. Without moe_layers the model is timm's own, the dense twin.

    attention (MoA, MoH, SwitchHead), mixture_of_depths and convolutions (DeepMoE, PatchMoE) put layers of these kinds
    into the model, share_depth=True lets all blocks share their weights but those of norms, as in WideNet
    (2107.11817, with moe_layers="all"): see `zoo.pretrained.vision_layers.put_layers`.
    """
    import timm

    from ..pretrained.vision_layers import put_layers
    from . import vision_timm

    vision_timm.register()
    make = timm.create_model if name.partition(".")[0] in MODELS else vision_timm.build_from_timm
    layers = {"attention": attention, "mixture_of_depths": mixture_of_depths, "convolutions": convolutions}
    return put_layers(make(name, **overrides), **layers, share_depth=share_depth)


def other_models() -> list[str]:
    """Names of timm's own models, which `build` takes too."""
    import timm

    return timm.list_models()


def register_models() -> None:
    """Make our models known to timm; called when timm has been imported."""
    from . import vision_timm

    vision_timm.register()
