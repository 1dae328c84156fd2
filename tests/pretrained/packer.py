"""Quantises matrices as compressed-tensors, ModelOpt, GPTQ, AWQ and bitsandbytes store them, by definition, in numpy.

Codes and scales are drawn, not found: what matters is which numbers they mean. Each function gives the tensors of a
matrix [O, I] by the ends of their names, and its numbers in float64; bitsandbytes' in float32, as that defines them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from quantiser import E2M1, E4M3
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [R, C] as int32 [R, C / n]: place p of a word, from the lowest bits on, has the code order[p] of its n."""
    each = 32 // bits
    found = np.zeros((codes.shape[0], codes.shape[1] // each), np.uint64)
    for place, taken in enumerate(order or range(each)):
        found |= codes[:, taken::each].astype(np.uint64) << np.uint64(bits * place)
    return torch.from_numpy(found.astype(np.uint32).view(np.int32))


def scales(shape: tuple[int, ...], dtype: torch.dtype, largest: int) -> Tensor:
    """Such that numbers of codes up to a power of two are about 1 at most: larger ones decide by their last bits."""
    return ((torch.rand(shape) + 1 / 8) / largest).to(dtype)


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def spread(scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A scale, or a zero, for each number."""
    down, across = rows // scale.shape[0], columns // scale.shape[1]
    return scale.repeat(down, 0).repeat(across, 1)


def ints(weight: Tensor, bits: int, packed: bool, group: int, zeros: bool, ordered: bool = True) -> Packed:
    """compressed-tensors' integers; group is 0 for a scale a matrix, -1 for one a row."""
    rows, columns = weight.shape
    half, size = 1 << bits - 1, (columns if group < 1 else group)
    codes = np.random.randint(-half, half, (rows, columns))
    scale = scales((1,) if group == 0 else (rows, columns // size), torch.bfloat16, half)
    grid = numbers(scale).reshape(1, 1) if group == 0 else numbers(scale)
    found = {"weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    zero = np.random.randint(-half, half, grid.shape) if zeros else np.zeros(grid.shape, int)
    if packed:
        found["weight_packed"] = words(codes + half, bits)
        if zeros:
            found["weight_zero_point"] = words((zero + half).T, bits).T
    else:
        found["weight"] = torch.from_numpy(codes.astype(np.int8))
        if zeros:
            found["weight_zero_point"] = torch.from_numpy(zero.astype(np.int8))
    place = np.arange(columns) // size
    if not ordered:
        place = np.random.permutation(place)
        found["weight_g_idx"] = torch.from_numpy(place.astype(np.int32))
    height = np.arange(rows) if grid.shape[0] > 1 else np.zeros(rows, int)
    index = np.ix_(height, place) if grid.shape[1] > 1 else (height[:, None], np.zeros((1, 1), int))
    return found, torch.from_numpy((codes - zero[index]) * grid[index])


def float8(
    weight: Tensor,
    scale: tuple[int, ...],
    dtype: torch.dtype = torch.bfloat16,
    block: tuple[int, int] | None = None,
) -> Packed:
    rows, columns = weight.shape
    codes = np.random.randint(0, 256, weight.shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0
    drawn = scales(scale, dtype, 512)
    grid = numbers(drawn).reshape((1, 1) if drawn.numel() == 1 else (drawn.shape[0], -1))
    found = {"weight": torch.from_numpy(codes).view(torch.float8_e4m3fn), "weight_scale": drawn}
    each = spread(grid, rows, columns) if block is None else grid.repeat(block[0], 0).repeat(block[1], 1)
    return found, torch.from_numpy(E4M3[codes] * each[:rows, :columns])


def float4(weight: Tensor, group: int, over: str, name: str = "weight_packed") -> Packed:
    """NVFP4, whose scales are over compressed-tensors' one number, or times ModelOpt's; with no such number MXFP4."""
    rows, columns = weight.shape
    codes = np.random.randint(0, 16, weight.shape)
    blocks = torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8))
    if not over:
        exponents = np.random.randint(115, 125, (rows, columns // group)).astype(np.uint8)
        found = {name: blocks, "weight_scale": torch.from_numpy(exponents)}
        grid = 2.0 ** (exponents.astype(float) - 127)
    else:
        of_scale, whole = np.random.randint(1, 57, (rows, columns // group)).astype(np.uint8), torch.rand(1) + 0.5
        found = {name: blocks, "weight_scale": torch.from_numpy(of_scale).view(torch.float8_e4m3fn), over: whole}
        grid = E4M3[of_scale] / numbers(whole) if over == "weight_global_scale" else E4M3[of_scale] * numbers(whole)
    return found, torch.from_numpy(E2M1[codes] * spread(grid, rows, columns))


def gptq(weight: Tensor, bits: int, group: int, one: int, ordered: bool) -> Packed:
    outputs, inputs = weight.shape
    size = inputs if group < 0 else group
    codes = np.random.randint(0, 1 << bits, (inputs, outputs))
    zero = np.random.randint(one, 1 << bits, (inputs // size, outputs))
    scale = scales((inputs // size, outputs), torch.float16, 1 << bits - 1)
    place = np.arange(inputs) // size
    found = {"qweight": words(codes.T, bits).T, "qzeros": words(zero - one, bits), "scales": scale}
    if not ordered:
        place = np.random.permutation(place)
    found["g_idx"] = torch.from_numpy(place.astype(np.int32))
    return found, torch.from_numpy(((codes - zero[place]) * numbers(scale)[place]).T)


def awq(weight: Tensor, group: int) -> Packed:
    outputs, inputs = weight.shape
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zero = (np.random.randint(0, 16, (n, outputs)) for n in (inputs, inputs // group))
    scale = scales((inputs // group, outputs), torch.float16, 8)
    place = np.arange(inputs) // group
    found = {"qweight": words(codes, 4, order), "qzeros": words(zero, 4, order), "scales": scale}
    return found, torch.from_numpy(((codes - zero[place]) * numbers(scale)[place]).T)


# QLoRA, appendix E; and what bitsandbytes has for FP4.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [0.0, 0.0052083335, 0.6666667, 1.0, 0.33333334, 0.5, 0.16666667, 0.25]
FP4 += [-x for x in FP4]


def blockwise(weight: Tensor, kind: str, block: int, nested: int) -> Packed:
    """bitsandbytes' codes of 4 bits, the high half of a byte first, of the whole matrix in blocks."""
    table, count = np.array(NF4 if kind == "nf4" else FP4, np.float32), weight.numel()
    codes = np.random.randint(0, 16, count)
    even = np.append(codes, 0)[: count + count % 2]
    said = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    found = {"weight": torch.from_numpy((even[0::2] << 4 | even[1::2]).astype(np.uint8)).view(-1, 1)}
    blocks = -(-count // block)
    if nested:
        magnitudes = np.random.randint(0, 256, blocks).astype(np.uint8)
        over, values = (np.random.rand(size).astype(np.float32) / 2 for size in (-(-blocks // nested), 256))
        largest = values[magnitudes] * over.repeat(nested)[:blocks] + np.float32(0.75)
        found |= {"weight.nested_absmax": torch.from_numpy(over), "weight.nested_quant_map": torch.from_numpy(values)}
        said |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.75}
    else:
        magnitudes = largest = np.random.rand(blocks).astype(np.float32)
    found |= {"weight.absmax": torch.from_numpy(magnitudes), "weight.quant_map": torch.from_numpy(table)}
    found[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    return found, torch.from_numpy((table[codes] * largest.repeat(block)[:count]).reshape(weight.shape))


def llm_int8(weight: Tensor) -> Packed:
    codes = np.random.randint(-127, 128, weight.shape).astype(np.int8)
    largest = np.random.rand(len(weight)).astype(np.float32)
    found = {"weight": torch.from_numpy(codes), "SCB": torch.from_numpy(largest)}
    found["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    return found, torch.from_numpy(codes * (largest / np.float32(127))[:, None])


def settings(method: str, **said: Any) -> dict[str, Any]:
    return {"quant_method": method, **said}


def of_weights(format: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return settings("compressed-tensors", format=format, config_groups=groups, ignore=["lm_head"], kv_cache_scheme=None)


BLOCKS, CUT = (
    of_weights("float-quantized", type="float", num_bits=8, strategy="block", block_structure=block)
    for block in ([16, 32], [40, 48])
)
INT4, INT8 = ({"type": "int", "num_bits": bits} for bits in (4, 8))
# What config.json says, and what makes a matrix.
WAYS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Packed]]] = {
    "int4": (of_weights("pack-quantized", **INT4), partial(ints, bits=4, packed=True, group=32, zeros=False)),
    "int4 zeros": (of_weights("pack-quantized", **INT4), partial(ints, bits=4, packed=True, group=16, zeros=True)),
    "int4 rows": (of_weights("pack-quantized", **INT4), partial(ints, bits=4, packed=True, group=-1, zeros=True)),
    "int4 ordered": (
        of_weights("pack-quantized", **INT4),
        partial(ints, bits=4, packed=True, group=16, zeros=True, ordered=False),
    ),
    "int8 packed": (of_weights("pack-quantized", **INT8), partial(ints, bits=8, packed=True, group=32, zeros=True)),
    "int8": (of_weights("int-quantized", **INT8), partial(ints, bits=8, packed=False, group=-1, zeros=False)),
    "int8 zeros": (of_weights("int-quantized", **INT8), partial(ints, bits=8, packed=False, group=-1, zeros=True)),
    "int8 whole": (of_weights("int-quantized", **INT8), partial(ints, bits=8, packed=False, group=0, zeros=False)),
    "float8 rows": (of_weights("float-quantized", type="float", num_bits=8), lambda w: float8(w, (len(w), 1))),
    "float8 whole": (of_weights("naive-quantized", type="float", num_bits=8), lambda w: float8(w, (1,))),
    "float8 blocks": (BLOCKS, lambda w: float8(w, (len(w) // 16, w.shape[1] // 32))),
    "float8 cut": (CUT, lambda w: float8(w, (-(-len(w) // 40), -(-w.shape[1] // 48)), block=(40, 48))),
    "nvfp4": (of_weights("nvfp4-pack-quantized"), partial(float4, group=16, over="weight_global_scale")),
    "mxfp4": (of_weights("mxfp4-pack-quantized"), partial(float4, group=32, over="")),
    "modelopt fp8": (settings("modelopt", quant_algo="FP8"), lambda w: float8(w, (), torch.float32)),
    "modelopt nvfp4": (
        settings("modelopt", quant_algo="NVFP4"),
        partial(float4, group=16, over="weight_scale_2", name="weight"),
    ),
    "gptq": (settings("gptq", bits=4, group_size=32), partial(gptq, bits=4, group=32, one=1, ordered=True)),
    "gptq ordered": (
        settings("gptq", bits=8, group_size=16, desc_act=True),
        partial(gptq, bits=8, group=16, one=1, ordered=False),
    ),
    "gptq v2": (
        settings("gptq", bits=2, group_size=-1, checkpoint_format="gptq_v2"),
        partial(gptq, bits=2, group=-1, one=0, ordered=True),
    ),
    "awq": (settings("awq", bits=4, group_size=32, version="gemm", zero_point=True), partial(awq, group=32)),
    "nf4 twice": (settings("bitsandbytes", load_in_4bit=True), partial(blockwise, kind="nf4", block=64, nested=256)),
    "nf4": (settings("bitsandbytes", load_in_4bit=True), partial(blockwise, kind="nf4", block=128, nested=0)),
    "fp4 off rows": (settings("bitsandbytes", load_in_4bit=True), partial(blockwise, kind="fp4", block=80, nested=16)),
    "llm int8": (settings("bitsandbytes", load_in_8bit=True), llm_int8),
}
