"""The shared mixture-of-experts core: tensors only, no task, no model family, no file format."""

from . import balance, expert_losses, kernels, routers, schedule, telemetry
from .adamix import AdaMix
from .adapted import AdaptedLinear, ComposedLinear, LoRALinear, ScaledLinear
from .attention_experts import HeadExperts, KeyValues, MoA, MoH, SwitchHead, rotary
from .blend import Blend
from .capacity import Capacity
from .conv_experts import ChannelRouter, DeepMoE, GatedConv2d, PatchMoE, shallow_embedding
from .decision import Decision
from .depth import DepthRouter, MixtureOfDepths
from .dispatch import ExpertParallel
from .dispatch_nodes import HierarchicalExpertParallel
from .dispatch_static import StaticExpertParallel
from .experts import MLP, Experts
from .grown import GrownExperts
from .hyper import HyperExperts, HyperNetwork
from .isolated import IsolatedMoE
from .kernels.portable import portable
from .latent import LatentExperts
from .layer import MoE, Step, record
from .lora import LoRAExperts
from .lora_of_experts import LoRAOfExperts
from .mix_lora import MixLoRAExperts
from .offloaded import OffloadedExperts
from .peer import PEER, NeuronExperts
from .prompts import PromptMixture
from .quantised import QuantisedExperts
from .rank_one import RankOneExperts
from .residual import ResidualExperts
from .routers import Router
from .routers.base import is_recomputation
from .routing import Routing
from .shortcut import Shortcut, ShortcutMoE
from .slots import Slots
from .unipelt import FollowedLinear, GatedPrefix
from .zero_computation import ZeroComputationExperts

__all__ = [
    "MLP",
    "PEER",
    "AdaMix",
    "AdaptedLinear",
    "Blend",
    "Capacity",
    "ChannelRouter",
    "ComposedLinear",
    "Decision",
    "DeepMoE",
    "DepthRouter",
    "ExpertParallel",
    "Experts",
    "FollowedLinear",
    "GatedConv2d",
    "GatedPrefix",
    "GrownExperts",
    "HeadExperts",
    "HierarchicalExpertParallel",
    "HyperExperts",
    "HyperNetwork",
    "IsolatedMoE",
    "KeyValues",
    "LatentExperts",
    "LoRAExperts",
    "LoRALinear",
    "LoRAOfExperts",
    "MixLoRAExperts",
    "MixtureOfDepths",
    "MoA",
    "MoE",
    "MoH",
    "NeuronExperts",
    "OffloadedExperts",
    "PatchMoE",
    "PromptMixture",
    "QuantisedExperts",
    "RankOneExperts",
    "ResidualExperts",
    "Router",
    "Routing",
    "ScaledLinear",
    "Shortcut",
    "ShortcutMoE",
    "Slots",
    "StaticExpertParallel",
    "Step",
    "SwitchHead",
    "ZeroComputationExperts",
    "balance",
    "expert_losses",
    "is_recomputation",
    "kernels",
    "portable",
    "record",
    "rotary",
    "routers",
    "schedule",
    "shallow_embedding",
    "telemetry",
]
