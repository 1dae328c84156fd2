"""Gates in float32 beside weights in bfloat16, as some checkpoints have them, over two processes.

Processes are copies of this one, which has no groups of its own: their threads would not be copied.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import zoo
from zoo.moe import MoE
from zoo.parallel import Mesh, Sizes, parallelize

MESHES = {"shard": Sizes(shard=2), "expert": Sizes(expert=2), "tensor": Sizes(tensor=2)}
NAMES = ("deepseek_v3_tiny", "gpt_oss_tiny")


def made(name: str):
    torch.manual_seed(0)
    model = zoo.create_model(f"language/{name}", num_hidden_layers=2, vocab_size=64, initializer_range=0.1)
    model.to(torch.bfloat16)
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        layer.router.float()
    return model


def results(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, use_cache=False).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = {}
    for name in NAMES:
        for mesh, sizes in MESHES.items():
            model = made(name)
            parallelize(model, Mesh(sizes))
            told[name, mesh] = results(model)
    torch.save(told, f"{folder}/told-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(folder / f"told-{rank}.pt") for rank in range(2)]


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
