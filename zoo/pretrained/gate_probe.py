"""Whether a gate whose class changes how it decides still decides as published ones do: both are tried on tokens."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..moe.routers import TopKRouter
from ..parallel.parts import as_written


@torch.no_grad()
def decides_alike(router: TopKRouter, published: TopKRouter) -> bool:
    """Whether `router`, in evaluation and without capacity, routes tokens as `published` does with the same weights.

    What a subclass overrides cannot be told from its options. Parameters are replaced by random ones while it is tried,
    so that those on the meta device, or in parts, need not be there. A gate that fails on a plain batch is not alike.
    """
    router = as_written(router)
    if type(router) is TopKRouter or hasattr(router, "frozen_names"):  # `grow` gives gates classes, not ways to decide
        return True
    device = torch.device("cpu") if router.weight.is_meta else router.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        tensors = {name: torch.randn(value.shape) for name, value in router.named_parameters()}
        tensors |= {name: _plain(value) for name, value in router.named_buffers()}
        tensors |= {"selection_bias": torch.rand(router.num_experts)} if router.selection_bias is not None else {}
        own = {name: tensors[name] for name in published.state_dict() if name in tensors}
        x, ids = torch.randn(2, 16, router.dim), torch.randint(2, (2, 16))
        states, capacity = {module: module.training for module in router.modules()}, router.capacity
        try:
            router.eval().capacity = None
            found = _decision(router, tensors, x, ids)
            return torch.allclose(found, _decision(published.eval(), own, x, ids), rtol=1e-3, atol=1e-5)
        except Exception:  # whatever a class of a user's own may raise
            return False
        finally:
            router.capacity = capacity
            for module, training in states.items():
                module.training = training


def _decision(router: TopKRouter, tensors: dict[str, Tensor], x: Tensor, ids: Tensor) -> Tensor:
    told: dict[str, Any] = {"causal": True, "token_ids": ids}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.func.functional_call(router, tensors, (x,), told).dense().float()


def _plain(buffer: Tensor) -> Tensor:
    """A copy of a buffer that it can be tried with."""
    if buffer.is_meta or isinstance(buffer, DTensor):
        return torch.zeros(buffer.shape, dtype=buffer.dtype)
    return buffer.detach().clone()
