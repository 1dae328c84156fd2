"""Products on the CPU are right whichever library multiplies, however operands and results lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import assert_as_exact_as_a_loop, error, make_case

from zoo.moe.kernels import products

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_onednn = pytest.mark.skipif(not ONEDNN, reason="this torch has no oneDNN")


@pytest.fixture(params=["mkl", pytest.param("onednn", marks=needs_onednn)])
def library(request, monkeypatch):
    """Float32 products by one library, of any size."""
    monkeypatch.setattr(products, "onednn_float32", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(products, "LARGE_WEIGHT", 1)


@pytest.fixture(params=[False, True], ids=["", "amx"])
def amx(request, monkeypatch):
    monkeypatch.setattr(products, "has_amx", lambda: request.param)


def by_columns(t):
    return t.mT.contiguous().mT


def with_gaps(t):
    return torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]


def columns_with_gaps(t):
    return with_gaps(t.mT).mT


LAYOUTS = [lambda t: t, by_columns, with_gaps, columns_with_gaps]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("layout_out", LAYOUTS[:2])
def test_operands_may_lie_in_any_way(layout_a, layout_b, layout_out, monkeypatch):
    monkeypatch.setattr(products, "RESULT", 200)
    monkeypatch.setattr(products, "LONGEST", 16)
    a, b = torch.randn(3, 33, 50), torch.randn(3, 50, 21)
    out = layout_out(torch.empty(3, 33, 21))
    products.bmm(layout_a(a), layout_b(b), out)
    assert error(out, a.double() @ b.double()) < 1e-6
    products.mm(layout_a(a)[0], layout_b(b)[1], out[2])
    assert error(out[2], a[0].double() @ b[1].double()) < 1e-6


@pytest.mark.usefixtures("library", "amx")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 8, 9, 17, 32, 33, 70])
@pytest.mark.parametrize("length", [40, 1030])
def test_few_and_many_rows_meet_a_weight(rows, length, dtype):
    x, w, b = torch.randn(2, rows, length).to(dtype), torch.randn(2, 24, length).to(dtype), torch.randn(24).to(dtype)
    exact, limit = x.double() @ w.mT.double(), 16 * torch.finfo(dtype).eps
    out = torch.empty(2, rows, 24, dtype=dtype)
    products.linear(x, w, out)
    assert error(out, exact) < limit
    products.linear_of_few(x[1], w[1], b, out[0])
    assert error(out[0], exact[1] + b.double()) < limit


@needs_onednn
@pytest.mark.parametrize(
    ("rows", "length", "columns"), [(64, 512, 256), (1, 5000, 300), (40, 9000, 200), (7, 3000, 90)]
)
def test_the_error_of_onednns_long_sums_does_not_grow(rows, length, columns, monkeypatch):
    monkeypatch.setattr(products, "onednn_float32", lambda: True)
    monkeypatch.setattr(products, "LARGE", 1)
    a, b, out = torch.randn(rows, length), torch.randn(length, columns), torch.empty(rows, columns)
    # A plain running sum of 9000 products is off by about 1.7e-6.
    assert error(products.mm(a, b, out), a.double() @ b.double()) <= 10 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("library", "amx")
@given(
    st.one_of(st.just(0), st.integers(8, 90)),  # the error of a few numbers is luck
    st.integers(8, 40),
    st.integers(8, 40),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_experts_are_as_exact_as_a_loop_by_each(tokens, dim, hidden_dim, experts, dtype, bias):
    case = make_case(tokens, dim, hidden_dim, experts, min(2, experts), bias=bias, dtype=dtype)
    assert_as_exact_as_a_loop(case, "cpu", dtype)


def test_other_processors_and_systems_are_left_to_torch(monkeypatch):
    products.onednn_float32.cache_clear()
    monkeypatch.setattr(products, "_processor", lambda: ("", frozenset()))
    assert not products.onednn_float32()
    products.onednn_float32.cache_clear()
