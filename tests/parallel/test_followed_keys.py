"""EMoE's gate follows experts that processes share out, and weights that they hold in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor

import zoo
from zoo.moe import MoE
from zoo.moe.schedule import advance
from zoo.parallel import Mesh, Sizes, parallelize

MESHES = {"experts": Sizes(expert=2), "parts": Sizes(shard=2)}


def trained(mesh: Sizes | None) -> list[Tensor]:
    """The gates' keys after a step, of a split model on this mesh."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    model: Any = zoo.split(transformers.LlamaForCausalLM(config), num_experts=6, k=3, method="random")
    if mesh is not None:
        parallelize(model, Mesh(mesh))
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    advance(model)
    keys: list[Any] = [moe.router.weight.detach() for moe in model.modules() if isinstance(moe, MoE)]
    return [key.full_tensor() if hasattr(key, "full_tensor") else key for key in keys]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: trained(mesh) for name, mesh in MESHES.items()}, f"{folder}/told-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("keys")
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(Path(folder) / f"told-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("mesh", MESHES)
def test_keys_follow_as_in_one_process(mesh: str, told: list[dict[str, list[Tensor]]]) -> None:
    expected = trained(None)
    for found in told:
        for ours, whole in zip(found[mesh], expected, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
