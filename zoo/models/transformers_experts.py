"""Our kernels behind transformers' experts interface: `experts_implementation="zoo"`, for any model that has one.

transformers keeps the router and hands over tokens, each token's choices and their weights. What an experts module
computes is found out by probing, not by its name: its own gate or activation is evaluated on a grid, beyond every limit
that it may clamp at, and must equal one of our activations there. Weights in another layout (transposed, or gate and up
interleaved) are rearranged in each call, through autograd. Whatever cannot be expressed raises ValueError.

Not supported in transformers 5.24: inkling2, inkling2_loop (soft caps inside the gate); muse_spark (a norm after each
expert).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ..moe import Routing
from ..moe.kernels import ACTIVATIONS, get_activation, moe_mlp

NAME = "zoo"
# Magnitudes to probe at: around the bend of every activation, and far beyond any clamp that a model could mean.
_PROBE = (0.0, 0.01, 0.1, 0.5, 1.0, 1.7, 3.0, 5.0, 6.5, 7.5, 9.0, 12.0, 30.0, 1e2, 1e3, 1e5, 1e8, 1e15)

_PARAMETERS = {
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
}


def register_experts() -> None:
    """Make `experts_implementation="zoo"` known to transformers; a second call changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a token's chosen experts make of it, weighted and summed: [T, D] from tokens [T, D] and choices [T, K].

    `self` is transformers' experts module. A choice of num_experts means none. Raises ValueError when the module
    computes something that our kernels do not.
    """
    activation = activation_of(self)
    w_in, b_in, w_out, b_out = _weights(self)
    index, keep = top_k_index.long(), top_k_index < self.num_experts
    # transformers 5.17 does not say whether experts are spread: choices that are missing then weigh nothing.
    if getattr(self, "_is_expert_parallel", False) and not torch.compiler.is_compiling():
        routing = Routing.from_choices(index, top_k_weights, self.num_experts, keep=keep)
    else:
        # Outside expert parallelism no choice is missing; should one be, it weighs nothing. Sizes stay fixed.
        weight = top_k_weights.masked_fill(~keep, 0.0)
        routing = Routing.from_choices(index.clamp(max=self.num_experts - 1), weight, self.num_experts)
    return moe_mlp(hidden_states, w_in, w_out, routing, activation, b_in=b_in, b_out=b_out)


def activation_of(experts: Any) -> str:
    """Our name of the activation inside one of transformers' experts modules; found once, and kept on the module."""
    if not torch.compiler.is_compiling():
        return _activation_of(experts)
    found = getattr(experts, "_zoo_activation", None)
    return _constant_activation_of(experts) if found is None else found[1]


def _activation_of(experts: Any) -> str:
    limits = tuple((k, v) for k, v in vars(experts).items() if type(v) in (int, float))
    known = experts.__dict__.get("_zoo_activation")
    if known is None or known[0] != limits:
        known = (limits, _find_activation(experts))
        experts._zoo_activation = known
    return known[1]


if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12):
    _constant_activation_of = torch.compiler.assume_constant_result(_activation_of)
else:  # torch 2.11 cannot with modules
    _constant_activation_of = torch.compiler.disable(
        _activation_of, reason="with torch 2.11 one graph needs a call of the model before it is compiled"
    )


def _find_activation(experts: Any) -> str:
    label = f"{type(experts).__name__} with experts_implementation='zoo'"
    if getattr(experts, "has_post_expert_norm", False):
        raise ValueError(f"{label}: a norm after each expert is not supported; use 'eager' or 'grouped_mm'")
    # A weight may be parametrized, as by peft's LoRA: then it is what its parametrization makes of it.
    names = {re.sub(r"^parametrizations\.(\w+)\..*", r"\1", name) for name, _ in experts.named_parameters()}
    if extra := names - _PARAMETERS:
        raise ValueError(
            f"{label}: parameters {', '.join(sorted(extra))} are not supported; use 'eager' or 'grouped_mm'"
        )
    gated = experts.has_gate
    grid = torch.tensor([sign * value for value in _PROBE for sign in (1.0, -1.0)], dtype=torch.float64)
    if gated:
        # Two hidden units, so that the order of gate and up is probed as well.
        gate, up = (axis.reshape(-1) for axis in torch.meshgrid(grid, grid, indexing="ij"))
        units = [(gate, up), (gate.roll(5), up.roll(3))]
        ours = torch.stack([u[0] for u in units] + [u[1] for u in units], dim=-1)
        theirs = ours if experts.is_concatenated else torch.stack([axis for u in units for axis in u], dim=-1)
        result = experts._apply_gate(theirs)
    else:
        ours = grid[:, None]
        result = experts.act_fn(ours)
    plain = [name for name, activation in ACTIVATIONS.items() if activation.gated == gated]
    limits = {float(v) for v in vars(experts).values() if type(v) in (int, float) and 0 < v < math.inf} if gated else ()
    for name in plain + [f"{name}:{limit}" for limit in sorted(limits) for name in plain]:
        if _equal(get_activation(name).forward(ours), result.double()):
            return name
    kind = "gate" if gated else "activation"
    raise ValueError(
        f"{label}: its {kind} ({_describe(experts)}) is none of {', '.join(ACTIVATIONS)}; use 'eager' or 'grouped_mm'"
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    # Models may compute in float32 inside; a difference that matters is far larger.
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def _describe(experts: Any) -> str:
    act = getattr(experts, "act_fn", None)
    name = getattr(act, "__name__", type(act).__name__) if act is not None else "its own _apply_gate"
    limits = [f"{k}={v}" for k, v in vars(experts).items() if "limit" in k or "alpha" in k]
    return ", ".join([name, *limits])


def _weights(experts: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Projections and biases in our layout: [E, 2F or F, D], [E, 2F or F], [E, D, F], [E, D]."""
    stem = "gate_up_proj" if experts.has_gate else "up_proj"
    w_in, w_out = getattr(experts, stem), experts.down_proj
    b_in = getattr(experts, f"{stem}_bias") if experts.has_bias else None
    b_out = experts.down_proj_bias if experts.has_bias else None
    if not w_in.is_floating_point() or w_in.itemsize < 2:
        raise ValueError(
            f"{type(experts).__name__}: experts_implementation='zoo' has no kernels for {w_in.dtype} weights"
        )
    if experts.is_transposed:
        w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
    if experts.has_gate and not experts.is_concatenated:
        w_in = w_in.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        b_in = None if b_in is None else b_in.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return w_in, b_in, w_out, b_out
