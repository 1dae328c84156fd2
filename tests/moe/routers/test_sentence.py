from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from zoo.moe.routers import SentenceRouter


def test_tokens_go_where_the_mean_of_their_sentence_goes() -> None:
    router = SentenceRouter(4, 6).double()
    x = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    segments, mask = torch.randint(5, (3, 7)), torch.rand(3, 7) > 0.3
    expected = torch.zeros(21, 6, dtype=torch.float64)
    for b in range(3):
        for s in range(7):
            if mask[b, s]:
                mean = x[b][(segments[b] == segments[b, s]) & mask[b]].mean(0)
                p, e = (router.weight @ mean).softmax(0).topk(2)
                expected[7 * b + s, e] = p / (p.sum() + 1e-9)
    found = router(x, mask=mask, segment_ids=segments).dense()
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(out.square().sum(), [x, router.weight]) for out in (found, expected))
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_sequence_is_a_sentence_and_so_is_a_list_of_tokens() -> None:
    router, x = SentenceRouter(4, 6), torch.randn(3, 7, 4)
    out = router(x).dense().view(3, 7, 6)
    torch.testing.assert_close(out, out[:, :1].expand(-1, 7, -1))
    for b in range(3):
        torch.testing.assert_close(router(x[b]).dense(), out[b])


def test_a_long_list_of_tokens_takes_no_matrix_of_pairs() -> None:
    router, x = SentenceRouter(4, 6), torch.randn(100_000, 4)
    mask = torch.rand(100_000) > 0.5
    probs, experts = (x[mask].double().mean(0) @ router.weight.double().T).softmax(-1).topk(2)
    expected = torch.zeros(6, dtype=torch.float64).index_add(0, experts, probs / (probs.sum() + 1e-9))
    found = router(x, mask=mask).dense()
    torch.testing.assert_close(found[mask], expected.float().expand(int(mask.sum()), 6))
    assert not found[~mask].any()


@pytest.mark.parametrize("options", [{"jitter": 0.1}, {"noise": "fixed"}])
def test_what_would_part_a_sentence_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="jitter and noise differ between the tokens of a sentence"):
        SentenceRouter(4, 6, **options)
    with pytest.raises(ValueError, match=re.escape("segment_ids has shape [3], expected [3, 7]")):
        SentenceRouter(4, 6)(torch.randn(3, 7, 4), segment_ids=torch.zeros(3))
