"""What the Triton kernels must compute. `test_triton.py` runs this file in a process of its own: on the GPU if
there is one, else under Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.moe import Routing
from zoo.moe.kernels import ACTIVATIONS, get_activation, moe_mlp, reference
from zoo.moe.kernels import triton as kernels
from zoo.moe.kernels.triton import plans
from zoo.moe.kernels.triton.backward import d_hidden
from zoo.moe.kernels.triton.combine import combine, token_lists
from zoo.moe.kernels.triton.expert_grads import d_bias, d_weight
from zoo.moe.kernels.triton.forward import up_projection
from zoo.moe.kernels.triton.gemm import grouped_gemm
from zoo.moe.kernels.triton.plans import Tile
from zoo.moe.kernels.triton.schedule import RowTiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "dx", "dw_in", "dw_out", "db_in", "db_out", "dweight")


@dataclass
class Case:
    """Arguments of one call, in the order of the backends' `forward`."""

    x: Tensor
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    weight: Tensor
    token_index: Tensor
    offsets: Tensor
    activation: str
    dy: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        parts = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor) and v.is_floating_point()}
        return replace(self, **parts)


def make(
    T: int,
    D: int,
    F: int,
    E: int,
    K: int = 2,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    expert: Tensor | None = None,
    keep: Tensor | None = None,
) -> Case:
    H = 2 * F if get_activation(activation).gated else F
    if expert is None:
        expert = torch.randint(0, E, (T, K))
    r = Routing.from_choices(expert, torch.rand(expert.shape) + 0.1, E, keep=keep)
    biases = (torch.randn(E, H).to(dtype), torch.randn(E, D).to(dtype)) if bias else (None, None)
    case = Case(
        torch.randn(T, D).to(dtype),
        (torch.randn(E, H, D) / D**0.5).to(dtype),
        (torch.randn(E, D, F) / F**0.5).to(dtype),
        *biases,
        r.weight,
        r.token_index,
        r.offsets,
        activation,
        torch.randn(T, D).to(dtype),
    )
    return replace(case, **{k: v.to(DEVICE) for k, v in vars(case).items() if isinstance(v, Tensor)})


def run(backend: object, c: Case, needs: list[bool] | None = None) -> dict[str, Tensor]:
    """Output and gradients by name."""
    shared = (c.x, c.w_in, c.w_out, c.b_in, c.b_out, c.weight)
    routed = (c.token_index, c.offsets, c.activation)
    y, pre = backend.forward(*shared, *routed, True)  # type: ignore[attr-defined]
    needs = needs or [t is not None for t in shared]
    grads = backend.backward(c.dy, *shared, pre, *routed, needs)  # type: ignore[attr-defined]
    return dict(zip(NAMES, (y, *grads)))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-300))


def check(c: Case) -> None:
    """Every result is within three times the error of a plain loop in its dtype, both measured in float64."""
    exact, loop, ours = run(reference, c.to(torch.float64)), run(reference, c), run(kernels, c)
    for name, want in exact.items():
        assert ours[name].shape == want.shape, name
        assert ours[name].dtype == loop[name].dtype, name
        if not want.any():
            assert not ours[name].any(), name
        else:
            # The errors of a few numbers are luck, those of many are not; few assignments make few different ones.
            luck = 4 * torch.finfo(c.x.dtype).eps / min(want.numel(), 8 * c.token_index.numel()) ** 0.5
            assert distance(ours[name], want) <= 3 * distance(loop[name], want) + luck, name


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_activation_matches(activation: str, dtype: torch.dtype) -> None:
    check(make(12, 19, 35, 2, activation=activation, dtype=dtype, bias=dtype == torch.float32))


@pytest.mark.parametrize("activation", ["swiglu_clamped", "swiglu_clamped:3", "swiglu:2.5"])
def test_clamps_match_beyond_their_limits(activation: str) -> None:
    c = make(20, 16, 32, 2, activation=activation, bias=True)
    check(replace(c, x=c.x * 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_biases_match(dtype: torch.dtype) -> None:
    check(make(17, 33, 20, 3, dtype=dtype, bias=True))


@pytest.mark.parametrize(
    ("T", "D", "F", "E", "K"),
    [(12, 144, 80, 4, 2), (90, 80, 144, 3, 2), (210, 128, 128, 2, 1), (150, 144, 272, 1, 1)],
    ids=["few rows", "some rows", "many rows", "one expert, no tile divides"],
)
def test_every_table_of_tiles_matches(T: int, D: int, F: int, E: int, K: int) -> None:
    check(make(T, D, F, E, K, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("T", "D", "F", "E", "K", "activation"),
    [(12, 144, 80, 4, 2, "swiglu"), (90, 80, 144, 3, 2, "gelu"), (210, 128, 128, 2, 1, "swiglu")],
    ids=["few rows", "some rows", "many rows"],
)
def test_blocks_through_descriptors_are_the_same(
    T: int, D: int, F: int, E: int, K: int, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = make(T, D, F, E, K, activation, torch.bfloat16, bias=True)
    turned = replace(c, w_in=c.w_in.mT.contiguous().mT, w_out=c.w_out.mT.contiguous().mT)
    pointers = run(kernels, c)
    for key, plan in plans.PLANS.items():
        described = {name: replace(tile, described=True) for name, tile in vars(plan).items()}
        monkeypatch.setitem(plans.PLANS, key, plans.Plan(**described))
    for each in (c, turned):
        for name, ours in run(kernels, each).items():
            assert torch.equal(ours, pointers[name]), name


@settings(max_examples=6, deadline=None)
@given(
    st.integers(8, 40),
    st.integers(8, 70),
    st.integers(8, 70),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_random_shapes_match(T: int, D: int, F: int, E: int, K: int, dtype: torch.dtype, bias: bool) -> None:
    check(make(T, D, F, E, K, dtype=dtype, bias=bias))


ROUTINGS: dict[str, Callable[[], Case]] = {
    "one token": lambda: make(1, 24, 16, 5, K=3),
    "empty experts": lambda: make(9, 24, 16, 5, expert=torch.full((9, 1), 3)),
    "all tokens to the last expert": lambda: make(40, 24, 16, 3, expert=torch.full((40, 1), 2)),
    "an expert twice in a token's choice": lambda: make(9, 24, 16, 2, expert=torch.ones(9, 3, dtype=torch.long)),
    "dropped assignments": lambda: make(30, 24, 16, 4, keep=torch.rand(30, 2) < 0.4),
    "every token to every expert": lambda: make(13, 24, 16, 11, expert=torch.arange(11).expand(13, 11)),
}


@pytest.mark.parametrize("name", ROUTINGS)
def test_unusual_routings_match(name: str) -> None:
    check(ROUTINGS[name]())


@pytest.mark.parametrize("T", [0, 7])
def test_without_assignments_everything_is_zero(T: int) -> None:
    c = make(T, 24, 16, 3, bias=True, keep=torch.zeros(T, 2, dtype=torch.bool))
    for name, ours in run(kernels, c).items():
        assert ours.shape == run(reference, c)[name].shape
        assert not ours.any()


def test_strided_and_expanded_tensors_match() -> None:
    c = make(20, 32, 48, 3, dtype=torch.bfloat16)
    strided = replace(
        c,
        x=torch.stack([c.x, c.x * 5], -1)[..., 0],
        w_in=c.w_in.transpose(1, 2).contiguous().transpose(1, 2),
        w_out=torch.cat([c.w_out, c.w_out], 2)[..., 48:],
        weight=torch.full((), 0.5, device=DEVICE).expand(c.weight.shape),
        dy=torch.ones((), device=DEVICE, dtype=torch.bfloat16).expand(c.dy.shape),
    )
    check(strided)
    check(replace(strided, x=c.x[:1].expand(20, 32), w_in=c.w_in[:1].expand(c.w_in.shape)))


def test_a_misaligned_address_changes_nothing() -> None:
    c = make(20, 32, 48, 3, dtype=torch.bfloat16)
    flat = torch.cat([c.x.new_zeros(1), c.x.flatten()])
    check(replace(c, x=flat[1:].view(20, 32)))


def test_only_the_gradients_asked_for_are_computed() -> None:
    c = make(9, 24, 16, 3, bias=True)
    everything = run(kernels, c)
    for i, name in enumerate(NAMES[1:]):
        grads = run(kernels, c, [i == j for j in range(6)])
        assert torch.equal(grads[name], everything[name])
        assert all(grads[other].numel() == 0 for other in NAMES[1:] if other != name)


def test_pre_activations_are_kept_only_on_request() -> None:
    c = make(9, 24, 16, 3)
    args = (c.x, c.w_in, c.w_out, None, None, c.weight, c.token_index, c.offsets, c.activation)
    y, pre = kernels.forward(*args, False)
    kept, saved = kernels.forward(*args, True)
    assert pre.shape == (0, 32)
    assert saved.shape == (18, 32)
    assert torch.equal(y, kept)


def test_a_token_that_is_not_finite_spoils_only_itself_and_its_experts() -> None:
    c = make(40, 24, 16, 3, expert=torch.arange(40)[:, None] % 3)
    bad = 1  # the first token of the second expert: next to the last of the first
    c.x[bad] = float("nan")
    ours = run(kernels, c)
    others = torch.arange(40, device=DEVICE) != bad
    for name in ("y", "dx"):
        assert ours[name][others].isfinite().all()
        assert ours[name][bad].isnan().all()
    for name in ("dw_in", "dw_out"):
        assert ours[name][[0, 2]].isfinite().all()
        assert ours[name][1].isnan().any()


def test_results_repeat_bit_for_bit() -> None:
    c = make(70, 48, 80, 3, dtype=torch.bfloat16, bias=True)
    first, second = run(kernels, c), run(kernels, c)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_gradients_flow_through_moe_mlp() -> None:
    c = make(15, 24, 16, 3)
    routing = Routing(c.token_index, c.offsets, c.weight, 15)
    results = []
    for backend in ("reference", "triton"):
        leaves = [t.clone().requires_grad_() for t in (c.x, c.w_in, c.w_out, c.weight)]
        y = moe_mlp(*leaves[:3], replace(routing, weight=leaves[3]), backend=backend)
        results.append([y, *torch.autograd.grad(y, leaves, c.dy)])
    for loop, ours in zip(*results):
        torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5)


def test_tokens_and_experts_beyond_two_to_the_31_are_reached() -> None:
    # Memory that is never touched costs nothing: only the few rows in use are.
    c = make(3, 16, 16, 3, dtype=torch.bfloat16)
    step = 2**30 + 16
    far_x = torch.empty(2 * step + 16, dtype=c.x.dtype, device=DEVICE).as_strided(c.x.shape, (step, 1))
    far_w = torch.empty(2 * step + 32 * 16, dtype=c.x.dtype, device=DEVICE).as_strided(c.w_in.shape, (step, 16, 1))
    far = replace(c, x=far_x.copy_(c.x), w_in=far_w.copy_(c.w_in))
    near, ours = run(kernels, c), run(kernels, replace(far, dy=far.dy))
    assert all(torch.equal(near[name], ours[name]) for name in NAMES if name not in ("db_in", "db_out"))


def test_assignments_beyond_two_to_the_31_are_reached() -> None:
    # Rows of pre-activations [A, 32] of which the last tile passes element 2^31.
    A, rows = 2**26 + 16, 16
    c = make(20, 16, 16, 1, K=1, dtype=torch.bfloat16)
    tile = Tile(rows, 32, 32, 4, 2)
    token_index = torch.empty(A, dtype=torch.int64, device=DEVICE)
    token_index[-rows:] = torch.arange(rows)
    first, end = torch.tensor([[A - rows], [A]], dtype=torch.int32, device=DEVICE)
    offsets = torch.cat([first, end])
    last = RowTiles(torch.zeros_like(first), first, offsets, rows)
    pre, hidden, d_pre = (c.x.new_empty(A, n) for n in (32, 16, 32))
    weight, partial = torch.empty(A, device=DEVICE), torch.empty(1, A, device=DEVICE)
    weight[-rows:] = 1
    x, dy, w_in, w_out = (t.double() for t in (c.x[:rows], c.dy[:rows], c.w_in[0], c.w_out[0]))
    act = ACTIVATIONS["swiglu"]

    up_projection(c.x, c.w_in, None, token_index, last, tile, "swiglu", pre, hidden)
    assert distance(pre[-rows:], x @ w_in.T) < 4e-3
    assert distance(hidden[-rows:], act.forward(x @ w_in.T)) < 4e-3

    d_hidden(c.dy, c.w_out, pre, weight, token_index, last, tile, "swiglu", d_pre, hidden, partial)
    kept = pre[-rows:].double()
    assert distance(d_pre[-rows:], act.backward(kept, dy @ w_out)) < 4e-3
    assert distance(partial[0, -rows:], (dy @ w_out * act.forward(kept)).sum(1)) < 1e-5

    grad = d_pre[-rows:].double()
    out = grouped_gemm(d_pre, c.w_in.mT, None, last, tile)
    assert distance(out[-rows:], grad @ w_in) < 4e-3
    out = grouped_gemm(hidden, c.w_in, None, last, tile)
    assert distance(out[-rows:], hidden[-rows:].double() @ w_in.T) < 4e-3

    place = torch.arange(A - rows, A, dtype=torch.int32, device=DEVICE)  # as the sort by expert gives it
    y = combine(out, None, token_lists(token_index, rows, place[:, None]))
    assert torch.equal(y, out[-rows:])

    dw_in, db_in = torch.empty_like(c.w_in), c.w_in.new_empty(1, 32)
    d_weight(d_pre, c.x, token_index, offsets, False, tile, dw_in)
    assert distance(dw_in[0], grad.T @ x) < 4e-3
    d_bias(d_pre, token_index, None, offsets, db_in)
    assert distance(db_in[0], grad.sum(0)) < 4e-3
