"""The synthetic study of MMoE (KDD 2018, section 5.1): three models against the correlation of two tasks.

python scripts/study_synthetic.py --out runs/synthetic-study
python scripts/study_synthetic.py --runs 20 --steps 500 --correlations 0.5 1.0

Shared-bottom, OMoE and MMoE of about the same size, each trained `--runs` times on tasks, rows and weights of its own;
run r of every model and correlation meets the same inputs and sines. As in the paper: 100 features, 8 experts of one
layer of 16, towers of one layer of 8, a shared bottom of 113, Adam, and the learning rate chosen from 1e-4, 1e-3 and
1e-2 for each model and correlation (by the mean loss of `--tuning-runs` other runs). The paper does not say, and chosen
here are: batches of 128 fresh rows, the number of steps, and m = 10 sines with alpha and beta from N(0, 1), drawn anew
for every run, as PLE's authors filled them in (--frequencies google: those of google-research, the same for all runs).

Leaves in OUT: runs.csv, the final loss of every run; study.html with both figures of the paper, study.svg, a part of
the first; study.md, the paper's four claims with what was found. A correlation that is done is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from html import escape
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tasks.cli import run_script
from tasks.folders import check_writable

MODELS = {"shared_bottom": "Shared-Bottom", "omoe": "OMoE", "mmoe": "MMoE"}
SIZES: dict[str, dict[str, Any]] = {
    "shared_bottom": {"bottom_dims": [113], "tower_dims": [8]},
    "omoe": {"num_experts": 8, "expert_dims": [16], "tower_dims": [8]},
    "mmoe": {"num_experts": 8, "expert_dims": [16], "tower_dims": [8]},
}
RATES = (1e-4, 1e-3, 1e-2)
BATCH = 128
POINTS = 50  # of a curve
UNSEEN = 2048  # rows that a run is evaluated on
# Verdicts: a difference counts when it is two standard errors of paired runs from zero.
MUCH, COMPARABLE = 0.5, 1.1

Losses = dict[str, list[float]]  # by model, a loss a run


class Streams:
    """Rows of many runs' tasks without end."""

    def __init__(self, runs: int, correlation: float, frequencies: Any, seed: int) -> None:
        import numpy as np

        from zoo.data.tables_synthetic import RegressionTasks

        drawn = [
            RegressionTasks.draw(np.random.default_rng((seed, r)), correlation, frequencies=frequencies)
            for r in range(runs)
        ]
        stacked = (np.stack([getattr(t, name) for t in drawn]) for name in ("weight", "alpha", "beta"))
        self.tasks = RegressionTasks(*(values.astype(np.float32) for values in stacked))
        self.random = np.random.default_rng((seed, runs))

    def draw(self, rows: int) -> tuple[Any, Any]:
        """x [runs, rows, 100] and y [runs, rows, 2]."""
        import torch

        runs, dim, _ = self.tasks.weight.shape
        x = self.random.standard_normal((runs, rows, dim), dtype="float32")
        y = self.tasks.labels(x)
        y += 0.01 * self.random.standard_normal(y.shape, dtype="float32")
        return torch.from_numpy(x), torch.from_numpy(y)


class Ensemble:
    """Many copies of a model with weights of their own, computed and trained as one."""

    def __init__(self, name: str, runs: int, rate: float, seed: int) -> None:
        import torch

        import zoo

        torch.manual_seed(seed)
        models = [zoo.create_model(f"recommendation/{name}", **SIZES[name]) for _ in range(runs)]
        self.base = models[0]
        self.parameters, self.buffers = torch.func.stack_module_state(models)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=rate, fused=True)
        self.losses: Callable[..., Any] = torch.func.vmap(self._losses)

    def _losses(self, parameters: Any, buffers: Any, x: Any, y: Any) -> Any:
        """Mean squared error over rows and tasks of one of the copies."""
        import torch

        from zoo.data.tables_batch import TableBatch

        batch = TableBatch(torch.arange(x.shape[0]), x, None, None, None, y)
        out = torch.func.functional_call(self.base, (parameters, buffers), (batch,))
        return (torch.stack(list(out.values()), -1) - y).square().mean()

    def step(self, x: Any, y: Any) -> Any:
        """Train every copy on a batch of its own; the losses before it [runs]."""
        self.optimizer.zero_grad()
        losses = self.losses(self.parameters, self.buffers, x, y)
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    def evaluate(self, x: Any, y: Any) -> Any:
        """Losses [runs] on a batch."""
        import torch

        with torch.no_grad():
            return self.losses(self.parameters, self.buffers, x, y)


def train(field: dict[str, tuple[str, float]], runs: int, steps: int, streams: Streams, seed: int) -> Any:
    """Train ensembles {label: (model, learning rate)} on the same rows: their curves and the final losses."""
    import torch

    ensembles = {label: Ensemble(model, runs, rate, seed) for label, (model, rate) in field.items()}
    every, curves = max(1, steps // POINTS), {label: [] for label in field}
    sums = dict.fromkeys(field, torch.zeros(()))
    for step in range(1, steps + 1):
        x, y = streams.draw(BATCH)
        for label, ensemble in ensembles.items():
            sums[label] = sums[label] + ensemble.step(x, y).mean()
        if step % every == 0:
            for label in field:
                curves[label].append((step, float(sums[label]) / every))
                sums[label] = torch.zeros(())
    pieces = [streams.draw(UNSEEN // 4) for _ in range(4)]
    finals = {label: torch.stack([e.evaluate(*p) for p in pieces]).mean(0).tolist() for label, e in ensembles.items()}
    return curves, finals


def at_correlation(correlation: float, asked: dict[str, Any], folder: Path) -> Path:
    """Tune and train all models at one correlation; returns the file with the outcome."""
    import torch

    file = folder / f"correlation_{correlation:g}.json"
    if file.exists() and json.loads(file.read_text())["asked"] == asked:
        print(f"correlation {correlation:g}: done before", flush=True)
        return file
    torch.set_num_threads(1)
    started = time.time()
    candidates = {f"{model} {rate:g}": (model, rate) for model in MODELS for rate in RATES}
    streams = Streams(asked["tuning_runs"], correlation, asked["frequencies"], seed=1)
    _, tried = train(candidates, asked["tuning_runs"], asked["steps"], streams, seed=1)
    tuning = {model: {f"{rate:g}": fmean(tried[f"{model} {rate:g}"]) for rate in RATES} for model in MODELS}
    chosen = {model: float(min(rates, key=lambda rate: rates[rate])) for model, rates in tuning.items()}
    print(f"correlation {correlation:g}: learning rates {chosen}, {time.time() - started:.0f} s", flush=True)
    streams = Streams(asked["runs"], correlation, asked["frequencies"], seed=2)
    field = {model: (model, rate) for model, rate in chosen.items()}
    curves, finals = train(field, asked["runs"], asked["steps"], streams, seed=2)
    print(f"correlation {correlation:g}: { ({m: round(fmean(f), 4) for m, f in finals.items()}) }", flush=True)
    outcome = {"asked": asked, "correlation": correlation, "tuning": tuning, "rates": chosen}
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps({**outcome, "curves": curves, "finals": finals}) + "\n")
    return draft.replace(file)


def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of a - b over paired runs, and its standard error."""
    differences = [x - y for x, y in zip(a, b)]
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))


def claims(finals: dict[float, Losses]) -> list[tuple[str, str, str]]:
    """The four claims of the paper: the claim and how it is read, whether it held, and its figures."""
    low, high = min(finals), max(finals)
    pairs = {model: paired(finals[low][model], finals[high][model]) for model in MODELS}
    gaps = {model: gap for model, (gap, _) in pairs.items()}
    shown = ", ".join(f"{MODELS[m]} {gap:+.4f} ± {error:.4f}" for m, (gap, error) in pairs.items())
    others = [gaps["shared_bottom"], gaps["omoe"]]
    found = [
        (
            f"MMoE loses much less than the others from correlation {high:g} to {low:g} (at most half as much)",
            _verdict([gap > 0 and gaps["mmoe"] <= MUCH * gap for gap in others]),
            f"increase of the mean loss: {shown}",
        )
    ]
    same, worse = (paired(finals[c]["omoe"], finals[c]["mmoe"]) for c in (high, low))
    found.append(
        (
            f"OMoE is as good as MMoE at correlation {high:g} (within 2 standard errors, or 1%), and worse at {low:g}",
            _verdict([abs(same[0]) <= max(2 * same[1], 0.01 * fmean(finals[high]["mmoe"])), worse[0] > 2 * worse[1]]),
            f"OMoE - MMoE: {same[0]:+.4f} ± {same[1]:.4f} and {worse[0]:+.4f} ± {worse[1]:.4f}",
        )
    )
    better = {(c, m): paired(finals[c]["shared_bottom"], finals[c][m]) for c in finals for m in ("omoe", "mmoe")}
    found.append(
        (
            "Both mixtures are better than Shared-Bottom at every correlation",
            _verdict([mean > 2 * error for mean, error in better.values()]),
            "Shared-Bottom - it: "
            + ", ".join(f"{MODELS[m]} at {c:g} {mean:+.4f} ± {error:.4f}" for (c, m), (mean, error) in better.items()),
        )
    )
    spread = {c: {m: stdev(finals[c][m]) for m in MODELS} for c in finals}
    best = {c: {m: min(finals[c][m]) for m in MODELS} for c in finals}
    widest = [max(s, key=lambda m: s[m]) == "shared_bottom" for s in spread.values()]
    alike = [max(b.values()) <= COMPARABLE * min(b.values()) for b in best.values()]
    found.append(
        (
            "Shared-Bottom varies most between runs, and the best runs of the three are comparable (within 10%)",
            _verdict([*widest, *alike]),
            "; ".join(
                f"at {c:g}: deviation {', '.join(f'{spread[c][m]:.4f}' for m in MODELS)}, "
                f"best {', '.join(f'{best[c][m]:.4f}' for m in MODELS)}"
                for c in finals
            ),
        )
    )
    return found


def _verdict(parts: list[bool]) -> str:
    if all(parts) or not any(parts):
        return "reproduced" if all(parts) else "not reproduced"
    return f"in part ({sum(parts)} of {len(parts)})"


def histogram(losses: list[float], low: float, high: float, bins: int = 24) -> list[tuple[float, float]]:
    """Runs in each of equal bins, as the points of a curve."""
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for loss in losses:
        counts[min(bins - 1, int((loss - low) / width))] += 1
    return [(low + (i + 0.5) * width, count) for i, count in enumerate(counts)]


def write(folder: Path, outcomes: list[dict[str, Any]]) -> str:
    """The files of the study; returns the text of study.md."""
    from zoo.report.chart import Series, line_chart
    from zoo.report.page import columns, figure, page, section, table
    from zoo.report.picture import picture

    outcomes = sorted(outcomes, key=lambda o: o["correlation"])
    finals: dict[float, Losses] = {o["correlation"]: o["finals"] for o in outcomes}
    lines = ["correlation,run," + ",".join(MODELS)]
    for c, losses in finals.items():
        lines += [f"{c:g},{r}," + ",".join(f"{x:.6f}" for x in row) for r, row in enumerate(zip(*losses.values()))]
    (folder / "runs.csv").write_text("\n".join(lines) + "\n")

    header = ["correlation", "model", "learning rate", "mean loss", "deviation", "best run"]
    rows = [
        [f"{o['correlation']:g}", MODELS[m], f"{o['rates'][m]:g}"]
        + [f"{figure:.4f}" for figure in (fmean(o["finals"][m]), stdev(o["finals"][m]), min(o["finals"][m]))]
        for o in outcomes
        for m in MODELS
    ]
    asked = outcomes[0]["asked"]
    about = (
        f"{asked['runs']} runs of {asked['steps']} steps of {BATCH} rows, learning rates chosen by "
        f"{asked['tuning_runs']} others, frequencies of {asked['frequencies']}; final loss on {UNSEEN} unseen rows"
    )
    found = claims(finals)
    text = "\n".join(
        [f"{about}.", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        + ["| " + " | ".join(row) + " |" for row in rows]
        + ["", "Claims of the paper:", ""]
        + [f"{number}. {claim}: **{verdict}**. {figures}." for number, (claim, verdict, figures) in enumerate(found, 1)]
    )
    (folder / "study.md").write_text(text + "\n")

    colors = {m: f"--c{i}" for i, m in enumerate(MODELS)}
    curves, bars = [], []
    for o in outcomes:
        name, losses = f"correlation {o['correlation']:g}", o["finals"]
        series = [Series(MODELS[m], o["curves"][m], colors[m]) for m in MODELS]
        curves.append(figure(f"Training loss, {name}", line_chart(series, "steps", "squared error")))
        if o is outcomes[0]:
            (folder / "study.svg").write_text(picture(series, "steps", f"squared error, {name}"))
        low, high = (f(x for m in MODELS for x in losses[m]) for f in (min, max))
        counted = [Series(MODELS[m], histogram(losses[m], low, high), colors[m]) for m in MODELS]
        bars.append(figure(f"Final losses, {name}", line_chart(counted, "squared error", "runs")))
    cells = [[escape(cell) for cell in row] for row in rows]
    marks = [
        [escape(claim), f'<b class="{"good" if verdict == "reproduced" else "bad"}">{verdict}</b>', escape(figures)]
        for claim, verdict, figures in found
    ]
    sections = [
        section("The synthetic study of MMoE", f"{escape(about)}.", table(header, cells)),
        section("The claims of the paper", "", table(["claim", "here", "figures"], marks)),
        section("Mean loss while training", "Figure 4 of the paper.", columns(*curves)),
        section("Runs by their final loss", "Figure 5 of the paper.", columns(*bars)),
    ]
    (folder / "study.html").write_text(page("The synthetic study of MMoE", sections))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/synthetic-study"), help="default %(default)s")
    parser.add_argument("--runs", type=int, default=200, help="of each model, at least 2; default %(default)s")
    parser.add_argument("--tuning-runs", type=int, default=20, help="of each learning rate; default %(default)s")
    parser.add_argument("--steps", type=int, default=4000, help="default %(default)s")
    parser.add_argument("--correlations", type=float, nargs="+", default=[0.5, 0.9, 1.0])
    parser.add_argument("--frequencies", choices=("ple", "google"), default="ple")
    parser.add_argument("--jobs", type=int, default=2, help="correlations trained at a time; default %(default)s")
    args = parser.parse_args()
    for name, least in (("runs", 2), ("tuning_runs", 1), ("steps", 1), ("jobs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    if len(set(args.correlations)) < 2:
        parser.error("--correlations: expected at least two to compare")
    for correlation in args.correlations:
        if not -1 <= correlation <= 1:
            parser.error(f"--correlations: expected numbers from -1 to 1, got {correlation:g}")
    check_writable("--out", args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(args, name) for name in ("runs", "tuning_runs", "steps", "frequencies")}
    several = args.jobs > 1
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) if several else ThreadPoolExecutor(1) as pool:
        work = [pool.submit(at_correlation, c, asked, args.out) for c in sorted(set(args.correlations))]
        try:
            outcomes = [json.loads(job.result().read_text()) for job in work]
        except BaseException:  # or what is left would be trained first
            pool.shutdown(cancel_futures=True)
            raise
    print(f"\n{write(args.out, outcomes)}\n\nwritten to {args.out}")


if __name__ == "__main__":
    run_script(main)
