"""Checkpoints of every family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3")


def theirs(family: str, **fields: Any) -> Any:
    """transformers' own model of a family, small, with weights large enough that every expert counts."""
    from zoo.models.language import configuration
    from zoo.pretrained.language import FAMILIES

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 256, "initializer_range": 0.2}
    config = configuration(f"{family}_tiny", **{**sizes, **fields})
    model = FAMILIES[family].classes()[1]._from_config(config).eval()
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(std=0.3)  # negative values too: the groups that are masked out must stay out
    return model


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a family, in shards."""
    folders = {}
    for seed, family in enumerate(FAMILIES):
        torch.manual_seed(seed)
        folders[family] = tmp_path_factory.mktemp(family)
        theirs(family).save_pretrained(folders[family], max_shard_size="300KB")
        assert (folders[family] / "model.safetensors.index.json").is_file()
    return folders
