"""Weights of a new V-MoE as google-research/vmoe draws them."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, lecun_normal_, trunc_normal_tf_
from torch import Tensor, nn

from ..moe import Experts, MoE, Router, ZeroComputationExperts
from ..moe.routers import ExpertChoiceRouter, SoftRouter, TopKRouter
from .vision_experts import stacked_mlps

# What a normal distribution cut off at two standard deviations keeps of its standard deviation.
TRUNCATED_STD = 0.87962566103423978
# Gates that start as linear layers do; others start in a way of their own, and keep it.
_AS_LINEAR = {gate.reset_parameters for gate in (TopKRouter, ExpertChoiceRouter, SoftRouter)}


@torch.no_grad()
def init_module(module: nn.Module, name: str, shared_init: bool) -> None:
    """Draw the weights of one module of a vision transformer, by its name in the model."""
    if ".router." in name or ".experts." in name:
        return  # part of a gate that has more than one matrix, or of experts of another kind, and starts in its own way
    if isinstance(module, MoE):
        if (mlps := stacked_mlps(module.experts)) is not None:
            init_experts(mlps, shared_init)
        router: Any = module.router
        if hasattr(router, "reset_parameters"):
            router.reset_parameters()
        if (
            getattr(type(router), "reset_parameters", None) in _AS_LINEAR
            and getattr(router, "noise", None) != "learned"
        ):
            lecun_normal(router.weight, router.dim * (router.num_experts if isinstance(router, SoftRouter) else 1))
    elif isinstance(module, nn.Linear):
        if name == "head":
            nn.init.zeros_(module.weight)
        elif name.startswith("pre_logits"):
            lecun_normal_(module.weight)
        else:
            for block in module.weight.chunk(_fused(name)):
                nn.init.xavier_uniform_(block)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6) if ".mlp." in name else nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        lecun_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, AttentionPoolLatent):
        nn.init.xavier_uniform_(module.latent[0].T)
    elif hasattr(module, "reset_parameters") and not isinstance(module, (Experts, ZeroComputationExperts, Router)):
        module.reset_parameters()  # type: ignore[operator]


@torch.no_grad()
def init_experts(experts: Experts, shared: bool) -> None:
    """Xavier for the projections, nearly zero for the biases; with `shared` all experts alike, as in V-MoE."""
    for weight in (experts.w_in, experts.down_proj):
        for expert in weight[:1] if shared else weight:
            nn.init.xavier_uniform_(expert)
        if shared:
            weight[1:] = weight[:1]
    for bias in (experts.b_in, experts.down_proj_bias):
        if bias is not None:
            bias.copy_(torch.randn_like(bias[:1] if shared else bias) * 1e-6)


def lecun_normal(weight: Tensor, fan_in: int) -> None:
    """A truncated normal distribution of variance 1 / fan_in."""
    trunc_normal_tf_(weight, std=1 / math.sqrt(fan_in) / TRUNCATED_STD)


def _fused(name: str) -> int:
    """How many matrices, one below the other, a linear layer of timm's holds."""
    return {"qkv": 3, "kv": 2}.get(name.rpartition(".")[2], 1)
