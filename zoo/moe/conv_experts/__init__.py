"""Convolutional experts for vision backbones: the channels of DeepMoE, the patches of pMoE."""

from .deep_moe import ChannelRouter, DeepMoE, GatedConv2d, shallow_embedding
from .patch_moe import PatchMoE

__all__ = ["ChannelRouter", "DeepMoE", "GatedConv2d", "PatchMoE", "shallow_embedding"]
