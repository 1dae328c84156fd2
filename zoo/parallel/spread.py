"""`parallelize`: one model over many processes, experts, data and tensors in parallel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from ..moe import (
    ExpertParallel,
    Experts,
    HierarchicalExpertParallel,
    LoRAExperts,
    LoRAOfExperts,
    StaticExpertParallel,
)
from ..moe.layer import Recorded
from .mesh import Mesh
from .tensor import SplitTokens, planned, split_tensors


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    reshard_after_forward: bool = True,
    chunks: int = 1,
    within: int = 1,
    shadows: int = 0,
    places: int = 0,
    mixed_precision: MixedPrecisionPolicy | None = None,
) -> nn.Module:
    """Spread a model over the processes of a mesh, in place: experts, FSDP2, tensor parallelism, data parallelism.

    Works on transformers models on our layers, timm models with experts, and any module with `MoE` layers. Every
    process has the whole model before, the same one, or has it on the meta device: then fill it afterwards.

    Experts of a layer are held by `mesh.experts["expert"]`, neighbours together, and tokens reach them by all-to-all
    (`ExpertParallel`), in so many chunks, while shared experts run. With `within` processes of such a group in a node,
    tokens cross once to each node (`HierarchicalExpertParallel`). Up to `shadows` experts a layer are lent to all of a
    group for a step where that sends fewer bytes (`zoo.moe.shadows`). With `places` rows from every process to every
    expert, no more, sizes do not depend on the gate, and the host waits for no device (`StaticExpertParallel`).

    All parameters are sharded and averaged by FSDP2, a block at a time: `reshard_after_forward` frees a block's
    parameters again until backward. Gradients are those of the mean over the `sizes.data` processes of their losses.
    Tensor parallelism splits attention and dense MLPs where the model's plan says how (`split_tensors`), and lets each
    process of a group send its own part of the tokens to experts; every one of them gets the same batch.
    Gates that merge experts (SMEAR, Lory, MEO) need them whole, many gates over one `ExpertStack` compute it once, and
    experts with LoRA inside stay with it: those are sharded as dense parameters are. So are embedding tables, unless
    `fuse_embeddings` laid them out before.

    Raises ValueError where a process would be left without an expert, for widths that do not divide, for blocks that
    share weights, for shadows or places with nodes, places with chunks or shadows, and for tensor parallelism of a
    model that has nothing for it.
    """
    sizes = mesh.sizes
    if shadows and 1 < within < sizes.expert:
        raise ValueError(f"shadows={shadows}: experts are lent in flat groups only, not with within={within}")
    if places and (shadows or chunks > 1 or 1 < within < sizes.expert):
        given = {"chunks": chunks, "within": within, "shadows": shadows}
        raise ValueError(f"places={places}: rows go in flat groups, at once, to experts that are not lent; got {given}")
    stacks = dict(spreadable(model))
    if share_weights(model):
        # FSDP would give each block weights of its own, without a word.
        raise ValueError(f"parallelize: blocks of {type(model).__name__} share weights; train it with ddp")
    if sizes.tensor > 1:
        if not stacks and not planned(model):
            raise ValueError(
                f"tensor={sizes.tensor}: {type(model).__name__} has no layers that can be split and no experts that "
                "tokens are sent to, so that processes would all do the same work; use replicate or shard"
            )
        split_tensors(model, mesh.dense["tensor"])
    for name, experts in stacks.items():
        _spread(name, experts, mesh, chunks, within, shadows, places)
    # Fused embedding tables lie as torchrec says, and learn by themselves.
    fused = {p for module in model.modules() if hasattr(module, "fused_optimizer") for p in module.parameters()}
    # FSDP has no place for scalars, such as Soft MoE's scale: every process keeps them.
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0} - fused
    for parameter in scalars:
        parameter.register_post_accumulate_grad_hook(_average)
    options: dict[str, Any] = {"reshard_after_forward": reshard_after_forward, "ignored_params": scalars | fused}
    if mixed_precision is not None:
        options["mp_policy"] = mixed_precision
    parts = sizes.shard * sizes.tensor
    cut: dict[str, Any] = {
        "shard_placement_fn": lambda parameter: Shard(divided(parameter.shape, parts, sizes.expert) or 0)
    }
    for experts in stacks.values():
        fully_shard(experts, mesh=mesh.experts["replicate", "shard"], **cut, **options)
    staying = {**options, "reshard_after_forward": False}
    gates = _of_another_dtype(model, stacks.values(), scalars | fused)
    for module in gates:
        # What a gate gives is no tensor, by which FSDP would know when to gather it again; it is small.
        fully_shard(module, mesh=mesh.dense["replicate", "shard"], **staying)
        # What layers around them call.
        for method in ("mix", "each", "apart") if isinstance(module, LoRAExperts) else ():
            register_fsdp_forward_method(module, method)
    for module in blocks(model):
        fully_shard(module, mesh=mesh.dense["replicate", "shard"], **options)
    # The root's own are the last of forward and the first of backward: freed between, they would be gathered twice.
    fully_shard(model, mesh=mesh.dense["replicate", "shard"], **staying)
    model.register_forward_hook(_Free([*gates, model]))
    return model


class _Free:
    """Forward hook: frees what stays gathered until backward where none will come.

    It would outlast a step of the optimizer otherwise, and the next forward would be one with the weights of before.
    """

    def __init__(self, modules: Iterable[Any]) -> None:
        self.modules = list(modules)

    @torch.compiler.disable
    def __call__(self, module: nn.Module, arguments: Any, out: Any) -> None:
        if not torch.is_grad_enabled():
            for part in self.modules:
                part.reshard()


def _of_another_dtype(model: nn.Module, stacks: Iterable[Experts], beside: set[nn.Parameter]) -> list[nn.Module]:
    """Modules with parameters of another type than most, such as gates in float32: FSDP takes one type a unit.

    Innermost first, with what is in them, which may be of the type of most.
    """
    beside = beside.union(*(set(experts.parameters()) for experts in stacks))
    sizes: Counter[torch.dtype] = Counter()
    for parameter in set(model.parameters()) - beside:
        sizes[parameter.dtype] += parameter.numel()
    found: set[nn.Module] = set()
    for module in model.modules():
        own = {p.dtype for p in module.parameters(recurse=False) if p not in beside}
        if own and module is not model and own != {sizes.most_common(1)[0][0]}:
            found |= {module, *(child for child in module.children() if not beside.issuperset(child.parameters()))}
    return [module for module in reversed(list(model.modules())) if module in found]


def share_weights(model: nn.Module) -> bool:
    """Whether blocks of a model have parameters in common, as those of `zoo.share_depth`."""
    held = Counter(parameter for block in blocks(model) for parameter in set(block.parameters()))
    return any(times > 1 for times in held.values())


def spreadable(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Names and modules of the stacked experts that processes may share out."""
    merged = [m for m in model.modules() if isinstance(m, Recorded) and m.router.merges]
    tuned = [m for m in model.modules() if isinstance(m, LoRAOfExperts)]
    whole = {id(module) for layer in (*merged, *tuned) for module in layer.modules()}
    for name, module in model.named_modules():
        if isinstance(module, Experts) and id(module) not in whole:
            yield name, module


def divided(shape: Sequence[int], parts: int, expert: int) -> int | None:
    """The dimension of a weight of stacked experts, in `expert` parts already, that more processes cut; None if none.

    That is rows, or columns where experts have too few rows, as those of one neuron; the experts where that has a bias.
    """
    inner = (dim for dim in range(1, len(shape)) if shape[dim] % parts == 0)
    return next(inner, None if shape[0] % (parts * expert) else 0)


@torch.no_grad()
def _spread(name: str, experts: Experts, mesh: Mesh, chunks: int, within: int, shadows: int, places: int) -> None:
    sizes, number = mesh.sizes, experts.num_experts
    part = -(-number // sizes.expert)
    if part * (sizes.expert - 1) >= number:
        raise ValueError(
            f"{name}: {number} experts in parts of {part} leave some of {sizes.expert} processes without any; "
            f"choose an expert size that leaves each at least one, such as {number}"
        )
    parts = sizes.shard * sizes.tensor
    for parameter, value in experts.named_parameters():
        if divided(value.shape, parts, sizes.expert) is None:
            raise ValueError(
                f"{name}.{parameter}: {value.shape[1]} rows do not divide into shard * tensor = {parts} parts"
            )
    inner: ExpertParallel | HierarchicalExpertParallel
    if 1 < within < sizes.expert:
        between, inside = mesh.node_groups(within)
        inner = HierarchicalExpertParallel(number, between, inside, chunks)
    elif places:
        inner = StaticExpertParallel(number, places, mesh.experts["expert"].get_group())
    else:
        inner = ExpertParallel(number, mesh.experts["expert"].get_group(), chunks, shadows)
    experts.keep_own(inner, mesh.experts["expert"])
    experts.parallel = inner if sizes.tensor == 1 else SplitTokens(inner, mesh.tensor_group)
    # FSDP averages over the processes with the same experts. A gradient is the sum over all data: each process has
    # that of the tokens that came to it, of its group of `expert` processes, and of its share of `tensor`.
    experts.gradient_scale = sizes.tensor / sizes.expert


@torch.no_grad()
def _average(parameter: torch.Tensor) -> None:
    """The mean gradient over all processes; of what was averaged before, it changes nothing."""
    if parameter.grad is not None:
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, outermost ones, that FSDP gathers one at a time: layers of a transformer, say."""
    return [part for parts in repeated(model) for part in parts]


def repeated(model: nn.Module) -> list[list[nn.Module]]:
    """The same, those of each list of modules together."""
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for _, container in model.named_modules():
        if id(container) in inside or not isinstance(container, (nn.ModuleList, nn.Sequential)) or len(container) < 2:
            continue
        parts = [
            child
            for child in container
            if any(True for _ in child.children()) and any(True for _ in child.parameters())
        ]
        if len(parts) < 2:
            continue
        found.append(parts)
        inside.update(id(module) for part in parts for module in part.modules())
    return found
