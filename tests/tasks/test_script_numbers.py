"""Numbers that make no sense are refused by the scripts before they read, train or write anything."""

import runpy
import sys
from pathlib import Path

import pytest

from zoo.data.tables_stream import Stream

SCRIPTS = Path(__file__).parents[2] / "scripts"
TRAINING = ["--steps", "--batch-size", "--image-size"]
# What a script needs beside, and its options that are whole numbers of at least 1.
OPTIONS = {
    "adapt_language": ([], ["--steps", "--base-steps", "--length", "--batch"]),
    "analyse_experts": (["model", "text"], ["--length", "--tokens"]),
    "answer_question": (["model", "what", "image"], ["--tokens"]),
    "bench_assignment": ([], ["--tokens", "--experts", "--width", "--repeats"]),
    "bench_dispatch": ([], ["--processes", "--tokens", "--k", "--repeats"]),
    "bench_offload": ([], ["--hidden", "--expert", "--layers", "--slots", "--tokens", "--repeats"]),
    "bench_shadows": ([], ["--processes", "--tokens", "--steps"]),
    "bench_shortcut": ([], ["--processes", "--tokens", "--sequence"]),
    "bench_topology": ([], ["--within", "--tokens", "--steps"]),
    "branch_train_mix": ([], ["--steps", "--k", "--width", "--layers", "--length", "--batch-size", "--pieces"]),
    "classify_images": (["model", "image"], ["--batch-size"]),
    "compare_routers": ([], ["--steps", "--seeds", "--eval-batches"]),
    "compress": (["model", "--out=out"], ["--keep", "--width", "--sequence-length", "--batches"]),
    "continue_language": (["model", "--out=out"], ["--steps", "--sequence-length"]),
    "describe_image": (["model", "image"], ["--tokens"]),
    "finetune_vision": (["model", "images", "--out=out"], TRAINING),
    "generate": (["model", "text"], ["--tokens", "--offload"]),
    "plot_capacity": (["model"], ["--choices"]),
    "score_table": (["model", "rows.csv", "--out=out"], ["--batch-size"]),
    "split_dense": (["model"], ["--experts", "--batch-size", "--length"]),
    "train_language": ([], ["--steps", "--sequence-length"]),
    "train_table": (["rows.csv", "schema.yaml", "--out=out"], ["--steps", "--batch-size"]),
    "upcycle_timm": (["model", "images", "--out=out"], [*TRAINING, "--experts"]),
    "zero_shot_classify": (["model", "image", "--classes", "cat"], ["--batch-size"]),
}


@pytest.mark.parametrize("script", OPTIONS)
def test_a_number_below_one_is_one_line(script, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    given, options = OPTIONS[script]
    for option in options:
        for value in ("0", "-3", "1.5"):
            monkeypatch.setattr(sys, "argv", [script, *given, f"{option}={value}"])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
            assert ended.value.code == 2
            told = f"argument {option}: expected a whole number of at least 1, got '{value}'"
            assert told in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_no_capacity_is_drawn_that_is_not_above_zero(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_capacity", "model", "--factors", "1", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPTS / "plot_capacity.py"), run_name="__main__")
    assert "argument --factors: expected a number above 0, got '0'" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, -1])
def test_a_stream_of_batches_without_rows_is_refused(size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        Stream(None, None, size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("bench_dispatch", ["--experts", "4", "--k", "5"], "--k: expected at most --experts 4, got 5"),
        ("bench_topology", ["--experts", "8", "--k", "9"], "k must be between 1 and num_experts=8, got 9"),
        ("bench_shadows", ["--processes", "3", "--experts", "4"], "3 processes do not divide 4 experts"),
        ("bench_shadows", ["--experts", "8", "--k", "9"], "--k: expected at most --experts 8, got 9"),
        ("bench_shadows", ["--skew", "nan"], "--skew: expected a finite number, got nan"),
        ("bench_offload", ["--json", f"{__file__}/out.json"], "is a file"),
        ("bench_olmoe", ["--json", f"{__file__}/out.json"], "is a file"),
        ("bench_olmoe", ["--sequence", "1"], "--sequence: expected at least 2 tokens"),
        ("bench_olmoe", ["--device", "nope"], "--device: expected cpu"),
    ],
)
def test_measurements_refuse_what_cannot_be_in_one_line(name, args, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *args])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
