"""Tiles kept for a model of GPU: written whole, read once, and used for the shapes they were measured on."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from zoo.moe.kernels.triton import plans, tiles, tuned
from zoo.moe.kernels.triton.tuned import Entry, Key

PLAN = plans.PLANS["90", 2, "some"]
OTHER = replace(PLAN, up=replace(PLAN.up, stages=5), down=replace(PLAN.down, warps=8))
KEY = Key(2, 64, 32, "few")


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_ZOO_CACHE", str(tmp_path))
    tuned.tuned.cache_clear()
    yield
    tuned.tuned.cache_clear()


def layer(dim=64, hidden_dim=32, experts=4, gated=True, dtype=torch.bfloat16, odd=False):
    """w_in, w_out, x."""
    x = torch.empty(20, dim + odd, dtype=dtype)[:, :dim]
    w_in = torch.empty(experts, hidden_dim * (2 if gated else 1), dim, dtype=dtype)
    return w_in, torch.empty(experts, dim, hidden_dim, dtype=dtype), x


def test_the_file_is_named_after_the_gpu(tmp_path, monkeypatch):
    assert tuned.file_of("NVIDIA H100 80GB HBM3") == tmp_path / "tiles" / "NVIDIA_H100_80GB_HBM3.json"
    assert tuned.file_of("../a/b").parent == tmp_path / "tiles"
    monkeypatch.delenv("MOE_ZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.file_of("x") == tmp_path / "xdg" / "moe-zoo" / "tiles" / "x.json"


def test_an_entry_holds_for_its_shape_alone():
    table = tiles.plan_for(40, *layer())
    assert table is plans.PLANS["90", 2, "few"]
    tuned.write("interpreter", [Entry(KEY, OTHER, {"forward": 1.5})])
    assert tiles.plan_for(40, *layer()) == OTHER
    assert tiles.plan_for(40, *layer(dtype=torch.float16)) == OTHER
    assert tiles.plan_for(40, *layer(experts=20)) == OTHER
    for rows, each in (
        (400, layer()),  # more rows
        (40, layer(dim=80)),
        (40, layer(hidden_dim=48)),
        (40, layer(gated=False)),
        (40, layer(dtype=torch.float32)),
        (40, layer(odd=True)),
    ):
        assert tiles.plan_for(rows, *each) in plans.PLANS.values()
    assert tiles.plan_for(40, *layer(odd=True)) is plans.PLANS["90", 2, "odd"]


@pytest.mark.parametrize("axes", [(1, 2, 0), (2, 1, 0)])
def test_weights_whose_experts_lie_side_by_side_are_read_number_by_number(axes):
    """As SonicMoE keeps them: neither rows nor columns of an expert lie together."""
    w_in, w_out, x = layer(experts=16)
    back = [axes.index(i) for i in range(3)]
    w_in, w_out = (w.permute(axes).contiguous().permute(back) for w in (w_in, w_out))
    assert w_in.stride(0) == 1
    assert tiles.plan_for(40, w_in, w_out, x) is plans.PLANS["90", 2, "odd"]
    turned = [w.mT.contiguous().mT for w in (w_in, w_out)]
    assert tiles.plan_for(40, *turned, x) is plans.PLANS["90", 2, "few"]


def test_entries_are_added_and_replaced(tmp_path):
    other = KEY._replace(dim=128)
    file = tuned.write("A", [Entry(KEY, PLAN), Entry(other, PLAN)])
    tuned.write("A", [Entry(KEY, OTHER, {"forward": 1.5, "backward": 1.0})])
    tuned.write("B", [Entry(KEY, PLAN)])
    assert {entry.key: entry.plan for entry in tuned.read(file)} == {KEY: OTHER, other: PLAN}
    assert json.loads(file.read_text())["gpu"] == "A"
    assert sorted(path.name for path in (tmp_path / "tiles").iterdir()) == ["A.json", "B.json"]


def test_another_version_of_triton_uses_the_table():
    tuned.write("interpreter", [Entry(KEY, OTHER, triton="0.1")])
    with pytest.warns(UserWarning, match=r"measured with triton 0\.1"):
        assert tiles.plan_for(40, *layer()) is plans.PLANS["90", 2, "few"]


@pytest.mark.parametrize("change", ["text", "size", "missing", "height", "unknown"])
def test_a_file_of_another_kind_is_named_and_left_alone(change):
    file = tuned.write("interpreter", [Entry(KEY, PLAN)])
    content = json.loads(file.read_text())
    plan = content["entries"][0]["plan"]
    if change == "size":
        plan["up"]["warps"] = "four"
    elif change == "missing":
        del plan["down"]
    elif change == "height":
        plan["up"]["m"] *= 2
    elif change == "unknown":
        plan["up"]["speed"] = 1
    damaged = "not json" if change == "text" else json.dumps(content)
    file.write_text(damaged)
    for use in (lambda: tiles.plan_for(40, *layer()), lambda: tuned.write("interpreter", [Entry(KEY, OTHER)])):
        with pytest.raises(ValueError, match=r"interpreter\.json does not hold tiles as `zoo tune` writes them"):
            use()
    assert file.read_text() == damaged


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch):
    file = tuned.write("A", [Entry(KEY, PLAN)])
    before = file.read_bytes()

    def fails(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(tuned.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        tuned.write("A", [Entry(KEY, OTHER)])
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
