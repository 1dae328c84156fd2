"""Our vision models in timm's registry, and timm's models with experts put in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .vision import MODELS

# Images as V-MoE and Soft MoE saw them: values from -1 to 1, 224 of 256 pixels in evaluation.
_CFG = {
    "url": "",
    "num_classes": 1000,
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "fixed_input_size": True,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "interpolation": "bicubic"}
_CFGS: dict[str, dict[str, Any]] = {
    "vit": _CFG,
    "swin": {**_CFG, **_IMAGENET, "classifier": "head.fc", "crop_pct": 0.9},
    "convnext": {**_CFG, **_IMAGENET, "classifier": "head.fc", "first_conv": "stem.0", "fixed_input_size": False},
}


def _cfg(kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    side = arguments.get("img_size", 224)
    return {**_CFGS[kind], "input_size": (3, side, side)}


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(*model) for name, model in MODELS.items()})


def register() -> None:
    """Add every model of MODELS to timm's registry; a second call changes nothing."""
    for name, (kind, arguments) in MODELS.items():
        if not timm.is_model(name):
            register_model(_entrypoint(name, kind, arguments))


def _entrypoint(name: str, kind: str, arguments: dict[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        options = {**arguments, **kwargs}
        return build_model_with_cfg(variant=name, pretrained=pretrained, **_architecture(kind, options), **options)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"{name}: {kind} with {arguments}."
    setattr(sys.modules[__name__], name, create)
    return create


def _architecture(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """What timm's builder is told about an architecture: its class, its features, and how weights are read."""
    # These import timm, which imports this module.
    from timm.models import convnext, swin_transformer_v2

    from . import vision_stages, vision_transformer

    if kind == "vit":
        return {
            "model_cls": vision_transformer.VisionTransformerMoE,
            "feature_cfg": {"out_indices": 3, "feature_cls": "getter"},
            "pretrained_filter_fn": _fitted,
        }
    stages = {"out_indices": tuple(range(len(options["depths"]))), "flatten_sequential": True}
    model, source = {
        "swin": (vision_stages.SwinTransformerMoE, swin_transformer_v2),
        "convnext": (vision_stages.ConvNeXtMoE, convnext),
    }[kind]
    return {"model_cls": model, "feature_cfg": stages, "pretrained_filter_fn": source.checkpoint_filter_fn}


def _fitted(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A state dict whose positions and patches fit the model's, as timm's own, which leaves out the layer kept here."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    return {**checkpoint_filter_fn(state, model), **{name: v for name, v in state.items() if "pre_logits" in name}}


def build_from_timm(
    name: str,
    *,
    moe_layers: str | int | Iterable[int] | None = None,
    num_experts: int = 8,
    router: Any = "TopKRouter",
    k: int | None = None,
    capacity: Any = None,
    losses: Mapping[str, Any] | None = None,
    group_images: int | None = None,
    normalize: bool | None = None,
    backend: str = "auto",
    pretrained: bool = False,
    **overrides: Any,
) -> nn.Module:
    """One of timm's own models, with experts in its blocks `moe_layers` where such are asked for.

    Experts are copies of the MLP they replace. normalize (the weights of a token's experts sum to one) is on for
    pretrained models, so that they start from what they know, and else off as in V-MoE. Raises ValueError for a gate's
    arguments without moe_layers.
    """
    from ..convert.upcycling import upcycle
    from .vision_gates import vision_spec

    if "experts" in overrides:
        raise ValueError(
            f"experts: those of {name} are copies of its MLPs; other kinds are for models made with experts, such as "
            "vision/vmoe_small_patch32_224"
        )
    if not isinstance(num_experts, int):
        raise ValueError(f"num_experts: expected one number, got {num_experts!r}; zoo.upcycle takes one a layer")
    if moe_layers is None:
        asked = {"k": k, "capacity": capacity, "losses": losses, "group_images": group_images}
        asked["router"] = None if router == "TopKRouter" else router
        if said := [option for option, value in asked.items() if value is not None]:
            raise ValueError(f"{', '.join(said)}: {name} has no experts; say which blocks get some, in moe_layers")
    model = timm.create_model(name, pretrained=pretrained, **overrides)
    if moe_layers is None:
        return model
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    if normalize is None:
        normalize = pretrained

    tokens = patches + getattr(model, "num_prefix_tokens", 0)
    options = {"k": k, "capacity": capacity, "losses": losses, "group_images": group_images, "normalize": normalize}
    spec = vision_spec(router, num_experts, tokens=tokens, **options)
    return upcycle(model, moe_layers, num_experts, spec, backend=backend, k=k)
