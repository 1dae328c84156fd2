"""Language families that transformers reads, in parts on two processes: what they compute, learn and write.

Processes are copies of this one, which has no groups of its own: their threads would not be copied.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from quantiser import quantise_mxfp4
from safetensors.torch import load_file

import zoo
from zoo.models.language import configuration
from zoo.parallel import Mesh, Sizes
from zoo.pretrained import causal

NAMES = ("granitemoe_tiny", "ernie4_5_moe_tiny", "qwen3_next_tiny", "gpt_oss_tiny")
# Folder and mesh; gates and ups take turns in gpt-oss's files, and are in parts themselves where rows are sharded.
CASES = [*((name, "expert") for name in NAMES), *(("gpt_oss_tiny-mxfp4", mesh) for mesh in ("expert", "shard"))]
CASES.append(("gpt_oss_tiny", "shard"))


def tokens(rank: int) -> torch.Tensor:
    return torch.randint(0, 128, (2, 11), generator=torch.Generator().manual_seed(rank))


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = {}
    for name, mesh in CASES:
        model = zoo.from_pretrained(Path(folder) / name, mesh=Mesh(Sizes(**{mesh: 2})), dtype="float32")
        logits = model(tokens(rank)).logits
        logits.square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}
        zoo.save_pretrained(model, Path(folder) / f"{name}-{mesh}")
        told[name, mesh] = logits.detach(), gradients
    torch.save(told, f"{folder}/told-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    for name in NAMES:
        number = 4 if name == "qwen3_next_tiny" else 2
        config = configuration(name, num_hidden_layers=number, vocab_size=128, hidden_size=64, initializer_range=0.2)
        causal.class_of(config.model_type)._from_config(config).save_pretrained(folder / name)
    quantise_mxfp4(folder / "gpt_oss_tiny", folder / "gpt_oss_tiny-mxfp4")
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method="fork")
    return folder, [torch.load(folder / f"told-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_two_processes_compute_and_learn_what_one_does(told, name, mesh):
    folder, found = told
    model = zoo.from_pretrained(folder / name, dtype="float32")
    losses = 0.0
    for rank in range(2):
        logits = model(tokens(rank)).logits
        assert (logits - found[rank][name, mesh][0]).norm() < 1e-5 * logits.norm()
        losses = losses + logits.square().mean() / 2
    losses.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        gradients = found[rank][name, mesh][1]
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            assert (gradient - expected[key]).norm() < 1e-4 * expected[key].norm() + 1e-9, key


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_what_was_read_in_parts_is_written_again(told, name, mesh):
    folder, _ = told
    plain = f"{name}-plain" if name.endswith("mxfp4") else name
    before, after = (load_file(folder / part / "model.safetensors") for part in (plain, f"{name}-{mesh}"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].float(), after[key]) for key in before)
