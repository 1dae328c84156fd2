"""Census-Income, both groups of tasks of the MMoE paper: every model with the same tuning and the same seeds.

python scripts/study_census.py --root data/census --out runs/census-study

For each group and model: `--tuning` settings, the same draws for all models (learning rate, dropout and weight decay of
embeddings and layers), each trained once; the setting with the best AUC of the main task on the validation half is
trained with `--seeds` other seeds. A run trains with Adam for at most `--epochs`, and its figures on the test half are
those of its best validation epoch. Models have about as many parameters as the shared bottom of 256 units.

Leaves in OUT: runs.csv, every run; study.md, means and deviations beside the published ones, and what every model adds
to a shared bottom and PLE to MMoE, run by run with the same seed. Runs that are done, with the same --epochs and
--patience, are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tasks.cli import run_script
from tasks.folders import check_writable

GROUPS = {"income": "income", "education": "education"}  # group: its main task; the other is never_married
AUXILIARY = "never_married"
BATCH = 1024
ZERO_ROWS = 20_000  # in which zeros are counted
TOWER = {"tower_dims": [32]}
EIGHT = {"num_experts": 8, "expert_dims": [38], **TOWER}
MODELS: dict[str, dict[str, Any]] = {
    "single_task": {"bottom_dims": [142], **TOWER},
    "shared_bottom": {"bottom_dims": [256], **TOWER},
    "omoe": EIGHT,
    "mmoe": EIGHT,
    "dselect_k_mmoe": EIGHT,
    "sparse_mmoe": EIGHT,
    "cgc": {"task_experts": 3, "shared_experts": 2, "expert_dims": [38], **TOWER},
    "ple": {"task_experts": 3, "shared_experts": 2, "expert_dims": [33], **TOWER},
    "adatt": {"task_experts": 3, "shared_experts": 2, "expert_dims": [33], **TOWER},
    "snr_trans": {"num_experts": 4, "expert_dims": [40], **TOWER},
    "m3oe": {"num_experts": 8, "bottom_dims": [54, 54], "expert_dims": [54], **TOWER},
}
# Means over 400 runs of Tables 1 and 2 of the MMoE paper (main task, never married).
PUBLISHED = {
    "income": {
        "single_task": (0.9337, 0.9922),
        "shared_bottom": (0.9295, 0.9921),
        "omoe": (0.9319, 0.9923),
        "mmoe": (0.9359, 0.9927),
    },
    "education": {
        "single_task": (0.8792, 0.9922),
        "shared_bottom": (0.8813, 0.9917),
        "omoe": (0.8813, 0.9912),
        "mmoe": (0.8826, 0.9924),
    },
}
FIELDS = ("group", "model", "phase", "setting", "seed", "epochs", "patience", "lr", "dropout", "decay", "epoch", "val")
FIELDS += ("main", "other", "parameters", "zeros", "most_zeros", "seconds")


def settings(count: int) -> list[dict[str, float]]:
    """What is tried, the same for every model; the first is what one would try first."""
    draw = random.Random(0)
    found = [{"lr": 1e-3, "dropout": 0.0, "decay": 0.0}]
    while len(found) < count:
        lr = round(math.exp(draw.uniform(math.log(3e-4), math.log(3e-3))), 6)
        found.append({"lr": lr, "dropout": draw.choice([0.0, 0.1, 0.3]), "decay": draw.choice([0.0, 1e-6, 1e-5])})
    return found[:count]


@cache
def data(group: str, root: str) -> Any:
    """The rows of a group, encoded once a process."""
    from tasks.recommendation_data import RecommendationData

    return RecommendationData(f"census:{group}", root=root, options={})


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train and test one model."""
    import time

    import torch

    import zoo
    from tasks.recommendation_evaluation import TableMetrics
    from zoo.moe.zeros import ZeroActivations

    torch.set_num_threads(1)
    started = time.time()
    source, main = data(job["group"], job["root"]), GROUPS[job["group"]]
    torch.manual_seed(job["seed"])
    model: Any = zoo.create_model(
        f"recommendation/{job['model']}", schema=source.schema, dropout=job["dropout"], **MODELS[job["model"]]
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=job["lr"], weight_decay=job["decay"], fused=True)
    order = torch.Generator().manual_seed(job["seed"])
    train = source.rows("train")

    def figures(split: str) -> dict[str, float]:
        rows, found = source.rows(split), TableMetrics(source.schema.tasks)
        with torch.no_grad():
            for start in range(0, len(rows), 4 * BATCH):
                batch = rows.batch(range(start, min(len(rows), start + 4 * BATCH)))
                found.add(model.predictions(model(batch)), batch.labels)
        return found.compute()

    best: dict[str, Any] = {"epoch": 0, "val": 0.0, "main": math.nan, "other": math.nan}  # of a run that diverged
    for epoch in range(1, job["epochs"] + 1):
        model.train()
        for indices in torch.randperm(len(train), generator=order).split(BATCH):
            batch = train.batch(indices.tolist())
            loss = sum(model.task_losses(model(batch), batch).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        if (reached := figures("val")[f"auc/{main}"]) > best["val"]:
            test = figures("test")
            best = {"epoch": epoch, "val": reached, "main": test[f"auc/{main}"], "other": test[f"auc/{AUXILIARY}"]}
        elif epoch - best["epoch"] >= job["patience"]:
            break
    zeros, rows = ZeroActivations(model), source.rows("test")
    with torch.no_grad(), zeros.watch():
        model(rows.batch(range(min(ZERO_ROWS, len(rows)))))
    shares = torch.cat(list(zeros.shares().values())).nan_to_num(1.0)
    found = {"zeros": round(float(shares.mean()), 4), "most_zeros": round(float(shares.max()), 4)}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return {**job, **best, **found, "seconds": round(time.time() - started, 1)}


class Runs:
    """Runs that are done, in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: list[dict[str, str]] = []
        if file.exists():
            with file.open(newline="") as lines:
                rows = csv.DictReader(lines)
                if tuple(rows.fieldnames or ()) != FIELDS:
                    raise ValueError(f"--out: {file} has other columns than this study's; name another folder")
                self.done = list(rows)
        else:
            file.write_text(",".join(FIELDS) + "\n")

    def of(self, **wanted: Any) -> list[dict[str, str]]:
        """Those with these values."""
        return [row for row in self.done if all(row[name] == str(value) for name, value in wanted.items())]

    def add(self, row: dict[str, Any]) -> None:
        """Keep one more."""
        self.done.append({name: str(row[name]) for name in FIELDS})
        with self.file.open("a", newline="") as out:
            csv.DictWriter(out, FIELDS, extrasaction="ignore").writerow(row)


def best_setting(runs: Runs, group: str, model: str, args: argparse.Namespace) -> int:
    """The setting whose run in tuning had the best validation AUC, of those that were asked for."""
    tried = runs.of(group=group, model=model, phase="tuning", epochs=args.epochs, patience=args.patience)
    asked = [row for row in tried if int(row["setting"]) < args.tuning]
    return int(max(asked, key=lambda row: float(row["val"]))["setting"])


def chosen(runs: Runs, group: str, model: str, args: argparse.Namespace) -> list[dict[str, str]]:
    """The runs of the best setting, with the seeds that were asked for."""
    key = {"setting": best_setting(runs, group, model, args), "epochs": args.epochs, "patience": args.patience}
    rows = runs.of(group=group, model=model, phase="seeds", **key)
    return [row for row in rows if int(row["seed"]) <= args.seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with census-income.data and census-income.test")
    parser.add_argument("--out", type=Path, default=Path("runs/census-study"), help="default %(default)s")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--tuning", type=int, default=3, help="settings tried for each model; default %(default)s")
    parser.add_argument("--seeds", type=int, default=4, help="runs of the best setting; default %(default)s")
    parser.add_argument("--epochs", type=int, default=5, help="default %(default)s")
    parser.add_argument("--patience", type=int, default=1, help="epochs without a better one; default %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each; default %(default)s")
    args = parser.parse_args()
    for name, least in (("tuning", 1), ("seeds", 2), ("epochs", 1), ("patience", 1), ("jobs", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(args, name)}")
    check_writable("--out", args.out)
    for group in args.groups:
        data(group, args.root).check("fit")
    args.out.mkdir(parents=True, exist_ok=True)
    runs, limits = Runs(args.out / "runs.csv"), {"epochs": args.epochs, "patience": args.patience}
    tried = settings(args.tuning)
    pairs = [(group, model) for group in args.groups for model in args.models]
    several = args.jobs > 1
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) if several else ThreadPoolExecutor(1) as pool:
        for phase, count in (("tuning", args.tuning), ("seeds", args.seeds)):
            jobs = []
            for group, model in pairs:
                for i in range(count):
                    setting = i if phase == "tuning" else best_setting(runs, group, model, args)
                    seed = 0 if phase == "tuning" else i + 1
                    key = {"group": group, "model": model, "phase": phase, "setting": setting, "seed": seed, **limits}
                    if not runs.of(**key):
                        jobs.append(pool.submit(run, {**key, "root": args.root, **tried[setting]}))
            try:
                for number, job in enumerate(as_completed(jobs), 1):
                    row = job.result()
                    runs.add(row)
                    where = f"{phase} {number}/{len(jobs)}: {row['group']}, {row['model']}, setting {row['setting']}"
                    print(f"{where}: {row['main']:.4f} {row['other']:.4f}, {row['seconds']} s", flush=True)
            except BaseException:  # or what is left would be trained first, for nothing
                pool.shutdown(cancel_futures=True)
                raise
    text = report(runs, args.groups, args.models, args)
    (args.out / "study.md").write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {args.out}")


def report(runs: Runs, groups: list[str], models: list[str], args: argparse.Namespace) -> str:
    """A table a group."""
    lines = [
        f"{args.tuning} settings tried a model, then {args.seeds} paired seeds; at most {args.epochs} epochs. AUC "
        "on the test half, mean (deviation); published: the MMoE paper. Against the shared bottom: mean difference "
        "of the main task's AUC with the same seed, and its standard error. Zeros: their share in what experts give, "
        "the mean over all experts and that of the expert with the most."
    ]
    for group in groups:
        found = {m: chosen(runs, group, m, args) for m in models}
        header = [group, "parameters", f"AUC {GROUPS[group]}", "published", f"AUC {AUXILIARY}", "published", "best run"]
        header += ["against shared bottom", "zeros"]
        lines += ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for model, rows in found.items():
            published = [f"{figure:.4f}" for figure in PUBLISHED[group].get(model, ())] or ["", ""]
            cells = [model, f"{int(rows[0]['parameters']):,}", spread(rows, "main"), published[0]]
            cells += [spread(rows, "other"), published[1], f"{max(float(row['main']) for row in rows):.4f}"]
            zeros = (fmean(float(row[name]) for row in rows) for name in ("zeros", "most_zeros"))
            cells += [against(rows, found.get("shared_bottom", [])), " / ".join(f"{share:.0%}" for share in zeros)]
            lines.append("| " + " | ".join(cells) + " |")
        if {"ple", "mmoe"} <= set(found):
            lines += ["", f"PLE against MMoE: {against(found['ple'], found['mmoe'])}."]
    return "\n".join(lines)


def spread(rows: list[dict[str, str]], name: str) -> str:
    """Mean and deviation."""
    values = [float(row[name]) for row in rows]
    return f"{fmean(values):.4f} ({stdev(values):.4f})"


def against(rows: list[dict[str, str]], others: list[dict[str, str]]) -> str:
    """Mean difference of the main task's AUC between runs of one seed, and its standard error."""
    theirs = {row["seed"]: float(row["main"]) for row in others}
    differences = [float(row["main"]) - theirs[row["seed"]] for row in rows if row["seed"] in theirs]
    if len(differences) < 2 or rows is others:
        return ""
    return f"{fmean(differences):+.4f} ± {stdev(differences) / math.sqrt(len(differences)):.4f}"


if __name__ == "__main__":
    run_script(main)
