"""What is read of quantised tensors: every code, cut blocks, parts, and what is wrong with a file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from quantiser import E2M1, E4M3, fp8, grid, mxfp4
from safetensors.torch import save_file
from torch import Tensor

from zoo.pretrained.quantised import dequantised, plain
from zoo.pretrained.tensorfile import Entry, read_header

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4"}
SCALES = [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8]


def entries(folder: Path, settings: dict, **tensors: Tensor) -> dict[str, Entry]:
    save_file(tensors, folder / "model.safetensors")
    header = read_header(folder / "model.safetensors")
    return dequantised(header, {"quantization_config": settings}, folder / "config.json")


def read(entry: Entry, dtype: torch.dtype = torch.float32) -> Tensor:
    target = torch.full(entry.shape, math.pi, dtype=dtype)
    entry.check(target)
    entry.read_into(target)
    return target


def same(a: Tensor, b: Tensor) -> bool:
    """The same numbers and signs of zeros, and NaN where the other has it."""
    a, b = (t.masked_fill(t.isnan(), 1234.5) for t in (a, b))
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_code_of_fp8_is_its_number_times_the_scale(dtype, tmp_path):
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    scale = torch.tensor([[0.37, -1.5]])
    found = entries(
        tmp_path, {**FP8, "weight_block_size": [8, 16]}, w=codes.view(torch.float8_e4m3fn), w_scale_inv=scale
    )
    assert found.keys() == {"w"}
    assert np.isnan(E4M3).sum() == 2
    assert np.nanmax(E4M3) == 448
    expected = torch.from_numpy(E4M3[codes] * grid(scale.double().numpy(), (8, 32), (8, 16)))
    ours = read(found["w"], dtype)
    # Rounded in float32 as the format's authors do, then to the dtype.
    assert same(ours, (expected if dtype == torch.float64 else expected.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_code_of_mxfp4_is_its_number_times_the_power_of_two(dtype, tmp_path):
    blocks = torch.arange(256, dtype=torch.uint8).reshape(16, 16).repeat(16, 1, 1)[None]  # [1, 16, 16, 16]
    scales = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    found = entries(tmp_path, MXFP4, e_blocks=blocks, e_scales=scales)
    assert found.keys() == {"e"}
    expected = torch.empty(1, 512, 16, dtype=torch.float64)
    for row in range(16):
        for group in range(16):
            power = 2.0 ** (row * 16 + group - 127) if row * 16 + group < 255 else math.nan
            for place in range(16):
                byte = int(blocks[0, row, group, place])
                expected[0, group * 32 + 2 * place, row] = E2M1[byte & 15] * power
                expected[0, group * 32 + 2 * place + 1, row] = E2M1[byte >> 4] * power
    ours, expected = read(found["e"], dtype), expected.to(dtype)
    finite = torch.ones(16, 512, dtype=torch.bool)
    finite[15, 480:] = False  # the scale's last code is NaN
    assert same(ours[0].T[finite], expected[0].T[finite])
    assert ours[0].T[~finite].isnan().all()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((128, 128), (128, 128)),
        ((1, 1), (128, 128)),
        ((192, 320), (128, 128)),
        ((576, 70), (128, 128)),
        ((129, 127), (128, 128)),
        ((37, 53), (5, 7)),
        ((3, 50, 44), (16, 32)),
        ((0, 4), (128, 128)),
    ],
)
def test_blocks_may_be_cut(shape, block, scales, tmp_path):
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    codes, scale, meant = fp8(weight, block, scales) if weight.numel() else (weight, torch.ones(0, 1), weight)
    found = entries(
        tmp_path, {**FP8, "weight_block_size": list(block)}, w=codes.to(torch.float8_e4m3fn), w_scale_inv=scale
    )
    assert same(read(found["w"]), meant)
    assert same(read(found["w"], torch.bfloat16), meant.bfloat16())
    if scales == torch.float32 and weight.numel():
        assert ((meant - weight).abs() <= weight.abs() / 15 + weight.abs().max() / 448 / 100).all()


@pytest.mark.parametrize(
    ("form", "block"), [((), None), ((1,), None), ((1, 1), None), ((), [128, 128]), ((1,), [9, 9])]
)
def test_one_scale_may_hold_for_a_matrix(form, block, tmp_path):
    codes, scale, meant = fp8(torch.randn(200, 150), (200, 150))
    settings = {**FP8, "weight_block_size": block}
    activations = {"w_activation_scale": torch.ones(()), "activation_scale": torch.ones(())}
    found = entries(tmp_path, settings, weight=codes, weight_scale_inv=scale.reshape(form), **activations)
    assert found.keys() == {"weight", "w_activation_scale"}
    assert same(read(found["weight"]), meant)


@pytest.mark.parametrize("form", [(4,), (4, 1, 1)])
def test_one_scale_may_hold_for_each_matrix_of_a_stack(form, tmp_path):
    codes, scale, meant = fp8(torch.randn(4, 20, 30) * torch.tensor([1.0, 2, 30, 4]).reshape(4, 1, 1), (20, 30))
    found = entries(tmp_path, {**FP8, "weight_block_size": None}, w=codes, w_scale_inv=scale.reshape(form))
    assert same(read(found["w"]), meant)


def test_blocks_are_of_128_where_the_configuration_does_not_say(tmp_path):
    codes, scale, meant = fp8(torch.randn(300, 140), (128, 128))
    assert same(read(entries(tmp_path, {"quant_method": "fp8"}, w=codes, w_scale_inv=scale)["w"]), meant)


def test_what_is_stored_plainly_stays_as_it_is(tmp_path):
    codes, scale, _ = fp8(torch.randn(4, 4), (128, 128))
    plainly = {"head": torch.randn(3, 4).bfloat16(), "mask": torch.ones(3, dtype=torch.uint8)}
    found = entries(tmp_path, {**FP8, "modules_to_not_convert": ["head"]}, w=codes, w_scale_inv=scale, **plainly)
    assert found.keys() == {"w", "head", "mask"}
    assert all(torch.equal(read(found[key], t.dtype), t) for key, t in plainly.items())


@pytest.mark.parametrize("seed", range(20))
def test_parts_are_those_of_the_whole_and_take_their_own_bytes(seed, tmp_path):
    random = np.random.default_rng(seed)
    block = tuple(int(n) for n in random.integers(1, 9, 2))
    shape = tuple(int(n) for n in random.integers(1, 30, 2))
    stack = (int(random.integers(1, 4)),) if seed % 2 else ()
    codes, scale, meant = fp8(torch.randn(*stack, *shape), block)
    entry = entries(tmp_path, {**FP8, "weight_block_size": list(block)}, w=codes, w_scale_inv=scale)["w"]
    first = int(random.integers(0, len(meant)))
    count = int(random.integers(1, len(meant) - first + 1))
    piece, meant = entry.rows(first, count), meant[first : first + count]
    assert same(read(piece), meant)
    box = [slice(a, int(random.integers(a + 1, n + 1))) for n in meant.shape for a in [int(random.integers(0, n))]]
    target = torch.empty(meant[tuple(box)].shape)
    taken = piece.read_part(target, box)
    assert same(target, meant[tuple(box)])
    rows = box[-2]
    above = 0 if stack else first
    down = (above + rows.stop - 1) // block[0] - (above + rows.start) // block[0] + 1
    each = (rows.stop - rows.start) * shape[1] + 4 * down * -(-shape[1] // block[1])
    assert taken == each * (box[0].stop - box[0].start if stack else 1)


@pytest.mark.parametrize("seed", range(10))
def test_parts_of_mxfp4_are_those_of_the_whole(seed, tmp_path):
    random = np.random.default_rng(seed)
    blocks, scales, meant = mxfp4(torch.randn(int(random.integers(1, 5)), 32 * int(random.integers(1, 4)), 7))
    entry = entries(tmp_path, MXFP4, e_blocks=blocks.contiguous(), e_scales=scales.contiguous())["e"]
    assert same(read(entry), meant)
    first = int(random.integers(0, len(meant)))
    piece, meant = entry.rows(first, len(meant) - first), meant[first:]
    box = [slice(a, int(random.integers(a + 1, n + 1))) for n in meant.shape for a in [int(random.integers(0, n))]]
    target = torch.empty(meant[tuple(box)].shape, dtype=torch.bfloat16)
    taken = piece.read_part(target, box)
    assert same(target, meant[tuple(box)].bfloat16())
    experts, rows = (side.stop - side.start for side in (box[0], box[2]))
    assert taken == experts * rows * 17 * (meant.shape[1] // 32)


def test_targets_of_any_layout_are_filled(tmp_path):
    codes, scale, meant = fp8(torch.randn(30, 20), (8, 8))
    entry = entries(tmp_path, {**FP8, "weight_block_size": [8, 8]}, w=codes, w_scale_inv=scale)["w"]
    stack = torch.zeros(20, 60)
    entry.read_into(stack[:, 30:].T)
    assert torch.equal(stack[:, 30:].T, meant)
    assert not stack[:, :30].any()


BYTES = torch.zeros(2, 4, 3, 16, dtype=torch.uint8)
CODES = torch.zeros(200, 300).to(torch.float8_e4m3fn)
GRID = torch.ones(2, 3)
WRONG = {
    "no scale": (FP8, {"w": CODES}, "w is FP8, but its scales w_scale_inv are missing"),
    "turned": (
        FP8,
        {"w": CODES, "w_scale_inv": GRID.T.contiguous()},
        r"w_scale_inv has shape \[3, 2\], expected \[2, 3\]",
    ),
    "floor": (
        FP8,
        {"w": CODES, "w_scale_inv": GRID[:1]},
        r"w_scale_inv has shape \[1, 3\], expected \[2, 3\]: w has \[200",
    ),
    "blocks": (
        {**FP8, "weight_block_size": None},
        {"w": CODES, "w_scale_inv": GRID},
        r"w_scale_inv has shape \[2, 3\], expected \[1, 1\]",
    ),
    "whole numbers": (FP8, {"w": CODES, "w_scale_inv": GRID.int()}, "w_scale_inv is stored as I32; expected F32, BF16"),
    "vector": (FP8, {"w": CODES[0].clone(), "w_scale_inv": GRID[0]}, r"w is FP8 of shape \[300\]; expected a matrix"),
    "mxfp4 without": (MXFP4, {"e_blocks": BYTES}, "e_blocks is MXFP4, but its scales e_scales are missing"),
    "mxfp4 shape": (
        MXFP4,
        {"e_blocks": BYTES, "e_scales": BYTES[0, ..., 0].clone()},
        r"e_scales has shape \[4, 3\], expected \[2, 4, 3\]: e_blocks has \[2, 4, 3, 16\]",
    ),
    "mxfp4 scale": (
        MXFP4,
        {"e_blocks": BYTES, "e_scales": torch.ones(2, 4, 3)},
        "e_scales is stored as F32; expected U8",
    ),
    "mxfp4 codes": (
        MXFP4,
        {"e_blocks": BYTES[..., :8].clone(), "e_scales": BYTES[..., 0].clone()},
        r"e_blocks is U8 of shape \[2, 4, 3, 8\]; expected U8 of \[experts, rows, columns / 32, 16\]",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_with_file_and_tensor(kind, tmp_path):
    settings, tensors, message = WRONG[kind]
    with pytest.raises(ValueError, match=rf"model.safetensors: tensor .*{message}"):
        entries(tmp_path, settings, **tensors)


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128, 128.0], 128])
def test_a_block_that_is_none_is_refused(block, tmp_path):
    with pytest.raises(ValueError, match=r"config.json: weight_block_size: expected rows and columns"):
        entries(tmp_path, {**FP8, "weight_block_size": block}, w=CODES, w_scale_inv=GRID)


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": m} for m in ("aqlm", "fbgemm_fp8", "hqq", "eetq")] + [{"bits": 4}, "gptq"],
)
@pytest.mark.parametrize("inside", [False, True])
def test_other_methods_are_refused_with_those_that_are_read(settings, inside, tmp_path):
    raw = {"quantization_config": settings}
    with pytest.raises(
        ValueError, match=r"config.json: the checkpoint is quantised .*or fp8, mxfp4, .*bitsandbytes. Take or make"
    ):
        dequantised({}, {"text_config": raw} if inside else raw, tmp_path / "config.json")


def test_a_truncated_file_is_named(tmp_path):
    found = entries(tmp_path, FP8, w=CODES, w_scale_inv=GRID)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated: tensor w"):
        read(found["w"])
    header = b'{"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"tensor w of shape \[2\] and type F8_E4M3 needs 2 bytes"):
        read_header(path)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(None, "bfloat16"), ("float8_e4m3fn", "bfloat16"), ("float16", "float16")]
)
def test_a_configuration_becomes_that_of_ordinary_numbers(dtype, expected):
    from transformers import DeepseekV3Config

    config = plain(DeepseekV3Config(dtype=dtype, quantization_config=dict(FP8)))
    assert config.dtype == getattr(torch, expected)
    assert not hasattr(config, "quantization_config")
    assert "quantization_config" not in config.to_dict()
    assert plain(DeepseekV3Config(dtype=dtype)).dtype == (dtype and getattr(torch, dtype))  # was not quantised
