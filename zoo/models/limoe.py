"""LIMoE (2206.02770): one transformer for images and text, with sparse layers that both share.

What a modality has of its own: how it enters (patches, or an embedding table, and learnt positions) and a projection of
its mean token at the end. All blocks are shared; attention stays inside an image or a text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import GELUTanh
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..moe import MoE
from ..moe.label_losses import IMAGE, TEXT
from .limoe_gates import limoe_spec, mixes_tokens, refuse_mixtures
from .vision_experts import put_experts, undecayed
from .vision_gates import vision_gate
from .vision_init import init_module
from .vision_transformer import CheckedPatchEmbed

MAX_SCALE = 100.0  # of the logits, as in CLIP


class Embedded(NamedTuple):
    """Embeddings of length one of images [N, P] and texts [M, P], None where none were given, and the logits' scale."""

    image: Tensor | None
    text: Tensor | None
    scale: Tensor

    @property
    def logits(self) -> Tensor:
        """scale * cosine of every image with every text, [N, M]."""
        assert self.image is not None
        assert self.text is not None
        return self.scale * self.image @ self.text.T


class _Part(NamedTuple):
    """Tokens x [B, S, D] of one modality; mask [B, S] is False for padding, None for none."""

    x: Tensor
    modality: int
    mask: Tensor | None


class _Patches(CheckedPatchEmbed):
    hint = "another size or other channels need image_size= or channels= when the model is made or read"


class _Block(Block):
    """One pre-norm block: attention inside each modality, then an MLP or experts for the tokens of both."""

    def forward(self, parts: list[_Part], together: bool) -> list[_Part]:  # type: ignore[override]
        """Tokens of the modalities to tokens; together: those of a pair meet the gate as one sequence."""
        parts = [part._replace(x=part.x + _attend(self, part)) for part in parts]
        if not isinstance(self.mlp, MoE):
            return [part._replace(x=part.x + self.mlp(self.norm2(part.x))) for part in parts]
        paired = len({part.x.shape[0] for part in parts}) == 1
        if together and len(parts) > 1 and paired:
            x = torch.cat([part.x for part in parts], dim=1)
            modality = torch.cat(
                [torch.full_like(part.x[..., 0], part.modality, dtype=torch.long) for part in parts], 1
            )
            y = self.mlp(self.norm2(x), modality=modality, mask=_joined_mask(parts))
            pieces = (x + y).split([part.x.shape[1] for part in parts], dim=1)
            return [part._replace(x=piece) for part, piece in zip(parts, pieces)]
        return [
            part._replace(x=part.x + self.mlp(self.norm2(part.x), modality=part.modality, mask=part.mask))
            for part in parts
        ]


class LIMoE(nn.Module):
    """One tower for images [N, C, H, W] and token ids [M, S], to embeddings that meet in one space.

    Arguments: vocab_size and text_length (the longest text); image_size, patch_size and channels; embed_dim, depth,
    num_heads, mlp_ratio; projection_dim, by default embed_dim; moe_layers, num_experts, k, router, capacity, losses,
    experts, shared_init, dense and backend as `zoo.models.vision_experts.put_experts` has them, with LIMoE's defaults
    for token choice (k = 1, batch priority routing, the losses of `zoo.models.limoe_gates`); temperature, what logits
    are divided by at first. The gates hear mask and modality (0 image, 1 text).

    routed: "together" lets the tokens of an image and of its text compete for the same places, as in the paper: both
    are one sequence to the gate, and group_pairs of them (by default all of a process) share capacity. "apart" routes
    each modality by itself; its losses then come once a modality and add up. By default together, but apart for gates
    that mix tokens (Soft MoE and merging), where an image would see its own caption, and the loss could be had without
    looking at it; the same holds of images and texts that are not in pairs.

    Raises ValueError for sizes that do not fit, blocks that do not exist, an unknown router, and a gate that mixes
    tokens of both modalities, one of a user's own when it first does.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 32_000,
        text_length: int = 16,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        projection_dim: int | None = None,
        moe_layers: str | int | Iterable[int] | None = "every-2",
        num_experts: int = 32,
        k: int | None = None,
        router: Any = "TopKRouter",
        capacity: Any = None,
        losses: Mapping[str, Any] | None = None,
        group_pairs: int | None = None,
        experts: Any = "Experts",
        routed: Literal["together", "apart"] | None = None,
        shared_init: bool = True,
        dense: bool = False,
        backend: str = "auto",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        _check(locals())
        patches = (image_size // patch_size) ** 2
        spec: Any = limoe_spec(router, num_experts, group_pairs)
        asked: dict[str, Any] = {"k": k, "capacity": capacity, "losses": losses, "group_images": group_pairs}
        mixing = mixes_tokens(router, vision_gate(spec, embed_dim, num_experts, tokens=patches, **asked))
        if routed == "together" and mixing:
            raise ValueError("routed='together': this gate mixes tokens, so that an image would see its own caption")
        self.routed = routed or ("apart" if mixing else "together")
        self.image_size, self.channels, self.shared_init = image_size, channels, shared_init
        self.vocab_size, self.text_length, self.temperature = vocab_size, text_length, temperature
        self.grad_checkpointing = False
        self.patch_embed = _Patches(image_size, patch_size, channels, embed_dim)
        self.token_embed = nn.Embedding(vocab_size, embed_dim)
        self.image_positions = nn.Parameter(torch.empty(1, patches, embed_dim))
        self.text_positions = nn.Parameter(torch.empty(1, text_length, embed_dim))
        blocks = (_Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, act_layer=GELUTanh) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.image_head = nn.Linear(embed_dim, projection_dim or embed_dim, bias=False)
        self.text_head = nn.Linear(embed_dim, projection_dim or embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.empty(()))
        self.moe_layers = put_experts(
            self,
            moe_layers=moe_layers,
            num_experts=num_experts,
            router=spec,
            **asked,
            experts=experts,
            shared_init=shared_init,
            dense=dense,
            backend=backend,
            tokens=patches + (text_length if self.routed == "together" else 0),
        )
        for layer in self.modules():
            if self.routed == "together" and isinstance(layer, MoE):
                layer.router.register_forward_hook(refuse_mixtures)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew, blocks and experts as google-research/vmoe does."""
        for name, module in self.named_modules():
            init_module(module, name, self.shared_init)
        for table in (self.token_embed.weight, self.image_positions, self.text_positions):
            nn.init.normal_(table, std=0.02)
        self.log_scale.fill_(-math.log(self.temperature))

    def forward(self, image: Tensor | None = None, ids: Tensor | None = None, mask: Tensor | None = None) -> Embedded:
        """Embed images [N, C, H, W] and texts, ids [M, S] with mask [M, S], False for padding; either may be left out.

        Where N = M they are pairs. Raises ValueError for images and ids of other sizes than the model's, and where
        neither is given.
        """
        parts = []
        if image is not None:
            parts.append(_Part(self.patch_embed(image) + self.image_positions, IMAGE, None))
        if ids is not None:
            parts.append(_Part(self._tokens(ids, mask), TEXT, None if mask is None else mask.bool()))
        if not parts:
            raise ValueError("LIMoE: expected images, texts or both, got neither")
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                parts = checkpoint(block, parts, self.routed == "together", use_reentrant=False)
            else:
                parts = block(parts, self.routed == "together")
        found = {part.modality: self._pooled(part) for part in parts}
        return Embedded(found.get(IMAGE), found.get(TEXT), self.log_scale.exp().clamp(max=MAX_SCALE))

    def _tokens(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if ids.dim() != 2 or ids.shape[1] > self.text_length:
            raise ValueError(
                f"LIMoE: expected ids [M, S] of at most {self.text_length} tokens a text, got {list(ids.shape)}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"LIMoE: mask has shape {list(mask.shape)}, ids have {list(ids.shape)}")
        look = ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling()
        if look and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(f"LIMoE: ids must lie in 0..{self.vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")
        return self.token_embed(ids) + self.text_positions[:, : ids.shape[1]]

    def _pooled(self, part: _Part) -> Tensor:
        """The mean token, projected, of length one, [B, P]."""
        x = self.norm(part.x)
        if part.mask is None:
            pooled = x.mean(1)
        else:
            pooled = x.where(part.mask[..., None], 0).sum(1) / part.mask.sum(1, keepdim=True).clamp(min=1)
        head = self.image_head if part.modality == IMAGE else self.text_head
        return F.normalize(head(pooled).float() if pooled.dtype != torch.float64 else head(pooled), dim=-1)

    def call_labels(self, images: int, texts: int, length: int) -> list[Tensor]:
        """Modality of every token, [T], in each call that a sparse layer gets for so many images and texts [M, S].

        In the order of the calls; it tells apart what `zoo.moe.record` kept.
        """
        parts = [torch.full((images, self.patch_embed.num_patches), IMAGE), torch.full((texts, length), TEXT)]
        parts = [part for part, count in zip(parts, (images, texts)) if count]
        if self.routed == "together" and images == texts:
            return [torch.cat(parts, dim=1).flatten()]
        return [part.flatten() for part in parts]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in backward instead of keeping what they computed."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: positions, and those of gates and experts that are no matrices."""
        return {"image_positions", "text_positions", "log_scale"} | undecayed(self)


def _attend(block: Any, part: _Part) -> Tensor:
    if part.mask is None:
        return block.attn(block.norm1(part.x))
    # A text without any token would have nothing to attend to, and become nan.
    seen = part.mask | ~part.mask.any(1, keepdim=True)
    return block.attn(block.norm1(part.x), attn_mask=seen[:, None, None])


def _joined_mask(parts: list[_Part]) -> Tensor | None:
    if all(part.mask is None for part in parts):
        return None
    masks = [torch.ones_like(p.x[..., 0], dtype=torch.bool) if p.mask is None else p.mask for p in parts]
    return torch.cat(masks, dim=1)


def _check(given: Mapping[str, Any]) -> None:
    """Raise ValueError for the first size that does not fit."""
    sizes = ("vocab_size", "text_length", "image_size", "patch_size", "channels", "embed_dim", "depth", "num_heads")
    for name in sizes:
        if not isinstance(given[name], int) or given[name] < 1:
            raise ValueError(f"LIMoE: {name} must be a whole number of at least 1, got {given[name]!r}")
    if given["image_size"] % given["patch_size"]:
        raise ValueError(
            f"LIMoE: images of {given['image_size']} pixels do not divide into patches of {given['patch_size']}"
        )
    if given["embed_dim"] % given["num_heads"]:
        raise ValueError(f"LIMoE: embed_dim={given['embed_dim']} does not divide into {given['num_heads']} heads")
    if given["temperature"] <= 0:
        raise ValueError(f"LIMoE: temperature must be above 0, got {given['temperature']}")
    if given["routed"] not in (None, "together", "apart"):
        raise ValueError(f"LIMoE: routed must be 'together' or 'apart', got {given['routed']!r}")
