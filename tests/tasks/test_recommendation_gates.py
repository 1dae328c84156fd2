"""What is logged of gates: weights of real rows, with their own domain's gate, row by row in a loop."""

import pytest
import torch

import zoo
from tasks.recommendation_gates import ExpertUse
from zoo.data.tables_batch import random_batch

SCHEMA = {
    "domain": "place",
    "features": {
        "place": {"kind": "categorical", "ids": "index", "num_embeddings": 4},
        "x": {"kind": "dense"},
    },
    "tasks": {"a": {}, "b": {"kind": "regression"}},
}


@pytest.mark.parametrize("name", ["m3oe", "mmoe"])
def test_rows_count_with_the_gate_of_their_domain(name):
    print("seed", torch.seed())  # pytest shows it with a failure
    model = zoo.create_model(f"recommendation/{name}", schema=SCHEMA, num_experts=3).eval()
    gates = model.domain_gates()
    assert [len(own) for own in gates.values()] == [4 if name == "m3oe" else 1] * 2
    seen, use = [], ExpertUse(model)
    hook = gates["a"][0].register_forward_hook(lambda gate, inputs, output: seen.append(inputs[0]))
    expected, rows = {task: torch.zeros(3) for task in gates}, 0
    for size in (9, 5):
        batch, real = random_batch(model.schema, size), torch.rand(size) < 0.7
        real[0] = True
        domain = model.inputs.domain(batch)
        with use.watch(real, domain):
            model(batch)
        for task, own in gates.items():
            for i in range(size):
                if real[i]:
                    gate = own[int(domain[i])] if len(own) > 1 else own[0]
                    expected[task] += (gate.router.weight @ seen[-1][i]).softmax(0).detach()
        rows += int(real.sum())
    hook.remove()
    found = use.compute()
    for task, weights in expected.items():
        for expert in range(3):
            assert found[f"gate/{task}/{expert}"] == pytest.approx(float(weights[expert]) / rows, rel=1e-5)
