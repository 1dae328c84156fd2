"""Compile every kernel with every tile of the table for sm_80 and sm_90, some for sm_100 and sm_120, without a GPU.

The host code runs on meta tensors, and launches are turned into compilations for an imagined GPU: what is
compiled is exactly what would be launched.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from zoo.bench.gpu.ahead import imagined
from zoo.moe.kernels import get_activation
from zoo.moe.kernels import triton as kernels
from zoo.moe.kernels.codes import FORMATS
from zoo.moe.kernels.triton import choose, plans, tiles
from zoo.moe.kernels.triton.weights import Coded

# The "80" tiles must fit the smallest Ampere and Ada chips, not only the A100 (163 KB).
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# The part of the table that each architecture uses, and the instruction of large products.
TABLE = {80: "80", 90: "90", 100: "90", 120: "80"}
PRODUCT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
EXPERTS = 4
ROWS = {"few": 4, "some": 64, "many": 512, "odd": 512}
WIDTHS = {"few": (1024, 2048), "some": (1024, 2048), "many": (1024, 2048), "odd": (1001, 2003)}


@dataclass
class Compiled:
    """One launch: the kernel's name, its options and what came of compiling it."""

    name: str
    options: dict[str, int]
    ptx: str
    cubin: bytes
    shared: int


Launches = Callable[..., list[Compiled]]


@pytest.fixture
def imagine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Compiled]]]:
    """Make launches compilations for an architecture, which gather in the list that is given."""
    seen: list[Compiled] = []

    def keep(function: JITFunction, options: dict[str, int], kernel: CompiledKernel) -> None:
        asm, shared = kernel.asm, kernel.metadata.shared
        seen.append(Compiled(function.__name__, options, asm["ptx"], asm["cubin"], shared))

    with ExitStack() as stack:

        def start(arch: int) -> list[Compiled]:
            stack.close()
            seen.clear()
            stack.enter_context(imagined(arch, keep))
            monkeypatch.setattr(tiles, "architecture", lambda device: TABLE[arch])
            return seen

        yield start


@pytest.fixture
def launches(imagine: Callable[[int], list[Compiled]]) -> Launches:
    """Compile all kernels of one forward and backward."""

    def compile_all(
        arch: int, dtype: torch.dtype, rows: str, activation: str = "swiglu", bias: bool = False, turned: bool = False
    ) -> list[Compiled]:
        seen = imagine(arch)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        (D, F), E, T = WIDTHS[rows], EXPERTS, ROWS[rows] * EXPERTS
        H = 2 * F if get_activation(activation).gated else F
        w_in, w_out = (empty(E, D, H).mT, empty(E, F, D).mT) if turned else (empty(E, H, D), empty(E, D, F))
        shared = (empty(T, D), w_in, w_out, empty(E, H) if bias else None, empty(E, D) if bias else None)
        routed = (empty(T, dtype=torch.int64), empty(E + 1, dtype=torch.int32), activation)
        weight = empty(T, dtype=torch.float32)
        _, pre = kernels.forward(*shared, weight, *routed, True)
        kernels.backward(empty(T, D), *shared, weight, pre, *routed, [True] * 3 + [bias] * 2 + [True])
        return seen

    return compile_all


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a thread; spilled registers live on the stack."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found.keys() == {"REG", "STACK", "LOCAL"}, usage
    return found


def check(seen: list[Compiled], arch: int, dtype: torch.dtype, folder: Path) -> None:
    products = [k for k in seen if "BLOCK_K" in k.options]
    assert len(products) == 6, "up, down, d_hidden, d_w_out, d_w_in, d_x"
    for k in seen:
        use = resources(k.cubin, folder)
        assert use["STACK"] == use["LOCAL"] == 0, f"{k.name} {k.options} spills: {use}"
        assert k.shared <= SHARED_MEMORY[arch], f"{k.name} {k.options} takes {k.shared} bytes of shared memory"
    for k in products:
        if dtype == torch.float32:
            assert "fma.rn.f32" in k.ptx, k.name
        elif k.options["BLOCK_M"] >= 64:
            assert PRODUCT[arch] in k.ptx, k.name
        else:
            assert "mma.sync" in k.ptx, k.name


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_the_table_is_that_of_the_compute_capability(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.architecture(torch.device("cuda")) == TABLE[10 * capability[0]]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_tile_of_the_table_fits(
    launches: Launches, arch: int, dtype: torch.dtype, rows: str, tmp_path: Path
) -> None:
    # The clamped activation with biases needs the most registers.
    seen = launches(arch, dtype, rows, "swiglu_clamped", bias=True)
    check(seen, arch, dtype, tmp_path)
    plan = plans.PLANS[str(arch), dtype.itemsize, rows]
    used = {(k.options["BLOCK_M"], k.options["BLOCK_N"], k.options["BLOCK_K"]) for k in seen if "BLOCK_K" in k.options}
    assert used == {(t.m, t.n, t.k) for t in (plan.up, plan.down, plan.d_hidden, plan.d_x, plan.d_weight)}


@pytest.mark.parametrize(
    ("arch", "activation"),
    [(arch, name) for arch in (80, 90) for name in ("swiglu", "geglu", "gelu_tanh", "relu2")]
    + [(100, "swiglu"), (120, "swiglu")],
)
def test_activations_fit_the_largest_tiles(launches: Launches, arch: int, activation: str, tmp_path: Path) -> None:
    check(launches(arch, torch.bfloat16, "many", activation), arch, torch.bfloat16, tmp_path)


@pytest.mark.parametrize("arch", [80, 90])
def test_weights_stored_the_other_way_round_fit(launches: Launches, arch: int, tmp_path: Path) -> None:
    check(launches(arch, torch.float16, "many", turned=True), arch, torch.float16, tmp_path)


@pytest.mark.parametrize("rows", ["few", "some", "many"])
@pytest.mark.parametrize("arch", [80, 90])
def test_gathered_rows_are_copied_asynchronously_sixteen_bytes_at_a_time(
    launches: Launches, arch: int, rows: str
) -> None:
    for k in launches(arch, torch.bfloat16, rows):
        if "BLOCK_K" in k.options:
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x(\w+)", k.ptx)
            # The weights' gradients also copy token indices ahead of the rows.
            assert set(copies) - ({"4", "8"} if k.name == "d_weight_kernel" else set()) == {"10"}, k.name


@pytest.mark.parametrize(("rows", "turned"), [("few", False), ("some", True), ("many", False)])
def test_blocks_through_descriptors_come_by_the_copy_engine(
    launches: Launches, rows: str, turned: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = vars(plans.PLANS["90", 2, rows])
    described = plans.Plan(**{name: replace(tile, described=True) for name, tile in plan.items()})
    monkeypatch.setitem(plans.PLANS, ("90", 2, rows), described)
    seen = launches(90, torch.bfloat16, rows, turned=turned)
    check(seen, 90, torch.bfloat16, tmp_path)
    for k in seen:
        if "BLOCK_K" in k.options:
            gathers = k.name != "grouped_gemm_kernel"
            assert ("cp.async.bulk.tensor.3d" in k.ptx) == (k.name != "d_weight_kernel"), k.name
            assert ("cp.async.ca" in k.ptx or "cp.async.cg" in k.ptx) == gathers, k.name


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def coded(format: str, rows: int, columns: int, parts: int = 1) -> Coded:
    sizes = FORMATS[format].sizes(rows, columns)
    codes, scales = (meta(EXPERTS, parts * size[0], size[1], dtype=dtype) for size, dtype in sizes)
    return Coded(codes, scales, format, parts)


@pytest.mark.parametrize(("format", "rows"), [*((name, "few") for name in FORMATS), ("mxfp4", "some")])
def test_codes_are_copied_as_they_are_and_decoded_two_at_a_time(
    imagine: Callable[[int], list[Compiled]], format: str, rows: str, tmp_path: Path
) -> None:
    (D, F), T, seen = WIDTHS[rows], ROWS[rows] * EXPERTS, imagine(90)
    weight, index = meta(T, dtype=torch.float32), meta(T, dtype=torch.int64)
    routed = (index, meta(EXPERTS + 1, dtype=torch.int32), "swiglu_clamped")
    shared = (meta(T, D), coded(format, F, D, 2), coded(format, D, F), meta(EXPERTS, 2 * F), meta(EXPERTS, D), weight)
    _, pre = kernels.forward(*shared, *routed, True)
    if rows == "some":
        kernels.backward(meta(T, D), *shared, pre, *routed, [True, *[False] * 4, True])
    products = [k for k in seen if "BLOCK_K" in k.options]
    assert len(products) == (4 if rows == "some" else 2)
    for k in products:
        use = resources(k.cubin, tmp_path)
        assert use["STACK"] == use["LOCAL"] == 0, f"{k.name} {k.options} spills: {use}"
        assert k.shared <= SHARED_MEMORY[90]
        assert "fma.rn.bf16x2" in k.ptx, k.name
        assert ("wgmma.mma_async" if rows == "some" else "mma.sync") in k.ptx, k.name
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], 0x(\w+)", k.ptx)
        assert set(copies) <= {"8", "10"}, k.name


@pytest.mark.parametrize("few_bits", [False, True], ids=["whole", "codes"])
def test_a_hidden_width_of_one_compiles(imagine: Callable[[int], list[Compiled]], few_bits: bool) -> None:
    seen, T = imagine(90), 4
    weights = (
        (coded("int8", 1, 33, 2), coded("int8", 33, 1)) if few_bits else (meta(EXPERTS, 2, 33), meta(EXPERTS, 33, 1))
    )
    routed = (meta(T, dtype=torch.int64), meta(EXPERTS + 1, dtype=torch.int32), "swiglu")
    kernels.forward(meta(T, 33), *weights, None, None, meta(T, dtype=torch.float32), *routed, False)
    assert len([k for k in seen if "BLOCK_K" in k.options]) == 2


@pytest.mark.parametrize("key", plans.CODED, ids=str)
def test_a_block_of_codes_has_one_scale_of_float8(key: tuple[str, int, str]) -> None:
    plan = plans.CODED[key]
    assert plan.up.m == plan.down.m
    assert plan.d_hidden.m == plan.d_x.m
    assert all(128 % tile.n == 128 % tile.k == 0 for name, tile in vars(plan).items() if name != "d_weight")


@pytest.mark.parametrize(
    ("arch", "tokens", "experts", "k"),
    [(80, 40960, 128, 8), (80, 4096, 1024, 2), (90, 1, 64, 8), (90, 32768, 256, 16), (90, 16384, 8, 2)],
)
def test_choosing_and_sorting_fit(
    imagine: Callable[[int], list[Compiled]], arch: int, tokens: int, experts: int, k: int, tmp_path: Path
) -> None:
    seen = imagine(arch)
    expert = choose.top_k(torch.empty(tokens, experts, device="meta"), k)
    choose.sort_choices(expert, torch.empty(tokens, k, device="meta"), experts)
    several = ["count_kernel", "scan_kernel"] if tokens > 1 else []
    assert [compiled.name for compiled in seen] == ["top_k_kernel", *several, "place_kernel"]
    for compiled in seen:
        use = resources(compiled.cubin, tmp_path)
        assert use["STACK"] == use["LOCAL"] == 0, f"{compiled.name} spills: {use}"
        assert compiled.shared <= 48 * 1024


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_float32_products_use_the_matrix_units_when_torch_allows_it(launches: Launches) -> None:
    for k in launches(90, torch.float32, "many"):
        if "BLOCK_K" in k.options:
            assert re.search(r"wgmma\.mma_async.*tf32", k.ptx), k.name
