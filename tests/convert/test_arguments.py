"""What conversions refuse of numbers, and of functions that are to run a model over data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from converted_cases import LANGUAGE, output
from torch import nn

import zoo
from zoo.moe import MoE


def sparse() -> nn.Module:
    return zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, vocab_size=64, num_local_experts=4).eval()


def dense() -> nn.Module:
    config, model, sizes = LANGUAGE["llama"]
    return getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval()


NUMBERS = {
    zoo.prune: (sparse, ("keep", "drop_layers", "drop_blocks")),
    zoo.to_dense: (sparse, ("width",)),
    zoo.grow: (sparse, ("num_new",)),
    zoo.upcycle: (dense, ("num_experts", "k", "granularity")),
    zoo.split: (dense, ("num_experts", "k", "shared", "expert_dim", "tokens")),
    zoo.adapt: (dense, ("num_experts", "rank")),
}
IN_TURN = ((zoo.prune, "keep"), (zoo.prune, "drop_layers"), (zoo.upcycle, "num_experts"), (zoo.adapt, "num_experts"))


@pytest.mark.parametrize("conversion", NUMBERS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("value", [2.5, 2.0, True, "2", torch.tensor(2.0), np.float32(2)], ids=repr)
def test_what_is_no_whole_number_is_refused_by_name(conversion, value):
    make, names = NUMBERS[conversion]
    model = make()
    more = {"kind": "MoELoRA"} if conversion is zoo.adapt else {}
    for name in names:
        told = rf"{conversion.__name__}: {name} must be a whole number, got .*{str(value)[:3]}"
        with pytest.raises(ValueError, match=told):
            conversion(model, **{name: value}, **more)
        if (conversion, name) in IN_TURN and not isinstance(value, str):
            with pytest.raises(ValueError, match=told):
                conversion(model, **{name: [1, value]}, **more)
    if conversion is zoo.prune:
        with pytest.raises(ValueError, match=r"prune: experts of model.layers.0.mlp must be a whole number"):
            zoo.prune(model, experts=[[0, value], [0, 1]])


def test_whole_numbers_of_other_libraries_are_numbers():
    scores = [[0.0, 3.0, 2.0, 1.0]] * 2
    expected = zoo.prune(sparse(), keep=2, scores=scores).state_dict()
    for keep in (np.int64(2), torch.tensor(2), np.array([2, 2]), torch.tensor([2, 2]), (2, np.int32(2))):
        found = zoo.prune(sparse(), keep=keep, scores=scores).state_dict()
        assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    grown = zoo.upcycle(dense(), layers="all", num_experts=np.array([2, 3, 4]), k=np.int64(1))
    assert [m.experts.num_experts for m in grown.modules() if isinstance(m, MoE)] == [2, 3, 4]


LOOKS = {
    "use": (sparse, lambda m, c: zoo.prune(m, keep=2, calibrate=c)),
    "layers": (sparse, lambda m, c: zoo.prune(m, drop_layers=1, calibrate=c)),
    "blocks": (sparse, lambda m, c: zoo.prune(m, drop_blocks=1, calibrate=c)),
    "dense": (sparse, lambda m, c: zoo.to_dense(m, weights="usage", calibrate=c)),
    "co-activation": (dense, lambda m, c: zoo.split(m, num_experts=4, method="coactivation", calibrate=c)),
    "importance": (dense, lambda m, c: zoo.split(m, num_experts=4, method="importance", calibrate=c)),
}


@pytest.mark.parametrize("kind", LOOKS)
def test_a_calibrate_that_shows_nothing_is_refused(kind):
    make, convert = LOOKS[kind]
    model, other, ids = make(), make(), torch.randint(64, (2, 5))
    loss = nn.Linear(2, 1)(torch.randn(2)).sum()

    def forgets(m: nn.Module) -> None:
        output(m, ids)

    for calibrate, told in (
        (forgets, "calibrate: expected a function that yields, or returns a list of, .*; it returned None"),
        (lambda m: m(ids).logits.sum(), "it returned Tensor"),
        (lambda m: 3, "it returned int"),
        ([loss], r"calibrate: expected a function that runs the model .*, got \[tensor"),
        (lambda m: [loss], "calibrate ran no|calibrate must run the model it is given"),
        (lambda m: [other(ids).logits.sum()], "calibrate ran no|calibrate must run the model it is given"),
        (lambda m: [], "calibrate ran no|calibrate yielded no loss"),
    ):
        with pytest.raises(ValueError, match=told):
            convert(model, calibrate)
    assert convert(model, lambda m: [m(ids).logits.sum()]) is not model
    with pytest.raises(ValueError, match=r"must yield losses with a gradient; got 0\.5"):
        zoo.split(dense(), num_experts=4, method="importance", calibrate=lambda m: [0.5])
