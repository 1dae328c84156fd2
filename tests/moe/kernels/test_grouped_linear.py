"""grouped_linear against one product an expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from zoo.moe.kernels import grouped_linear, linear


def case(counts: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows = torch.randn(sum(counts), 5, dtype=dtype, requires_grad=True)
    return rows, torch.randn(len(counts), 3, 5, dtype=dtype, requires_grad=True), offsets


@pytest.mark.parametrize("counts", [[4, 0, 7, 1], [0, 0], [1], [3, 3, 3]])
def test_each_row_meets_its_expert(counts: list[int]) -> None:
    rows, weight, offsets = case(counts)
    expert = [e for e, count in enumerate(counts) for _ in range(count)]
    expected = torch.stack([weight[e] @ row for e, row in zip(expert, rows)]) if expert else rows.new_zeros(0, 3)
    found = grouped_linear(rows, weight, offsets)
    torch.testing.assert_close(found, expected)
    if expert:
        direction = torch.randn_like(found)
        for a, b in zip(*(torch.autograd.grad(y, (rows, weight), direction) for y in (found, expected))):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_as_an_operator_it_keeps_the_rules(dtype: torch.dtype, needs: tuple[bool, bool]) -> None:
    rows, weight, offsets = case([2, 0, 3], dtype)
    arguments = rows.detach().requires_grad_(needs[0]), weight.detach().requires_grad_(needs[1]), offsets
    torch.library.opcheck(torch.ops.zoo.grouped_linear, arguments)


def test_it_compiles_in_one_graph_and_a_gradient_may_be_expanded() -> None:
    torch._dynamo.reset()
    rows, weight, offsets = case([2, 0, 3])
    expected = torch.autograd.grad(grouped_linear(rows, weight, offsets).sum(), (rows, weight))
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(rows, weight, offsets).sum(), (rows, weight))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_its_products_are_counted() -> None:
    rows, weight, offsets = case([2, 0, 3])
    with FlopCounterMode(display=False) as counter:
        grouped_linear(rows, weight, offsets).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 3 * 5


def test_autocast_reaches_both_sides() -> None:
    rows, weight, offsets = case([2, 0, 3], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(rows, weight, offsets)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert rows.grad is not None
    assert rows.grad.dtype == weight.grad.dtype == torch.float32  # type: ignore[union-attr]


def test_what_does_not_fit_is_named() -> None:
    rows, weight, offsets = case([2, 0, 3])
    with pytest.raises(ValueError, match="3 offsets do not fit"):
        grouped_linear(rows, weight, offsets[1:])
    with pytest.raises(ValueError, match=r"rows \[5, 4\]"):
        grouped_linear(rows[:, :4], weight, offsets)


def test_torchs_grouped_product_gets_factors_that_begin_where_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.nn.functional.grouped_mm
    starts: list[int] = []

    def seen(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        starts.extend(t.data_ptr() % 16 for t in (a, b))
        return product(a, b, offs=offs)

    def off(*size: int) -> Tensor:  # as a view into a buffer of all parameters may lie
        values = torch.randn(size, dtype=torch.bfloat16)
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(size)

    monkeypatch.setattr(linear, "_on_grouped_gemm", lambda rows, weight: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", seen)
    rows, weight, grad = off(5, 8).requires_grad_(), off(3, 16, 8).requires_grad_(), off(5, 16)
    y = grouped_linear(rows, weight, torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    y.backward(grad)
    assert starts == [0] * 6
    expected = torch.stack([weight[e].double() @ row for e, row in zip((0, 0, 2, 2, 2), rows.double())])
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)
