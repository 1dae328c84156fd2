"""The MMoE paper's synthetic tasks: their closed forms, and as a table."""

import math

import numpy as np
import pytest

from zoo.data.tables import open_table
from zoo.data.tables_synthetic import multi_task_regression


def weights_of(x, y):
    """What a label is made of when there are no sines: y = x w, solved for w [dim, 2]."""
    return np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64), rcond=None)[0]


@pytest.mark.parametrize("correlation", [-1.0, -0.3, 0.0, 0.5, 0.9, 1.0])
def test_the_cosine_of_the_weights_is_the_correlation(correlation):
    seed = int(np.random.default_rng().integers(2**31))
    x, y = multi_task_regression(500, correlation, dim=20, m=0, noise_std=0, seed=seed)
    w = weights_of(x, y)
    np.testing.assert_allclose(w.T @ w, [[1, correlation], [correlation, 1]], atol=1e-5)


def test_labels_are_the_sum_of_the_linear_part_and_sines_as_in_the_generator_of_google_research():
    seed = int(np.random.default_rng().integers(2**31))
    arguments = {"rows": 200, "correlation": 0.5, "dim": 30, "noise_std": 0.0, "seed": seed}
    x, linear = multi_task_regression(**arguments, m=0)
    again, y = multi_task_regression(**arguments)
    np.testing.assert_array_equal(x, again)
    for row in range(200):
        for task in range(2):
            dot = float(linear[row, task])
            expected = dot + sum(math.sin(i * dot + (i - 1) ** 2) for i in range(1, 11))
            assert y[row, task] == pytest.approx(expected, abs=2e-4)  # linear is rounded to float32


def covariance_of_labels(p, alpha, beta):
    """Cov(y_1, y_2) without noise: E of products of linear and sine parts of two normals u, v with correlation p.

    E[u sin(a v + b)] = a p exp(-a^2/2) cos b, and E[sin(a u + b) sin(c v + d)] is half of
    exp(-(a^2+c^2)/2) (exp(a c p) cos(b-d) - exp(-a c p) cos(b+d)); the means exp(-a^2/2) sin b are taken off.
    """
    total = p
    for a, b in zip(alpha, beta):
        total += 2 * a * p * math.exp(-(a**2) / 2) * math.cos(b)
        for c, d in zip(alpha, beta):
            both = math.exp(-(a**2 + c**2) / 2)
            product = (math.exp(a * c * p) * math.cos(b - d) - math.exp(-a * c * p) * math.cos(b + d)) / 2
            total += both * (product - math.sin(b) * math.sin(d))
    return total


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_the_covariance_of_the_labels_is_its_closed_form(correlation):
    seed, rows = int(np.random.default_rng().integers(2**31)), 200_000
    _, y = multi_task_regression(rows, correlation, dim=2, noise_std=0.0, seed=seed)
    alpha, beta = range(1, 11), [i**2 for i in range(10)]
    products = (y[:, 0] - y[:, 0].mean()) * (y[:, 1] - y[:, 1].mean())
    expected = covariance_of_labels(correlation, alpha, beta)
    assert products.mean() == pytest.approx(expected, abs=float(5 * products.std() / rows**0.5))
    variance = covariance_of_labels(1.0, alpha, beta)
    squares = (y[:, 1] - y[:, 1].mean()) ** 2
    assert squares.mean() == pytest.approx(variance, abs=float(5 * squares.std() / rows**0.5))


def test_noise_has_the_deviation_asked_for_and_inputs_are_standard_normal():
    arguments = {"rows": 20_000, "correlation": 0.9, "dim": 10, "seed": 5}
    x, clean = multi_task_regression(**arguments, noise_std=0.0)
    _, noisy = multi_task_regression(**arguments, noise_std=0.3)
    noise = noisy - clean
    np.testing.assert_allclose(noise.std(0), 0.3, rtol=0.05)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.04
    np.testing.assert_allclose(np.cov(x.T), np.eye(10), atol=0.06)


def test_the_frequencies_of_ple_are_drawn_with_the_seed():
    def draw(seed, frequencies):
        return multi_task_regression(50, 0.5, dim=5, seed=seed, frequencies=frequencies)[1]

    np.testing.assert_array_equal(draw(1, "ple"), draw(1, "ple"))
    assert not np.allclose(draw(1, "ple"), draw(2, "ple"))
    # At p = 1 both tasks are one function, whatever it is.
    same = multi_task_regression(50, 1.0, dim=5, noise_std=0.0, frequencies="ple")[1]
    np.testing.assert_allclose(same[:, 0], same[:, 1], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"correlation": 1.5}, "correlation: expected a number from -1 to 1, got 1.5"),
        ({"correlation": 0.5, "dim": 1}, "dim: two tasks need at least 2 dimensions, got 1"),
        ({"correlation": 0.5, "frequencies": "mmoe"}, "frequencies: expected google or ple, got 'mmoe'"),
    ],
)
def test_what_cannot_be_generated_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        multi_task_regression(10, **arguments)


def test_the_table_holds_the_rows_in_three_splits():
    options = {"correlation": 0.9, "rows": 400, "dim": 6, "seed": 7, "noise_std": 0.1}
    table = open_table("synthetic", held_out=0.25, **options)
    assert table.description == (
        "MMoE's synthetic tasks, correlation 0.9: 6 numbers and 0 features of ids a row; tasks task_1, task_2"
    )
    x, y = multi_task_regression(**options)
    preparation = table.fit()
    numbers = []
    for split in ("train", "val", "test"):
        rows = table.encode(split, preparation)
        np.testing.assert_array_equal(rows.dense, x[rows.numbers])
        np.testing.assert_array_equal(rows.labels, y[rows.numbers])
        numbers += rows.numbers.tolist()
    assert sorted(numbers) == list(range(400))
