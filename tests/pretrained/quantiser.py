"""Quantises checkpoints as DeepSeek-V3 and gpt-oss are published, from the formats' definitions, in numpy.

Beside each quantised tensor stands what it means: its codes looked up in a table of the definition, times the scale.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = r".*(lm_head|embed_tokens|mlp\.gate\.|block_sparse_moe\.gate\.|norm|bias|visual|vision|router|sinks).*"


def e4m3(code: int) -> float:
    """Sign, four bits of exponent (bias 7), three of mantissa; no infinity, all ones are NaN (OCP 8-bit FP, E4M3)."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    """Sign, two bits of exponent (bias 1), one of mantissa (OCP Microscaling, FP4)."""
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


E4M3 = np.array([e4m3(code) for code in range(256)])
E2M1 = np.array([e2m1(code) for code in range(16)])


def nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Codes of the table's nearest numbers."""
    order = np.argsort(table, kind="stable")
    order = order[~np.isnan(table[order])]
    middles = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(middles, values)].astype(np.uint8)


def grid(scale: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """The scale of each element."""
    rows, columns = np.arange(shape[-2]) // block[0], np.arange(shape[-1]) // block[1]
    return scale[..., rows[:, None], columns[None, :]]


def fp8(weight: Tensor, block: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of this dtype (float8_e8m0fnu: powers of two; uint8: their bytes), and the numbers in float32."""
    values = weight.double().numpy()
    down, across = -(-values.shape[-2] // block[0]), -(-values.shape[-1] // block[1])
    largest = np.zeros((*values.shape[:-2], down, across))
    for i in range(down):
        for j in range(across):
            part = values[..., i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            largest[..., i, j] = np.abs(part).max((-2, -1))
    scale = np.maximum(largest / 448, 2.0**-100)
    if dtype in (torch.float8_e8m0fnu, torch.uint8):
        exponents = np.ceil(np.log2(scale))
        scale = 2.0**exponents
        stored = torch.from_numpy((exponents + 127).astype(np.uint8)).view(dtype)
    else:
        stored = torch.from_numpy(scale).to(dtype)
        scale = stored.double().numpy()
    codes = nearest(values / grid(scale, values.shape, block), E4M3)
    meant = E4M3[codes].astype(np.float32) * grid(scale, values.shape, block).astype(np.float32)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), stored, torch.from_numpy(meant)


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks and scales of a stack [E, C, R], as gpt-oss has them, and the numbers in float32."""
    values = weight.double().transpose(1, 2).numpy()
    groups = values.reshape(*values.shape[:2], -1, 32)
    exponents = np.ceil(np.log2(np.maximum(np.abs(groups).max(-1), 2.0**-100) / 6))
    scale = 2.0 ** exponents[..., None]
    codes = nearest(groups / scale, E2M1)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    meant = torch.from_numpy((E2M1[codes] * scale).reshape(values.shape)).transpose(1, 2).contiguous().float()
    return torch.from_numpy(blocks), torch.from_numpy((exponents + 127).astype(np.uint8)), meant


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def quantise(
    source: Path,
    folder: Path,
    settings: dict[str, Any],
    code: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]],
    kept: str = KEPT,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """A checkpoint's weights of two or more dimensions quantised, in `folder`, and their numbers in `folder-plain`.

    Codes are in the first of two files and scales in the second, as they are now and then in DeepSeek-V3's shards.
    """
    stored: list[dict[str, Tensor]] = [{}, {}]
    numbers = {}
    for key, tensor in tensors(source).items():
        if tensor.dim() < 2 or re.fullmatch(kept, key):
            numbers[key] = stored[0][key] = tensor.to(dtype) if "correction_bias" not in key else tensor
            continue
        parts, meant = code(key, tensor)
        numbers[key] = meant.to(dtype)
        for name, part in parts.items():
            stored["scale" in name.rpartition("proj")[2]][name] = part.contiguous()
    plain = folder.with_name(f"{folder.name}-plain")
    config = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    for target, more in ((folder, {"quantization_config": settings}), (plain, {})):
        target.mkdir(parents=True)
        (target / "config.json").write_text(json.dumps(config | more))
        if (source / "generation_config.json").is_file():
            (target / "generation_config.json").write_text((source / "generation_config.json").read_text())
    save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    index = {}
    for n, held in enumerate(stored, start=1):
        name = f"model-{n:05d}-of-00002.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def quantise_fp8(
    source: Path, folder: Path, block: tuple[int, int] = (128, 128), scales: torch.dtype = torch.float32
) -> None:
    """As DeepSeek-V3 is published."""

    def code(key: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, meant = fp8(tensor, block, scales)
        return {key: codes, f"{key}_scale_inv": scale}, meant

    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    quantise(source, folder, {**settings, "modules_to_not_convert": ["lm_head"]}, code)


def quantise_mxfp4(source: Path, folder: Path) -> None:
    """As gpt-oss is published: only its experts."""

    def code(key: str, tensor: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks, scales, meant = mxfp4(tensor)
        return {f"{key}_blocks": blocks, f"{key}_scales": scales}, meant

    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    quantise(source, folder, settings, code, kept=r"(?!.*experts\.(gate_up|down)_proj$).*")
