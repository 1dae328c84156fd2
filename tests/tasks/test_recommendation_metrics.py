"""Figures of recommendation models against scikit-learn and counting by brute force, also over processes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from sklearn import metrics as sklearn

import zoo
from tasks import recommendation_metrics as ours
from tasks.recommendation import RecommendationTask
from tasks.recommendation_evaluation import TableMetrics
from zoo.data.tables_batch import random_batch
from zoo.data.tables_schema import Target


def drawn(seed, rows, values=None, positives=0.3):
    """Scores (few different ones where `values` is given, so that many tie), labels, weights and groups of rows."""
    random = np.random.default_rng(seed)
    scores = random.random(rows) if values is None else random.integers(0, values, rows) / values
    labels = (random.random(rows) < positives).astype(np.float64)
    return scores, labels, random.random(rows) + 0.1, random.integers(-3, max(rows // 7, 1), rows)


def counted(scores, labels, weight):
    """AUC by looking at every pair of a positive and a negative row."""
    above = total = 0.0
    for i in np.flatnonzero(labels == 1):
        for j in np.flatnonzero(labels == 0):
            pair = weight[i] * weight[j]
            above += pair * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
            total += pair
    return above / total


@pytest.mark.parametrize("values", [None, 5])
def test_auc_is_the_share_of_pairs_in_order(values):
    scores, labels, weight, _ = drawn(1, 120, values)
    ones = np.ones(120)
    assert ours.auc(scores, labels) == pytest.approx(counted(scores, labels, ones), abs=1e-14)
    assert ours.auc(scores, labels, weight) == pytest.approx(counted(scores, labels, weight), abs=1e-12)
    assert ours.auc(scores, labels) == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize(("seed", "rows", "values", "positives"), [(2, 50_000, None, 0.02), (3, 50_000, 40, 0.5)])
def test_figures_of_many_rows_are_sklearns(seed, rows, values, positives):
    p, y, weight, _ = drawn(seed, rows, values, positives)
    for w in (None, weight):
        assert ours.auc(p, y, w) == pytest.approx(sklearn.roc_auc_score(y, p, sample_weight=w), rel=1e-10)
        assert ours.log_loss(p, y, w) == pytest.approx(sklearn.log_loss(y, p, sample_weight=w), rel=1e-10)
        squared = sklearn.mean_squared_error(y, p, sample_weight=w)
        assert ours.rmse(p, y, w) == pytest.approx(math.sqrt(squared), rel=1e-10)
        assert ours.mae(p, y, w) == pytest.approx(sklearn.mean_absolute_error(y, p, sample_weight=w), rel=1e-10)
        assert ours.calibration(p, y, w) == pytest.approx(np.average(p, weights=w) / np.average(y, weights=w))


def test_the_auc_of_one_class_is_undefined():
    scores = np.array([0.1, 0.5, 0.9])
    for labels in (np.zeros(3), np.ones(3)):
        assert math.isnan(ours.auc(scores, labels))
        assert math.isnan(ours.gauc(scores, labels, np.array([0, 0, 1])))
    assert math.isnan(ours.auc(scores[:0], scores[:0]))
    assert ours.auc(np.array([0.4, 0.4]), np.array([1.0, 0.0])) == 0.5  # defined: the pair ties


def test_gauc_averages_the_auc_of_groups_with_both_classes_by_their_rows():
    scores, labels, weight, group = drawn(4, 700, 9)
    for w in (None, weight):
        sums = np.zeros(2)
        for g in np.unique(group):
            rows = group == g
            if len(set(labels[rows])) == 2:
                within = None if w is None else w[rows]
                mass = rows.sum() if w is None else w[rows].sum()
                sums += mass * sklearn.roc_auc_score(labels[rows], scores[rows], sample_weight=within), mass
        assert sums[1] < (700 if w is None else weight.sum())  # some groups have one class and are left out
        assert ours.gauc(scores, labels, group, w) == pytest.approx(sums[0] / sums[1], rel=1e-12)


@pytest.mark.parametrize("k", [1, 3, 100])
@pytest.mark.parametrize("classes", [2, 5])
def test_ndcg_is_sklearns_in_each_group_with_ties_shared(k, classes):
    scores, _, _, group = drawn(5, 400, 6)
    gains = np.random.default_rng(6).integers(0, classes, 400).astype(np.float64)
    gains[group == 3] = 0  # a group where nothing is to be found
    expected = []
    for g in np.unique(group):
        rows = group == g
        if gains[rows].sum() and rows.sum() > 1:
            expected.append(sklearn.ndcg_score([gains[rows]], [scores[rows]], k=k))
        elif gains[rows].sum():
            expected.append(1.0)  # sklearn refuses a list of one
    assert ours.ndcg(scores, gains, group, k) == pytest.approx(np.mean(expected), rel=1e-12)


def test_calibration_error_by_hand():
    p = np.array([0.1, 0.2, 0.6, 0.8])
    y = np.array([0.0, 1.0, 1.0, 1.0])
    # Two bins of two rows: |0.15 - 0.5| and |0.7 - 1|, half of the rows each.
    assert ours.calibration_error(p, y, bins=2) == pytest.approx(0.5 * 0.35 + 0.5 * 0.3)
    weight = np.array([3.0, 1.0, 1.0, 1.0])
    assert ours.calibration_error(p, y, weight, bins=2) == pytest.approx((abs(0.5 - 1.0) + abs(1.4 - 2.0)) / 6)
    # Rows of one prediction are one bin, however many bins are asked for.
    assert ours.calibration_error(np.full(8, 0.25), np.arange(8) % 4 == 0, bins=4) == pytest.approx(0)


def test_predictions_that_are_the_chances_are_calibrated():
    random = np.random.default_rng(7)
    p = random.random(200_000) ** 3
    y = (random.random(200_000) < p).astype(np.float64)
    assert ours.calibration(p, y) == pytest.approx(1, abs=0.01)
    assert ours.calibration_error(p, y) < 0.006
    assert ours.calibration_error(p / 2, y) == pytest.approx(p.mean() / 2, rel=0.02)


def test_kappa_is_sklearns_with_quadratic_weights():
    random = np.random.default_rng(8)
    y, weight = random.integers(0, 5, 300), random.random(300)
    classes = np.clip(y + random.integers(-1, 2, 300), 0, 4)
    for w in (None, weight):
        expected = sklearn.cohen_kappa_score(classes, y, weights="quadratic", sample_weight=w)
        assert ours.kappa(classes.astype(float), y.astype(float), w) == pytest.approx(expected, rel=1e-10)


def test_an_infinite_log_loss_is_kept_finite_as_sklearn_does():
    p, y = np.array([0.0, 1.0, 0.5]), np.array([1.0, 0.0, 1.0])
    assert ours.log_loss(p, y) == pytest.approx(sklearn.log_loss(y, p))


TASKS = (
    Target("click"),
    Target("buy", given="click"),
    Target("watched", kind="regression"),
    Target("stars", kind="ordinal", classes=5),
)


def batch_of(seed, rows):
    """Predictions, labels (some absent), groups and weights."""
    random = torch.Generator().manual_seed(seed)
    chance = {name: torch.rand(rows, generator=random).double() for name in ("click", "buy", "watched", "stars")}
    chance["buy_joint"], chance["stars"] = chance["click"] * chance["buy"], chance["stars"] * 4
    labels = torch.stack(
        [
            torch.rand(rows, generator=random).round(),
            torch.rand(rows, generator=random).round(),
            torch.randn(rows, generator=random),
            torch.randint(5, (rows,), generator=random).float(),
        ],
        dim=1,
    )
    labels[:, 1] *= labels[:, 0]  # nothing is bought without a click
    labels[torch.rand(labels.shape, generator=random) < 0.2] = torch.nan
    group, weight = torch.randint(6, (rows,), generator=random), torch.rand(rows, generator=random)
    return chance, labels, group, weight


def test_figures_of_a_stream_count_labelled_rows_alone():
    metrics = TableMetrics(TASKS, ndcg_k=3)
    batches = [batch_of(seed, rows) for seed, rows in ((1, 40), (2, 1), (3, 0), (4, 60))]
    for chance, labels, group, weight in batches:
        # Two rows of padding, which may hold anything.
        padded = {name: torch.cat([p, torch.full((2,), torch.nan)]) for name, p in chance.items()}
        real = torch.arange(len(labels) + 2) < len(labels)
        columns = (torch.cat([labels, torch.ones(2, 4)]), torch.cat([group, group.new_ones(2)]))
        metrics.add(padded, *columns, torch.cat([weight, torch.ones(2)]), real)
    found = metrics.compute()
    assert metrics.undefined == {}

    chances = {name: np.concatenate([b[0][name].numpy() for b in batches]) for name in batches[0][0]}
    labels, group, weight = (np.concatenate([b[i].numpy() for b in batches]) for i in (1, 2, 3))
    click, buy, _, stars = labels.T

    def auc_of(name, label, rows):
        return sklearn.roc_auc_score(label[rows], chances[name][rows], sample_weight=weight[rows])

    assert found["auc/click"] == pytest.approx(auc_of("click", click, ~np.isnan(click)))
    # A conversion counts among clicks; click and conversion together count wherever both are known.
    assert found["auc/buy"] == pytest.approx(auc_of("buy", buy, (click == 1) & ~np.isnan(buy)))
    both = np.where(click == 0, 0, np.where(click == 1, buy, np.nan))
    assert found["auc/buy_joint"] == pytest.approx(auc_of("buy_joint", both, ~np.isnan(both)))
    known = ~np.isnan(stars)
    nearest = np.rint(chances["stars"][known])
    expected = sklearn.accuracy_score(stars[known], nearest, sample_weight=weight[known])
    assert found["accuracy/stars"] == pytest.approx(expected)
    names = {"auc", "logloss", "calibration", "ece", "gauc", "ndcg3"}
    for task in ("click", "buy", "buy_joint"):
        assert {key.split("/")[0] for key in found if key.split("/")[1] == task} == names
    of_stars = {key.split("/")[0] for key in found if key.endswith("stars")}
    assert {key for key in found if key.endswith("watched")} == {"rmse/watched", "mae/watched"}
    assert of_stars == {"rmse", "mae", "accuracy", "kappa", "ndcg3"}


def test_of_three_tasks_in_a_chain_all_must_happen_and_none_does_where_the_first_did_not():
    tasks = (Target("click"), Target("cart", given="click"), Target("buy", given="cart"))
    random = np.random.default_rng()
    click, cart, buy = random.choice([0.0, 1.0, np.nan], (3, 300))
    cart[click == 0] = np.nan  # nobody asks what comes after a click that was not
    chance = random.random(300)
    metrics = TableMetrics(tasks)
    names = ("click", "cart", "cart_joint", "buy", "buy_joint")
    labels = torch.from_numpy(np.stack([click, cart, buy], 1))
    metrics.add({name: torch.from_numpy(chance) for name in names}, labels)
    found = metrics.compute()

    def every(*happened):
        """1 where all happened, 0 where one that is known before the rest did not, nan where that is not known."""
        for value in happened:
            if value != 1:
                return value
        return 1.0

    joint = np.array([every(*row) for row in zip(click, cart, buy)])
    known = ~np.isnan(joint)
    assert found["auc/buy_joint"] == pytest.approx(sklearn.roc_auc_score(joint[known], chance[known]))
    assert found["logloss/buy_joint"] == pytest.approx(sklearn.log_loss(joint[known], chance[known]))
    asked = (click == 1) & (cart == 1) & ~np.isnan(buy)
    assert found["auc/buy"] == pytest.approx(sklearn.roc_auc_score(buy[asked], chance[asked]))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([0.0, 0.0, torch.nan], "no row is positive"),
        ([1.0, torch.nan, 1.0], "no row is negative"),
        ([torch.nan] * 3, "no row has a label"),
    ],
)
def test_an_undefined_figure_is_nan_and_says_why(labels, told):
    metrics = TableMetrics([Target("click")])
    metrics.add({"click": torch.tensor([0.2, 0.4, 0.6])}, torch.tensor(labels)[:, None])
    assert math.isnan(metrics.compute()["auc/click"])
    assert metrics.undefined == {"click": told}


def test_predictions_that_are_not_finite_have_no_figures():
    metrics = TableMetrics([Target("click")])
    metrics.add({"click": torch.tensor([0.2, torch.nan])}, torch.tensor([[1.0], [0.0]]), torch.zeros(2).long())
    found = metrics.compute()
    assert all(math.isnan(value) for value in found.values())
    assert metrics.undefined == {"click": "predictions are not finite"}


def test_nothing_added_gives_nothing():
    assert TableMetrics(TASKS).compute() == {}


def part(rank, world):
    """This process's share of the stream: rows are dealt out unevenly, the last process gets none of the second."""
    metrics = TableMetrics(TASKS)
    for seed, shares in ((1, [30, 5, 1]), (2, [7, 3, 0])):
        chance, labels, group, weight = batch_of(seed, sum(shares))
        edges = np.cumsum([0, *shares])
        rows = slice(edges[rank], edges[rank + 1]) if world > 1 else slice(None)
        metrics.add({k: v[rows] for k, v in chance.items()}, labels[rows], group[rows], weight[rows])
    return metrics.compute()


def worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    torch.save(part(rank, 3), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_three_processes_with_uneven_shares_give_the_figures_of_one(tmp_path):
    mp.start_processes(worker, (str(tmp_path),), nprocs=3, start_method="fork")
    first, *others = (torch.load(tmp_path / f"{rank}.pt") for rank in range(3))
    assert all(other == first for other in others)
    assert first == pytest.approx(part(0, 1), rel=1e-12)


def test_rows_that_a_model_is_very_sure_of_are_told_apart():
    """In float32 the probabilities of logits above 17 are all 1, wrong ones among them."""
    schema = {"features": {"x": {"kind": "dense"}}, "tasks": {"a": {}}}
    model = zoo.create_model("recommendation/single_task", schema=schema)
    logits, labels = [30.0, 21.0, 18.0, -3.0, -40.0], [1.0, 0.0, 0.0, 1.0, 0.0]
    batch = replace(random_batch(model.schema, 5), labels=torch.tensor(labels)[:, None])
    model.forward = lambda batch: {"a": torch.tensor(logits)}
    task = RecommendationTask(model)
    task.on_validation_epoch_start()
    task.validation_step(batch, 0)
    figures = task._metrics.compute()
    pairs = [(a, b) for a, y in zip(logits, labels) for b, z in zip(logits, labels) if y > z]
    assert figures["auc/a"] == pytest.approx(sum(a > b for a, b in pairs) / len(pairs))
    losses = [math.log1p(math.exp(-z if y else z)) for z, y in zip(logits, labels)]
    assert figures["logloss/a"] == pytest.approx(sum(losses) / 5, rel=1e-6)
