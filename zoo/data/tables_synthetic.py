"""The synthetic regression tasks of the MMoE paper (Ma et al., KDD 2018, section 3.2): as related as one asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .tables_files import Columns
from .tables_schema import Dense, Schema, Target
from .tables_split import HELD_OUT, Table, held_out_of


@dataclass(frozen=True)
class RegressionTasks:
    """Two related tasks. With u_1, u_2 orthonormal, w_1 = u_1, w_2 = p u_1 + sqrt(1 - p^2) u_2 and x ~ N(0, I),

        y_k = w_k x + sum_(i=1..m) sin(alpha_i w_k x + beta_i) + eps_k,    so that cos(w_1, w_2) = p.

    weight [dim, 2], alpha and beta [m]; or of R pairs of tasks at once, [R, dim, 2] and [R, m].
    """

    weight: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray

    @classmethod
    def draw(
        cls,
        random: np.random.Generator,
        correlation: float,
        dim: int = 100,
        m: int = 10,
        frequencies: Literal["google", "ple"] = "google",
    ) -> RegressionTasks:
        """Tasks with p = correlation; arguments and errors as of `multi_task_regression`."""
        if not -1 <= correlation <= 1:
            raise ValueError(f"correlation: expected a number from -1 to 1, got {correlation}")
        if dim < 2:
            raise ValueError(f"dim: two tasks need at least 2 dimensions, got {dim}")
        if frequencies not in ("google", "ple"):
            raise ValueError(f"frequencies: expected google or ple, got {frequencies!r}")
        basis, _ = np.linalg.qr(random.standard_normal((dim, 2)))
        weight = basis @ np.array([[1.0, correlation], [0.0, (1 - correlation**2) ** 0.5]])
        if frequencies == "google":
            alpha, beta = np.arange(1.0, m + 1), np.arange(0.0, m) ** 2
        else:
            alpha, beta = random.standard_normal((2, m))
        return cls(weight, alpha, beta)

    def labels(self, x: np.ndarray) -> np.ndarray:
        """y [..., rows, 2] of inputs x [..., rows, dim], without noise."""
        y = linear = x @ self.weight
        for i in range(self.alpha.shape[-1]):
            y = y + np.sin(self.alpha[..., i, None, None] * linear + self.beta[..., i, None, None])
        return y


def multi_task_regression(
    rows: int,
    correlation: float,
    dim: int = 100,
    m: int = 10,
    seed: int = 0,
    noise_std: float = 0.01,
    frequencies: Literal["google", "ple"] = "google",
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs x [rows, dim] and labels y [rows, 2] of `RegressionTasks`, both float32.

    The paper leaves m, alpha and beta open. "google": alpha_i = i and beta_i = (i - 1)^2, of the generator in
    google-research; "ple": both from N(0, 1), as in section 5.2.1 of PLE (Tang et al., RecSys 2020); m = 10 in both.
    eps is written as N(0, 0.01); 0.01 is the deviation here, as in that generator. The seed decides all that is random.
    Raises ValueError for a correlation that is not between -1 and 1, or a dim below 2.
    """
    random = np.random.default_rng(seed)
    tasks = RegressionTasks.draw(random, correlation, dim, m, frequencies)
    x = random.standard_normal((rows, dim))
    y = tasks.labels(x)
    y = y + noise_std * random.standard_normal(y.shape)
    return x.astype(np.float32), y.astype(np.float32)


def synthetic_schema(dim: int = 100) -> Schema:
    """Numbers x0, x1, ... and the regression tasks task_1 and task_2."""
    features = tuple(Dense(f"x{i}") for i in range(dim))
    return Schema(features, (Target("task_1", kind="regression"), Target("task_2", kind="regression")))


def synthetic_table(
    correlation: float = 0.5,
    rows: int = 50_000,
    dim: int = 100,
    m: int = 10,
    seed: int = 0,
    noise_std: float = 0.01,
    frequencies: Literal["google", "ple"] = "google",
    held_out: float = HELD_OUT,
) -> Table:
    """The tasks as a table of `rows` rows in all; arguments are those of `multi_task_regression`."""
    x, y = multi_task_regression(rows, correlation, dim, m, seed, noise_std, frequencies)
    columns = {f"x{i}": x[:, i] for i in range(dim)} | {"task_1": y[:, 0], "task_2": y[:, 1]}
    origin = f"MMoE's synthetic tasks, correlation {correlation:g}"
    return Table(origin, synthetic_schema(dim), held_out_of({"train": Columns(origin, columns)}, held_out))
