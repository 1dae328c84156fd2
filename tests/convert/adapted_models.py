"""Tiny dense models that are adapted in tests, and what their gates need to hear."""

from __future__ import annotations

from typing import Any

import timm
import torch
import transformers
from torch import Tensor, nn

from zoo.convert.adapter_kinds import KINDS

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "pad_token_id": 0}
LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, **HEADS}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, **HEADS, "head_dim": 8}),
    "phi3 (fused)": ("Phi3Config", "Phi3ForCausalLM", {**SIZES, **HEADS}),
    "gpt2 (transposed, fused)": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "opt (MLP in the layer)": ("OPTConfig", "OPTForCausalLM", {**OPT, "word_embed_proj_dim": 32}),
    "t5 (two stacks)": ("T5Config", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
}
# Kinds that change nothing at first; what comes before tokens, or is composed of trained LoRAs, has tests of its own.
OWN = [kind for kind, row in KINDS.items() if row.level not in ("prompts", "unipelt") and not row.frozen]
# What gates need that are told something: their sizes, and what two sequences are.
GATES: dict[str, Any] = {"MOELoRA": {"num_tasks": 3}, "MoCLE": {"num_clusters": 3}, "MoR1E": None}
LABELS = {"task": torch.tensor([0, 2]), "cluster": torch.tensor([1, 2]), "intuition": torch.rand(2, 32)}


def language(name: str = "llama", **fields: Any) -> Any:
    config, model, sizes = LANGUAGE[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **fields}))
    with torch.no_grad():  # large enough that experts matter
        for parameter in made.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return made.eval()


def vision(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    return timm.create_model(name, **{**sizes, **options}).eval()


def batch() -> tuple[Tensor, Tensor]:
    """Tokens [2, 7] and which of them are real."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return torch.randint(3, 64, (2, 7)), mask


def stir(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Draw anew what is trained, so that adapters do something."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, std)
    return model
