"""Attention experts, mixture of depths and convolutional experts in a timm model that has been made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from ..convert.sharing import tie_depth
from ..gates import gate_factory, parse_spec
from ..layers import attention_factory, depth_factory
from ..moe import DeepMoE, DepthRouter, MixtureOfDepths, PatchMoE
from ..nearest import unknown

CONVOLUTIONS: dict[str, Any] = {c.__name__: c for c in (DeepMoE, PatchMoE)}


class BlockAttention(nn.Module):
    """An attention of `zoo.moe` (`MoA`, `MoH`, `SwitchHead`) where a timm block has its own."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend from tokens x [B, N, D]; attn_mask [B, 1, N, N] is True where a query sees a key."""
        if is_causal:
            raise ValueError("attention experts of a vision model were made to see all tokens, not only those before")
        return self.attention(x, attention_mask=attn_mask)


class BlockDepth(nn.Module):
    """A timm block that only some tokens of an image go through; attention is among these (`MixtureOfDepths`)."""

    def __init__(self, block: nn.Module, router: DepthRouter) -> None:
        super().__init__()
        self.depth = MixtureOfDepths(block, router, residual=True, per_token=())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens x [B, N, D] to tokens."""
        if attn_mask is not None or is_causal:
            raise ValueError("mixture of depths in a vision model has no attention masks")
        return self.depth(x)


class ClassifierDeepMoE(DeepMoE):
    """A `DeepMoE` whose backbone is a timm classifier: what timm asks of a model, the backbone answers."""

    backbone: Any

    def forward_features(self, x: Tensor, **options: Any) -> Tensor:
        """What the backbone hands to its head, of images x [B, C, H, W]."""
        self._passing.value = self.embedding(x)
        return self.backbone.forward_features(x, **options)

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """What the backbone's stages make of images x [B, C, H, W], as timm gives it."""
        self._passing.value = self.embedding(x)
        return self.backbone.forward_intermediates(x, *args, **options)

    def reset_classifier(self, num_classes: int, *args: Any, **options: Any) -> None:
        """Give the backbone another head, and the embedding a classifier of as many classes."""
        self.backbone.reset_classifier(num_classes, *args, **options)
        if num_classes > 0:
            old = self.classifier
            place: Any = {"device": old.weight.device, "dtype": old.weight.dtype}
            self.classifier = nn.Linear(old.in_features, num_classes, **place)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to which block, of the backbone's; embedding and gates' classifier to the last."""
        found = self.backbone.group_matcher(coarse=coarse)
        return {name: _below_backbone(patterns) for name, patterns in found.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("backbone"), name)


def _below_backbone(patterns: Any) -> Any:
    """timm's patterns of names, for names that begin with "backbone."."""
    if isinstance(patterns, str):
        anchored = re.sub(r"(?<!\[)\^", "", patterns)  # timm matches from the beginning in any case
        return rf"^backbone\.(?:{anchored})"
    return [(_below_backbone(pattern), end) for pattern, end in patterns]


def put_layers(
    model: Any,
    *,
    attention: Any = None,
    mixture_of_depths: Any = None,
    convolutions: Any = None,
    share_depth: bool | None = None,
) -> Any:
    """The model with layers of other kinds in it, in place, but for DeepMoE, which goes around it; each starts fresh.

    attention and mixture_of_depths are those of `zoo.layers`, for timm's VisionTransformer and ours. convolutions, for
    any backbone with convolutions whose names match the patterns in "layers":
        {"name": "DeepMoE", "layers": ["layer*.conv1"], "sparsity": 0.001}     channels gated for each image
        {"name": "PatchMoE", "layers": ["layer4.1.conv2"], "num_experts": 4, "patch_size": 1,
         "router": {"name": "PatchRouter", "patches": 8}}
                    experts of C'/E channels each, with a kernel no larger than the patch, on the patches they choose
    share_depth=True lets all blocks share their weights but those of norms (`zoo.share_depth`).
    Raises ValueError for blocks and convolutions that do not exist or do not fit, TypeError for what is no description.
    """
    changed = {"attention": attention, "mixture_of_depths": mixture_of_depths, "convolutions": convolutions}
    changed = {name: value for name, value in changed.items() if value is not None}
    if not changed and not share_depth:
        return model
    like = next(model.parameters())
    with like.device:
        if attention is not None:
            blocks = _blocks(model, "attention")
            own = blocks[0].attn
            made = attention_factory(attention, len(blocks), model.embed_dim, own.num_heads, own.head_dim)
            for i in made[0]:
                blocks[i].attn = BlockAttention(made[1]())
        if mixture_of_depths is not None:
            blocks = _blocks(model, "mixture_of_depths")
            layers, router = depth_factory(mixture_of_depths, len(blocks), model.embed_dim)
            for i in layers:
                blocks[i] = BlockDepth(blocks[i], router())
        if convolutions is not None:
            model = _convolutions(model, convolutions)
    model.to(like.dtype)
    model.changed = changed
    return tie_depth(model) if share_depth else model


def _blocks(model: Any, what: str) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise ValueError(f"{what}: expected a timm VisionTransformer, got {type(model).__name__}")
    return model.blocks


def _convolutions(model: Any, spec: Any) -> Any:
    make, arguments = parse_spec(spec, "convolutions", CONVOLUTIONS, "zoo.moe")
    if make is DeepMoE:
        options = {"num_classes": model.num_classes, **arguments}
        accepted = ("embedding_dim", "layers", "sparsity", "embedding_weight", "num_classes")
        _check(options, accepted, "DeepMoE")
        return ClassifierDeepMoE(model, **options)
    if make is not PatchMoE:
        raise ValueError(f"convolutions: expected DeepMoE or PatchMoE, got {getattr(make, '__name__', make)}")
    _check(arguments, ("layers", "num_experts", "patch_size", "router"), "PatchMoE")
    if missing := [name for name in ("layers", "num_experts", "router") if name not in arguments]:
        raise ValueError(f"convolutions: PatchMoE needs {' and '.join(missing)}")
    patterns = [arguments["layers"]] if isinstance(arguments["layers"], str) else list(arguments["layers"])
    there = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    chosen = [name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"PatchMoE: no convolution matches {patterns}; there are: {', '.join(there)}")
    for name in chosen:
        layer = _patch_moe(name, there[name], arguments["num_experts"], arguments.get("patch_size", 1), arguments)
        model.set_submodule(name, layer)
    return model


def _patch_moe(name: str, conv: nn.Conv2d, num_experts: int, size: int, arguments: Mapping[str, Any]) -> PatchMoE:
    """Experts in place of one convolution that keeps the size of its maps."""
    if conv.groups != 1 or any(step != 1 for step in conv.stride) or conv.out_channels % num_experts:
        raise ValueError(
            f"PatchMoE: {name}, {conv.in_channels} to {conv.out_channels} channels with stride {conv.stride[0]} and "
            f"{conv.groups} groups, cannot be {num_experts} experts: it needs stride 1, one group, and channels that "
            "the experts divide"
        )
    gate = gate_factory(arguments["router"], conv.in_channels * size**2, num_experts)
    kernel = min(conv.kernel_size[0], size if size % 2 else max(size - 1, 1))
    width, bias = conv.out_channels // num_experts, conv.bias is not None
    convolution = (nn.Conv2d(conv.in_channels, width, kernel, padding="same", bias=bias) for _ in range(num_experts))
    return PatchMoE(gate(), convolution, size)


def _check(given: Mapping[str, Any], accepted: tuple[str, ...], what: str) -> None:
    for name in given:
        if name not in accepted:
            raise unknown(f"argument of {what}", name, accepted)
