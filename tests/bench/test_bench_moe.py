import json

import pytest
import torch

from zoo.bench import moe, turns
from zoo.bench.contestants import Problem, Shape, installed

SMALL = Shape(16, 32, 16, 4, 2)


@pytest.mark.parametrize("routing", [False, True])
def test_every_contestant_but_the_limit_computes_the_same_layer(routing):
    problem = Problem.random(SMALL, torch.float32, "cpu", routing)
    field = {one.name: one for one in installed(problem, ("reference", "cpu", "grouped_mm"))}
    assert {"dense", "zoo cpu", "transformers eager", "transformers batched_mm"} <= set(field)
    expected = field["zoo reference"].run()
    for one in field.values():
        if one.group != "limit":
            torch.testing.assert_close(one.run(), expected, rtol=1e-4, atol=1e-5)


def test_contestants_take_turns():
    field = installed(Problem.random(SMALL, torch.float32, "cpu"), ("cpu",))
    order = []
    for one in field:
        run = one.run
        one.run = lambda name=one.name, run=run: order.append(name) or run()
    taken = turns.measure(field, 3, True, "cpu")
    names = [one.name for one in field]
    rounds = [order[i : i + len(names)] for i in range(0, len(order), len(names))]
    assert len(rounds) == 1 + turns.WARM_UP + 3
    assert all(sorted(each) == sorted(names) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert all(len(seconds) == 3 for seconds in taken.values())


def test_table_and_file_hold_every_contestant(tmp_path, capsys):
    out = tmp_path / "bench.json"
    shape = ["--shape", "16,32,16,4,2", "--dtype", "float32", "--device", "cpu", "--repeats", "1"]
    assert moe.main([*shape, "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    (result,) = written["results"]
    assert written["machine"]["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for row in result["rows"]:
        assert row["name"] in printed
    by_name = {row["name"]: row for row in result["rows"]}
    assert by_name["dense"]["of_dense"] == 1.0
    assert max(r["against_best_rival"] for n, r in by_name.items() if n.startswith("transformers")) == 1.0


def test_routing_is_part_of_the_layer_and_gives_logits_their_gradient():
    problem = Problem.random(Shape(40, 16, 8, 130, 3), torch.float32, "cpu", routing=True)
    gaps = problem.logits.sort(-1).values.diff(dim=-1)
    assert gaps.min() >= 2**-14
    results = {}
    for one in installed(problem, ("reference", "cpu")):
        if one.group != "limit":
            assert any(leaf is problem.logits for leaf in one.leaves)
            results[one.name] = torch.autograd.grad(one.run().square().sum(), [problem.logits])[0]
    # Written out: the softmax over all experts, of which the k best are kept.
    probs = problem.logits.softmax(-1)
    y = 0
    for j, e in enumerate(problem.logits.detach().sort(-1, descending=True).indices[:, :3].T):
        gate, up = torch.einsum("td,thd->th", problem.x, problem.w_in[e]).chunk(2, -1)
        out = torch.einsum("tf,tdf->td", torch.nn.functional.silu(gate) * up, problem.w_out[e])
        y = y + probs.gather(1, e[:, None]) * out
        assert torch.equal(problem.choice[:, j], e)
    (expected,) = torch.autograd.grad(y.square().sum(), [problem.logits])
    for name, grad in results.items():
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_phases_and_rates_are_those_of_each_turn(tmp_path, capsys):
    out = tmp_path / "bench.json"
    shape = ["--shape", "64,32,16,4,2", "--dtype", "float32", "--device", "cpu", "--repeats", "1", "--routing"]
    assert moe.main([*shape, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "64,32,16,4,2 float32, forward + backward with routing" in printed
    assert "TFLOP/s f" in printed
    (result,) = json.loads(out.read_text())["results"]
    operations = 6 * 64 * 16 * 32 * 2
    timed = [row for row in result["rows"] if not row["refuses"]]
    assert {"dense", "zoo cpu"} <= {row["name"] for row in timed}
    for row in timed:
        assert row["forward_ms"] + row["backward_ms"] == pytest.approx(row["ms"])
        assert row["forward_tflops"] * row["forward_ms"] == pytest.approx(operations / 1e9)
        assert row["backward_tflops"] * row["backward_ms"] == pytest.approx(2 * operations / 1e9)


def test_a_list_of_shapes_has_a_name():
    args = moe._parse(["--shapes", "h200", "--shape", "8,8,8,2,1"])
    assert args.shapes == "h200"
    assert moe.shape_of(moe.PRESETS["h200"][0]) == (40960, 768, 256, 128, 8)
    assert all(moe.shape_of(text).k <= moe.shape_of(text).experts for text in moe.PRESETS["h200"])


@pytest.mark.parametrize(("option", "tokens"), [(["--decode"], 1), (["--decode", "3"], 3)])
def test_decoding_times_few_tokens_without_the_dense_limit(option, tokens, capsys):
    small = ["--shape", "16,32,16,4,2", "--dtype", "bfloat16", "--device", "cpu", "--repeats", "1"]
    assert moe.main([*small, *option]) == 0
    printed = capsys.readouterr().out
    assert f"{tokens},32,16,4,2 bfloat16, forward of {tokens} token(s)" in printed
    assert "dense  " not in printed.replace("of dense", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2,3"], "expected five positive integers"),
        (["--shape", "8,8,8,2,3"], "K = 3 choices of E = 2 experts"),
        (["--repeats", "0"], "expected at least 1"),
        (["--decode", "0"], "expected at least 1 token"),
        (["--device", "tpuu"], "error: --device tpuu: "),
        (["--json", "nowhere/x.json"], "expected a file that can be written, in a folder that is there, got nowhere/x"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        moe.main(arguments)
    assert message in capsys.readouterr().err


def test_a_backend_that_is_none_is_named(capsys):
    assert moe.main(["--backend", "cpuu"]) == 2
    assert capsys.readouterr().err == "error: unknown backend 'cpuu'; did you mean cpu?\n"
