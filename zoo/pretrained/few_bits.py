"""Writing models with quantised experts as FP8 and MXFP4 checkpoints are published; `quantised` reads them.

FP8 is DeepSeek-V3's (arXiv 2412.19437, section 3.3), for the families of `language.TABLES`; MXFP4 is gpt-oss's. Codes
and scales go into the files as they are, experts' alone: all else is named in `modules_to_not_convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..moe import OffloadedExperts, QuantisedExperts
from ..moe.kernels.codes import BLOCK, GROUP
from .language import RELATIVES, TABLES

OSS = "gpt_oss"
KEPT_BY_OSS = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def check(model: nn.Module) -> None:
    """Raise TypeError, naming the layer, for experts that no published layout has a place for, and offloaded ones."""
    for name, module in model.named_modules():
        if isinstance(module, OffloadedExperts):
            raise TypeError(f"save_pretrained: {name} are offloaded experts; write the model that they are from")
    experts = {name: m for name, m in model.named_modules() if isinstance(m, QuantisedExperts)}
    if not experts:
        return
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    expected = "mxfp4" if model_type == OSS else "float8" if model_type in TABLES.keys() | RELATIVES.keys() else None
    for name, few in experts.items():
        if few.format != expected or (model_type != OSS and few.b_out is not None):
            raise TypeError(
                f"save_pretrained: no published layout has a place for {name}, QuantisedExperts in {few.format} of "
                f"{model_type or type(model).__name__}; expected float8 in {', '.join(TABLES)}, or mxfp4 in {OSS}; "
                "keep its state_dict"
            )


def settings_for(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """quantization_config of a checkpoint with these tensors; empty where none of them are codes."""
    if any(key.endswith("_blocks") for key in tensors):
        return {"quant_method": "mxfp4", "modules_to_not_convert": [*KEPT_BY_OSS]}
    if not any(key.endswith("_scale_inv") for key in tensors):
        return {}
    kept = [
        key.removesuffix(".weight")
        for key, tensor in tensors.items()
        if key.endswith(".weight") and tensor.dim() > 1 and f"{key}_scale_inv" not in tensors
    ]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept,
    }


def numbers(model: nn.Module) -> int:
    """How many parameters a model has, those in few bits too."""
    few = sum(module.numbers for module in model.modules() if isinstance(module, QuantisedExperts))
    return sum(p.numel() for p in model.parameters()) + few


def plain_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state as if its float8 experts were plain ones."""
    return {
        name.removesuffix("_codes"): shape
        for name, shape in shapes.items()
        if f"{name.removesuffix('_scales')}_codes" not in shapes
    }


def of_oss(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """gpt-oss's name and layout of codes or scales [E, R, ...] of its experts: gates and ups take turns."""
    name, _, kind = name.rpartition("_")
    if name == "experts.gate_up_proj":
        tensor = tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return (
        (f"{name}_scales", tensor) if kind == "scales" else (f"{name}_blocks", tensor.unflatten(-1, (-1, GROUP // 2)))
    )
