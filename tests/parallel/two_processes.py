"""Models spread over two processes, which are copies of this one: what they compute and learn.

This one must have no groups of its own: their threads would not be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from zoo.parallel import Mesh, Sizes, parallelize

Results = tuple[Tensor, dict[str, Tensor]]


def results(model: nn.Module) -> Results:
    """A language model's logits of fixed tokens below 64, and the gradients of their mean square, by name."""
    tokens = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, use_cache=False).logits
    logits.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in gradients.items()}


def spread(
    folder: Path, made: Callable[[str], Any], names: Iterable[str], meshes: Mapping[str, Sizes]
) -> list[dict[tuple[str, str], Results]]:
    """The `results` on both processes of every model that `made` makes, by its name and the mesh's."""
    mp.start_processes(_work, args=(str(folder), made, names, meshes), nprocs=2, start_method="fork")
    return [torch.load(folder / f"told-{rank}.pt") for rank in range(2)]


def _work(
    rank: int, folder: str, made: Callable[[str], Any], names: Iterable[str], meshes: Mapping[str, Sizes]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    told = {}
    for name in names:
        for mesh, sizes in meshes.items():
            model = made(name)
            parallelize(model, Mesh(sizes))
            told[name, mesh] = results(model)
    torch.save(told, f"{folder}/told-{rank}.pt")
    dist.destroy_process_group()
