"""Grown, residual and latent experts over processes: what one process computes and learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import results, spread

import zoo
from zoo.parallel import Sizes

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 64, "initializer_range": 0.2}
MESHES = {"replicate": Sizes(replicate=2), "shard": Sizes(shard=2), "expert": Sizes(expert=2)}
NAMES = ("grown", "latent", "residual")


def made(name: str) -> Any:
    torch.manual_seed(0)
    experts = {"residual": "ResidualExperts", "latent": {"name": "LatentExperts", "latent_dim": 12}}.get(name)
    model = zoo.create_model("language/mixtral_tiny", **SIZES, experts=experts)
    if name == "grown":
        return zoo.grow(model, num_new=3, noise=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    results(made("grown"))  # imports everything before the processes are copied
    return spread(tmp_path_factory.mktemp("processes"), made, NAMES, MESHES)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_processes_compute_what_one_does(processes: Any, name: str, mesh: str, tmp_path: Path) -> None:
    logits, gradients = results(made(name))
    for told in processes:
        found, learnt = told[name, mesh]
        assert float((found - logits).abs().max() / logits.abs().max()) < 1e-5
        assert learnt.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert float((learnt[key] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-30)) < 1e-4, key
