"""What a plan needs to know of a model: its parameters as `parallelize` groups them, and what a token passes."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..moe import Experts, MoE, QuantisedExperts, ShortcutMoE
from ..moe.routers import ExpertChoiceRouter, SoftRouter
from .spread import blocks, share_weights, spreadable
from .tensor import planned


@dataclass(frozen=True)
class Parameter:
    """One tensor of a unit that FSDP gathers at a time."""

    shape: tuple[int, ...]
    style: str | None  # how tensor parallelism splits it
    learns: bool
    itemsize: int


@dataclass(frozen=True)
class Stack:
    """Stacked experts of one layer."""

    experts: int
    shapes: tuple[tuple[int, ...], ...]
    k: float
    rows: int  # of the input projection: what backward keeps of each assignment
    beside: int = 0  # parameters of the shared expert
    pair: int = 0  # with a shortcut, those of its two blocks but for gate and experts
    learns: bool = True
    itemsize: int = 4
    slots: int = 0  # of each expert in a sequence, in Soft MoE


class Facts:
    """What a plan needs of a model, which may be on the meta device.

    `active` parameters work for each token, `learning` of them get gradients; all by default. Raises ValueError for a
    model that `parallelize` refuses: its blocks share weights.
    """

    def __init__(self, model: Any, active: int, learning: int | None = None) -> None:
        if share_weights(model):
            raise ValueError(
                f"blocks of {type(model).__name__} share weights, which no mesh lays out; train it with ddp"
            )
        stacks = dict(spreadable(model))
        inside = {id(p) for experts in stacks.values() for p in experts.parameters()}
        styles = planned(model)
        layers = {id(getattr(m.experts, "mlp", m.experts)): m for m in model.modules() if isinstance(m, MoE)}
        repeated = blocks(model)
        self.stacks = [self._stack(e, layers.get(id(e)), repeated) for e in stacks.values()]
        units = [*repeated, model]
        seen: set[int] = set(inside)
        self.units: list[list[Parameter]] = []
        names = {id(p): name for name, p in model.named_parameters()}
        for unit in units:
            mine = [p for p in unit.parameters() if id(p) not in seen]
            seen.update(id(p) for p in mine)
            self.units.append(
                [
                    Parameter(tuple(p.shape), _style(names[id(p)], styles), p.requires_grad, p.element_size())
                    for p in mine
                ]
            )
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tied = getattr(head, "weight", None)  # what is looked up in it, every token is multiplied by as well
        tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not tied]
        # What timm's models add to tokens, or put beside them.
        tables += [p for n in ("pos_embed", "cls_token", "reg_token") if (p := getattr(model, n, None)) is not None]
        self.embedded = sum(table.numel() for table in tables)
        # Products of their backward that nobody computes: gradients of weights that stay as they are.
        learnt = sum(table.numel() for table in tables if table.requires_grad)
        self.frozen = 0 if learning is None else (active - self.embedded) - (learning - learnt)
        self.active = active
        # An image's classes are foretold once, not once a token.
        classes = list(getattr(model, "get_classifier", nn.Identity)().parameters())
        self.once = sum(p.numel() for p in classes)
        self.once_frozen = 0 if learning is None else sum(p.numel() for p in classes if not p.requires_grad)
        # Every process has all experts in few bits.
        self.coded = sum(b.nbytes for m in model.modules() if isinstance(m, QuantisedExperts) for b in m.buffers())
        config = getattr(model, "config", None)
        self.heads = getattr(config, "num_attention_heads", 0) or 0
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.width = next((m.router.dim for m in layers.values()), 0) or getattr(config, "hidden_size", 0)
        head = max(getattr(config, "head_dim", None) or 0, self.width // self.heads if self.heads else 0)
        self.attention = self.heads * head
        self.vocabulary = getattr(config, "vocab_size", 0) or 0
        self.kept = sum(m.in_features for unit in repeated for m in unit.modules() if isinstance(m, nn.Linear))
        # Two layers with a shortcut between them are one block.
        self.layers = len(self.units) - 1 + sum(isinstance(m, ShortcutMoE) for m in model.modules())

    def at(self, sequence: int) -> Facts:
        """The same for sequences of so many tokens: in Soft MoE experts compute slots, as many whatever the tokens."""
        found = copy(self)
        found.active -= self.once - self.once // sequence
        found.frozen -= self.once_frozen - self.once_frozen // sequence
        found.stacks = [replace(s, k=s.experts * s.slots / sequence) if s.slots else s for s in self.stacks]
        for stack in (s for s in found.stacks if s.slots):
            idle = round(sum(math.prod(shape[1:]) for shape in stack.shapes) * (stack.experts - stack.k))
            # Tokens are mixed into slots, and slots into tokens.
            found.active += 2 * stack.experts * stack.slots * self.width - idle
            found.frozen -= 0 if stack.learns else idle
        return found

    @staticmethod
    def _stack(experts: Experts, layer: MoE | None, found: list[nn.Module]) -> Stack:
        shapes, k = tuple(tuple(p.shape) for p in experts.parameters()), 1.0
        beside = pair = slots = 0
        if layer is not None:
            router = layer.router
            slots = router.slots if isinstance(router, SoftRouter) else 0
            k = float(getattr(router, "k", 1) or 1)
            if isinstance(router, ExpertChoiceRouter):
                k = float(router.capacity.factor)
            beside = _numbers(layer.shared)
            if isinstance(layer, ShortcutMoE):
                block = next((b for b in found if any(m is layer for m in b.modules())), None)
                pair = max(0, _numbers(block) - _numbers(layer.experts) - _numbers(layer.router))
        kept = experts.w_out.requires_grad, experts.w_out.element_size()
        return Stack(experts.num_experts, shapes, k, shapes[0][1], beside, pair, *kept, slots)


def _numbers(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _style(name: str, styles: dict[str, str]) -> str | None:
    layer, _, kind = name.rpartition(".")
    style = styles.get(layer)
    if style is None or style == "replicated_with_grad_allreduce":
        return None
    if style.startswith("rowwise"):
        return "columns" if kind == "weight" else None
    return "rows"
