"""One row a language model of transformers: which gate its sparse blocks have, and where they keep what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..moe.routers import TopKRouter
from . import sparse_gates as gates
from .language import TABLES, _deepseek_v2, _deepseek_v3, _mixtral, _softmax, activation_of


@dataclass(frozen=True)
class SparseBlock:
    """One row: the gate of a language model's sparse block, and the block's names and layout.

    prefix is that of transformers' classes; gate, bias and shared are paths inside the block: to the module with the
    gate's weight, to the tensor that is added for the choice alone, and to the shared experts. Its experts are
    `transposed` where they are [E, D, 2F] and [E, F, D], `interleaved` where gates and ups take turns, and have
    `biases` or not. `parts` where it has blocks of its own for text and for what was seen; `weigh_input` as in
    `Experts`; `pair` where it gives a second result, which nothing reads; `ids` where it is told input_ids; `latent`
    are the linear layers around its experts, where their tokens are narrower; `apart` where gate and experts are the
    layer's own, and read different tokens; `beside` are tensors that our gate has besides, and their paths.
    `special` gives the class of a layer's gate and its arguments where that is no `TopKRouter` with those of `router`,
    else None.
    `beyond` is true of the configurations whose blocks are none of ours: these models keep transformers' gates.
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
    ids: bool = False
    latent: tuple[str, str] | None = None
    apart: bool = False
    beside: tuple[tuple[str, str], ...] = ()
    activation: Callable[[Any], str] = activation_of
    special: Callable[[Any, int], tuple[type[TopKRouter], dict[str, Any]] | None] = lambda config, layer: None
    beyond: Callable[[Any], bool] = lambda config: False

    def gate_of(self, config: Any, layer: int) -> tuple[type[TopKRouter], dict[str, Any]]:
        """The class and the arguments, besides the sizes, of the gate of a decoder layer."""
        return self.special(config, layer) or (TopKRouter, self.router(config))


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
            "dots3_note_text": "Dots3Note",
            "sarvam_mla": "DeepseekV3",
            "sarvam_moe": "Glm4Moe",
        }.items()
    },
    **{
        name: SparseBlock(prefix, _deepseek_v3, shared="shared_experts", activation=gates.limited)
        for name, prefix in {"glm5_next_text": "Glm5NextText", "hy_v4": "HYV4", "hy_v4_vl_text": "HYV4VLText"}.items()
    },
    "axk2": SparseBlock("AXK2", gates.axk2, shared="shared_experts"),
    **{
        name: SparseBlock(prefix, _deepseek_v3)
        for name, prefix in {"mimo_v2_flash": "MiMoV2Flash", "beam": "Beam"}.items()
    },
    "nemotron_h": SparseBlock(
        "NemotronH",
        _deepseek_v3,
        shared="shared_experts",
        activation=gates.relu2,
        latent=("fc1_latent_proj", "fc2_latent_proj"),
    ),
    # softmax over all experts
    "jamba": SparseBlock("Jamba", gates.unnormalized, gate="router"),
    "minimax": SparseBlock("MiniMax", _mixtral),
    "hunyuan_v1_moe": SparseBlock("HunYuanMoEV1", gates.normalized, gate="gate.wg", shared="shared_mlp"),
    "qwen3_next": SparseBlock("Qwen3Next", _softmax, shared="shared_expert", shared_gate="shared_expert_gate"),
    "qwen3_vl_moe_text": SparseBlock("Qwen3VLMoe", gates.normalized),
    **{
        name: SparseBlock(prefix, gates.normalized, shared="shared_expert", shared_gate="shared_expert_gate")
        for name, prefix in {"qwen3_5_moe_text": "Qwen3_5Moe", "qwen4_exp_text": "Qwen4Exp"}.items()
    },
    **{
        name: SparseBlock(prefix, gates.mistral4, shared="shared_experts")
        for name, prefix in {"mistral4": "Mistral4", "mistral_large4_text": "MistralLarge4Text"}.items()
    },
    **{
        name: SparseBlock(prefix, _deepseek_v2, shared="shared_experts")
        for name, prefix in {
            "deepseek_ocr2_text": "DeepseekOcr2",
            "unlimited_ocr_text": "UnlimitedOcr",
        }.items()
    },
    # softmax over the chosen
    **{
        name: SparseBlock(prefix, gates.after, gate="router")
        for name, prefix in {
            "granitemoe": "GraniteMoe",
            "granitemoe_swa": "GraniteMoeSWA",
            "granitemoehybrid": "GraniteMoeHybrid",
            "granitemoeshared": "GraniteMoeShared",
        }.items()
    },
    "aria_text": SparseBlock(
        "Aria", gates.aria, gate="router", shared="shared_experts", transposed=True, activation=gates.swiglu
    ),
    "gpt_oss": SparseBlock(
        "GptOss",
        gates.gpt_oss,
        gate="router",
        transposed=True,
        interleaved=True,
        biases=True,
        pair=True,
        activation=gates.gpt_oss_activation,
    ),
    # softmax with a bias for the choice
    "ernie4_5_moe": SparseBlock(
        "Ernie4_5_Moe", gates.ernie, bias="gate.moe_statics.e_score_correction_bias", shared="shared_experts"
    ),
    "ernie4_5_vl_moe_text": SparseBlock(
        "Ernie4_5_VLMoe",
        gates.ernie,
        bias="gate.moe_statics.e_score_correction_bias",
        shared="shared_experts",
        parts=("text_moe", "vision_moe"),
    ),
    # sigmoid
    "afmoe": SparseBlock("Afmoe", gates.afmoe, gate="router.gate", bias="expert_bias", shared="shared_experts"),
    "lfm2_moe": SparseBlock("Lfm2Moe", gates.lfm2, bias="expert_bias", activation=gates.swiglu),
    "llama4_text": SparseBlock(
        "Llama4", gates.llama4, gate="router", shared="shared_expert", transposed=True, weigh_input=True
    ),
    "minimax_m2": SparseBlock("MiniMaxM2", gates.minimax_m2, bias="e_score_correction_bias"),
    "minimax_m3_vl_text": SparseBlock(
        "MiniMaxM3VL", gates.minimax_m3, shared="shared_experts", activation=gates.gpt_oss_activation
    ),
    "hy_v3": SparseBlock("HYV3", gates.hunyuan_v3, bias="e_score_correction_bias", shared="shared_experts"),
    "laguna": SparseBlock(
        "Laguna", gates.laguna, shared="shared_experts", beyond=lambda config: config.moe_router_logit_softcapping > 0
    ),
    "flint": SparseBlock("Flint", gates.flint, shared="shared_expert"),
    "cohere2_moe": SparseBlock(
        "Cohere2Moe",
        gates.cohere,
        shared="shared_experts",
        beyond=lambda config: config.num_shared_experts > 0 and config.shared_expert_combination_strategy != "sum",
    ),
    # scores that are none of these, or experts that are drawn or looked up
    "deepseek_v4": SparseBlock(
        "DeepseekV4",
        gates.deepseek_v4,
        shared="shared_experts",
        activation=gates.limited,
        ids=True,
        beside=(("table", "gate.tid2eid"),),
        special=gates.deepseek_v4_hash,
    ),
    "gemma4_text": SparseBlock(
        "Gemma4Text",
        gates.gemma4_choices,
        gate="router.proj",
        apart=True,
        beside=(("scale_in", "router.scale"), ("expert_scale", "router.per_expert_scale")),
        activation=gates.gemma4_activation,
        special=gates.gemma4,
    ),
    "phimoe": SparseBlock("Phimoe", gates.unnormalized, gate="router", special=gates.phimoe),
}
