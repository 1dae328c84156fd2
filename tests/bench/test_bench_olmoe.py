"""The benchmark of whole training steps, on a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_olmoe.py"
TINY = ["--model", "language/olmoe_tiny", "--layers", "2", "--batch", "2", "--sequence", "24", "--device", "cpu"]


def test_everyone_trains_the_same_model(monkeypatch, tmp_path, capsys):
    file = tmp_path / "olmoe.json"
    rivals = ["--rival", "grouped_mm", "--rival", "eager", "--rival", "unknown"]
    more = ["--repeats", "1", "--dtype", "float32", "--peak-tflops", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *rivals, *more])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    written = json.loads(file.read_text())
    rows = {row["name"]: row for row in written["rows"]}
    unknown = rows.pop("transformers unknown")
    assert "ValueError" in unknown["refuses"]
    assert set(rows) == {"zoo core", "zoo in transformers", "transformers grouped_mm", "transformers eager"}
    for row in rows.values():
        assert row["refuses"] is None
        assert row["tokens_per_second"] == pytest.approx(48 / row["ms"] * 1e3)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * written["operations_per_token"] / 2e12)
    # By hand: attention, four of 16 experts of 3*128*128, the gate, norms and the output layer, 2 layers.
    layer = 2 * 128 * 128 + 2 * 64 * 128 + 4 * 3 * 128 * 128 + 16 * 128 + 2 * 128 + 128 + 64
    assert written["operations_per_token"] == 6 * (2 * layer + 128 + 1024 * 128) + 12 * 2 * 128 * 24
    assert "left out: it failed with ValueError" in capsys.readouterr().out


def test_our_core_shares_every_parameter_and_its_gradient(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, "--dtype", "float32"])
    script = runpy.run_path(str(SCRIPT))
    args = script["options"]()
    model = script["theirs"](args)
    core = script["ours"](args, model)
    assert {id(p) for p in core.parameters()} == {id(p) for p in model.parameters()}
    ids = torch.randint(0, model.config.vocab_size, (2, 24))
    gradients = []
    for network in (model, core):
        model.zero_grad()
        network(input_ids=ids, labels=ids).loss.backward()
        gradients.append({id(p): p.grad.clone() for p in model.parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-3, atol=1e-5)


def test_mistakes_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--layers", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "--layers 0: expected at least 1" in capsys.readouterr().err
