"""Train every gate on one tiny language model and one tiny vision model, and put them side by side.

python scripts/compare_routers.py --out runs/routers --steps 300 --seeds 3
python scripts/compare_routers.py --domains language --routers "Switch" "hash*"

Writes OUT/routers.csv, OUT/routers.md and OUT/routers.svg: quality on unseen data, the busiest expert's load over the
mean (1 is even), the share of choices that capacity dropped, and training speed. Each domain has one model, the same
data in the same order, and the same learning rate for all gates: what the table shows is how they do untuned. Figures
are means over seeds of the weights and of the gates' noise, that of quality with its standard deviation.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

import zoo
from tasks.balance import LayerBalance
from tasks.cli import run_script
from tasks.folders import check_writable
from tasks.language import LanguageData, LanguageTask
from tasks.numbers import count
from tasks.optim import parameter_groups
from tasks.vision import VisionData, VisionTask
from zoo.data.images_rows import IGNORE
from zoo.moe.routers.hash import balanced_table
from zoo.moe.routers.remoe import update_l1

AHEAD = "lets tokens see later ones"
SWITCH = {"switch": 0.01}
COLUMNS = ("quality", "load_max", "drop_rate", "per_second")


@dataclass
class Gate:
    """One row: how the gate is described, from the settings of a run, its losses, and why a domain leaves it out."""

    spec: Callable[["Settings"], dict[str, Any]]
    losses: dict[str, Any] | None = None
    not_language: str = ""
    not_vision: str = ""


@dataclass
class Settings:
    """What gates may depend on."""

    steps: int
    frequencies: torch.Tensor | None = None  # of token ids


def gate(name: str, losses: dict[str, Any] | None = None, not_language: str = "", **arguments: Any) -> Gate:
    """A row whose arguments are the same in every run."""
    return Gate(lambda s: {"name": name, **arguments}, losses, not_language)


GATES: dict[str, Gate] = {
    "Shazeer": gate("TopKRouter", {"importance": 0.1, "load": 0.1}, score="softmax_topk", noise="learned"),
    "Switch": gate("TopKRouter", SWITCH, k=1, jitter=0.01, capacity={"factor": 1.25}),
    "GShard": gate("GShardRouter"),
    "V-MoE": gate(
        "TopKRouter",
        {"importance_vmoe": 0.005, "load_vmoe": 0.005},
        noise="fixed",
        noise_std=0.125,
        capacity={"factor": 1.05},
    ),
    "V-MoE, batch priority": gate(
        "TopKRouter",
        {"importance_vmoe": 0.005, "load_vmoe": 0.005},
        noise="fixed",
        noise_std=0.125,
        not_language=AHEAD,
        capacity={"factor": 1.05, "drop": "priority"},
    ),
    "Mixtral": gate("TopKRouter", SWITCH, score="softmax_topk"),
    "token rounding (SonicMoE)": gate("TokenRoundingRouter", SWITCH, normalize=True),
    "no balance at all": gate("TopKRouter", {}, score="softmax_topk"),
    "DeepSeek-V3 (loss-free bias)": gate("TopKRouter", {}, score="sigmoid", normalize=True, selection_bias=True),
    "Skywork": gate("TopKRouter", SWITCH, normalize_logits=1.0),
    "Skywork, adaptive loss": gate("SkyworkRouter"),
    "SparseMixer (GRIN)": gate("SparseMixerRouter", SWITCH),
    "ModuleFormer": gate("ModuleFormerRouter"),
    "attention router (Yuan)": gate("AttentionRouter", SWITCH),
    "hierarchical (Shazeer)": gate("HierarchicalRouter", num_groups=4),
    "output masking (NLLB)": gate("OutputMaskingRouter"),
    "null experts (AdaMoE)": gate("NullExpertRouter", {"null_load": 0.01}, k=3, num_null=4),
    "top-any (DYNMoE)": gate("DynamicRouter"),
    "X-MoE": gate("XMoERouter", SWITCH),
    "prototypes (M6-T)": gate("PrototypeRouter", SWITCH),
    "DSelect-k": gate("DSelectKRouter"),
    "ReMoE": gate("ReMoERouter"),
    "BASE": gate("BASERouter"),
    "Sinkhorn (S-BASE)": gate("SinkhornRouter", {}),
    "hash, random": Gate(lambda s: {"name": "HashRouter", "vocab_size": _size(s)}, not_vision="has no token ids"),
    "hash, balanced": Gate(
        lambda s: {"name": "HashRouter", "table": balanced_table(s.frequencies, 8)},  # type: ignore[arg-type]
        not_vision="has no token ids",
    ),
    "hash of bigrams": gate("HashRouter", feature="bigram"),
    "hash, several (MultiHash)": Gate(
        lambda s: {"name": "HashRouter", "vocab_size": _size(s), "hashes": 2}, not_vision="has no token ids"
    ),
    "StableMoE": Gate(
        lambda s: {"name": "StableMoERouter", "vocab_size": _size(s), "switch_step": max(s.steps // 2, 1)},
        not_vision="has no token ids",
    ),
    "random (THOR)": gate("RandomRouter"),
    "dense": gate("DenseRouter"),
    "DS-MoE": gate("DenseRouter", {"mutual_information": 1e-3}, eval_k=4),
    "EvoMoE": Gate(
        lambda s: {"name": "DenseToSparseRouter", "decay_steps": max(s.steps // 2, 1), "hard_steps": 2 * s.steps // 3}
    ),
    "SMoE-Dropout": Gate(lambda s: {"name": "SMoEDropoutRouter", "steps": s.steps, "k_max": 4}),
    "expert choice": gate("ExpertChoiceRouter", not_language=AHEAD),
    "expert choice, capped": gate("ExpertChoiceRouter", not_language=AHEAD, max_experts=3),
    "sentence": gate("SentenceRouter", not_language=AHEAD),
    "Soft MoE": gate("SoftRouter", not_language=AHEAD, slots=2),
    "SMEAR": gate("SMEARRouter", not_language=AHEAD),
    "MEO": gate("MEORouter", not_language=AHEAD),
    "Lory": gate("LoryRouter", segment=16),
    "MoT": gate("MoTRouter", group_size=4),
}
GATES["hash of bigrams"].not_vision = "has no token ids"


def _size(settings: Settings) -> int:
    assert settings.frequencies is not None
    return settings.frequencies.numel()


class Language:
    """Bits per byte of a two-layer decoder on text, by bytes."""

    name, quality, better, unit = "language", "bits per byte", "lower", "tokens"

    def __init__(self, source: str, steps: int) -> None:
        self.data = LanguageData(source, tokenizer="bytes", sequence_length=128, batch_size=16)
        self.vocab = self.data.tokenizer.vocab_size
        train = self.data.packed("train")
        ids = torch.cat([torch.as_tensor(train[i]["input_ids"]).flatten() for i in range(min(200, len(train)))])
        self.settings = Settings(steps, torch.bincount(ids.long(), minlength=self.vocab))

    def task(self, **gate: Any) -> LanguageTask:
        """The model with one gate."""
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4}
        model = zoo.create_model("language/mixtral_tiny", vocab_size=self.vocab, **sizes, **gate)
        return LanguageTask(model)

    def loss(self, task: LanguageTask, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What is trained."""
        return task.nats(batch).sum() / (batch["labels"] >= 0).sum().clamp(min=1)

    def sums(self, task: LanguageTask, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Bits and bytes of a batch."""
        text = batch["target_bytes"] >= 0
        return float(task.nats(batch)[text].sum()) / math.log(2), float(batch["target_bytes"].clamp(min=0).sum())


class Vision:
    """Error on handwritten digits of a small vision transformer."""

    name, quality, better, unit = "vision", "error", "lower", "images"

    def __init__(self, source: str, steps: int) -> None:
        self.data = VisionData(source, image_size=8, channels=1, batch_size=64)
        self.settings = Settings(steps)

    def task(self, **gate: Any) -> VisionTask:
        """The model with one gate."""
        sizes = {"embed_dim": 64, "depth": 4, "patch_size": 2, "img_size": 8, "in_chans": 1, "num_experts": 8}
        classes = len(self.data.classes)
        model = zoo.create_model("vision/vmoe_tiny_test", moe_layers="every-2", num_classes=classes, **sizes, **gate)
        return VisionTask(model)

    def loss(self, task: VisionTask, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What is trained."""
        return torch.nn.functional.cross_entropy(task.model(batch["image"]), batch["label"])

    def sums(self, task: VisionTask, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Wrong answers and images of a batch."""
        real = batch["label"] != IGNORE
        wrong = (task.model(batch["image"]).argmax(-1) != batch["label"]) & real
        return float(wrong.sum()), float(real.sum())


def forever(loader: Any) -> Iterator[Any]:
    """Batches, epoch after epoch."""
    while True:
        yield from loader


def compare(domain: Any, options: dict[str, Any], eval_batches: int, seeds: int) -> dict[str, float]:
    """Train a model with each seed and measure them: means, and the deviation of quality."""
    runs = [train(domain, options, eval_batches, seed) for seed in range(seeds)]
    row = {column: mean(run[column] for run in runs) for column in runs[0]}
    if seeds > 1:
        row["deviation"] = stdev(run["quality"] for run in runs)
    return row


def train(domain: Any, options: dict[str, Any], eval_batches: int, seed: int) -> dict[str, float]:
    """Train one model and measure it."""
    torch.manual_seed(seed)
    task = domain.task(**options)
    model, batches, seconds, seen = task.model.train(), forever(domain.data.train_dataloader()), [], 0
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=2e-3)
    for step in range(domain.settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / 20, 1.0)
        batch = next(batches)
        start = time.perf_counter()
        with zoo.moe.record(model) as decided:
            loss = domain.loss(task, batch) + sum(decided.losses().values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        zoo.moe.balance.update_biases(model)
        zoo.moe.schedule.advance(model)
        update_l1(model)
        seconds.append(time.perf_counter() - start)
        seen = task.count(batch)
    balance, top, bottom = LayerBalance(), 0.0, 0.0
    model.eval()
    for i, batch in enumerate(domain.data.val_dataloader()):
        if i == eval_batches:
            break
        with torch.no_grad(), zoo.moe.record(model) as decided:
            a, b = domain.sums(task, batch)
        top, bottom = top + a, bottom + b
        balance.update(decided)
    layers = list(balance.compute().values())
    row = {"quality": top / max(bottom, 1.0), "per_second": seen / median(seconds)}
    for name in ("load_max", "drop_rate"):
        if layers:
            row[name] = sum(layer[name] for layer in layers) / len(layers)
    return row


def rows(domain: Any, wanted: list[str], eval_batches: int, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for every gate, best first to the reader's eye is up to the table; those left out say why."""
    for name, made in {"dense twin": None, **GATES}.items():
        if not any(fnmatchcase(name, pattern) for pattern in wanted):
            continue
        row: dict[str, Any] = {"domain": domain.name, "gate": name}
        reason = getattr(made, f"not_{domain.name}", "")
        if reason:
            yield {**row, "note": f"not run: {reason}"}
            continue
        options = {"dense": True} if made is None else {"router": made.spec(domain.settings)}
        if made is not None and made.losses is not None:
            options["losses"] = made.losses
        yield {**row, **compare(domain, options, eval_batches, seeds)}


def shown(row: dict[str, Any], column: str) -> str:
    """A figure as text."""
    if column not in row:
        return "-"
    digits = {"quality": 3, "load_max": 2, "drop_rate": 3, "per_second": 0}[column]
    spread = f" ± {row['deviation']:.{digits}f}" if column == "quality" and "deviation" in row else ""
    return f"{row[column]:.{digits}f}{spread}"


def markdown(found: list[dict[str, Any]], domains: list[Any]) -> str:
    """One table a domain, best quality first."""
    parts = []
    for domain in domains:
        mine = [row for row in found if row["domain"] == domain.name]
        head = [
            "gate",
            f"{domain.quality} ({domain.better} is better)",
            "busiest / mean",
            "dropped",
            f"{domain.unit}/s",
        ]
        lines = [f"## {domain.name}, {domain.settings.steps} steps", "", " | ".join(["", *head, ""]).strip()]
        lines.append("| " + " | ".join(["---"] * len(head)) + " |")
        for row in sorted(mine, key=lambda row: row.get("quality", math.inf)):
            cells = [row["note"], "", "", ""] if "note" in row else [shown(row, column) for column in COLUMNS]
            lines.append("| " + " | ".join([row["gate"], *cells]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def picture(found: list[dict[str, Any]], domains: list[Any]) -> str:
    """Bars: a row a gate, a column a figure; a domain below the other."""
    line, left, width, y = 18, 190, 170, 0
    parts: list[str] = []
    for domain in domains:
        mine = sorted((r for r in found if r["domain"] == domain.name and "quality" in r), key=lambda r: r["quality"])
        y += 2 * line
        for i, title in enumerate((domain.quality, "busiest / mean", "dropped", f"{domain.unit}/s")):
            parts.append(f'<text x="{left + i * width}" y="{y}" font-weight="bold">{escape(title)}</text>')
        for row in mine:
            y += line
            parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{escape(row["gate"])}</text>')
            for i, column in enumerate(COLUMNS):
                most = max((r[column] for r in mine if column in r), default=0.0) or 1.0
                x, size = left + i * width, (width - 70) * row.get(column, 0.0) / most
                parts.append(f'<rect x="{x}" y="{y - 11}" width="{size:.1f}" height="12" fill="#4477aa"/>')
                parts.append(f'<text x="{x + size + 4:.1f}" y="{y}">{shown(row, column)}</text>')
    size = f'width="{left + 4 * width}" height="{y + line}"'
    style = 'font-family="sans-serif" font-size="12" fill="#222222"'
    back = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{back}{"".join(parts)}</svg>\n'


def write(folder: Path, found: list[dict[str, Any]], domains: list[Any]) -> None:
    """The three files, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f"{name}.tmp" for name in ("routers.csv", "routers.md", "routers.svg")}
    with drafts["routers.csv"].open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["domain", "gate", *COLUMNS, "deviation", "note"], restval="")
        table.writeheader()
        table.writerows(found)
    drafts["routers.md"].write_text(markdown(found, domains), encoding="utf-8")
    drafts["routers.svg"].write_text(picture(found, domains), encoding="utf-8")
    for name, draft in drafts.items():
        draft.replace(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/routers"), help="default %(default)s")
    parser.add_argument("--steps", type=count, default=300, help="optimizer steps a gate, default %(default)s")
    parser.add_argument("--seeds", type=count, default=1, help="models a gate, default %(default)s")
    parser.add_argument("--eval-batches", type=count, default=20, help="default %(default)s")
    parser.add_argument("--domains", nargs="+", choices=("language", "vision"), default=["language", "vision"])
    parser.add_argument("--routers", nargs="+", default=["*"], help="names or patterns of rows; default all")
    parser.add_argument("--text", default="stdlib", help="what the language model reads (see tasks.language)")
    args = parser.parse_args()
    known = ("dense twin", *GATES)
    for pattern in args.routers:
        if not any(fnmatchcase(name, pattern) for name in known):
            parser.error(f"no gate is called {pattern}; there are: {', '.join(known)}")
    check_writable("--out", args.out)
    if (args.out / "routers.csv").exists():
        raise ValueError(f"--out: {args.out} has the results of an earlier comparison; name another folder")
    made = {"language": lambda: Language(args.text, args.steps), "vision": lambda: Vision("digits", args.steps)}
    domains, found = [made[name]() for name in args.domains], []
    for domain in domains:
        for row in rows(domain, args.routers, args.eval_batches, args.seeds):
            found.append(row)
            print(row["domain"], row["gate"], row.get("note") or [shown(row, c) for c in COLUMNS], flush=True)
            write(args.out, found, domains)
    print(f"written to {args.out}")


if __name__ == "__main__":
    run_script(main)
