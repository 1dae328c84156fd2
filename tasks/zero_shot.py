"""What a model with one space for images and texts knows without training for it: classes by name, and retrieval.

Embeddings have length one: image [n, P], text [m, P]. All is exact over processes, each of which brings its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from zoo.data.pairs_rows import encode_texts
from zoo.data.tokenizer import Tokenizer
from zoo.models.contrastive import gather
from zoo.moe.masked import world_size

KS = (1, 5, 10)
BLOCK = 1024  # rows compared with all others at a time


@torch.no_grad()
def class_embeddings(
    model: Any, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str] = ("{}",), batch_size: int = 256
) -> Tensor:
    """An embedding a class, [C, P]: the mean over all templates of its prompts' embeddings, of length one again.

    As CLIP has it (2103.00020, section 3.1.4). Raises ValueError for a template without a place for the name, {}.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}}, where the name of a class belongs")
    device = next(model.parameters()).device
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    found = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = encode_texts(tokenizer, prompts[start : start + batch_size], model.text_length)
        found.append(model(ids=ids.to(device), mask=mask.to(device)).text)
    return F.normalize(torch.cat(found).unflatten(0, (len(classes), len(templates))).mean(1), dim=-1)


def retrieval(
    image: Tensor,
    text: Tensor,
    group: Tensor,
    text_group: Tensor,
    ks: Sequence[int] = KS,
    processes: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Recall at k in both directions, {"text_recall_1": ..., "image_recall_1": ...}, over all processes or a group.

    Of an image, the share of those that have a text of their own group among the k nearest texts, and the same of a
    text. A wrong one that is as near as the right one counts as nearer, so that a model that gives the same embedding
    to all has found nothing. An image or text without a counterpart counts as not found. nan where there are none.
    """
    images, texts = (gather(rows.detach().double(), processes)[0] for rows in (image, text))
    groups, text_groups = (gather(rows, processes)[0] for rows in (group, text_group))
    sums = torch.cat(
        [
            _found(image.detach().double(), group, texts, text_groups, ks),
            _found(text.detach().double(), text_group, images, groups, ks),
        ]
    )
    if world_size(processes) > 1:
        dist.all_reduce(sums, group=processes)
    of_images, of_texts = sums.view(2, -1).tolist()
    figures = {f"text_recall_{k}": n / of_images[-1] if of_images[-1] else float("nan") for k, n in zip(ks, of_images)}
    return figures | {
        f"image_recall_{k}": n / of_texts[-1] if of_texts[-1] else float("nan") for k, n in zip(ks, of_texts)
    }


def _found(query: Tensor, group: Tensor, others: Tensor, other_groups: Tensor, ks: Sequence[int]) -> Tensor:
    """How many queries have one of their group among the k nearest, for each k, and how many there are."""
    hits = torch.zeros(len(ks) + 1, dtype=torch.float64, device=query.device)
    hits[-1] = len(query)
    if not len(others):
        return hits
    for start in range(0, len(query), BLOCK):
        near = query[start : start + BLOCK] @ others.T
        right = group[start : start + BLOCK, None] == other_groups
        best = near.where(right, -torch.inf).amax(1, keepdim=True)
        before = ((near >= best) & ~right).sum(1)
        before = before.where(right.any(1), torch.iinfo(before.dtype).max)
        for place, k in enumerate(ks):
            hits[place] += (before < k).sum()
    return hits
