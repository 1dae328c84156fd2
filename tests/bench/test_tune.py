"""`zoo tune`, and compiling ahead: what is measured is kept, and used."""

import json
import time
from dataclasses import replace

import pytest
import torch

from zoo.bench import tune
from zoo.bench.contestants import Shape
from zoo.bench.gpu import ahead, setting, tiles

pytest.importorskip("triton")
from zoo.moe.kernels.triton import tuned
from zoo.moe.kernels.triton.plans import PLANS
from zoo.moe.kernels.triton.tiles import plan_for

SHAPE = Shape(64, 256, 128, 16, 2)
DTYPES = {"x": torch.bfloat16, "weight": torch.float32, "token_index": torch.int64, "offsets": torch.int32}


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    tuned.tuned.cache_clear()
    yield
    tuned.tuned.cache_clear()


def small(**changes):
    return replace(setting.cpu("reference"), **changes)


def job(plan, shape=SHAPE):
    return ahead.Job(shape, DTYPES, tiles.key_of(shape, torch.bfloat16), plan, 90)


@pytest.fixture
def fake(monkeypatch):
    """As if there were a GPU, on which two stages in `up` double the speed of the forward."""

    class Timer:
        def __init__(self, setting, shape):
            pass

        def __call__(self, plan, forward):
            return 1.0 if forward and plan.up.stages == 2 else 2.0

    monkeypatch.setattr(tiles, "Timer", Timer)
    monkeypatch.setattr(tiles, "refusal", lambda setting: None)


def test_what_was_found_is_kept_and_used(fake, capsys):
    assert tune.main(["--device", "cpu", "--shape", "64,256,128,16,2", "--shape", "4096,512,256,16,2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("64,256,128,16,2: forward 2.00, backward 1.00 times the table's speed")
    file = tuned.file_of("interpreter")
    assert said[-1] == f"written to {file}"
    entries = json.loads(file.read_text())["entries"]
    assert [(e["dim"], e["hidden_dim"], e["rows"], e["element_size"]) for e in entries] == [
        (256, 128, "few", 2),
        (512, 256, "many", 2),
    ]
    assert all(entry["gain"] == {"forward": 2.0, "backward": 1.0} for entry in entries)
    x, w_in, w_out = ahead.like(SHAPE, torch.bfloat16)
    assert plan_for(128, w_in, w_out, x).up.stages == 2
    assert plan_for(12800, w_in, w_out, x) is PLANS["90", 2, "many"]  # other rows than were tuned for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,16,16,2"], "expected five positive integers"),
        (["--shape", "1,16,24,2,1"], "D and F are multiples of 16"),
        ([], "expected --shape"),
        (["--shape", "1,16,16,2,1", "--seconds", "0"], "--seconds 0.0: expected a positive number"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        tune.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_added_to_is_found_before_the_work(fake, capsys):
    file = tuned.file_of("interpreter")
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert tune.main(["--device", "cpu", "--shape", "64,256,128,16,2"]) == 2
    assert f"{file} does not hold tiles" in capsys.readouterr().err
    assert file.read_text() == "{}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main(["--shape", "64,256,128,16,2"]) == 2
    assert capsys.readouterr().err == "zoo tune: no CUDA device was found here\n"


def test_a_plan_is_used_inside_its_block_alone():
    key = tiles.key_of(SHAPE, torch.bfloat16)
    table = tiles.table_plan(SHAPE, torch.bfloat16, "90")
    other = replace(table, up=replace(table.up, warps=8))
    x, w_in, w_out = ahead.like(SHAPE, torch.bfloat16)
    with ahead.planned("meta", key, other):
        assert plan_for(128, w_in, w_out, x) is other
    assert plan_for(128, w_in, w_out, x) is table


def test_plans_compile_without_a_gpu(tmp_path):
    plan = tiles.table_plan(SHAPE, torch.bfloat16, "90")
    impossible = replace(plan, up=replace(plan.up, k=7))
    found = ahead.Compiler(small())([job(plan), job(impossible)])
    assert found[0] is None
    assert list((tmp_path / "triton").rglob("up_kernel.cubin"))
    assert "CompilationError" in str(found[1])


def test_plans_are_compiled_by_several_processes(tmp_path):
    plan = tiles.table_plan(SHAPE, torch.bfloat16, "90")
    given = small(processes=2)
    compiler = ahead.Compiler(given)
    try:
        assert compiler([job(plan)]) == [None]
        assert list((tmp_path / "triton").rglob("up_kernel.cubin"))
        given.deadline = time.monotonic()
        late = compiler([job(plan, SHAPE._replace(tokens=t)) for t in range(64, 200)])
        assert "not compiled in time" in late
    finally:
        compiler.close()
