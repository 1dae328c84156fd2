"""Routing decisions of Megatron-Core 0.16.1 and DeepSpeed on random logits, reproduced to 1e-6."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from zoo.moe import Capacity, balance
from zoo.moe.routers import SinkhornRouter, TopKRouter
from zoo.moe.routers.sinkhorn import sinkhorn_plan

FOLDER = Path(__file__).parent / "reference"
CASES = {case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())}
DEEPSPEED_DROPS = {"probs": "probability", "position": "position"}


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def named(part: str) -> list[str]:
    found = [name for name in CASES if part in name]
    assert found
    return found


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def route(router: TopKRouter, data: dict[str, Tensor]):
    if "bias" in data:
        assert router.selection_bias is not None
        router.selection_bias.copy_(data["bias"])
    return router.train().route(data["logits"])


def selected(routing) -> Tensor:
    out = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
    out[routing.token_index, routing.expert_index] = True
    return out


@pytest.mark.parametrize("name", named("megatron_softmax"))
def test_softmax_before_and_after_the_choice(name: str) -> None:
    data, case = arrays(name), CASES[name]
    score = "softmax_topk" if case["normalize_topk"] else "softmax"
    router = TopKRouter(4, 8, case["k"], score=score, losses={"switch": 1.0, "z": 1.0})
    routing = route(router, data)
    close(routing.dense(), data["weights"])
    assert torch.equal(selected(routing), data["selected"])
    close(routing.losses["switch"], data["load_balance_loss"])
    close(routing.losses["z"], data["z_loss"])


@pytest.mark.parametrize("name", named("megatron_sigmoid_bias"))
def test_sigmoid_with_a_selection_bias(name: str) -> None:
    data, case = arrays(name), CASES[name]
    router = TopKRouter(
        4, 8, case["k"], score="sigmoid", normalize=case["k"] > 1, scale=case["scale"], selection_bias=True
    )
    routing = route(router, data)
    close(routing.dense(), data["weights"])
    assert torch.equal(selected(routing), data["selected"])


@pytest.mark.parametrize("name", named("megatron_group_limited"))
def test_group_limited_choice(name: str) -> None:
    data, case = arrays(name), CASES[name]
    router = TopKRouter(
        4,
        8,
        case["k"],
        score="sigmoid",
        normalize=True,
        selection_bias=True,
        num_groups=case["groups"],
        group_topk=case["group_topk"],
        group_score=case["k"] // case["group_topk"],
    )
    routing = route(router, data)
    close(routing.dense(), data["weights"])
    assert torch.equal(selected(routing), data["selected"])


@pytest.mark.parametrize("name", named("megatron_drop"))
def test_megatron_capacity(name: str) -> None:
    data, case = arrays(name), CASES[name]
    capacity = Capacity(case["capacity_factor"], drop=DEEPSPEED_DROPS[case["drop"]])
    assert capacity.places(48, case["k"], 8, training=True) == case["capacity"]
    routing = route(TopKRouter(4, 8, case["k"], capacity=capacity), data)
    close(routing.dense(), data["weights"])
    assert torch.equal(selected(routing), data["selected"])


def test_sinkhorn_plan_and_choice() -> None:
    data = arrays("megatron_sinkhorn")
    close(sinkhorn_plan(data["logits"]), data["plan"])
    routing = SinkhornRouter(4, 8, k=1).train().route(data["logits"])
    assert torch.equal(selected(routing).int().argmax(1), data["top1"])
    close(routing.weight.sum(), data["logits"].sigmoid().gather(1, data["top1"][:, None]).sum())


def deepspeed(name: str, **options):
    data, case = arrays(name), CASES[name]
    capacity = Capacity(case["capacity_factor"], minimum=1, **options)
    assert capacity.places(48, case["k"], 8, training=True) == case["capacity"]
    table = {"gshard": 1.0} if "gshard" in name else {"switch": 1.0}
    routing = route(TopKRouter(4, 8, case["k"], capacity=capacity, losses=table), data)
    close(routing.dense(), data["weights"])
    close(next(iter(routing.losses.values())), data["aux_loss"])
    # DeepSpeed counts choices before any is dropped.
    assert torch.equal(route(TopKRouter(4, 8, case["k"]), data).counts.long(), data["counts"])


def test_deepspeed_switch_top1() -> None:
    deepspeed("deepspeed_switch_top1_cf1.0", drop="unordered")


def test_deepspeed_gshard_top2() -> None:
    deepspeed("deepspeed_gshard_top2_cf1.0", drop="choice", renormalize=True)


@pytest.mark.parametrize("name", named("deepspeed_topk"))
def test_deepspeed_topk(name: str) -> None:
    deepspeed(name, drop=DEEPSPEED_DROPS[CASES[name]["drop"]], renormalize=True)


def test_bias_update() -> None:
    data = arrays("megatron_bias_update")
    rate = CASES["megatron_bias_update"]["rate"]
    close(balance.updated_bias(data["bias"], data["load"], rate), data["new_bias"])


def test_every_case_is_used() -> None:
    used = ("softmax", "sigmoid_bias", "group_limited", "megatron_drop", "sinkhorn", "deepspeed", "bias_update")
    assert all(any(part in name for part in used) for name in CASES)
