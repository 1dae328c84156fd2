import csv
import json
import math

import pytest

EXPERTS, LAYERS = 8, 3


@pytest.fixture
def run_folder(tmp_path):
    """A finished run as `zoo demo` leaves it: the MoE makes 400 steps in 80 s, the dense twin 500."""
    folder = tmp_path / "run"
    write_run(folder)
    return folder


def write_run(folder):
    def table(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)

    def when(step, rate):
        return {"step": step, "seconds": step / rate, "tokens": step * 4096}

    for name, rate, steps, floor in (("moe", 5.0, 400, 1.6), ("dense", 6.25, 500, 1.75)):
        bits = {step: floor + 6 * math.exp(-step / 60) + 1.5 / math.sqrt(step) for step in range(1, steps + 1)}
        wobble = [0.1 * math.sin(step * 12.9898) for step in range(steps + 1)]
        train = [{**when(s, rate), "bits_per_byte": bits[s] + 0.05 + wobble[s]} for s in bits]
        table(folder / "language" / name / "train.csv", train)
        val = [{**when(s, rate), "bits_per_byte": bits[s], "perplexity": 2.0 ** bits[s]} for s in bits if s % 50 == 0]
        table(folder / "language" / name / "val.csv", val)
    rows = []
    for step in range(10, 401, 10):
        for layer in range(LAYERS):
            raw = [1 + 0.9 * math.sin(e * 2.1 + layer) * math.exp(-step / 100) for e in range(EXPERTS)]
            loads = {f"load_{e}": value / sum(raw) for e, value in enumerate(raw)}
            violation = max(raw) / sum(raw) * EXPERTS - 1
            entropy = math.log(EXPERTS) * (0.4 + 0.6 * math.exp(-step / 80 / (layer + 1)))
            rows.append({"step": step, "layer": layer, "entropy": entropy, "max_violation": violation, **loads})
    table(folder / "language" / "moe" / "experts.csv", rows)
    tokens = ["self", ".", "\n    ", " return", "(", " <b>&", "None", "        ", "def", '"""']
    special = [
        {
            "layer": layer,
            "load": [1 / EXPERTS] * EXPERTS,
            "decided_by_token": 0.61,
            "decided_by_position": 0.02,
            "experts": [
                [{"token": t, "share": 0.9 - 0.05 * i, "count": 40} for i, t in enumerate(tokens[e:] + tokens[:e])]
                for e in range(EXPERTS)
            ],
        }
        for layer in range(LAYERS)
    ]
    samples = [{"prompt": "def f(", "text": "def f(self, x):\n    return x < 3 & True\n"}]
    model = {"total": 12_000_000, "active": 4_000_000}
    about = {
        "corpus": "source of Python 3.11.7's standard library: 687 files, 12301020 bytes",
        "tokenizer": "bpe:4096",
        "precision": "bf16-mixed",
        "models": {"moe": model, "dense": {**model, "total": 4_000_000}},
    }
    facts = {
        "made_by": "zoo demo",
        "status": "finished",
        "started": "2026-11-23 10:00:00 UTC",
        "processor": "Some Processor",
        "cores": 2,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "wall_seconds": 200.0,
    }
    for path, content in (
        ("demo.json", facts),
        ("language/about.json", about),
        ("language/moe/specialisation.json", special),
        ("language/moe/samples.json", samples),
    ):
        (folder / path).write_text(json.dumps(content))
