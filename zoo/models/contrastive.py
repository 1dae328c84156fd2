"""The contrastive loss over the batches of all processes, and the gathering that it and evaluation need.

N images and texts in all processes together, n of them here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..moe.masked import world_size


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, processes: dist.ProcessGroup | None = None) -> Tensor:
    """Mean cross-entropy of finding each image's text among all, and each text's image (CLIP 2103.00020, LIMoE).

    image and text [n, P] are embeddings of length one, row i of both a pair; scale multiplies their cosines. With
    several processes each one's rows meet those of all; where some have the same, `processes` are a group in which each
    has its own (`Mesh.data_group`). The mean of the values over the processes is the loss of one process with all
    pairs, and so is the mean of the gradients, as data parallelism takes it, of embeddings, scale and whatever made
    them, also where processes have different numbers of pairs. Computed in float32 (float64 stays).

    Raises ValueError when the shapes differ.
    """
    if image.shape != text.shape or image.dim() != 2:
        raise ValueError(
            f"contrastive_loss: expected as many images as texts, [n, P] both; got {list(image.shape)} and "
            f"{list(text.shape)}"
        )
    with torch.autocast(image.device.type, enabled=False):
        if image.dtype != torch.float64:
            image, text, scale = image.float(), text.float(), scale.float()
        every, first = gather(torch.cat([image, text], dim=1), processes)
        images, texts = every.split(image.shape[1], dim=1)
        own = torch.arange(first, first + len(image), device=image.device)
        found = F.cross_entropy(scale * image @ texts.T, own, reduction="sum")
        found = found + F.cross_entropy(scale * text @ images.T, own, reduction="sum")
        return found / 2 * world_size(processes) / max(len(every), 1)


def gather(rows: Tensor, processes: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """The rows [n, ...] of all processes, or of a group, [N, ...] in order of rank, and where this process's begin.

    Gradients cross: each process's rows get the sum of what all processes make of them. All must call it together, in
    forward and in backward; numbers of rows may differ.
    """
    if world_size(processes) == 1:
        return rows, 0
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size(processes))]
    dist.all_gather(counts, count, processes)
    sizes = torch.cat(counts).tolist()
    return _Gather.apply(rows, sizes, processes), sum(sizes[: dist.get_rank(processes)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], processes: dist.ProcessGroup | None) -> Tensor:
        ctx.sizes, ctx.processes = sizes, processes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, processes)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.processes)
        return total.split(ctx.sizes)[dist.get_rank(ctx.processes)], None, None
