"""How our operators are registered: opaque to torch.compile, which sees no more than the shapes that `fake` gives.

By hand, as torch.library.custom_op checks at each call what costs more than decoding one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("zoo", "FRAGMENT")


def operator(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], vjp: Any = None, setup_context: Any = None
) -> Any:
    """The operator zoo::NAME of a schema "NAME(arguments) -> results"; vjp and setup_context as autograd functions'."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"zoo::{name}", fake, lib=_LIBRARY)
    if vjp is not None:
        torch.library.register_autograd(f"zoo::{name}", vjp, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.zoo, name).default


def backward_of(name: str, arguments: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The operator zoo::NAME_backward(arguments) -> Tensor[], which has no gradient itself."""

    def refuse(ctx: Any, grads: Any) -> None:
        raise NotImplementedError(f"{name} can be differentiated once; its backward has no gradient")

    return operator(f"{name}_backward({arguments}) -> Tensor[]", run, fake, refuse)
