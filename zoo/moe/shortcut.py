"""Shortcut-connected experts (ScMoE): routed in one block, added in the next, so that tokens travel meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Experts
from .layer import MoE
from .routers.base import Router
from .routing import Routing


class ShortcutMoE(MoE):
    """Experts that take the place of a block's MLP, whose result the next block adds, in its `Shortcut`.

    ScMoE (2404.05019): of two blocks, experts read what the first has between its attention and its MLP, and each has a
    dense MLP. With h_l = x_l + attention_l(norm(x_l)) and n_l = norm(h_l), as in transformers' LongCat-Flash,
        x_{l+1} = h_l + dense(n_l)
        x_{l+2} = h_{l+1} + next_dense(n_{l+1}) + sum_e g_e(n_l) f_e(n_l)
    This module is called with n_l and returns dense(n_l); `Shortcut` is called with n_{l+1}. Where experts are spread
    over processes, tokens set out before `dense` runs; results set out after it, while the next block's attention and
    MLP run, and are waited for by `Shortcut`. Backward their gradients travel likewise. What it costs: neither gate nor
    experts see what the second block's attention and the first's MLP add.

    Call the two alternately, and put both into one region of activation checkpointing.
    Raises ValueError as `MoE`.
    """

    shared: nn.Module

    def __init__(self, router: Router, experts: Experts, dense: nn.Module) -> None:
        super().__init__(router, experts, shared=dense)
        self._result: Callable[[], Tensor] | None = None

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """dense(x) of tokens x [..., D]; keywords go to the router."""
        parallel, routing = self._parallel(), self._decide(x, context)
        found: list[Tensor] = []
        later: list[Callable[[], Tensor]] = []
        if parallel is not None:
            parallel.meanwhile = lambda: found.append(self.shared(x))
            # Experts that are more than MLPs go on with what comes back, so that they have to wait.
            if isinstance(routing, Routing) and isinstance(self.experts, Experts):
                parallel.later = later
        y = routing.apply(x.reshape(-1, x.shape[-1]), self.experts)
        self._result = functools.partial(_waited_for, later[0]) if later else lambda: y
        return found[0] if found else self.shared(x)

    def take(self) -> Callable[[], Tensor]:
        """A function that waits for what experts made of the last call's tokens, [T, D]; forgotten here.

        Raises RuntimeError where there was no call since.
        """
        if self._result is None:
            raise RuntimeError("Shortcut: its ShortcutMoE has not run since; the two are called alternately")
        result, self._result = self._result, None
        return result


# As in `Experts`, an exchange stays out of compiled graphs.
@torch.compiler.disable
def _waited_for(result: Callable[[], Tensor]) -> Tensor:
    return result()


class Shortcut(nn.Module):
    """The MLP of the block after a `ShortcutMoE`: a dense one, and what came over the shortcut."""

    def __init__(self, dense: nn.Module, source: ShortcutMoE) -> None:
        super().__init__()
        self.dense = dense
        self._source = (source,)  # a part of the other block, not of this one

    def forward(self, x: Tensor) -> Tensor:
        """dense(x) and the experts' result, of tokens x [..., D] at the places of those that the experts had."""
        result = self._source[0].take()  # first: a recomputation for checkpointing may end within the dense MLP
        return self.dense(x) + result().view(x.shape)
