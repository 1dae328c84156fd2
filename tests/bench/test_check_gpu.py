"""The checks for a GPU, in small on the CPU: they pass on what is right, and find what is wrong."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from zoo.bench.contestants import Shape
from zoo.bench.gpu import bits, capture, results, setting, times
from zoo.moe import QuantisedExperts, kernels

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_gpu.py"
SHAPE = Shape(13, 16, 24, 4, 2)


def small(**changes):
    return replace(setting.cpu("reference"), shapes=(SHAPE,), **changes)


def script(file, *arguments, **environment):
    command = [sys.executable, str(SCRIPT), "--json", str(file), *arguments]
    paths = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    given = os.environ | {"PYTHONPATH": paths} | environment
    return subprocess.run(command, env=given, capture_output=True, text=True)


def test_every_section_runs_and_is_summed_up(tmp_path):
    file = tmp_path / "out" / "check.json"
    done = script(file, "--device", "cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = json.loads(file.read_text())
    assert written["machine"]["versions"]["torch"] == torch.__version__
    names = ["device", "correct", "time", "decode", "repeat", "sync", "memory", "far", "graphs", "compile", "bits"]
    names += ["away", "tiles"]
    assert list(written["sections"]) == names
    summary = done.stdout[done.stdout.index("section   result") :]
    for name in names:
        section = written["sections"][name]
        assert section["error"] is None
        assert section["rows"], name
        assert re.search(rf"^{name} +ok ", summary, re.M)
    assert any("TFLOP/s" in row["note"] for row in written["sections"]["time"]["rows"])


def test_tiles_are_timed_under_the_interpreter(tmp_path):
    file = tmp_path / "check.json"
    options = ("--device", "cpu", "--only", "tiles", "--shape", "3,16,16,2,1")
    done = script(file, *options, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    sections = json.loads(file.read_text())["sections"]
    row = sections["tiles"]["rows"][0]
    assert row["figures"]["key"] == {"element_size": 2, "dim": 16, "hidden_dim": 16, "rows": "few"}
    assert row["figures"]["table_ms"]["backward"] > 0
    assert set(row["figures"]["best"]) == {"up", "down", "d_hidden", "d_x", "d_weight"}
    assert all("ms" in entry for entry in row["figures"]["candidates"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path):
    done = script(tmp_path / "check.json")
    assert done.returncode == 2
    assert done.stderr == "check_gpu: no CUDA device was found here; --device cpu tries the script in small\n"


def test_an_unknown_section_is_a_mistake(tmp_path):
    done = script(tmp_path / "check.json", "--device", "cpu", "--only", "speed")
    assert done.returncode == 2
    assert "--only speed: expected some of device, correct" in done.stderr


BREAK_TWO = """
import os
from zoo.bench.gpu import capture
def fails(setting):
    yield from ()
    raise RuntimeError("broken here")
def dies(setting):
    os._exit(7)
    yield
capture.sync, capture.graphs = fails, dies
"""


def test_a_section_that_fails_or_dies_does_not_stop_the_others(tmp_path):
    file = tmp_path / "check.json"
    (tmp_path / "sitecustomize.py").write_text(BREAK_TWO)  # Python runs it first, in every process
    paths = os.pathsep.join([str(tmp_path), str(SCRIPT.parents[1])])
    done = script(file, "--device", "cpu", "--only", "sync,graphs,memory", PYTHONPATH=paths)
    assert done.returncode == 1, done.stderr
    sections = json.loads(file.read_text())["sections"]
    assert sections["sync"]["error"] == "RuntimeError: broken here"
    assert sections["graphs"]["error"] == "its process ended with status 7"
    assert sections["memory"]["error"] is None
    assert len(sections["memory"]["rows"]) == 4
    summary = done.stdout[done.stdout.index("section   result") :]
    assert re.search("^sync +FAIL .*broken here", summary, re.M)
    assert re.search("^memory +ok", summary, re.M)


SPOIL_CASES = """
import torch
from zoo.bench.gpu import results, setting
def case(number):
    if number in {spoiling}:
        torch.ones = None  # as an illegal access leaves the device
        raise RuntimeError(f"case {{number}} did it")
    return setting.Row(f"case {{number}}", True)
def cases(given):
    for number in range(5):
        yield from setting.tried(given, f"case {{number}}", lambda: case(number))
results.repeat = cases
"""


@pytest.mark.parametrize(("spoiling", "found"), [((1, 3), "+-+-+"), ((4,), "++++-"), ((0, 1, 2, 3, 4), "----")])
def test_cases_after_one_that_spoils_the_device_are_tried_in_another_process(spoiling, found, tmp_path):
    file = tmp_path / "check.json"
    (tmp_path / "sitecustomize.py").write_text(SPOIL_CASES.format(spoiling=spoiling))
    paths = os.pathsep.join([str(tmp_path), str(SCRIPT.parents[1])])
    done = script(file, "--device", "cpu", "--only", "repeat,memory", "--shape", "3,16,16,2,1", PYTHONPATH=paths)
    assert done.returncode == 1, done.stderr
    sections = json.loads(file.read_text())["sections"]
    rows = sections["repeat"]["rows"]
    assert [row["what"] for row in rows] == [f"case {number}" for number in range(len(found))]
    assert "".join("+" if row["ok"] else "-" for row in rows) == found
    assert rows[spoiling[0]]["note"] == f"RuntimeError: case {spoiling[0]} did it"
    assert sections["memory"]["error"] is None
    assert all(row["ok"] for row in sections["memory"]["rows"])


def spoilt(name, monkeypatch, module):
    """Make our kernels wrong in one way."""
    true = kernels.moe_mlp

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.5

    def wrong(x, w_in, w_out, routing, *rest, **options):
        if name == "dx":
            x = Spoil.apply(x)
        elif name == "dw_out":
            w_out = Spoil.apply(w_out)
        elif name == "dlogits":
            routing.weight = Spoil.apply(routing.weight)
        y = true(x, w_in, w_out, routing, *rest, **options)
        return y * 1.5 if name == "y" else y

    monkeypatch.setattr(module, "moe_mlp", wrong)


@pytest.mark.parametrize("name", ["y", "dx", "dw_out", "dlogits"])
def test_a_wrong_result_is_found(name, monkeypatch):
    assert all(row.ok for row in results.correct(small()))
    spoilt(name, monkeypatch, setting)
    rows = list(results.correct(small()))
    assert len(rows) == 7
    wrong = [row for row in rows if not row.ok]
    # The choice of one expert among one has no gradient, and those of few tokens are not looked at.
    assert len(wrong) == (3 if name == "dlogits" else len(rows))
    assert all(name in row.note for row in wrong if name != "y")
    assert not all(row.ok for row in results.far(small()))


def test_a_result_that_is_not_a_number_is_found(monkeypatch):
    true = setting.outputs_and_gradients
    monkeypatch.setattr(
        results, "outputs_and_gradients", lambda *args: {k: v * float("nan") for k, v in true(*args).items()}
    )
    assert not any(row.ok for row in (*results.correct(small()), *results.far(small())))


def test_a_case_that_fails_does_not_stop_its_section(monkeypatch):
    true = setting.outputs_and_gradients

    def fails_for_one_token(given, p, dy):
        if p.shape.tokens == 1:
            raise RuntimeError("out of something")
        return true(given, p, dy)

    monkeypatch.setattr(results, "outputs_and_gradients", fails_for_one_token)
    rows = {row.what: row for row in results.correct(small())}
    failed = rows.pop("1,16,24,4,2")
    assert not failed.ok
    assert failed.note == "RuntimeError: out of something"
    assert len(rows) == 6
    assert all(row.ok for row in rows.values())


def test_results_that_do_not_repeat_are_found(monkeypatch):
    true = setting.outputs_and_gradients

    def unsteady(*args):
        found = true(*args)
        found["dw_in"].view(-1)[torch.randint(found["dw_in"].numel(), ())] += torch.rand(())
        return found

    monkeypatch.setattr(results, "outputs_and_gradients", unsteady)
    rows = list(results.repeat(small()))
    assert all(row.ok is False and "dw_in differ" in row.note for row in rows)


def test_waiting_for_the_gpu_is_found(monkeypatch):
    calls = []

    def waits(*args):
        calls.append(args)
        if len(calls) % 2 == 0:  # the first is before waiting is an error
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(capture, "outputs_and_gradients", waits)
    first, second, layer = capture.sync(small())
    assert (first.ok, second.ok, layer.ok) == (False, False, True)


def test_a_graph_that_ignores_new_inputs_is_found(monkeypatch):
    def stale(setting, step, leaves):
        kept = step()
        return lambda: kept

    assert all(row.ok for row in capture.graphs(small()))
    monkeypatch.setattr(capture, "captured", stale)
    assert not any(row.ok for row in capture.graphs(small()))


def test_a_compiled_layer_with_another_result_is_found(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda layer, **options: lambda x: layer(x) * 1.1)
    assert [row.ok for row in capture.compiled(small())] == [False]


def test_a_tensor_kept_for_nothing_is_found(monkeypatch):
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(torch.ones(y.shape[0], 8, y.shape[1]))
            return y * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad

    assert all(row.ok for row in capture.memory(small()))
    true = capture.moe_mlp
    monkeypatch.setattr(capture, "moe_mlp", lambda *args: Keep.apply(true(*args)))
    assert not any(row.ok for row in capture.memory(small()))


def test_decoding_counts_the_bytes_of_the_experts_that_are_chosen():
    row = times.decode_row(small(), SHAPE._replace(tokens=1), 1e9)
    assert row.figures["experts"] == 2
    assert row.figures["bytes"] == 2 * 3 * 16 * 24 * 2
    assert row.figures["target_us"] == pytest.approx(1e6 * row.figures["bytes"] / 0.8e9)


def test_wrong_results_of_codes_are_found(monkeypatch):
    true = QuantisedExperts.decoded_first
    given = replace(small(), shapes=(Shape(13, 32, 32, 4, 2),), few=(1, 128))
    monkeypatch.setattr(QuantisedExperts, "unfused", lambda self, x: None)
    for fused, good in ((true, True), (lambda *args: true(*args) * 1.5, False)):
        monkeypatch.setattr(QuantisedExperts, "fused", fused)
        rows = [row for row in bits.few_bits(given) if "registers" in row.what]
        assert [row.ok for row in rows] == [good] * 6
    assert rows[0].figures["bytes"] > 2 * 3 * 32 * 32  # of at least the two experts of a token


def test_gradients_of_weights_are_judged_by_what_they_are_sums_of(monkeypatch):
    shape, given = Shape(1, 32, 32, 4, 2), small()
    few, p = bits._made(given, shape, "int8"), given.problem(shape, routing=False)
    dy = torch.randn_like(p.x)
    (y, _, dweight), sizes = bits._exact(few, p, dy)
    each, total = p.routing.expert_index, torch.zeros_like(y)
    for a, e in enumerate(each):
        gate, up = (few.w_in[e] @ p.x[0].detach().float()).chunk(2)
        out = few.w_out[e] @ (torch.nn.functional.silu(gate) * up)
        total += p.routing.weight[a].detach() * out
        torch.testing.assert_close(dweight[a].float(), out @ dy[0].float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sizes[a].float(), (out * dy[0].float()).square().sum().sqrt(), rtol=2e-2, atol=1e-4)
    torch.testing.assert_close(y, total, rtol=1e-4, atol=1e-4)
    # Where products cancel, what rounding leaves of them is no mistake.
    assert setting.distance(dweight + 1e-3 * sizes, dweight, sizes) == pytest.approx(1e-3, rel=0.02)
