"""The gates of LIMoE: the paper's settings where a user does not say otherwise."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from ..gates import parse_gate
from ..moe import Capacity, Decision, Router, Routing
from ..moe.label_losses import IMAGE, TEXT
from ..moe.routers import LoryRouter, MEORouter, MoTRouter, SMEARRouter, SoftRouter, TopKRouter
from .vision_gates import merged

# Batch priority routing, as LIMoE needs it, with V-MoE's capacity. Evaluation drops nothing, so that an embedding does
# not depend on what else is embedded beside it.
CAPACITY = Capacity(1.05, eval_factor=math.inf, multiple_of=4, drop="priority")
MIXING = (SoftRouter, SMEARRouter, LoryRouter, MEORouter, MoTRouter)


def entropy_losses(num_experts: int, weight: float = 0.04, global_batch: bool = False) -> dict[str, dict[str, Any]]:
    """LIMoE's local loss on text and global losses on both modalities, as `zoo.moe.auxiliary` reads them.

    The thresholds are 9 experts for text and 20 for images where there are 32, and in proportion elsewhere. They and
    the weight are as others cite them: they could not be held against the paper's appendix.
    """
    minimum = [max(1.0, share * num_experts / 32) for share in (20, 9)]
    shared = {"weight": weight, "global_batch": global_batch}
    return {
        "local_entropy": {**shared, "only": TEXT},
        "global_entropy": {**shared, "only": [IMAGE, TEXT], "minimum": minimum},
    }


def limoe_losses(num_experts: int) -> dict[str, Any]:
    """The entropy losses on top of V-MoE's two and a z-loss (ST-MoE's weight), which is what the paper combines."""
    return {"importance_vmoe": 0.005, "load_vmoe": 0.005, "z": 1e-3, **entropy_losses(num_experts)}


def limoe_spec(spec: Any, num_experts: int, group_pairs: int | None) -> Any:
    """The description of a gate, with LIMoE's settings for token choice that it leaves out."""
    if gate_class(spec) is not TopKRouter:
        return spec
    defaults: dict[str, Any] = {"k": 1, "capacity": CAPACITY, "losses": limoe_losses(num_experts)}
    if group_pairs is None:
        defaults["group_size"] = None  # all that a process has of a batch
    return merged(defaults, spec, {})


def mixes_tokens(spec: Any, make: Callable[[], Router]) -> bool:
    """Whether a gate's experts see mixtures of a group's tokens, as in Soft MoE; `make` makes the gate that spec means.

    A gate of another's is known to where it says so (`merges`); `refuse_mixtures` finds the others.
    """
    kind = gate_class(spec)
    if not isinstance(kind, type):
        with torch.device("meta"):
            gate = make()
        return gate.merges or isinstance(gate, MIXING)
    return issubclass(kind, MIXING) or bool(getattr(kind, "merges", False))


def refuse_mixtures(router: Router, given: Any, decision: Decision) -> None:
    """A hook for gates that hear an image and its text as one sequence; raises ValueError where these are mixed."""
    if not isinstance(decision, Routing):
        raise ValueError(
            f"LIMoE: {type(router).__name__} mixes tokens, so that an image would see its own caption; make the model "
            "with routed='apart'"
        )


def gate_class(spec: Any) -> Any:
    """What makes the gate that `spec` describes; raises as `parse_gate`."""
    make, _ = parse_gate(spec)
    return make.func if isinstance(make, functools.partial) else make
