from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.moe import Experts, MoE, telemetry
from zoo.moe.routers import HashRouter
from zoo.moe.routers.hash import balanced_table, clustered_table, dispersed_table, hash_pairs, random_table

VOCAB, EXPERTS = 50, 4


def chosen(router: HashRouter, ids: Tensor, **context: Any) -> list[int]:
    """The expert of every token, -1 for none; each weighs one."""
    x = torch.randn(*ids.shape, router.dim)
    dense = router(x, token_ids=ids, **context).dense()
    assert set(dense.unique().tolist()) <= {0.0, 1.0}
    return [row.argmax().item() if row.any() else -1 for row in dense]  # type: ignore[misc]


def test_the_random_table_is_that_of_the_authors() -> None:
    """ParlAI seeds Python's generator with 42 and draws an expert for each token id in turn."""
    random.seed(42)
    expected = [random.randrange(0, EXPERTS) for _ in range(VOCAB)]
    assert random_table(VOCAB, EXPERTS).tolist() == expected
    assert HashRouter(3, EXPERTS, VOCAB).table.tolist() == expected  # type: ignore[union-attr]
    assert random_table(VOCAB, EXPERTS, seed=1).tolist() != expected


def test_a_token_goes_where_the_table_says_in_training_and_evaluation() -> None:
    ids = torch.randint(VOCAB, (3, 7))
    router = HashRouter(3, EXPERTS, VOCAB)
    expected = [router.table[i].item() for i in ids.flatten()]  # type: ignore[index]
    for training in (True, False):
        assert chosen(router.train(training), ids) == expected
        assert chosen(router, ids.flatten()) == expected


def test_the_layer_runs_the_tables_expert_with_weight_one() -> None:
    ids, x = torch.randint(VOCAB, (2, 6)), torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    layer = MoE(HashRouter(3, EXPERTS, VOCAB), Experts(EXPERTS, 3, 5, "relu")).double()
    up, down = layer.experts.up_proj, layer.experts.down_proj
    expected = torch.stack(
        [
            torch.stack([down[e] @ (up[e] @ x[b, s]).relu() for s in range(6) for e in [layer.router.table[ids[b, s]]]])  # type: ignore[index]
            for b in range(2)
        ]
    )
    found = layer(x, token_ids=ids)
    torch.testing.assert_close(found, expected)
    variables = (x, up, down)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), variables), torch.autograd.grad(expected.square().sum(), variables)
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_balanced_table_fills_the_emptiest_expert_with_the_most_frequent_token() -> None:
    frequencies = torch.randint(1, 1000, (VOCAB,)).tolist()
    load, expected = [0] * EXPERTS, [0] * VOCAB
    for token in sorted(range(VOCAB), key=lambda t: -frequencies[t]):
        e = load.index(min(load))
        expected[token], load[e] = e, load[e] + frequencies[token]
    found = balanced_table(frequencies, EXPERTS).tolist()
    loads = [sum(f for f, e in zip(frequencies, found) if e == expert) for expert in range(EXPERTS)]
    assert sorted(loads) == sorted(load)  # where loads were equal on the way either expert will do
    assert max(loads) < 1.05 * min(loads)


def test_the_balanced_table_spreads_tokens_that_never_occur() -> None:
    table = balanced_table([5.0, 5.0] + [0.0] * 20, 2)
    assert table[:2].tolist() == [0, 1]
    assert table.bincount().tolist() == [11, 11]


def test_natural_text_is_balanced_by_the_balanced_table_and_not_by_the_random_one() -> None:
    frequencies = 1 / torch.arange(1, 1001)  # Zipf
    ids = torch.multinomial(frequencies, 20000, replacement=True, generator=torch.Generator().manual_seed(0))
    imbalance = {}
    for name, table in {"random": random_table(1000, 8), "balanced": balanced_table(frequencies, 8)}.items():
        router = HashRouter(2, 8, table=table)
        imbalance[name] = telemetry.max_violation(router(torch.randn(20000, 2), token_ids=ids)).item()
    assert imbalance["balanced"] < 0.1 < imbalance["random"]


def test_clusters_share_an_expert_and_dispersed_tokens_do_not() -> None:
    torch.manual_seed(0)
    cluster = torch.arange(EXPERTS).repeat_interleave(8)
    embeddings = torch.eye(EXPERTS)[cluster] * 10 + torch.randn(32, EXPERTS) * 0.1
    table = clustered_table(embeddings, EXPERTS, seed=1)
    centers = torch.stack([embeddings[table == e].mean(0) for e in table.unique()])
    assert torch.equal(table, clustered_table(embeddings, EXPERTS, seed=1))
    # Lloyd's fixed point: every token is nearest to the mean of its own cluster.
    assert torch.equal(torch.cdist(embeddings, centers).argmin(1), torch.searchsorted(table.unique(), table))
    spread = dispersed_table(cluster, EXPERTS)
    for c in range(EXPERTS):
        assert spread[cluster == c].bincount(minlength=EXPERTS).tolist() == [2] * EXPERTS
    with pytest.raises(ValueError, match="3 tokens do not make 4 clusters"):
        clustered_table(torch.randn(3, 2), 4)


def mixed_by_hand(first: int, second: int, seed: int) -> int:
    h = seed
    for part in (first, second):
        h = (h ^ part) & 0x7FFFFFFF
        for factor in (0x45D9F3B, 0x119DE1F3):
            h = (h * factor) % 2**31
            h ^= h >> 15
    return h


def test_pairs_hash_as_whole_numbers_do() -> None:
    first, second = torch.randint(200000, (500,)), torch.randint(200000, (500,))
    expected = [mixed_by_hand(a, b, 42) for a, b in zip(first.tolist(), second.tolist())]
    assert hash_pairs(first, second, 42).tolist() == expected


def test_pairs_spread_evenly_and_on_their_own() -> None:
    first, second = (t.flatten() for t in torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij"))
    expert = hash_pairs(first, second, 42) % 8
    assert (expert.bincount(minlength=8) / 1250 - 1).abs().max() < 0.15
    # Knowing one token of the pair says next to nothing about the expert.
    for token in (first, second):
        counts = torch.zeros(100, 8).index_put_((token, expert), torch.tensor(1.0), accumulate=True)
        assert (counts.max(1).values < 35).all()  # 12.5 on average


@pytest.mark.parametrize("feature", ["previous", "bigram"])
def test_the_token_before_decides(feature: Any) -> None:
    router = HashRouter(3, EXPERTS, VOCAB, feature=feature)
    ids = torch.randint(VOCAB, (3, 9))
    expected = []
    for row in ids.tolist():
        for t, token in enumerate(row):
            before = row[t - 1] if t else token  # none before: the token itself
            hashed = mixed_by_hand(before, token, 42) % EXPERTS
            expected.append(hashed if feature == "bigram" else router.table[before].item())  # type: ignore[index]
    assert chosen(router, ids) == expected
    # A row that goes on from an earlier call is the same as the whole row.
    rest = chosen(router, ids[:, 4:], previous_ids=ids[:, 3])
    assert rest == torch.tensor(expected).view(3, 9)[:, 4:].flatten().tolist()
    # Padding is no previous token.
    padded = torch.cat([torch.full((3, 2), -100), ids], dim=1)
    mask = torch.cat([torch.zeros(3, 2, dtype=torch.bool), torch.ones(3, 9, dtype=torch.bool)], dim=1)
    found = torch.tensor(chosen(router, padded, mask=mask)).view(3, 11)
    assert found[:, :2].unique().tolist() == [-1]
    assert found[:, 2:].flatten().tolist() == expected


def test_masked_tokens_go_nowhere_whatever_their_ids() -> None:
    router, mask = HashRouter(3, EXPERTS, VOCAB), torch.tensor([True, False, True])
    routing = router(torch.randn(3, 3), token_ids=torch.tensor([4, -100, 6]), mask=mask)
    assert telemetry.kept_per_token(routing).tolist() == [1, 0, 1]
    assert telemetry.drop_rate(routing).item() == 0
    with pytest.raises(ValueError, match="carries no probabilities"):
        telemetry.entropy(routing)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 0)])
@pytest.mark.parametrize("feature", ["token", "previous", "bigram"])
def test_no_token_and_one_token(shape: tuple[int, int], feature: Any) -> None:
    router = HashRouter(3, EXPERTS, VOCAB, feature=feature)
    ids = torch.zeros(shape, dtype=torch.long)
    assert len(chosen(router, ids)) == ids.numel()


def test_the_table_is_part_of_the_state_and_survives_copies_and_the_meta_device() -> None:
    router = HashRouter(3, EXPERTS, VOCAB, table=balanced_table(torch.rand(VOCAB), EXPERTS))
    other = HashRouter(3, EXPERTS, VOCAB)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.table, router.table)  # type: ignore[arg-type]
    assert torch.equal(copy.deepcopy(router).table, router.table)  # type: ignore[arg-type]
    assert router.double().table.dtype == torch.int64  # type: ignore[union-attr]
    with torch.device("meta"):
        empty = HashRouter(3, EXPERTS, VOCAB)
        given = HashRouter(3, EXPERTS, table=list(range(EXPERTS)))
    empty.to_empty(device="cpu").reset_parameters()
    assert torch.equal(empty.table, random_table(VOCAB, EXPERTS))  # type: ignore[arg-type]
    given.to_empty(device="cpu").reset_parameters()
    assert given.table.tolist() == list(range(EXPERTS))  # type: ignore[union-attr]
    assert Counter(dict(HashRouter(3, EXPERTS, feature="bigram").state_dict())) == Counter()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HashRouter(3, 4)(torch.randn(2, 3)), "give vocab_size, or a table"),
        (lambda: HashRouter(3, 4, 9)(torch.randn(2, 3)), "HashRouter needs token_ids in the context"),
        (
            lambda: HashRouter(3, 4, 9)(torch.randn(2, 3), token_ids=torch.tensor([1, 9])),
            r"must lie in 0\.\.8, got 1\.\.9",
        ),
        (lambda: HashRouter(3, 4, 9)(torch.randn(2, 3), token_ids=torch.tensor([1])), r"shape \[1\], expected \[2\]"),
        (lambda: HashRouter(3, 4, 9, feature="next"), "feature must be"),
        (lambda: HashRouter(3, 4, table=[0, 4]), r"with experts 0\.\.3"),
        (lambda: HashRouter(3, 4, table=[0], feature="bigram"), "leave it out"),
        (
            lambda: HashRouter(3, 4, 9, feature="previous")(torch.randn(2, 3), token_ids=torch.tensor([1, 2])),
            "got one list",
        ),
    ],
)
def test_what_does_not_fit_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("feature", ["token", "previous", "bigram"])
def test_several_hashes_give_a_token_an_expert_of_each_part(feature: Any) -> None:
    """Each is the hash of its own seed over its own part of the experts."""
    ids = torch.randint(VOCAB, (3, 7))
    router = HashRouter(3, 6, VOCAB, hashes=3, feature=feature, seed=5)
    routing = router(torch.randn(3, 7, 3), token_ids=ids)
    parts = routing.dense().view(21, 3, 2)
    for m in range(3):
        alone = HashRouter(3, 2, VOCAB, feature=feature, seed=5 + m)
        assert parts[:, m].argmax(1).tolist() == chosen(alone, ids)
        assert parts[:, m].sum(1).eq(1).all()
    mask = torch.rand(3, 7) > 0.5
    assert torch.equal(router(torch.randn(3, 7, 3), token_ids=ids, mask=mask).dense().any(1), mask.flatten())


def test_several_hashes_are_an_expert_cut_in_segments() -> None:
    """As the paper defines it: a token's FFN has the units that each hash names, one behind the other."""
    ids, x = torch.randint(VOCAB, (11,)), torch.randn(11, 3, dtype=torch.float64)
    layer = MoE(HashRouter(3, 6, VOCAB, hashes=2), Experts(6, 3, 5, "relu")).double()
    up, down = layer.experts.up_proj, layer.experts.down_proj
    for token, found in zip(range(11), layer(x, token_ids=ids)):
        segments = layer.router.table[:, ids[token]].tolist()  # type: ignore[index]
        inner, outer = torch.cat([up[e] for e in segments]), torch.cat([down[e] for e in segments], dim=1)
        torch.testing.assert_close(found, outer @ (inner @ x[token]).relu())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hashes": 3}, "4 experts cannot be shared by 3 hashes"),
        ({"hashes": 0}, "4 experts cannot be shared by 0 hashes"),
        ({"hashes": 2, "table": [[0, 1], [1, 2]]}, "row m with experts 2 m and the next ones of its part"),
        ({"hashes": 2, "table": [0, 1]}, r"table must be \[2, V\]"),
    ],
)
def test_mistakes_in_several_hashes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HashRouter(3, EXPERTS, VOCAB, **arguments)
