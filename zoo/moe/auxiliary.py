"""Which auxiliary losses a router adds, by name, and with what weight."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
    "mutual_information": balance.mutual_information,
    "communication": balance.communication,
    "topology": balance.topology,
    "task_mutual_information": balance.task_mutual_information,
    "local_entropy": balance.local_entropy,
    "global_entropy": balance.global_entropy,
    "localized_balance": balance.localized_balance,
    "selector_entropy": balance.selector_entropy,
    "selector_reach": balance.selector_reach,
    "relu_l1": balance.relu_l1,
    "null_load": balance.null_load,
    "top_any_load": balance.top_any_load,
    "top_any_cost": balance.top_any_cost,
    "diverse_and_simple": balance.diverse_and_simple,
    "stable_balance": balance.stable_balance,
    "stable_distill": balance.stable_distill,
    "hierarchical_load": balance.hierarchical_load,
}
SCOPES = ("batch", "sequence", "group")
BY_SEQUENCE = ("sequence", "localized_balance")  # losses that are computed a sequence at a time unless told otherwise
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
LABELS = ("task", "modality", "sample_type")  # whole numbers that a loss may read of the context


@dataclass
class Term:
    """One weighted loss: `scope` says what it is computed over, each group apart and then averaged."""

    function: Callable[..., Tensor]
    weight: float
    scope: str = "batch"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters
        self.parameters = tuple(parameters)
        self.required = [name for name, p in parameters.items() if p.default is p.empty and p.kind in NAMED]


class AuxiliaryLosses:
    """The losses of a router from a table {name: weight} or {name: {weight: .., scope: .., option: ..}}.

    `name` is one of LOSSES, or the import path of a function of the same kind: it is called with the tensors it names
    among its parameters (see `zoo.moe.balance`) and the options given. An option may name another tensor to stand in:
    {"switch": {"weight": 1e-4, "selected": "unbiased"}} counts the best scores instead of what bias and groups made of
    them, as Megatron does, and by default "sequence", which is DeepSeek-V3's; {"probs": "noisy_probs"} is V-MoE's
    gshard. scope is "batch" (default), "sequence" (default of the losses BY_SEQUENCE) or "group" (the router's groups).

    Raises ValueError naming an unknown loss, scope or option.
    """

    def __init__(self, table: Mapping[str, float | Mapping[str, Any]] | None) -> None:
        if table is not None and not isinstance(table, Mapping):
            raise ValueError(f"losses: expected a table of names and weights, got {table!r}")
        self.terms = {name: _term(name, spec) for name, spec in (table or {}).items()}

    def __call__(
        self, sources: Mapping[str, Callable[[], Any]], groups: Mapping[str, tuple[int, int] | None]
    ) -> dict[str, Tensor]:
        """Weighted losses. `sources` makes a named tensor on demand, `groups` gives (G, N) of a scope, G * N >= T."""
        made: dict[str, Any] = {}

        def source(name: str) -> Any:
            if name not in made:
                made[name] = sources[name]()
            return made[name]

        losses = {}
        for name, term in self.terms.items():
            if "noise_std" in term.parameters and "noisy_logits" in sources and "noise_std" not in sources:
                continue  # what it measures is the noise, and there is none at present
            split = groups.get(term.scope)
            if term.scope != "batch" and split is None:
                raise ValueError(
                    f"auxiliary loss {name!r} is computed a {term.scope} at a time, but the tokens came as one list or "
                    "this gate has one decision for all; expected [B, S, D] (scope 'sequence') or a router with "
                    "group_size (scope 'group')"
                )
            arguments = dict(term.options)
            for parameter in term.parameters:
                chosen = arguments.get(parameter, parameter)
                if isinstance(chosen, str) and chosen in sources:
                    arguments[parameter] = source(chosen)
                elif parameter in sources and isinstance(chosen, str):
                    raise ValueError(
                        f"auxiliary loss {name!r}: {parameter} names {chosen!r}, which is no tensor of this gate; "
                        f"known: {', '.join(sources)}"
                    )
            if missing := [parameter for parameter in term.required if parameter not in arguments]:
                raise ValueError(
                    f"auxiliary loss {name!r} needs {', '.join(missing)}: give it as an option, or take another loss; "
                    f"this gate has {', '.join(sources)}"
                )
            if split is not None:
                arguments = _split(name, term, arguments, split, source("probs").shape[0])
            losses[name] = term.weight * term.function(**arguments)
        return losses


def choice_sources(
    logits: Tensor,
    noisy: Tensor,
    std: Tensor | None,
    expert: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    probs: Callable[[], Tensor],
    noisy_probs: Callable[[], Tensor],
) -> dict[str, Callable[[], Any]]:
    """What losses may ask for after a choice of experts [T, K] with weights [T, K] from logits [T, E]."""
    k = expert.shape[-1]

    def chosen(index: Tensor, value: Tensor | None = None) -> Tensor:
        zeros = torch.zeros_like(logits)
        return zeros.scatter(-1, index, 1.0) if value is None else zeros.scatter(-1, index, value.to(zeros.dtype))

    return {
        "logits": lambda: logits,
        "noisy_logits": lambda: noisy,
        "noise_std": lambda: std,
        "probs": probs,
        "noisy_probs": noisy_probs,
        "selected": lambda: chosen(expert),
        "first": lambda: chosen(expert[:, :1]),
        "unbiased": lambda: chosen(logits.topk(k, dim=-1).indices),
        "gates": lambda: chosen(expert, weight),
        "mask": lambda: mask,
        "k": lambda: k,
    }


def _split(name: str, term: Term, arguments: dict[str, Any], split: tuple[int, int], tokens: int) -> dict[str, Any]:
    """The tensors [T, ..] among `arguments` as [G, N, ..]; tokens that fill a short last group are masked."""
    missing = math.prod(split) - tokens
    if missing and "mask" not in term.parameters:
        raise ValueError(
            f"auxiliary loss {name!r} takes no mask, but {tokens} tokens do not fill {split[0]} groups of {split[1]}; "
            "expected a parameter `mask`, False for tokens to leave out"
        )
    if missing and arguments.get("mask") is None:
        like = next(value for value in arguments.values() if isinstance(value, Tensor) and value.dim())
        arguments["mask"] = torch.ones(tokens, dtype=torch.bool, device=like.device)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim():
            if missing:
                value = F.pad(value, (0, 0) * (value.dim() - 1) + (0, missing))
            arguments[name] = value.unflatten(0, split)
    return arguments


def _term(name: str, spec: float | Mapping[str, Any]) -> Term:
    function = LOSSES.get(name) or _imported(name)
    if not callable(function):
        raise ValueError(f"auxiliary loss {name!r}: expected a function of tensors, found a {type(function).__name__}")
    options = dict(spec) if isinstance(spec, Mapping) else {"weight": spec}
    try:
        weight = float(options.pop("weight"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"auxiliary loss {name!r}: expected a number or a table with 'weight', got {spec!r}") from None
    scope = options.pop("scope", "sequence" if name in BY_SEQUENCE else "batch")
    if scope not in SCOPES:
        raise ValueError(f"auxiliary loss {name!r}: unknown scope {scope!r}; known: {', '.join(SCOPES)}")
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"auxiliary loss {name!r} has no option {option!r}; it takes: {', '.join(known)}")
    return Term(function, weight, scope, options)


def _imported(path: str) -> Callable[..., Tensor]:
    if not isinstance(path, str):
        raise ValueError(f"losses: expected names or import paths of functions, got {path!r}")
    module, _, attribute = path.rpartition(".")
    if module:
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"auxiliary loss {path!r} cannot be imported: {error}") from None
    near = difflib.get_close_matches(path, LOSSES, n=3) or list(LOSSES)
    raise ValueError(f"unknown auxiliary loss {path!r}; did you mean: {', '.join(near)}? An import path works too")
