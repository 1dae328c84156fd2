"""Tensor parallelism: attention and dense MLPs in parts, and tokens shared out on their way to experts.

Every process of a tensor group sees the same tokens. Between the split layers activations are whole on each of them,
so that gates decide alike everywhere; their generators must be in step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ..moe import MLP, ExpertParallel, HierarchicalExpertParallel, Routing

# torch 2.13 warns of the old name, and 2.11 has no other.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# What transformers calls the ways of splitting a layer, in its plans (config.base_model_tp_plan).
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    # A norm of each head on its own: heads [B, S, H, d] are in parts.
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}
# Its first columns go to a split layer, which adds up their gradient; the rest, rotary keys, to all heads as they are.
SHARED_KEYS = "mla_kv_a_proj"
GATED = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
EXPERTS = re.compile(r"\.(experts|gate|router)(\.|$)")  # which are ours, or stay as they are
PLAIN = {"fc1": "colwise", "fc2": "rowwise"}


def split_tensors(model: Any, mesh: DeviceMesh) -> dict[str, str]:
    """Split layers over the processes of a mesh of one dimension, in place; returns how, by name.

    transformers models say themselves how (config.base_model_tp_plan); beside that, and in all others, dense MLPs of
    gate_proj, up_proj and down_proj or of fc1 and fc2 are split, so shared experts and a timm model's. timm's attention
    has queries, keys and values in one matrix, and stays whole, as does all else.
    Raises ValueError for heads or widths that the processes do not divide.
    """
    plan = planned(model)
    for name, style in plan.items():
        _check(name, style, model.get_submodule(name), mesh.size())
    _check_heads(model, plan, mesh.size())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, style in plan.items():
        if style == SHARED_KEYS:
            first = model.get_submodule(name.rpartition(".")[0]).kv_lora_rank
            model.get_submodule(name).register_forward_hook(_SharedKeys(first, mesh.get_group()))
            continue
        parallelize_module(model, mesh, {name: STYLES[style]()})
        model.get_submodule(name).register_forward_hook(_wait)
    for name, parameter in model.named_parameters():
        if name in frozen:  # torch makes some of them anew
            parameter.requires_grad_(False)
    return plan


class _SharedKeys:
    """Forward hook: of what a layer gives, each process uses the columns after the first for its own heads."""

    def __init__(self, first: int, group: dist.ProcessGroup) -> None:
        self.first, self.group = first, group

    def __call__(self, module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
        return torch.cat([out[..., : self.first], _Whole.apply(out[..., self.first :], self.group)], -1)


def _wait(module: nn.Module, arguments: Any, out: Tensor) -> Tensor:
    """Have a sum over processes before it is given on: torch.compile loses gradients of what is still on its way."""
    return _Waited.apply(out) if isinstance(out, AsyncCollectiveTensor) else out


def planned(model: Any) -> dict[str, str]:
    """How each layer of a model is split, by name."""
    theirs = dict(getattr(getattr(model, "config", None), "base_model_tp_plan", None) or {})
    prefix = getattr(model, "base_model_prefix", "")
    base = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    known = {*STYLES, SHARED_KEYS}
    # Where layers are split in a way that is not known here, those around them stay whole, but for the experts.
    odd = [pattern for pattern, style in theirs.items() if style not in known and not EXPERTS.search(pattern)]
    whole = tuple(f"{p.rpartition('.')[0] if 'proj' in p.rpartition('.')[2] else p}." for p in odd)
    rules = {f"{base}{p}": style for p, style in theirs.items() if style in known and not p.startswith(whole)}
    found: dict[str, str] = {}
    other: set[str] = set()
    for name, module in model.named_modules():
        for pattern, style in rules.items():
            outer, _, last = name.rpartition(".")
            if not fnmatchcase(name, pattern):
                continue
            if isinstance(module, nn.Linear) == ("proj" in last):
                found[name] = style
            elif "proj" in last:
                other.add(outer)
        for parts in (GATED, PLAIN):
            if all(isinstance(getattr(module, part, None), nn.Linear) for part in parts):
                found |= {f"{name}.{part}": style for part, style in parts.items()}
            elif isinstance(module, MLP) and parts is GATED and module.gate_proj is None:
                found |= {f"{name}.{part}": GATED[part] for part in ("up_proj", "down_proj")}
    # Of an attention or MLP with an adapted layer, say, no layer can be split alone.
    return {name: style for name, style in found.items() if name.rpartition(".")[0] not in other}


def _check(name: str, style: str, module: nn.Module, parts: int) -> None:
    if isinstance(module, nn.Linear):
        size = module.in_features if style.startswith("rowwise") else module.out_features
        if size % parts:
            raise ValueError(f"{name}: a width of {size} does not divide over {parts} processes")


def _check_heads(model: Any, plan: dict[str, str], parts: int) -> None:
    config = getattr(model, "config", None)
    if not any(re.search(r"\.[qk]_proj$", name) and style == "colwise" for name, style in plan.items()):
        return
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None)
        if heads and heads % parts:
            raise ValueError(f"tensor: {field}={heads} does not divide over {parts} processes")


class SplitTokens:
    """Each process of a tensor group takes its share of the tokens to the experts; afterwards all have all results.

    Tokens and routing are the same on all of them, and so are, after backward, their gradients.
    """

    def __init__(self, inner: ExpertParallel | HierarchicalExpertParallel, group: dist.ProcessGroup) -> None:
        self.inner, self.group = inner, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, x: Tensor, routing: Routing, experts: Callable[[Tensor, Routing], Tensor]) -> Any:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]; all processes call it together."""
        return self.shared(x, routing, lambda inner, own, arrived: inner(own, arrived, experts))

    def shared(self, x: Tensor, routing: Routing, there: Callable[[Any, Tensor, Routing], Any]) -> Any:
        """The same where `there` takes this process's tokens, and their routing, to experts by `inner`."""
        ranges = token_ranges(routing.num_tokens, self.size)
        (first, last), part = ranges[self.rank], ranges[0][1]
        weight = _Whole.apply(routing.weight, self.group)
        own = of_tokens(Routing(routing.token_index, routing.offsets, weight, routing.num_tokens), first, last)
        later, total = self.inner.later, routing.num_tokens
        y = there(self.inner, _Whole.apply(x, self.group)[first:last], own)
        if later is None:
            return _Gather.apply(y, part, total, self.group)
        summed = later.pop()
        later.append(lambda: _Gather.apply(summed(), part, total, self.group))
        return y

    def links(self, within: int = 1) -> list[int]:
        """How far away each expert is, as `zoo.moe.topology.LINKS`: processes of a tensor group count as one."""
        return self.inner.links(within)

    @property
    def meanwhile(self) -> Callable[[], None] | None:
        """What runs while tokens travel."""
        return self.inner.meanwhile

    @meanwhile.setter
    def meanwhile(self, work: Callable[[], None] | None) -> None:
        self.inner.meanwhile = work

    @property
    def later(self) -> list[Callable[[], Tensor]] | None:
        """Where the function is put that waits for results."""
        return self.inner.later

    @later.setter
    def later(self, found: list[Callable[[], Tensor]] | None) -> None:
        self.inner.later = found


class _Whole(torch.autograd.Function):
    """What all processes have, of which each uses another part: backward, each gets the gradients of all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.contiguous().clone()
        dist.all_reduce(whole, group=ctx.group)
        return whole, None


class _Waited(torch.autograd.Function):
    """The tensor that an asynchronous collective fills, once it has."""

    @staticmethod
    def forward(ctx: Any, values: AsyncCollectiveTensor) -> Tensor:
        return values.trigger_wait()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Gather(torch.autograd.Function):
    """Rows of all processes in a row, `part` of each but the last; backward, each keeps the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, part: int, total: int, group: dist.ProcessGroup) -> Tensor:
        world, rank = dist.get_world_size(group), dist.get_rank(group)
        ctx.first, ctx.count = min(part * rank, total), rows.shape[0]
        padded = rows.new_zeros(part, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty(part * world, *rows.shape[1:])
        _all_gather(gathered, padded, group=group)
        # FSDP warns of views: what is done in place to them would be missing in its backward.
        return gathered if gathered.shape[0] == total else gathered[:total].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient[ctx.first : ctx.first + ctx.count].contiguous(), None, None, None


def token_ranges(tokens: int, parts: int) -> list[tuple[int, int]]:
    """Where each of so many parts of the tokens begins and ends; the last ones may be empty."""
    size = -(-tokens // parts)
    return [(min(size * i, tokens), min(size * (i + 1), tokens)) for i in range(parts)]


def of_tokens(routing: Routing, first: int, last: int) -> Routing:
    """The part of a routing that is of the tokens from `first` to before `last`, counted from the first of these."""
    mine = ((routing.token_index >= first) & (routing.token_index < last)).nonzero().flatten()
    offsets = torch.searchsorted(mine, routing.offsets.long(), out_int32=True)
    weight = routing.weight.index_select(0, mine)
    return Routing(routing.token_index.index_select(0, mine) - first, offsets, weight, last - first)
