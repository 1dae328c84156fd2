"""Sequences of several sources in given shares: what epochs hold, by counting."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from zoo.data.loader import Loader
from zoo.data.mixing import Mixture, shares_of


class Rows:
    """Stands for the sequences of one source."""

    def __init__(self, source: int, size: int) -> None:
        self.source, self.size, self.facts = source, size, {"source": source}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"of": torch.tensor(self.source), "row": torch.tensor(index)}


def met(mixture: Mixture, epoch: int) -> Counter[tuple[int, int]]:
    mixture.epoch = epoch
    rows = [mixture[i] for i in torch.randperm(len(mixture)).tolist()]
    assert all(row["source"] == row["of"] for row in rows)
    return Counter((int(row["of"]), int(row["row"])) for row in rows)


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.2, 0.5, 0.3], [3, 0, 1e-9], [1e300, 1e300]])
def test_shares_are_whole_and_nearest_to_the_proportions(total: int, weights: list[float]) -> None:
    found = shares_of(total, weights)
    assert sum(found) == total
    whole = sum(map(Fraction, weights))
    assert all(abs(share - total * Fraction(w) / whole) < 1 for share, w in zip(found, weights))
    assert all(share == 0 for share, w in zip(found, weights) if w == 0)


def test_an_epoch_has_the_shares_and_repeats_none_before_all_were_met() -> None:
    sizes, weights = (40, 5, 15), [0.5, 0.4, 0.1]
    mixture = Mixture([Rows(s, size) for s, size in enumerate(sizes)], weights, seed=3)
    assert len(mixture) == 60
    together: Counter[tuple[int, int]] = Counter()
    for epoch in range(7):
        found = met(mixture, epoch)
        shares = [sum(n for (s, _), n in found.items() if s == source) for source in range(3)]
        assert shares == [30, 24, 6]
        together += found
        for source, size in enumerate(sizes):
            times = [together[source, row] for row in range(size)]
            assert max(times) - min(times) <= 1


def test_orders_follow_the_seed_and_nothing_else() -> None:
    def rows(seed: int, epoch: int) -> list[int]:
        mixture = Mixture([Rows(0, 50), Rows(1, 50)], [1, 3], seed=seed)
        mixture.epoch = epoch
        return [int(mixture[i]["row"]) for i in range(len(mixture))]

    assert rows(1, 4) == rows(1, 4)
    assert rows(1, 4) != rows(2, 4)
    assert rows(1, 4) != rows(1, 5)
    assert rows(2**62, 0) != rows(2**62 + 1, 0)


def test_a_source_without_weight_is_left_out_and_padding_is_nobodys() -> None:
    mixture = Mixture([Rows(0, 9), Rows(1, 4)], [0, 2])
    assert {source for source, _ in met(mixture, 0)} == {1}
    assert len(mixture) == 13
    assert int(mixture[-1]["row"]) == -1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_tells_the_epoch_and_goes_on_where_it_was(workers: int) -> None:
    def loader() -> Loader:
        parts = [Rows(0, 12), Rows(1, 4)]
        return Loader(Mixture(parts, [1, 1], seed=5), 4, shuffle=True, seed=5, num_workers=workers)

    def rows(batch: dict[str, Tensor]) -> list[tuple[int, int]]:
        return list(zip(batch["of"].tolist(), batch["row"].tolist()))

    first = loader()
    epochs = [[rows(batch) for batch in first] for _ in range(2)]
    # Eight of twelve in an epoch: the next begins with the other four.
    own = [[row for batch in epoch for s, row in batch if s == 0] for epoch in epochs]
    assert len(set(own[0])) == 8
    assert set(own[0]) | set(own[1]) == set(range(12))
    second = loader()
    iterator = iter(second)
    next(iterator)
    state = second.state_dict()
    again = loader()
    again.load_state_dict(state)
    assert [rows(batch) for batch in again] == epochs[0][1:]
    assert [rows(batch) for batch in again] == epochs[1]
