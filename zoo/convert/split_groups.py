"""Which neurons of a dense MLP become which expert: at random, by likeness, or dealt out by importance.

Neurons are numbered as rows of the input projection, [E, n], ascending within an expert; what is drawn is drawn from
torch's own generator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe.kernels import get_activation
from ..moe.routers.assignment import balanced_assignment
from .arguments import Calibrate
from .dense_mlps import DenseMLP
from .split_calibration import importance, observe

Method = Literal["random", "cluster", "coactivation", "importance"]

RESTARTS, ITERATIONS = 3, 100
TOLERANCE, ROUNDS = 5e-4, 200  # of the assignment: near its best, at a tenth of a second for 14336 neurons


class Cut(NamedTuple):
    """Hidden units of each expert [E, n], and tokens [T, D] that the MLP met, where its gate learns from them."""

    neurons: Tensor
    inputs: Tensor | None = None


def cut(
    model: nn.Module,
    sizes: Mapping[DenseMLP, int],
    num_experts: int,
    method: Method,
    shared: int,
    predicts: bool,
    calibrate: Calibrate | None,
    tokens: int,
) -> dict[DenseMLP, Cut]:
    """Which units of each MLP become which expert; sizes are units an expert, predicts asks for tokens too.

    Other arguments, and what is raised, as in `zoo.split`.
    """
    seen: dict[tuple[str, DenseMLP], Tensor] = {}
    scores: dict[DenseMLP, Tensor] = {}
    if predicts or method in ("coactivation", "importance"):
        if calibrate is None:
            what = f'method="{method}"' if method in ("coactivation", "importance") else "MoEficationRouter"
            raise ValueError(
                f"split: {what} needs calibrate, a function that runs the model over data and yields losses; got None"
            )
        read: dict[tuple[str, DenseMLP], nn.Module] = {}
        if predicts:
            read |= {("inputs", mlp): mlp.linears[0] for mlp in sizes}
        if method == "coactivation":
            read |= {("hidden", mlp): mlp.down for mlp in sizes}
        if read:
            seen = observe(model, read, calibrate, tokens)
        if method == "importance":
            scores = importance(model, list(sizes), calibrate)
    cuts = {}
    for mlp, width in sizes.items():
        if method == "random":
            neurons = random_groups(mlp.sizes[1], num_experts)
        elif method == "cluster":
            neurons = alike_groups(mlp.weights()["w_in"][: mlp.sizes[1]], num_experts)  # of a gated MLP the gate's rows
        elif method == "coactivation":
            hidden, gated = seen.pop(("hidden", mlp)).T, get_activation(mlp.activation).gated
            neurons = alike_groups(hidden.abs() if gated else hidden.clamp(min=0), num_experts)
        else:
            neurons = dealt_groups(scores[mlp], num_experts, shared, width)
        cuts[mlp] = Cut(neurons, seen.get(("inputs", mlp)))
    return cuts


def any_groups(neurons: int, num_experts: int, width: int) -> Tensor:
    """Groups of the right shape, for a model whose values nobody reads."""
    return torch.arange(num_experts * width).view(num_experts, -1) % neurons


def random_groups(neurons: int, num_experts: int) -> Tensor:
    """F neurons in E groups at random, no neuron in two (LLaMA-MoE's independent random split)."""
    return torch.randperm(neurons, device="cpu").view(num_experts, -1).sort(-1).values


@torch.no_grad()
def alike_groups(vectors: Tensor, num_experts: int) -> Tensor:
    """Neurons with vectors [F, V] of like direction together: balanced k-means on these, scaled to length one.

    With groups of one size n the objective is F - sum over groups of (sum of cosines of all its pairs) / n, so that
    this also is a cut of the graph whose edges weigh as much as two neurons' vectors are alike, into equal parts.
    """
    unit = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)
    return balanced_kmeans(unit, num_experts).cpu().argsort(stable=True).view(num_experts, -1)


def dealt_groups(importance: Tensor, num_experts: int, shared: int, expert_dim: int) -> Tensor:
    """MoEBERT's experts (2204.07675): the `shared` most important neurons in each, and the others dealt out in turn.

    importance [F]. An expert takes its best until it has expert_dim neurons; [E, expert_dim], shared ones first, each
    kind ascending.
    """
    order = importance.cpu().argsort(descending=True, stable=True)
    common, rest = order[:shared].sort().values, order[shared:]
    own = torch.stack([rest[e::num_experts][: expert_dim - shared] for e in range(num_experts)])
    return torch.cat([common.expand(num_experts, -1), own.sort(-1).values], dim=1)


@torch.no_grad()
def balanced_kmeans(vectors: Tensor, num_clusters: int) -> Tensor:
    """Cluster of each vector [N, V], [N] int64: clusters of N / E vectors each, near to their means.

    Lloyd's algorithm with a balanced assignment, which is as good as the best one within a small tolerance, from
    distances' own odds (k-means++); the best of several starts. Raises ValueError where E does not divide N.
    """
    count = vectors.shape[0]
    if count % num_clusters:
        raise ValueError(f"balanced_kmeans: {count} vectors do not make {num_clusters} clusters of one size")
    best, least = torch.zeros(count, dtype=torch.int64, device=vectors.device), math.inf
    for _ in range(RESTARTS if num_clusters > 1 else 0):
        labels, spread = _lloyd(vectors, _seeds(vectors, num_clusters))
        if spread < least:
            best, least = labels, spread
    return best


def spread_within(vectors: Tensor, labels: Tensor) -> float:
    """Sum of squared distances of vectors [N, V] from the mean of their cluster: what `balanced_kmeans` makes small."""
    return float((vectors - _means(vectors, labels, int(labels.max()) + 1)[labels]).square().sum())


def _lloyd(vectors: Tensor, means: Tensor) -> tuple[Tensor, float]:
    labels, least = torch.zeros(0, dtype=torch.int64), math.inf
    for _ in range(ITERATIONS):
        nearness = 2 * vectors @ means.T - means.square().sum(-1)
        found = balanced_assignment(nearness, TOLERANCE, ROUNDS)
        means = _means(vectors, found, means.shape[0])
        # All vectors' squares less those of the means, which only the second part of tells clusterings apart.
        spread = float(vectors.square().sum() - vectors.shape[0] / means.shape[0] * means.square().sum())
        if spread >= least * (1 - 1e-6):
            break
        labels, least = found, spread
    return labels, least


def _means(vectors: Tensor, labels: Tensor, num_clusters: int) -> Tensor:
    sums = vectors.new_zeros(num_clusters, vectors.shape[1]).index_add_(0, labels, vectors)
    return sums / torch.bincount(labels, minlength=num_clusters).clamp(min=1).unsqueeze(-1)


def _seeds(vectors: Tensor, count: int) -> Tensor:
    """Vectors to start from, each drawn with odds that are its squared distance from the nearest so far."""
    chosen = [int(torch.randint(vectors.shape[0], (), device="cpu"))]
    away = torch.full((vectors.shape[0],), math.inf, dtype=vectors.dtype, device=vectors.device)
    for _ in range(count - 1):
        away = torch.minimum(away, (vectors - vectors[chosen[-1]]).square().sum(-1))
        odds = away.double().cpu().clamp(min=0)
        chosen.append(int(torch.multinomial(odds if odds.sum() > 0 else torch.ones_like(odds), 1)))
    return vectors[chosen]
