"""What choosing and sorting in Triton must give. `test_triton.py` runs this file in a process of its own: on the GPU if
there is one, else under Triton's interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.moe import Routing
from zoo.moe.kernels import choices, moe_mlp
from zoo.moe.kernels.triton import choose
from zoo.moe.routers import TopKRouter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers take the Triton kernels in the interpreter too."""
    monkeypatch.setattr(choices, "_can", lambda x, num_experts: num_experts <= choices.MOST)


def by_loop(expert: Tensor, num_experts: int) -> tuple[list[int], list[int]]:
    """Flat choices in order of expert, token and choice, and how many each expert has."""
    flat = expert.flatten().tolist()
    order = [i for e in range(num_experts) for i, chosen in enumerate(flat) if chosen == e]
    return order, [flat.count(e) for e in range(num_experts)]


@pytest.mark.parametrize(
    ("tokens", "k", "experts"),
    [(0, 2, 4), (1, 1, 1), (1, 8, 64), (13, 3, 5), (300, 2, 100), (700, 1, 256), (131, 4, 513), (257, 8, 8)],
)
def test_choices_are_sorted_by_expert_and_token(tokens: int, k: int, experts: int) -> None:
    expert = torch.rand(tokens, experts, device=DEVICE).topk(k).indices
    weight = torch.rand(tokens, k, device=DEVICE)
    order, counts = by_loop(expert, experts)
    token_index, offsets, sorted_weight, place = choose.sort_choices(expert, weight, experts)
    assert token_index.dtype == torch.int64
    assert offsets.dtype == place.dtype == torch.int32
    assert token_index.tolist() == [i // k for i in order]
    assert offsets.diff().tolist() == counts
    assert offsets[0] == 0
    assert torch.equal(sorted_weight, weight.flatten()[order])
    assert place.flatten()[order].tolist() == list(range(tokens * k))


def test_idle_experts_and_experts_chosen_twice() -> None:
    expert = torch.randint(0, 3, (90, 4), device=DEVICE) * 2 + 1
    order, counts = by_loop(expert, 9)
    token_index, offsets, _, place = choose.sort_choices(expert, torch.ones(90, 4, device=DEVICE), 9)
    assert token_index.tolist() == [i // 4 for i in order]
    assert offsets.diff().tolist() == counts
    assert place.flatten()[order].tolist() == list(range(360))


def test_all_tokens_to_one_expert() -> None:
    expert = torch.full((500, 1), 6, device=DEVICE)
    token_index, offsets, _, place = choose.sort_choices(expert, torch.ones(500, 1, device=DEVICE), 8)
    assert token_index.tolist() == place.flatten().tolist() == list(range(500))
    assert offsets.tolist() == [0] * 7 + [500] * 2


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "dtype"),
    [
        (0, 2, 4, torch.float32),
        (1, 1, 1, torch.float32),
        (70, 3, 5, torch.float16),
        (40, 16, 256, torch.bfloat16),
        (9, 7, 7, torch.float32),
        (33, 2, 600, torch.float32),
    ],
)
def test_the_best_are_found_in_order(tokens: int, k: int, experts: int, dtype: torch.dtype) -> None:
    ranks = torch.rand(tokens, experts, device=DEVICE).argsort(1) - experts // 2
    scores = ranks.to(dtype)  # all different, and of both signs
    assert torch.equal(choose.top_k(scores, k), scores.topk(k).indices)
    assert torch.equal(choose.top_k(scores.T.contiguous().T, k), scores.topk(k).indices)
    assert torch.equal(choose.top_k(ranks / 777 - 0.1, k), ranks.topk(k).indices)


def test_scores_may_lie_far_apart_in_memory() -> None:
    """The distance of the last expert's from the first one's is more than 32 bits hold."""
    scores = torch.empty(600 * 2**22, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 600), (1, 2**22))
    scores.copy_(torch.randperm(1200, device=DEVICE).view(2, 600) // 5 - 120)
    near = scores.contiguous()
    assert near.gather(1, choose.top_k(scores, 3)).tolist() == near.topk(3).values.tolist()
    assert choose.top_k(scores, 3).tolist() == choose.top_k(near, 3).tolist()


def test_equal_scores_infinities_and_nan() -> None:
    inf, nan = float("inf"), float("nan")
    scores = [[1, 1, 1, 1], [0.0, -0.0, 0.0, -1], [-inf, -inf, -inf, 3], [inf, 2, nan, -nan], [-inf] * 4]
    best = choose.top_k(torch.tensor(scores, device=DEVICE), 3)
    assert best.tolist() == [[0, 1, 2], [0, 1, 2], [3, 0, 1], [2, 3, 0], [0, 1, 2]]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("options", [{}, {"score": "softmax_topk"}, {"score": "sigmoid", "selection_bias": True}])
def test_a_router_decides_and_learns_as_with_torch(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    router = TopKRouter(8, 12, 3, normalize=True, **options).to(DEVICE)
    logits = torch.randn(50, 12, device=DEVICE, dtype=torch.float32).requires_grad_()
    scale = torch.randn(50, 12, device=DEVICE)

    def decide() -> tuple[Routing, Tensor]:
        routing = router.route(logits)
        return routing, torch.autograd.grad((routing.dense() * scale).sum(), logits)[0]

    fused, gradient = decide()
    monkeypatch.setattr(choices, "_can", lambda x, num_experts: False)
    plain, expected = decide()
    assert fused.place is not None
    assert plain.place is None
    assert torch.equal(fused.token_index, plain.token_index)
    assert torch.equal(fused.offsets, plain.offsets)
    torch.testing.assert_close(fused.weight, plain.weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("fused")
def test_places_spare_the_kernels_a_sort_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = torch.rand(40, 6, device=DEVICE).topk(3).indices
    x, w_in, w_out = (torch.randn(*size, device=DEVICE) for size in ((40, 16), (6, 64, 16), (6, 16, 32)))
    weight, dy = torch.rand(40, 3, device=DEVICE), torch.randn(40, 16, device=DEVICE)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w_in, w_out, weight)]
        routing = Routing.from_choices(expert, leaves[3], 6)
        y = moe_mlp(*leaves[:3], routing, backend="triton")
        return [y, *torch.autograd.grad(y, leaves, dy)]

    sorts = []
    argsort = Tensor.sort
    monkeypatch.setattr(Tensor, "sort", lambda *args, **kwargs: sorts.append(1) or argsort(*args, **kwargs))
    placed = run()
    assert not sorts
    monkeypatch.setattr(choices, "_can", lambda x, num_experts: False)
    for ours, plain in zip(placed, run()):
        assert (ours - plain).norm() <= 1e-6 * plain.norm()
    assert sorts


def test_operators_are_what_torch_expects_of_them() -> None:
    expert = torch.rand(20, 6, device=DEVICE).topk(2).indices
    weight = torch.rand(20, 2, device=DEVICE, requires_grad=True)
    # The other checks cannot deal with outputs that are integers.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.zoo.sort_choices, (expert, weight, 6), test_utils=checks)
    torch.library.opcheck(torch.ops.zoo.top_k, (torch.randn(20, 6, device=DEVICE), 2), test_utils=checks)


@pytest.mark.usefixtures("fused")
def test_a_router_compiles_without_a_break() -> None:
    router = TopKRouter(8, 12, 3).to(DEVICE)
    logits = torch.randn(50, 12, device=DEVICE, requires_grad=True)

    def decide(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = router.route(logits)
        return routing.token_index, routing.weight, routing.place

    results = []
    for run in (decide, torch.compile(decide, backend="aot_eager", fullgraph=True)):
        token_index, weight, place = run(logits)
        results.append((token_index, weight, place, torch.autograd.grad(weight.square().sum(), logits)[0]))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain)
