"""V-MoE and Soft MoE: timm's VisionTransformer with mixtures of experts in place of some MLPs.

What differs from timm's own, because the published models differ: GELU is the tanh form; the final norm comes before
any pooling; positions may be sines and cosines; a tanh layer may stand before the head (`pre_logits`); experts start
alike; weights start as in google-research/vmoe. All else is timm's, and so are the names of the parameters.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..moe import MoE
from ..nearest import unknown
from .vision_experts import put_experts, stacked_mlps, undecayed
from .vision_init import init_module

POSITIONS = ("learn", "sincos2d", "none", "")


class CheckedPatchEmbed(PatchEmbed):
    """timm's PatchEmbed, which says what it expected of images that do not fit."""

    hint = (
        "another size needs set_input_size, img_size= or dynamic_img_size=True when the model is made, other channels "
        "in_chans="
    )

    def forward(self, x: Tensor) -> Tensor:
        """Patches of images [B, C, H, W]; raises ValueError for other channels or another size than it is set to."""
        channels = self.proj.in_channels
        fixed = self.strict_img_size and self.img_size is not None
        if x.dim() != 4 or x.shape[1] != channels or (fixed and tuple(x.shape[2:]) != tuple(self.img_size)):
            size = "x".join(map(str, self.img_size)) if fixed else "any size"
            raise ValueError(f"expected images [B, {channels}, H, W] of {size}, got {list(x.shape)}; {self.hint}")
        return super().forward(x)


class VisionTransformerMoE(VisionTransformer):
    """A timm VisionTransformer whose blocks `moe_layers` have experts (V-MoE 2106.05974, Soft MoE 2308.00951).

    Beside timm's arguments: moe_layers ("last-2": the last two of the odd blocks, "every-2", a list, or "none"),
    num_experts, router, k, capacity, losses and group_images (see `vision_gate`), experts of another kind (see
    `put_experts`), representation_size (the width of `pre_logits`, or None), pos_embed="sincos2d" with pos_temperature,
    shared_init (all experts start alike), expert_dropout (by default proj_drop_rate, as in other MLPs), backend (of the
    experts).
    dense=True makes the dense twin: an MLP as wide as a token's experts together in place of each mixture.

    Raises ValueError for blocks that do not exist, an unknown router, an image smaller than a patch, and for a norm
    inside the MLP (scale_mlp_norm), which experts cannot have.
    """

    pos_embed: Any
    weight_init_mode: Any

    def __init__(
        self,
        *,
        moe_layers: str | int | Iterable[int] | None = "last-2",
        num_experts: int = 8,
        k: int | None = None,
        router: Any = "TopKRouter",
        capacity: Any = None,
        losses: Mapping[str, Any] | None = None,
        group_images: int | None = None,
        experts: Any = "Experts",
        expert_dropout: float | None = None,
        representation_size: int | None = None,
        pos_embed: str = "learn",
        pos_temperature: float = 10_000.0,
        shared_init: bool = True,
        dense: bool = False,
        backend: str = "auto",
        weight_init: str = "",
        **timm: Any,
    ) -> None:
        defaults = {"fc_norm": False, "act_layer": "gelu_tanh", "embed_layer": CheckedPatchEmbed}
        if pos_embed not in POSITIONS:
            raise unknown("pos_embed", pos_embed, POSITIONS)
        self.sincos = pos_embed == "sincos2d"
        if self.sincos:
            pos_embed = "none"
            defaults["no_embed_class"] = True
        super().__init__(**{**defaults, **timm}, pos_embed=pos_embed, weight_init="skip")
        place = {name: timm.get(name) for name in ("device", "dtype")}
        if not self.patch_embed.num_patches:
            raise ValueError(
                f"VisionTransformerMoE: an image of {self.patch_embed.img_size} has no patch of "
                f"{self.patch_embed.patch_size}"
            )
        self.pos_temperature, self.shared_init = pos_temperature, shared_init
        if self.sincos:
            del self.pos_embed
            self.register_buffer(
                "pos_embed", self._positions(self.patch_embed.grid_size, timm.get("device")), persistent=False
            )
        if timm.get("qk_norm"):
            self._norm_queries_and_keys(place)
        self._add_pre_logits(representation_size, place)
        self.moe_layers = put_experts(
            self,
            moe_layers=moe_layers,
            num_experts=num_experts,
            k=k,
            router=router,
            capacity=capacity,
            losses=losses,
            group_images=group_images,
            experts=experts,
            expert_dropout=expert_dropout,
            shared_init=shared_init,
            dense=dense,
            backend=backend,
            tokens=self.patch_embed.num_patches + self.num_prefix_tokens,
        )
        self.weight_init_mode = "" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights()

    def _norm_queries_and_keys(self, place: Mapping[str, Any]) -> None:
        """Put norms without bias on queries and keys, as flax has them; also where a pooling head attends."""
        attentions: list[Any] = [block.attn for block in self.blocks]
        if isinstance(self.attn_pool, AttentionPoolLatent):
            attentions.append(self.attn_pool)
        for attention in attentions:
            for name in ("q_norm", "k_norm"):
                setattr(attention, name, nn.LayerNorm(attention.head_dim, eps=1e-6, bias=False, **place))

    def _add_pre_logits(self, width: int | None, place: Mapping[str, Any]) -> None:
        self.pre_logits: nn.Module = nn.Identity()
        if not width:  # 0 too, which passes where timm drops arguments that are None
            return
        self.pre_logits = nn.Sequential(OrderedDict(fc=nn.Linear(self.embed_dim, width, **place), act=nn.Tanh()))
        self.head_hidden_size = width
        self.reset_classifier(self.num_classes)

    def _positions(self, grid: Sequence[int], device: torch.device | None = None) -> Tensor:
        """Sines and cosines of each patch's place, [1, H*W, D], laid out as in google-research/vmoe and big_vision."""
        if self.embed_dim % 4 or self.embed_dim < 8:
            raise ValueError(
                f"sincos2d positions need a width that is a multiple of 4 and at least 8: {self.embed_dim}"
            )
        quarter, (height, width) = self.embed_dim // 4, grid
        omega = self.pos_temperature ** -(torch.arange(quarter, dtype=torch.float32, device=device) / (quarter - 1))
        y, x = (torch.arange(n, dtype=torch.float32, device=device)[:, None] * omega for n in (height, width))
        y = y[:, None].expand(height, width, quarter)
        x = x[None].expand(height, width, quarter)
        table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).view(1, height * width, self.embed_dim)
        return table.to(self.patch_embed.proj.weight.dtype)

    @torch.no_grad()
    def fix_init_weight(self) -> None:
        """Divide what attention and MLPs, or experts, of block i give by sqrt(2 (i + 1)), as BEiT starts; timm's."""
        blocks: Any = self.blocks
        for i, block in enumerate(blocks):
            scale = math.sqrt(2 * (i + 1))
            block.attn.proj.weight.div_(scale)
            if not isinstance(block.mlp, MoE):
                block.mlp.fc2.weight.div_(scale)
            elif (mlps := stacked_mlps(block.mlp.experts)) is not None:
                mlps.down_proj.div_(scale)

    @torch.no_grad()
    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw all weights anew: as google-research/vmoe does, or as timm's `mode` says, experts always as V-MoE's."""
        mode = mode or self.weight_init_mode
        if self.sincos:
            like = self.patch_embed.proj.weight
            self.pos_embed = self._positions(self.patch_embed.grid_size, like.device)
        if mode:
            positions, self.pos_embed = self.pos_embed, None if self.sincos else self.pos_embed
            fix, self.fix_init = self.fix_init, False
            super().init_weights(mode, needs_reset)
            self.pos_embed, self.fix_init = positions, fix
        elif not self.sincos and self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        for name, module in self.named_modules():
            if not mode or isinstance(module, MoE):
                init_module(module, name, self.shared_init)
        if self.fix_init:
            self.fix_init_weight()
        if mode:
            return
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.zeros_(token)
        if isinstance(self.head, nn.Linear):
            # The loss of the published runs is a sigmoid a class: at first each is as likely as one in num_classes.
            nn.init.constant_(self.head.bias, -math.log(self.num_classes))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: timm's, and those of routers and experts that are no matrices."""
        return super().no_weight_decay() | undecayed(self)

    def set_input_size(
        self, img_size: tuple[int, int] | None = None, patch_size: tuple[int, int] | None = None
    ) -> None:
        """Change the size of images or patches; learnt positions are resampled, sines and cosines computed anew."""
        if not self.sincos:
            super().set_input_size(img_size, patch_size)
            return
        old, self.pos_embed = self.pos_embed, None
        super().set_input_size(img_size, patch_size)
        self.pos_embed = self._positions(self.patch_embed.grid_size, old.device).to(old.dtype)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model another head; `pre_logits` stays."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0 and self.head_hidden_size != self.embed_dim:
            old = self.head
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=old.weight.device, dtype=old.weight.dtype)
            self.head.train(self.training)

    def _pos_embed(self, x: Tensor) -> Tensor:
        if not (self.sincos and self.dynamic_img_size):
            return super()._pos_embed(x)
        fixed = self.pos_embed
        if tuple(x.shape[1:3]) != tuple(self.patch_embed.grid_size):
            fixed = self._positions(x.shape[1:3], x.device).to(x.dtype)
        x = x.flatten(1, 2) + fixed
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        return self.pos_drop(torch.cat([*prefix, x], dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, C] of tokens [B, N, D], or with pre_logits what the head reads."""
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)
