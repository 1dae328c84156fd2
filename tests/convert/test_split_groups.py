"""Which neurons go together, against brute force and planted groups."""

from __future__ import annotations

import itertools

import pytest
import torch
from converted_cases import error
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.convert.split_groups import alike_groups, balanced_kmeans, dealt_groups, random_groups, spread_within


def spread(vectors: Tensor, labels: list[int]) -> float:
    """Sum of squared distances from the means, pair by pair, in float64."""
    total = 0.0
    for cluster in set(labels):
        members = [v.double() for v, label in zip(vectors, labels) if label == cluster]
        total += sum(float((a - b).square().sum()) for a, b in itertools.combinations(members, 2)) / len(members)
    return total


def partitions(count: int, size: int) -> list[list[int]]:
    """All ways to part 0..count-1 into groups of one size, as labels."""
    if not count:
        return [[]]
    found = []

    def grow(labels: list[int], cluster: int) -> None:
        free = [i for i, label in enumerate(labels) if label < 0]
        if not free:
            found.append(labels)
            return
        for others in itertools.combinations(free[1:], size - 1):
            grow([cluster if i in (free[0], *others) else label for i, label in enumerate(labels)], cluster + 1)

    grow([-1] * count, 0)
    return found


@pytest.mark.parametrize(("count", "clusters"), [(8, 2), (9, 3), (6, 6), (5, 1)])
def test_balanced_kmeans_comes_near_the_best_of_all_partitions(count, clusters):
    for seed in range(5):
        vectors = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
        labels = balanced_kmeans(vectors, clusters)
        assert labels.bincount(minlength=clusters).tolist() == [count // clusters] * clusters
        assert spread_within(vectors, labels) == pytest.approx(spread(vectors, labels.tolist()), rel=1e-5, abs=1e-6)
        values = sorted(spread(vectors, other) for other in partitions(count, count // clusters))
        assert spread(vectors, labels.tolist()) <= values[len(values) // 50] * 1.05 + 1e-9


def test_balanced_kmeans_finds_planted_clusters_and_splits_what_is_too_large():
    means = 10 * torch.eye(6, 16)
    planted = torch.arange(6).repeat_interleave(20)[torch.randperm(120)]
    labels = balanced_kmeans(means[planted] + 0.5 * torch.randn(120, 16), 6)
    assert len({(int(a), int(b)) for a, b in zip(planted, labels)}) == 6
    # 80 of one kind and 40 of another do not make two clusters of one size: 20 have to go where they do not belong.
    large = torch.cat([means[:1].expand(80, -1), means[1:2].expand(40, -1)]) + 0.01 * torch.randn(120, 16)
    labels = balanced_kmeans(large, 2)
    assert labels.bincount().tolist() == [60, 60]
    assert labels[80:].unique().numel() == 1


@pytest.mark.parametrize("vectors", [torch.zeros(12, 4), torch.ones(12, 4), torch.eye(2).repeat(6, 1)])
def test_vectors_that_are_all_alike_still_make_equal_clusters(vectors):
    assert balanced_kmeans(vectors, 4).bincount().tolist() == [3, 3, 3, 3]
    assert alike_groups(vectors, 4).flatten().sort().values.tolist() == list(range(12))


def test_clusters_of_another_size_are_refused():
    with pytest.raises(ValueError, match="7 vectors do not make 2 clusters of one size"):
        balanced_kmeans(torch.randn(7, 3), 2)


def test_alike_neurons_have_vectors_of_like_direction_whatever_their_length():
    direction = F.normalize(torch.randn(4, 8), dim=-1)
    planted = torch.arange(32) % 4
    vectors = direction[planted] * torch.rand(32, 1).add(0.01) * 100
    groups = alike_groups(vectors.to(torch.bfloat16), 4)
    assert {tuple(group) for group in groups.tolist()} == {tuple(range(e, 32, 4)) for e in range(4)}


def test_the_objective_is_a_cut_of_the_graph_of_cosines():
    vectors, labels = torch.rand(12, 40), torch.arange(12) % 3
    unit = F.normalize(vectors.double(), dim=-1)
    inside = sum(float(unit[i] @ unit[j]) for i in range(12) for j in range(12) if labels[i] == labels[j])
    assert spread_within(unit, labels) == pytest.approx(12 - inside / 4, rel=1e-9)


def test_random_groups_have_every_neuron_once():
    groups = random_groups(48, 6)
    assert groups.shape == (6, 8)
    assert groups.flatten().sort().values.tolist() == list(range(48))
    assert not torch.equal(groups, random_groups(48, 6))


@pytest.mark.parametrize(("experts", "shared", "dim"), [(4, 8, 18), (4, 8, 12), (3, 0, 16), (5, 3, 12), (1, 0, 48)])
def test_neurons_are_dealt_out_in_turn(experts, shared, dim):
    scores = torch.rand(48)
    order = sorted(range(48), key=lambda i: -float(scores[i]))
    groups = dealt_groups(scores, experts, shared, dim)
    assert groups.shape == (experts, dim)
    hands: list[list[int]] = [[] for _ in range(experts)]
    for turn, neuron in enumerate(order[shared:]):
        if len(hands[turn % experts]) < dim - shared:
            hands[turn % experts].append(neuron)
    for group, hand in zip(groups.tolist(), hands):
        assert group == [*sorted(order[:shared]), *sorted(hand)]


def test_neurons_active_together_are_found_from_data():
    """Eight kinds of tokens, each of which its own six neurons hear: the rows of W_in say nothing of it."""
    import zoo

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": zoo.moe.MLP(8, 48, "relu", bias=True)})])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0]["mlp"](x)  # type: ignore[index, no-any-return]

    net, planted = Net(), torch.arange(48)[torch.randperm(48)] % 8
    mlp = net.blocks[0]["mlp"]
    with torch.no_grad():
        mlp.up_proj.weight.copy_(torch.eye(8)[planted] * (1 + torch.rand(48, 1)))
        mlp.up_proj.bias.fill_(-2.0)
    kinds = torch.randint(8, (600,))
    x = 4 * torch.eye(8)[kinds] + 0.1 * torch.randn(600, 8)
    calibrate = lambda model: (model(part).sum() for part in x.split(50))  # noqa: E731
    sparse = zoo.split(net, num_experts=8, k=1, method="coactivation", calibrate=calibrate)
    experts = sparse.blocks[0]["mlp"].experts
    assert {tuple(expert.argmax(-1).unique().tolist()) for expert in experts.up_proj} == {(e,) for e in range(8)}
    with torch.no_grad():
        assert error(sparse(x), net(x)) < 1e-5  # one expert of eight does all the work
