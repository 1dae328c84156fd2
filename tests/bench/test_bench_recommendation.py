import argparse
import json
from importlib.util import find_spec

import pytest
import torch

from zoo.bench import recommendation

TINY = ["--batch", "16", "--rows", "10", "--dim", "4", "--experts", "2", "--widths", "8", "4", "--device", "cpu"]
RIVALS = {
    "DeepCTR-Torch": "deepctr_torch",
    "DeepCTR-Torch, its fit": "deepctr_torch",
    "torch-rechub": "torch_rechub",
}


def arguments(**changed) -> argparse.Namespace:
    return argparse.Namespace(**{"batch": 16, "rows": 10, "dim": 4, "experts": 2, "widths": [8, 4], **changed})


def flops(run) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_limit_does_the_products_of_a_plain_model_and_no_others():
    """But that a model needs no gradient of its input's numbers, all products of its step are those of the limit."""
    args = arguments(batch=64, rows=50, dim=8)
    runs = {c.name: c.run for c in recommendation.contestants(args, "cpu")}
    ratio = flops(runs["plain torch, a loop"]) / flops(runs["dense"])
    assert 0.9 < ratio < 1.1


def test_every_contestant_that_trains_lowers_its_loss_on_its_batch():
    torch.manual_seed(0)
    for contestant in recommendation.contestants(arguments(batch=64, dim=8, widths=[16, 8]), "cpu"):
        if contestant.refuses or contestant.group == "limit":
            continue
        losses = [float(contestant.run()) for _ in range(120 // contestant.steps)]
        assert losses[-1] < 0.96 * losses[0], contestant.name


def test_table_and_file_hold_every_contestant(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert recommendation.main([*TINY, "--repeats", "1", "--json", str(out)]) == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    by_name = {row["name"]: row for row in written["rows"]}
    for name, row in by_name.items():
        assert name in printed
        if "ms" in row:
            assert row["rows_per_second"] == pytest.approx(16e3 / row["ms"])
        else:
            assert not find_spec(RIVALS[name])
    ours = by_name[recommendation.OURS]["ms"]
    assert written["ratios"] == {
        name: pytest.approx(row["ms"] / ours) for name, row in by_name.items() if "ms" in row and row["ms"] != ours
    }


def test_ours_and_the_plain_model_have_the_same_parameters():
    import zoo
    from zoo.data.tables_schema import Categorical, Dense, Schema, Target

    features = [Categorical(f"c{i}", num_embeddings=10, ids="index") for i in range(recommendation.FIELDS)]
    dense = [Dense(f"i{i}") for i in range(recommendation.NUMBERS)]
    schema = Schema((*features, *dense), tuple(Target(f"t{i}") for i in range(recommendation.TASKS)), dim=4)
    model = zoo.create_model("recommendation/mmoe", schema=schema, num_experts=2, expert_dims=[8, 4], tower_dims=[32])
    width = recommendation.FIELDS * 4 + recommendation.NUMBERS
    experts = 2 * (width * 8 + 8 + 8 * 4 + 4)
    per_task = width * 2 + 4 * 32 + 32 + 32 + 1
    tables = recommendation.FIELDS * 10 * 4
    assert sum(p.numel() for p in model.parameters()) == experts + recommendation.TASKS * per_task + tables


@pytest.mark.parametrize("name", ["batch", "rows", "dim", "experts", "repeats"])
def test_mistakes_in_sizes_are_named(name, capsys):
    with pytest.raises(SystemExit):
        recommendation.main([*TINY, f"--{name}", "0"])
    assert f"--{name} 0: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--dim", "6"], "--dim 6: expected a multiple of 4"),
        (["--widths", "8", "0"], "--widths 8 0: expected at least 1 each"),
        (["--json", "."], "expected a file that can be written"),
        (["--json", "nowhere/x.json"], "in a folder that is there, got nowhere/x.json"),
    ],
)
def test_what_would_fail_later_is_said_before_any_work(option, message, capsys):
    with pytest.raises(SystemExit):
        recommendation.main([*TINY, *option])
    assert message in capsys.readouterr().err
