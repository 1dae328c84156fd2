"""Small dense models, and what tests of conversions have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from zoo.moe import MoE

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, **HEADS}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SIZES, **HEADS}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, **HEADS, "head_dim": 8}),
    "phi3 (one matrix)": ("Phi3Config", "Phi3ForCausalLM", {**SIZES, **HEADS}),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {**SIZES, **HEADS}),
    "gpt2 (transposed)": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "opt (inside the layer)": ("OPTConfig", "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "bert (in two modules)": ("BertConfig", "BertForMaskedLM", {**SIZES, "num_attention_heads": 4}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
}
VISION: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 48, "depth": 3, "embed_dim": 48},
    "convnext_tiny": {"dims": (16, 24, 32, 40), "depths": (2, 1, 1, 1)},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 3, "embed_dim": 48},
    "vit_giant_patch14_dinov2": {"img_size": 28, "depth": 3, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 4},
}


def language(name: str, **options: Any) -> Any:
    """A language model of transformers, in eval mode."""
    config, model, sizes = LANGUAGE[name]
    return getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **options})).eval()


def vit(**options: Any) -> Any:
    """A vision transformer of timm for images of 32 pixels, in eval mode."""
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()


@torch.no_grad()
def shaken(model: Any) -> Any:
    """The same with something added to every parameter: a bias that is lost must be missed."""
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def output(model: Any, x: Tensor) -> Tensor:
    """Logits of images, or of token ids."""
    with torch.no_grad():
        return model(x) if x.is_floating_point() else _logits(model, x)


def _logits(model: Any, ids: Tensor) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(ids, **more).logits


def losses_of(ids: Tensor) -> Callable[[nn.Module], Iterator[Tensor]]:
    """A function for `calibrate`: two batches of a language model, and something to call a loss."""
    return lambda model: (_logits(model, batch)[..., :5].square().mean() for batch in (ids, ids.flip(-1)))


def error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def experts_of(model: nn.Module) -> list[MoE]:
    """All mixtures of experts in the model."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def owners(stacked: Tensor, rows: Tensor) -> Tensor:
    """The expert of each of the rows [F, D], whose rows [E, n, D] the stacked ones are; raises unless each is there."""
    same = (stacked.detach()[None] == rows[:, None, None]).all(-1)  # [F, E, n]
    assert same.sum((1, 2)).eq(1).all()
    return same.any(-1).int().argmax(1)
