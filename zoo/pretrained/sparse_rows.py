"""One row a language model of transformers: which gate its sparse blocks have, and where they keep what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..moe.kernels.activations import CLAMP_ALPHA, CLAMP_LIMIT
from .language import TABLES, _deepseek_v2, _deepseek_v3, _mixtral, _softmax, activation_of


@dataclass(frozen=True)
class SparseBlock:
    """One row: the gate of a language model's sparse block, and the block's names and layout.

    prefix is that of transformers' classes; gate, bias and shared are paths inside the block: to the module with the
    gate's weight, to the tensor that is added for the choice alone, and to the shared experts. Its experts are
    `transposed` where they are [E, D, 2F] and [E, F, D], `interleaved` where gates and ups take turns, and have
    `biases` or not. `parts` where it has blocks of its own for text and for what was seen; `weigh_input` as in
    `Experts`; `pair` where it gives a second result, which nothing reads.
    """

    prefix: str
    router: Callable[[Any], dict[str, Any]]
    gate: str = "gate"
    bias: str = "gate.e_score_correction_bias"
    shared: str | None = None
    shared_gate: str | None = None
    transposed: bool = False
    interleaved: bool = False
    biases: bool = False
    parts: tuple[str, ...] = ()
    weigh_input: bool = False
    pair: bool = False
    activation: Callable[[Any], str] = activation_of


def _normalized(config: Any) -> dict[str, Any]:
    return {"k": config.num_experts_per_tok, "normalize": True, "normalize_eps": 0.0}


def _after(config: Any) -> dict[str, Any]:
    return {"k": config.num_experts_per_tok, "score": "softmax_topk"}


def _aria(config: Any) -> dict[str, Any]:
    return {"k": config.moe_topk, "score": "softmax_topk"}


def _llama4(config: Any) -> dict[str, Any]:
    return {"k": config.num_experts_per_tok, "score": "sigmoid"}


def _ernie(config: Any) -> dict[str, Any]:
    # The sum of the chosen is divided by, but at least moe_norm_min = 1e-12: the same where any is chosen in earnest.
    return {"k": config.moe_k, "normalize": True, "normalize_eps": 1e-20, "selection_bias": True}


def _gpt_oss(config: Any) -> dict[str, Any]:
    return {**_after(config), "bias": True}


def _gpt_oss_activation(config: Any) -> str:
    if getattr(config, "swiglu_alpha", CLAMP_ALPHA) != CLAMP_ALPHA:
        raise ValueError(
            f"{config.model_type}: swiglu_alpha {config.swiglu_alpha}; the kernels have {CLAMP_ALPHA} alone"
        )
    limit = float(getattr(config, "swiglu_limit", CLAMP_LIMIT))
    return "swiglu_clamped" if limit == CLAMP_LIMIT else f"swiglu_clamped:{limit}"


def _minimax_m2(config: Any) -> dict[str, Any]:
    return {**_normalized(config), "score": "sigmoid", "selection_bias": True}


def _lfm2(config: Any) -> dict[str, Any]:
    return {
        "k": config.num_experts_per_tok,
        "score": "sigmoid",
        "normalize": config.norm_topk_prob,
        "normalize_eps": 1e-6,
        "scale": config.routed_scaling_factor,
        "selection_bias": config.use_expert_bias,
    }


def _afmoe(config: Any) -> dict[str, Any]:
    return {
        "k": config.num_experts_per_tok,
        "score": "sigmoid",
        "normalize": True,
        "normalize_eps": 1e-20,
        "scale": config.route_scale,
        "selection_bias": True,
    }


def _unnormalized(config: Any) -> dict[str, Any]:
    return {"k": config.num_experts_per_tok}


def _swiglu(config: Any) -> str:
    return "swiglu"


# By the model_type of the language model's configuration.
BLOCKS: dict[str, SparseBlock] = {
    **{
        name: SparseBlock(row.prefix, row.router, shared=row.shared, shared_gate=row.shared_gate)
        for name, row in TABLES.items()
    },
    # DeepSeek-V3's gate
    **{
        name: SparseBlock(prefix, _deepseek_v3, shared="shared_experts")
        for name, prefix in {
            "bailing_hybrid": "BailingHybrid",
            "exaone_moe": "ExaoneMoe",
            "glm4v_moe_text": "Glm4vMoe",
            "kimi_linear": "KimiLinear",
        }.items()
    },
    "mimo_v2_flash": SparseBlock("MiMoV2Flash", _deepseek_v3),
    # softmax over all experts
    "jamba": SparseBlock("Jamba", _unnormalized, gate="router"),
    "minimax": SparseBlock("MiniMax", _mixtral),
    "hunyuan_v1_moe": SparseBlock("HunYuanMoEV1", _normalized, gate="gate.wg", shared="shared_mlp"),
    "qwen3_next": SparseBlock("Qwen3Next", _softmax, shared="shared_expert", shared_gate="shared_expert_gate"),
    "qwen3_vl_moe_text": SparseBlock("Qwen3VLMoe", _normalized),
    "qwen3_5_moe_text": SparseBlock(
        "Qwen3_5Moe", _normalized, shared="shared_expert", shared_gate="shared_expert_gate"
    ),
    **{
        name: SparseBlock(prefix, _deepseek_v2, shared="shared_experts")
        for name, prefix in {
            "deepseek_ocr2_text": "DeepseekOcr2",
            "unlimited_ocr_text": "UnlimitedOcr",
        }.items()
    },
    # softmax over the chosen
    **{
        name: SparseBlock(prefix, _after, gate="router")
        for name, prefix in {
            "granitemoe": "GraniteMoe",
            "granitemoe_swa": "GraniteMoeSWA",
            "granitemoehybrid": "GraniteMoeHybrid",
            "granitemoeshared": "GraniteMoeShared",
        }.items()
    },
    "aria_text": SparseBlock(
        "Aria", _aria, gate="router", shared="shared_experts", transposed=True, activation=_swiglu
    ),
    "gpt_oss": SparseBlock(
        "GptOss",
        _gpt_oss,
        gate="router",
        transposed=True,
        interleaved=True,
        biases=True,
        pair=True,
        activation=_gpt_oss_activation,
    ),
    # softmax with a bias for the choice
    "ernie4_5_moe": SparseBlock(
        "Ernie4_5_Moe", _ernie, bias="gate.moe_statics.e_score_correction_bias", shared="shared_experts"
    ),
    "ernie4_5_vl_moe_text": SparseBlock(
        "Ernie4_5_VLMoe",
        _ernie,
        bias="gate.moe_statics.e_score_correction_bias",
        shared="shared_experts",
        parts=("text_moe", "vision_moe"),
    ),
    # sigmoid
    "afmoe": SparseBlock("Afmoe", _afmoe, gate="router.gate", bias="expert_bias", shared="shared_experts"),
    "lfm2_moe": SparseBlock("Lfm2Moe", _lfm2, bias="expert_bias", activation=_swiglu),
    "llama4_text": SparseBlock(
        "Llama4", _llama4, gate="router", shared="shared_expert", transposed=True, weigh_input=True
    ),
    "minimax_m2": SparseBlock("MiniMaxM2", _minimax_m2, bias="e_score_correction_bias"),
}
