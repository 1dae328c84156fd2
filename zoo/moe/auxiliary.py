"""Which auxiliary losses a router adds, by name, and with what weight."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from . import balance

# A name in a configuration -> the function, with the options that make it that loss.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "switch": balance.load_balance,
    "load_balance": balance.load_balance,
    "transformers": partial(balance.load_balance, normalization="tokens"),
    "global_batch": partial(balance.load_balance, global_batch=True),
    "gshard": balance.gshard,
    "importance": balance.importance,
    "load": balance.load,
    "importance_vmoe": balance.importance_probs,
    "load_vmoe": balance.load_vmoe,
    "z": balance.z,
    "sequence": balance.load_balance,
    "device_level": balance.device_level,
}
SCOPES = ("batch", "sequence", "group")


@dataclass
class Term:
    """One weighted loss: `scope` says what it is computed over, each group apart and then averaged."""

    function: Callable[..., Tensor]
    weight: float
    scope: str = "batch"
    options: dict[str, Any] = field(default_factory=dict)


class AuxiliaryLosses:
    """The losses of a router from a table {name: weight} or {name: {weight: .., scope: .., option: ..}}.

    `name` is one of LOSSES, or the import path of a function of the same kind: it is called with the tensors it names
    among its parameters (see `zoo.moe.balance`) and the options given. scope is "batch" (default), "sequence" (default of
    the loss of that name) or "group" (the router's groups). Raises ValueError naming an unknown loss, scope or option.
    """

    def __init__(self, table: Mapping[str, float | Mapping[str, Any]] | None) -> None:
        self.terms = {name: _term(name, spec) for name, spec in (table or {}).items()}

    def __call__(
        self, sources: Mapping[str, Callable[[], Any]], groups: Mapping[str, tuple[int, int] | None]
    ) -> dict[str, Tensor]:
        """Weighted losses. `sources` makes a named tensor on demand; `groups` gives (G, N) of each scope."""
        made: dict[str, Any] = {}
        losses = {}
        for name, term in self.terms.items():
            split = groups.get(term.scope)
            if term.scope != "batch" and split is None:
                raise ValueError(
                    f"auxiliary loss {name!r} is computed a {term.scope} at a time, but the tokens came as one list; "
                    f"expected [B, S, D] (or a router group_size that divides the tokens)"
                )
            arguments = dict(term.options)
            for parameter in inspect.signature(term.function).parameters:
                if parameter in sources and parameter not in arguments:
                    if parameter not in made:
                        made[parameter] = sources[parameter]()
                    value = made[parameter]
                    if split is not None and isinstance(value, Tensor) and value.dim():
                        value = value.unflatten(0, split)
                    arguments[parameter] = value
            losses[name] = term.weight * term.function(**arguments)
        return losses


def _term(name: str, spec: float | Mapping[str, Any]) -> Term:
    function = LOSSES.get(name) or _imported(name)
    if not isinstance(spec, Mapping):
        return Term(function, float(spec), "sequence" if name == "sequence" else "batch")
    options = dict(spec)
    if "weight" not in options:
        raise ValueError(f"auxiliary loss {name!r}: expected a number or a table with 'weight', got {dict(spec)}")
    weight = float(options.pop("weight"))
    scope = options.pop("scope", "sequence" if name == "sequence" else "batch")
    if scope not in SCOPES:
        raise ValueError(f"auxiliary loss {name!r}: unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"auxiliary loss {name!r} has no option {option!r}; it takes: {', '.join(known)}")
    return Term(function, weight, scope, options)


def _imported(path: str) -> Callable[..., Tensor]:
    module, _, attribute = path.rpartition(".")
    if module:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"auxiliary loss {path!r} cannot be imported: {error}") from None
    near = difflib.get_close_matches(path, LOSSES, n=3) or list(LOSSES)
    raise ValueError(f"unknown auxiliary loss {path!r}; did you mean: {', '.join(near)}? An import path works too")
