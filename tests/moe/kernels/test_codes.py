"""Numbers of few bits, against loops over blocks and over all codes."""

import math

import pytest
import torch

from zoo.moe.kernels.codes import FORMATS

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SHAPES = {"float8": [(1, 1), (128, 128), (256, 130), (5, 300)], "mxfp4": [(1, 32), (7, 96)], "int8": [(1, 1), (9, 33)]}
CASES = [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]


def kept(name, values, dtype=torch.float32):
    codes, scales = FORMATS[name].encode(values)
    for tensor, (size, kind) in zip((codes, scales), FORMATS[name].sizes(*values.shape[-2:])):
        assert tensor.dtype == kind
        assert tensor.shape == (*values.shape[:-2], *size)
    return FORMATS[name].decode(codes, scales, dtype)


def nearest(value, numbers):
    """Of the numbers in rising order, the one next to value; at a tie that with the even place."""
    distances = [abs(value - n) for n in numbers]
    best = [i for i, d in enumerate(distances) if d == min(distances)]
    return numbers[next((i for i in best if i % 2 == 0), best[0])]


def one_by_one(name, values):
    """What a format makes of a matrix [R, C], one number after another in Python's float64."""
    found = torch.empty_like(values)
    rows, columns = values.shape
    height, width = {"float8": (128, 128), "mxfp4": (1, 32), "int8": (1, columns)}[name]
    for r in range(0, rows, height):
        for c in range(0, columns, width):
            block = values[r : r + height, c : c + width]
            largest = float(block.abs().max())
            if name == "float8":
                scale = torch.tensor(largest / 448, dtype=torch.float32) if largest else torch.tensor(1.0)
                new = (block / scale).to(torch.float8_e4m3fn).float() * scale
            elif name == "int8":
                scale = torch.tensor(largest / 127, dtype=torch.float32) if largest else torch.tensor(1.0)
                new = torch.tensor([[float(round(float(v / scale))) for v in row] for row in block]) * scale
            else:
                scale = 2.0 ** (math.floor(math.log2(largest)) - 2) if largest else 1.0
                signed = [
                    [math.copysign(nearest(abs(float(v)) / scale, E2M1), v) * scale for v in row] for row in block
                ]
                new = torch.tensor(signed)
            found[r : r + height, c : c + width] = new
    return found


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_each_number_becomes_the_nearest_that_its_block_has(name, shape):
    values = torch.randn(3, *shape) * 10.0 ** torch.randint(-6, 6, (3, 1, 1)).float()
    values[1, 0] = 0
    found, expected = kept(name, values), torch.stack([one_by_one(name, matrix) for matrix in values])
    # A float32 quotient may fall on the other side of a tie than the exact one.
    assert ((found - expected).abs() > 1e-6 * expected.abs()).float().mean() < 2e-3
    assert torch.equal(kept(name, values, torch.bfloat16), found.bfloat16())
    assert torch.equal(kept(name, values, torch.float64).float(), found)


@pytest.mark.parametrize("name", FORMATS)
def test_errors_stay_below_half_a_step(name):
    values = torch.randn(4, 128, 256)
    error = (kept(name, values) - values).abs()
    if name == "float8":  # half of 2^-3 of a number, or half of the smallest step, 2^-9 of a scale
        largest = values.abs().amax((1, 2), keepdim=True)
        assert (error <= (values.abs() / 16).maximum(largest / 448 / 2**10) * 1.001).all()
    elif name == "int8":
        assert (error <= values.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    else:  # the largest, below 8, may be cut to 6; others round by half of a step of their size
        largest = values.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        assert (error.unflatten(-1, (-1, 32)) <= largest / 4).all()
        assert error.mean() < 0.15 * values.abs().mean()


def test_ties_of_mxfp4_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    row = torch.cat([ties, -ties, torch.zeros(16)])[None]
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    assert torch.equal(kept("mxfp4", row)[0, :16], torch.cat([even, -even]))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_in_a_format_stays_as_it_is(name):
    values = kept(name, torch.randn(2, 64, 160))
    again = kept(name, values)
    torch.testing.assert_close(again, values, rtol=3e-7, atol=0)
    if name == "mxfp4":
        assert torch.equal(again, values)


@pytest.mark.parametrize("exponent", [-140, -126, -20, 20, 126])
def test_mxfp4_of_very_small_and_very_large_numbers(exponent):
    row = torch.ldexp(torch.randn(1, 32).clamp(-1.9, 1.9), torch.tensor(exponent))
    assert torch.isfinite(kept("mxfp4", row)).all()
    if exponent > -126:
        torch.testing.assert_close(kept("mxfp4", row), one_by_one("mxfp4", row), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_what_no_format_has_is_refused(name):
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            FORMATS[name].encode(torch.full((1, 32), wrong))
    with pytest.raises(ValueError, match="rows of 33 numbers do not divide into groups of 32"):
        FORMATS["mxfp4"].sizes(4, 33)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("size", [(130, 7), (1, 1), (5, 33), (300, 640), (7, 32), (129, 4096)])
def test_products_of_any_size_are_those_of_the_numbers(name, rows, size):
    if name == "mxfp4" and size[1] % 32:
        pytest.skip("mxfp4 has no such rows")
    codes, scales = FORMATS[name].encode(torch.randn(size))
    numbers = FORMATS[name].decode(codes, scales, torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        x = torch.randn(rows, size[1]).to(dtype)
        found, expected = x.new_full((rows, 3, size[0]), math.nan)[:, 1], x.double() @ numbers.T
        FORMATS[name].linear(x, codes, scales, found)
        # Errors are those of sums of products, none of which is larger than this.
        bound = x.double().abs() @ numbers.T.abs()
        assert ((found.double() - expected).abs() <= tolerance * bound).all()


def test_numbers_without_an_exponent_stay_where_a_process_flushes_them():
    values = torch.tensor([0.5, -0.5, 6.0, 0.0] * 8)[None]
    codes, scales = FORMATS["mxfp4"].encode(values)
    try:
        torch.set_flush_denormal(True)
        found = FORMATS["mxfp4"].decode(codes, scales, torch.float32)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, values)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_every_code_with_every_scale_is_its_number_where_torch_decodes_whole_matrices(kind):
    """As on a GPU, to which nothing is sent for that."""
    numbers = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers += [-number for number in numbers]
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(255, -1, -1)
    scales = torch.arange(255, dtype=torch.uint8)[:, None, None].expand(-1, 16, 1).contiguous()
    found = FORMATS["mxfp4"].numbers(codes.contiguous(), scales, kind).double()
    expected = torch.tensor([[[numbers[16 * r + c & 15] for c in range(16)] for r in range(16)]], dtype=torch.float64)
    second = torch.tensor([[[numbers[(16 * r + c) >> 4] for c in range(16)] for r in range(16)]], dtype=torch.float64)
    powers = 2.0 ** torch.arange(-127, 128, dtype=torch.float64)[:, None, None]
    expected = (torch.cat([expected, second], -1) * powers).to(kind).double()
    finite = expected.isfinite()
    assert torch.equal(found[finite], expected[finite])
    assert not found[~finite].isfinite().any()

    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    found = FORMATS["float8"].numbers(codes, torch.tensor([[0.75]]), kind)
    expected = codes.view(torch.float8_e4m3fn).to(kind) * 0.75
    finite = expected.isfinite()
    assert torch.equal(found[finite], expected[finite])
