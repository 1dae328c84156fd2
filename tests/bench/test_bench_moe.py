import json

import pytest
import torch

from zoo.bench import moe, turns
from zoo.bench.contestants import Problem, Shape, installed

SMALL = Shape(16, 32, 16, 4, 2)


def test_every_contestant_but_the_limit_computes_the_same_layer():
    problem = Problem.random(SMALL, torch.float32, "cpu")
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
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        moe.main(arguments)
    assert message in capsys.readouterr().err
