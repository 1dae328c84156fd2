"""Few-shot accuracy of frozen features, as V-MoE and Soft MoE report it.

A linear map from features to targets in {-1, 1}^C is fitted in closed form to a few images of every class, as in
google-research/vmoe's evaluator: features whitened, one large constant feature in place of a bias, L2 regularisation.
N images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from zoo.data.images_rows import IGNORE, real_rows

SHOTS = (1, 5, 10, 25)
STRENGTHS = tuple(2.0**i for i in range(-10, 20))  # of regularisation
BIAS = 100.0  # large, so that its weight is hardly regularised
STD_FLOOR = 1e-5


def ridge(x: Tensor, y: Tensor, num_classes: int, test_x: Tensor, strengths: Sequence[float]) -> Tensor:
    """Scores [len(strengths), M, C] of test features [M, D], fitted to features x [N, D] and labels y [N].

    W = (X^T X + l I)^{-1} X^T Y for each l of `strengths`, with Y in {-1, 1}, in double precision.
    """
    x, test_x = x.double(), test_x.double()
    mean, std = x.mean(0), x.std(0, correction=0) + STD_FLOOR
    x, test_x = (F.pad((z - mean) / std, (0, 1), value=BIAS) for z in (x, test_x))
    targets = 2.0 * F.one_hot(y, num_classes).double() - 1
    # One decomposition serves all strengths; of whichever Gram matrix is smaller.
    if len(x) >= x.shape[1]:
        values, vectors = torch.linalg.eigh(x.T @ x)
        left, right = test_x @ vectors, vectors.T @ (x.T @ targets)
    else:
        values, vectors = torch.linalg.eigh(x @ x.T)
        left, right = test_x @ (x.T @ vectors), vectors.T @ targets
    return torch.stack([left / (values.clamp(min=0) + strength) @ right for strength in strengths])


def few_shot_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = (0, 1, 2),
    strengths: Sequence[float] = STRENGTHS,
) -> dict[int, float]:
    """Accuracy on the test features for every number of shots, the mean over seeds, which choose the images.

    The strength of regularisation is one for all seeds, chosen by the mean rank of its accuracy, as in the original
    evaluator over its data sets. A class with fewer images than shots gives what it has.
    """
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    found = {}
    for count in shots:
        accuracies = []
        for seed in seeds:
            chosen = torch.from_numpy(choose(train_y.numpy(), count, seed, num_classes))
            scores = ridge(train_x[chosen], train_y[chosen], num_classes, test_x, strengths)
            accuracies.append((scores.argmax(-1) == test_y).double().mean(-1).numpy())
        ranks = [np.argsort(np.argsort(of_seed)) for of_seed in accuracies]
        best = int(np.argmax(np.mean(ranks, axis=0)))
        found[count] = float(np.mean([of_seed[best] for of_seed in accuracies]))
    return found


def choose(labels: np.ndarray, count: int, seed: int, num_classes: int) -> np.ndarray:
    """Rows of `count` images of every class; more shots of one seed contain the fewer."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.permutation(np.where(labels == c)[0])[:count] for c in range(num_classes)])


@torch.no_grad()
def features(model: Any, batches: Iterable[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """What a timm model hands to its classifier, [N, D] float32, and labels [N]; rows that count nowhere left out."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    found, labels = [], []
    try:
        for batch in map(real_rows, batches):
            real = batch["label"] != IGNORE
            out = model.forward_head(model.forward_features(batch["image"].to(device)), pre_logits=True)
            found.append(out.float().cpu()[real])
            labels.append(batch["label"][real])
    finally:
        model.train(training)
    return torch.cat(found), torch.cat(labels)


class FewShot(Callback):
    """Log few-shot accuracy of the model's features, from the training to the validation split, at each validation.

    Beside a callback that averages weights, list this one first: then it sees the average.

    Args:
        shots: images of every class.
        seeds: choices of images that are averaged.
    """

    def __init__(self, shots: Sequence[int] = SHOTS, seeds: int = 3) -> None:
        if min([*shots, seeds]) < 1:
            raise ValueError(f"FewShot: shots and seeds must be at least 1, got {list(shots)} and {seeds}")
        self.shots, self.seeds = tuple(shots), seeds

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, on every process the same, and log."""
        if not trainer.sanity_checking:
            for count, accuracy in self.measure(pl_module.model, trainer.datamodule).items():  # type: ignore[attr-defined]
                pl_module.log(f"val/{count}shot", accuracy, sync_dist=True)

    def measure(self, model: Any, data: Any) -> dict[int, float]:
        """Accuracy for every number of shots; only training images that some seed chooses are looked at."""
        labels = np.array(data.images.split("train").labels)
        most, classes = max(self.shots), len(data.classes)
        rows = sorted({int(row) for seed in range(self.seeds) for row in choose(labels, most, seed, classes)})
        train_x, train_y = features(model, data.batches("train", rows))
        test_x, test_y = features(model, data.batches("val"))
        return few_shot_accuracy(train_x, train_y, test_x, test_y, self.shots, range(self.seeds))
