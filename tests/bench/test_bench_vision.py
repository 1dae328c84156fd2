import argparse
import json

import pytest
import torch

from zoo.bench import vision

TINY = ["--model", "vmoe_tiny_test", "--batch", "2", "--device", "cpu", "--repeats", "1"]


def multiplications(contestant) -> int:
    """Of the MLPs and experts in one forward pass, counted where they happen."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        contestant.run()
    return counter.get_total_flops()


def test_the_dense_model_does_the_same_multiplications():
    args = argparse.Namespace(model="vmoe_tiny_test", batch=8, depth=None, dtype="float32")
    dense, sparse = vision.fields(args, "cpu")["V-MoE"]
    ratio = multiplications(dense) / multiplications(sparse)
    assert 0.95 < ratio < 1  # the gate's own come on top


def test_tables_and_file_hold_every_contestant(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert vision.main([*TINY, "--json", str(out)]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert [r["kind"] for r in written["results"]] == ["V-MoE"] * 2 + ["Soft MoE"] * 2
    for result in written["results"]:
        by_name = {row["name"]: row for row in result["rows"]}
        assert by_name["dense"]["of_dense"] == 1.0
        for name, row in by_name.items():
            assert name in printed
            assert row["images_per_second"] == pytest.approx(2e3 / row["ms"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--batch", "0"], "at least 1"),
        (["--repeats", "0"], "at least 1"),
        (["--depth", "1"], "at least 2"),
        (["--json", "nowhere/x.json"], "in a folder that is there"),
    ],
)
def test_mistakes_are_named(option, message, capsys):
    with pytest.raises(SystemExit):
        vision.main([*TINY, *option])
    assert message in capsys.readouterr().err
