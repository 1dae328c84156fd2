"""The instructions that decode weights in few bits, one after another as PTX defines them, on every code."""

import re

import pytest
import torch

pytest.importorskip("triton")

from zoo.moe.kernels.triton import decode

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
WORD = 0xFFFFFFFF


def halves(word):
    """The two bfloat16 of a register, the lower first, as float64."""
    bits = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16).double()


def fma(a, b, c):
    exact = halves(a) * halves(b) + halves(c)
    rounded = exact.bfloat16()
    assert torch.equal(rounded.double(), exact) or not exact.isfinite().all()
    low, high = (int(bits) & 0xFFFF for bits in rounded.view(torch.int16))
    return high << 16 | low


def prmt(a, b, selector):
    source = [a >> 8 * i & 0xFF for i in range(4)] + [b >> 8 * i & 0xFF for i in range(4)]
    return sum(source[selector >> 4 * i & 7] << 8 * i for i in range(4))


def lop3(a, b, c, table):
    terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
    return sum(terms) & WORD  # of different terms no bit is set in two


OPERATIONS = {
    "mov.b32": lambda a: a,
    "prmt.b32": prmt,
    "shl.b32": lambda a, n: a << n & WORD,
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma,
}


def run(text, inputs):
    """The registers after a piece of PTX, which are given some by name."""
    registers = dict(inputs)
    body = text.strip().removeprefix("{").removesuffix("}")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        if line.startswith(".reg"):
            continue
        operation, target, *operands = re.split(r"[\s,]+", line)
        registers[target] = OPERATIONS[operation](
            *(registers[name] if name in registers else int(name, 0) for name in operands)
        )
    return registers


def words():
    """Registers of four bytes in which every byte stands at every place."""
    for start in range(256):
        four = [(start + step) % 256 for step in (0, 77, 154, 231)]
        yield four, sum(byte << 8 * i for i, byte in enumerate(four))


def signed(bits):
    return torch.tensor(bits, dtype=torch.uint8)


def test_float8():
    for four, word in words():
        found = run(decode.FLOAT8.value, {"$2": word})
        values = torch.cat([halves(found["$0"]), halves(found["$1"])])
        expected = signed(four).view(torch.float8_e4m3fn).double()
        number = ~expected.isnan()  # E4M3 has one that is none, which no weight has
        assert torch.equal(values[number], expected[number])
        assert torch.equal(values[number].signbit(), expected[number].signbit())


def test_int8():
    for four, word in words():
        found = run(decode.INT8.value, {"$2": word})
        values = torch.cat([halves(found["$0"]), halves(found["$1"])])
        assert torch.equal(values, signed(four).view(torch.int8).double())


@pytest.mark.parametrize("scales", [(127, 127), (30, 160), (100, 131)])
def test_mxfp4(scales):
    # As `power` makes it of a scale: 2^(scale - 127 + 126 - SPARE), whose exponent has a bias of 127.
    factors = [(scale + 126 - decode.SPARE.value) << 7 for scale in scales]
    inputs = {f"${5 + i}": factor << 16 | factor for i, factor in enumerate(factors)}
    numbers = torch.tensor([*E2M1, *(-n for n in E2M1)], dtype=torch.float64)
    powers = torch.tensor([2.0 ** (scale - 127 - decode.SPARE.value) for scale in scales for _ in range(2)]).double()
    for four, word in words():
        found = run(decode.MXFP4.value, {"$4": word, **inputs})
        low, high = (torch.cat([halves(found[name]) for name in pair]) for pair in (("$0", "$1"), ("$2", "$3")))
        assert torch.equal(low, numbers[[byte & 15 for byte in four]] * powers)
        assert torch.equal(high, numbers[[byte >> 4 for byte in four]] * powers)
