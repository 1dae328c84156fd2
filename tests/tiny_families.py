"""A tiny random model of every family in transformers that has its experts interface.

Families are found in transformers' source, by the decorator of their experts class. Configurations are shrunk by the
names of their fields; what a family needs besides is in SPECIAL.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

SMALL = {
    r"vocab_size.*": 64,
    r"hidden_size": 32,
    r".*intermediate_size.*": 24,
    r"num_hidden_layers": 2,
    r"num_attention_heads|num_key_value_heads": 4,
    r"head_dim|.*_head_dim": 8,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k.*": 2,
    r"n_group|topk_group|num_expert_group": 1,
    r"q_lora_rank|kv_lora_rank|o_lora_rank": 16,
    r"first_k_dense_replace": 1,
    r"sliding_window": 8,
}

GEMMA = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
SPECIAL: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["sparse", "sparse"]},
    "flint": {"mlp_only_layers": []},
    "deepseek_ocr2": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
    },
    "diffusion_gemma": GEMMA,
    "gemma4": {
        **GEMMA,
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 0, 1],
            "partial_rotary_factor": 0.5,
        }
    },
    "glm5_next": {"mlp_layer_types": ["dense", "sparse"]},
    "granitemoehybrid": {
        "layer_types": ["attention", "attention"],
        "mamba_n_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "hy_v4_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 24},
}


def experts_classes() -> Iterator[tuple[str, ModuleType, str]]:
    """Family, modelling module and name of every experts class that has the interface."""
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" not in source:
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and any(
                "use_experts_implementation" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                yield path.parent.name, module, node.name


def tiny_model(family: str, module: ModuleType, experts: str) -> PreTrainedModel:
    """A model with experts of that class, a few million parameters at most; a causal language model where there is one.

    Expert weights and biases are drawn anew, so that every term counts. Raises LookupError when no model class fits.
    """
    failures = []
    for model_class in _text_models(module):
        try:
            config = _shrunk(model_class.config_class, SPECIAL.get(family, {}))
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class._from_config(config).parameters())
            if size > 5e6:
                raise ValueError(f"{size} parameters")
            model = model_class._from_config(config, attn_implementation="eager")
            found = [m for m in model.modules() if type(m).__name__ == experts]
            if not found:
                raise ValueError(f"no {experts} in it")
        except Exception as error:  # every way in which some configuration cannot be shrunk
            failures.append(f"{model_class.__name__}: {error}")
            continue
        for parameter in (p for m in found for p in m.parameters(recurse=False)):
            torch.nn.init.normal_(parameter, std=0.3)
        return model
    raise LookupError(f"{family}: no tiny model with {experts}: {failures}")


def _text_models(module: ModuleType) -> list[type[PreTrainedModel]]:
    kinds = ("ForCausalLM", "TextModel", "Model")
    found = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, PreTrainedModel)
        and c.__module__ == module.__name__
        and inspect.isclass(c.config_class)
        and not c.config_class.sub_configs
        and c.__name__.endswith(kinds)
        and not c.__name__.endswith("PreTrainedModel")
    ]
    return sorted(found, key=lambda c: next(i for i, kind in enumerate(kinds) if c.__name__.endswith(kind)))


def _shrunk(config_class: Any, special: dict[str, Any]) -> Any:
    small: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    for name, value in config_class().to_dict().items():
        sizes = [size for pattern, size in SMALL.items() if re.fullmatch(pattern, name)]
        if sizes and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            small[name] = min(value, *sizes)
    return config_class(**{**small, **special})
