"""Documents that share a sequence, in every language family of transformers: apart, or said not to be."""

from __future__ import annotations

import pytest
import torch
from test_causal import EVERY, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, enlarge, tiny_model
from tiny_families import experts_classes

from zoo.pretrained.packed import MASKS_GIVEN, carries_state, mask_arguments

FAMILIES = {f: (f, m, e) for f, m, e in experts_classes() if f in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} | EVERY
# What carries a state there is left out of the tiny configuration.
HYBRID = ("granitemoehybrid",)


def model_of(family: str, **config):
    model = enlarge(tiny_model(*FAMILIES[family]))
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def heard(model, lengths: tuple[int, ...]) -> float:
    """How much the last of several documents in one sequence differs from the same one alone, relative."""
    documents = [torch.randint(0, 64, (2, length)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    both = model(torch.cat(documents, 1), position_ids=positions, use_cache=False, **mask_arguments(model, positions))
    alone = model(documents[-1], position_ids=torch.arange(lengths[-1]).expand(2, -1), use_cache=False).logits
    return ((both.logits[:, -lengths[-1] :] - alone).norm() / alone.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_documents_are_apart_but_where_a_state_is_carried(family):
    torch.manual_seed(0)
    model = model_of(family)
    if family in HYBRID:
        assert carries_state(model)
    else:
        assert (heard(model, (6, 7)) > 1e-4) == carries_state(model)


@pytest.mark.parametrize("family", MASKS_GIVEN)
@torch.no_grad()
def test_windows_and_several_documents_are_apart_too(family):
    torch.manual_seed(0)
    model = model_of(family, sliding_window=3)
    assert heard(model, (5, 1, 4, 8)) < 1e-5
    # One document has the logits that the model gives by itself.
    tokens, positions = torch.randint(0, 64, (2, 9)), torch.arange(9).expand(2, -1)
    own = model(tokens, use_cache=False).logits
    given = model(tokens, position_ids=positions, use_cache=False, **mask_arguments(model, positions)).logits
    assert (own - given).norm() < 1e-5 * own.norm()


def test_other_families_are_given_nothing():
    assert mask_arguments(model_of("mixtral"), torch.arange(5)[None]) == {}
