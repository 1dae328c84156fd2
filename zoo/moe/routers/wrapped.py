"""A gate inside another: what both kinds of gate have in common that change the weights of any gate's assignments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..routing import Routing
from .base import Router


class WrappingRouter(Router):
    """Base of gates that hand on the assignments of an inner gate, made from its class or its name in this package.

    Raises ValueError for an unknown name, and TypeError where the inner gate's decisions are no assignments.
    """

    def __init__(
        self, dim: int, num_experts: int, inner_experts: int, gate: type[Router] | str, options: dict[str, Any]
    ) -> None:
        super().__init__(dim, num_experts)
        self.router = _by_name(gate)(dim, inner_experts, **options)

    @property
    def k(self) -> int:
        """How many experts a token meets, where the inner gate says so."""
        return self.router.k  # type: ignore[return-value]

    def _inner(self, x: Tensor, context: dict[str, Any]) -> Routing:
        """The inner gate's decision on tokens x [T, D] or [B, S, D]."""
        routing = self.router(x, **context)
        if not isinstance(routing, Routing):
            kind, outer = type(self.router).__name__, type(self).__name__
            raise TypeError(f"{outer}: {kind} hands on a {type(routing).__name__}, expected a Routing")
        return routing


def _by_name(gate: type[Router] | str) -> type[Router]:
    if not isinstance(gate, str):
        return gate
    from .. import routers

    known = {name for name in routers.__all__ if name != "Router"}
    name = gate.removeprefix("zoo.moe.routers.")
    if name not in known:
        raise ValueError(f"unknown gate {gate!r}; known: {', '.join(sorted(known))}")
    return getattr(routers, name)
