"""What the gates and experts of transformers' language models are, told by a configuration: arguments of ours."""

from __future__ import annotations

from typing import Any

from ..moe.kernels.activations import CLAMP_ALPHA, CLAMP_LIMIT
from ..moe.routers import Gemma4Router, ScoredHashRouter, SparseMixerRouter, TopKRouter
from ..nearest import unknown
from .language import ACTIVATIONS, _deepseek_v3, _softmax, activation_of


def normalized(config: Any) -> dict[str, Any]:
    """Softmax over all experts, the chosen ones' shares of it."""
    return {"k": config.num_experts_per_tok, "normalize": True, "normalize_eps": 0.0}


def after(config: Any) -> dict[str, Any]:
    """Softmax over the chosen logits."""
    return {"k": config.num_experts_per_tok, "score": "softmax_topk"}


def aria(config: Any) -> dict[str, Any]:
    """Aria: softmax over the chosen logits."""
    return {"k": config.moe_topk, "score": "softmax_topk"}


def llama4(config: Any) -> dict[str, Any]:
    """Llama 4: the sigmoid of one expert, or of several, as it is."""
    return {"k": config.num_experts_per_tok, "score": "sigmoid"}


def ernie(config: Any) -> dict[str, Any]:
    """ERNIE 4.5: softmax with a bias for the choice."""
    # The sum of the chosen is divided by, but at least moe_norm_min = 1e-12: the same where any is chosen in earnest.
    return {"k": config.moe_k, "normalize": True, "normalize_eps": 1e-20, "selection_bias": True}


def gpt_oss(config: Any) -> dict[str, Any]:
    """gpt-oss: softmax over the chosen logits, which have biases."""
    return {**after(config), "bias": True}


def gpt_oss_activation(config: Any) -> str:
    """The clamped SwiGLU of gpt-oss and MiniMax M3; raises ValueError for another slope than the kernels'."""
    if getattr(config, "swiglu_alpha", CLAMP_ALPHA) != CLAMP_ALPHA:
        raise ValueError(
            f"{config.model_type}: swiglu_alpha {config.swiglu_alpha}; the kernels have {CLAMP_ALPHA} alone"
        )
    limit = float(getattr(config, "swiglu_limit", CLAMP_LIMIT))
    return "swiglu_clamped" if limit == CLAMP_LIMIT else f"swiglu_clamped:{limit}"


def minimax_m2(config: Any) -> dict[str, Any]:
    """MiniMax M2: sigmoids with a bias for the choice."""
    return {**normalized(config), "score": "sigmoid", "selection_bias": True}


def lfm2(config: Any) -> dict[str, Any]:
    """LFM2: sigmoids, with a bias for the choice or without."""
    return {
        "k": config.num_experts_per_tok,
        "score": "sigmoid",
        "normalize": config.norm_topk_prob,
        "normalize_eps": 1e-6,
        "scale": config.routed_scaling_factor,
        "selection_bias": config.use_expert_bias,
    }


def afmoe(config: Any) -> dict[str, Any]:
    """AFMoE: sigmoids with a bias for the choice."""
    return {
        "k": config.num_experts_per_tok,
        "score": "sigmoid",
        "normalize": True,
        "normalize_eps": 1e-20,
        "scale": config.route_scale,
        "selection_bias": True,
    }


def hunyuan_v3(config: Any) -> dict[str, Any]:
    """Hunyuan 3: sigmoids with a bias for the choice."""
    return {
        "k": config.num_experts_per_tok,
        "score": "sigmoid",
        "normalize": True,
        "normalize_eps": 1e-20,
        "scale": config.router_scaling_factor,
        "selection_bias": True,
    }


def laguna(config: Any) -> dict[str, Any]:
    """Laguna: MiniMax M2's gate, scaled."""
    return {**minimax_m2(config), "scale": config.moe_routed_scaling_factor}


def minimax_m3(config: Any) -> dict[str, Any]:
    """MiniMax M3: MiniMax M2's gate, scaled."""
    return {**minimax_m2(config), "scale": config.routed_scaling_factor}


def flint(config: Any) -> dict[str, Any]:
    """Flint: sigmoids, without a bias."""
    return {**_softmax(config), "score": "sigmoid"}


def mistral4(config: Any) -> dict[str, Any]:
    """Mistral 4 and Large 4: softmax, inside the groups of the best two experts."""
    # Scores are softmax's: groups that count as 0 are never chosen from. Mistral Large 4 always normalises.
    return {
        "k": config.num_experts_per_tok,
        "normalize": getattr(config, "norm_topk_prob", True),
        "normalize_eps": 1e-20,
        "scale": config.routed_scaling_factor,
        "num_groups": config.n_group,
        "group_topk": config.topk_group,
        "group_score": "top2_sum",
    }


def axk2(config: Any) -> dict[str, Any]:
    """A.X K2: DeepSeek-V3's gate, with groups or without; experts outside them count as 0."""
    if config.n_group is not None:
        return {**_deepseek_v3(config), "group_fill": 0.0}
    return {name: value for name, value in _deepseek_v3(config).items() if "group" not in name}


def cohere(config: Any) -> dict[str, Any]:
    """Cohere 2: softmax over the chosen logits, or their sigmoids."""
    if config.expert_selection_fn == "softmax":
        return after(config)
    return flint(config)


def deepseek_v4(config: Any) -> dict[str, Any]:
    """DeepSeek-V4: roots of softplus with a bias for the choice."""
    scores = {"sqrtsoftplus": "sqrt_softplus", "sigmoid": "sigmoid"}
    if config.scoring_func not in scores:
        raise unknown(f"scoring_func of {config.model_type}", config.scoring_func, scores)
    return {
        "k": config.num_experts_per_tok,
        "score": scores[config.scoring_func],
        "normalize": True,
        "normalize_eps": 1e-20,
        "scale": config.routed_scaling_factor,
        "selection_bias": True,
    }


def deepseek_v4_hash(config: Any, layer: int) -> tuple[type[TopKRouter], dict[str, Any]] | None:
    """DeepSeek-V4's first layers: experts by token id; None for the others."""
    if config.mlp_layer_types[layer] != "hash_moe":
        return None
    found = {**deepseek_v4(config), "selection_bias": False}
    return ScoredHashRouter, {**found, "vocab_size": config.vocab_size, "seed": layer}


def phimoe(config: Any, layer: int) -> tuple[type[TopKRouter], dict[str, Any]]:
    """Phi-3.5-MoE: SparseMixer."""
    return SparseMixerRouter, {
        "k": config.num_experts_per_tok,
        "threshold": config.router_jitter_noise,
        "jitter": config.input_jitter_noise,
    }


def gemma4(config: Any, layer: int) -> tuple[type[TopKRouter], dict[str, Any]]:
    """Gemma 4: softmax over what the gate normalises itself, with a factor an expert."""
    return Gemma4Router, {"k": config.top_k_experts, "eps": config.rms_norm_eps}


def gemma4_choices(config: Any) -> dict[str, Any]:
    """Gemma 4: how many experts a token meets."""
    return {"k": config.top_k_experts}


def gemma4_activation(config: Any) -> str:
    """Gemma's name of the activation is hidden_activation."""
    if config.hidden_activation not in ACTIVATIONS:
        raise unknown(f"expert activation of {config.model_type}", config.hidden_activation, ACTIVATIONS)
    return ACTIVATIONS[config.hidden_activation]


def limited(config: Any) -> str:
    """A gated activation clamped at config.swiglu_limit."""
    return f"{activation_of(config)}:{float(config.swiglu_limit)}"


def relu2(config: Any) -> str:
    """Nemotron-H's squared ReLU, without a gate; raises ValueError for another."""
    if config.mlp_hidden_act != "relu2":
        raise unknown(f"mlp_hidden_act of {config.model_type}", config.mlp_hidden_act, ("relu2",))
    return "relu2"


def unnormalized(config: Any) -> dict[str, Any]:
    """Softmax over all experts as it is."""
    return {"k": config.num_experts_per_tok}


def swiglu(config: Any) -> str:
    """SwiGLU, whatever a configuration says."""
    return "swiglu"
