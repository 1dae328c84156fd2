"""Gates in float32 beside weights in bfloat16, as some checkpoints have them, and autocast, over two processes."""

from __future__ import annotations

import pytest
import torch
from two_processes import results, spread

import zoo
from zoo.moe import MoE
from zoo.parallel import Sizes

MESHES = {"shard": Sizes(shard=2), "expert": Sizes(expert=2), "tensor": Sizes(tensor=2)}
AUTOCAST = "under autocast"
NAMES = ("deepseek_v3_tiny", "gpt_oss_tiny", AUTOCAST)


def made(name: str):
    torch.manual_seed(0)
    if name == AUTOCAST:
        model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, vocab_size=64, initializer_range=0.1)
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
        return model
    model = zoo.create_model(f"language/{name}", num_hidden_layers=2, vocab_size=64, initializer_range=0.1)
    model.to(torch.bfloat16)
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        layer.router.float()
    return model


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return spread(tmp_path_factory.mktemp("mixed"), made, NAMES, MESHES)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_each_keeps_its_type_and_all_learn_what_one_process_does(told, name, mesh):
    model = made(name)
    logits, gradients = results(model)
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    for rank in range(2):
        found, theirs = told[rank][name, mesh]
        assert (found - logits).norm() < 0.03 * logits.norm()
        assert theirs.keys() == gradients.keys()
        for key, gradient in theirs.items():
            assert gradient.dtype == dtypes[key]
            assert (gradient.float() - gradients[key].float()).norm() < 0.1 * gradients[key].float().norm() + 1e-8, key
