"""Branch-Train-Mix (2403.07816): experts of several dense models in one sparse model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import MoE
from .averaging import RunningMean, Source, branches, listed, shares_of, tensors_of
from .dense_mlps import DenseMLP, expert_parameter, recognise
from .origin import made_by
from .upcycling import _counterpart, upcycle


@torch.no_grad()
def mix(
    models: Source | Iterable[Source],
    layers: str | int | Iterable[int] = "all",
    router: Any = "TopKRouter",
    *,
    others: Iterable[Source] = (),
    k: int | None = None,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
    capacity: Any = None,
    losses: Mapping[str, Any] | None = None,
    router_std: float = 0.02,
    within: str = "",
    backend: str = "auto",
) -> nn.Module:
    """One sparse model of several fine-tuned copies of a dense one: its experts are their MLPs (BTX, 2403.07816).

    Expert i of every chosen layer is the MLP of model i; all other tensors are the models' mean (`zoo.average`), with
    `weights` or equal ones; gates are new, from N(0, router_std^2). The published recipe: models that were branched
    from one seed and trained on a domain each, and the seed itself as one of them, top-2 (k) of all layers with weights
    SoftMax(TopK(W x)), which is the default, and losses={"switch": 0.01}; then all of it is trained on, on all domains.
    router="DenseRouter" is its soft routing, {"name": "TopKRouter", "k": 1, "normalize": False} its Switch routing;
    the paper's sampled top-1 and its splitting and blending of experts are not here: their details could not be
    checked, as there is no code of the authors.

    models: modules, folders or hub ids (read one after the other by `zoo.from_pretrained`, so that only one model's
    weights are in memory beside the result), or one of them and `others`. The given modules stay as they are. layers,
    router, normalize, capacity, losses, within and backend are those of `zoo.upcycle`, k is two by default; what is
    made can be saved as upcycled models are: Llama and Mistral as Mixtral, Qwen3 as Qwen3-MoE, timm models for zoo.

    Raises ValueError naming what differs where the models are not copies of one: architecture, configuration, a
    tensor's name or shape, the vocabulary; and as `zoo.upcycle`.
    """
    sources = listed("mix", models, others)
    shares = shares_of("mix", weights, len(sources))
    opened = branches("mix", sources)
    dense = next(opened)
    sparse = upcycle(
        dense,
        layers,
        len(sources),
        router,
        k=k,
        normalize=normalize,
        capacity=capacity,
        losses=losses,
        router_std=router_std,
        within=within,
        backend=backend,
    )
    before = {id(m) for m in dense.modules() if isinstance(m, MoE)}
    places: list[tuple[MoE, DenseMLP]] = []
    for name, module in sparse.named_modules():
        if isinstance(module, MoE):
            dense_name, found = _counterpart(name, dense)
            if id(found) not in before:
                places.append((module, recognise(dense_name, found)))
    kept = _outside(dense, [mlp for _, mlp in places])
    into = tensors_of(sparse)
    mean = RunningMean({name: into[name] for name in kept}, shares[0])
    names = [(moe, mlp.name, mlp.activation) for moe, mlp in places]
    del dense, places, kept, into
    numbers = iter(range(1, len(sources)))
    for model in opened:  # no enumerate, which would hold a model while the next one is read
        number = next(numbers)
        mlps = [recognise(name, model.get_submodule(name)) for _, name, _ in names]
        for (moe, name, activation), mlp in zip(names, mlps):
            if mlp.activation != activation:
                raise ValueError(f"mix: {name} of model {number} has {mlp.activation}, expected {activation}")
            mlp.check()
            for part, tensor in mlp.weights().items():
                expert_parameter(moe.experts, part)[number].copy_(tensor)
        mean.add(_outside(model, mlps), shares[number])
        del model, mlps
    mean.write()
    made_by("mix", sparse)
    return sparse


def _outside(model: nn.Module, mlps: Sequence[DenseMLP]) -> dict[str, Tensor]:
    """The model's tensors but for those of the MLPs."""
    inside = {id(parameter) for mlp in mlps for parameter in mlp.parameters}
    return {name: tensor for name, tensor in tensors_of(model).items() if id(tensor) not in inside}
