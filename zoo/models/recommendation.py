"""Recommendation models: many tasks on the rows of a table.

MODELS is data: what builds the part that tasks share, and its arguments. Sizes that papers leave open, and those of a
model without a schema, are the MMoE paper's for its synthetic data: experts of one layer of 16, towers of one of 8, a
shared bottom of 113.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..nearest import unknown

if TYPE_CHECKING:
    from torch import nn

    from ..data.tables_schema import Schema

_DSELECT_K = {"name": "DSelectKRouter", "k": 2}
_TOP_K = {"name": "TopKRouter", "k": 2, "losses": {"importance": 0.01}}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "single_task": ("single_task", {}),
    "shared_bottom": ("shared_bottom", {}),
    "omoe": ("multi_gate", {"one_gate": True}),
    "mmoe": ("multi_gate", {}),
    "dselect_k_mmoe": ("multi_gate", {"router": _DSELECT_K}),
    "sparse_mmoe": ("multi_gate", {"router": _TOP_K}),
    "cgc": ("ple", {"num_levels": 1}),
    "ple": ("ple", {"num_levels": 2}),
    "adatt": ("adatt", {}),
    "snr_trans": ("snr_trans", {}),
    "m3oe": ("m3oe", {}),
}


def build(name: str, schema: Schema | Mapping[str, Any] | None = None, **overrides: Any) -> nn.Module:
    """Build MODELS[name] for a schema with the size of every table, as a `Preparation` has it; by default the MMoE
    paper's synthetic data.

    Every model takes tower_dims, tower_norm, dropout, and esmm (see `RecommendationModel`); the others that a model
    takes are the keywords of its builder below: sizes, expert_activation, expert_norm, and for gates `router` (a name,
    a class or {"name": ..., arguments}; see `zoo models --routers`) and `losses` by name. Raises ValueError naming the
    nearest for an unknown one.
    """
    from ..data.tables_schema import Schema
    from ..data.tables_synthetic import synthetic_schema

    kind, defaults = MODELS[name]
    maker = _MAKERS[kind]
    read = synthetic_schema() if schema is None else Schema.read(schema)
    arguments = {**defaults, **overrides}
    common = {key: arguments.pop(key) for key in _COMMON if key in arguments}
    fixed = {"one_gate"} if kind == "multi_gate" else set()
    known = set(inspect.signature(maker).parameters) - {"schema", "dim", "dropout"} - fixed
    for key in overrides:
        if key not in _COMMON and key not in known:
            raise unknown(f"argument of recommendation/{name}", key, sorted(known | set(_COMMON)))
        _check_size(key, overrides[key])
    model: Any = _assembled(read, maker, arguments, **common)
    model.made_with = {"network": f"recommendation/{name}", "overrides": overrides}  # for `zoo.save_pretrained`
    return model


def _check_size(key: str, value: Any) -> None:
    """Raise ValueError for widths that are no list, or a number that is not whole."""
    if key.endswith("_dims"):
        if isinstance(value, str) or not (isinstance(value, Sequence) and all(isinstance(v, Integral) for v in value)):
            raise ValueError(f"{key}: expected a list of widths, such as [64, 32], got {value!r}")
    elif key.endswith(("_experts", "_levels")) and not isinstance(value, Integral):
        raise ValueError(f"{key}: expected a whole number, got {value!r}")


def _assembled(
    schema: Schema,
    maker: Callable[..., Any],
    arguments: Mapping[str, Any],
    tower_dims: Sequence[int] = (8,),
    tower_norm: str | None = None,
    dropout: float = 0.0,
    esmm: bool = False,
) -> nn.Module:
    from .recommendation_model import RecommendationModel, SeparateInputs, inputs_of
    from .recommendation_towers import Towers

    inputs: Any = SeparateInputs(schema) if maker is _single_task else inputs_of(schema)
    sharing = maker(schema, inputs.out_dim, dropout=dropout, **arguments)
    domains = getattr(sharing, "num_domains", 1)
    towers = Towers(schema.tasks, sharing.out_dim, tower_dims, norm=tower_norm, dropout=dropout, domains=domains)
    return RecommendationModel(schema, inputs, sharing, towers, esmm)


_COMMON = tuple(p for p in inspect.signature(_assembled).parameters if p not in ("schema", "maker", "arguments"))


def _single_task(
    schema: Schema,
    dim: int,
    dropout: float,
    bottom_dims: Sequence[int] = (113,),
    expert_activation: str = "relu",
    expert_norm: str | None = None,
) -> Any:
    from .recommendation_sharing import SingleTask

    return SingleTask(dim, len(schema.tasks), bottom_dims, **_options(expert_activation, expert_norm, dropout))


def _shared_bottom(
    schema: Schema,
    dim: int,
    dropout: float,
    bottom_dims: Sequence[int] = (113,),
    expert_activation: str = "relu",
    expert_norm: str | None = None,
) -> Any:
    from .recommendation_sharing import SharedBottom

    return SharedBottom(dim, len(schema.tasks), bottom_dims, **_options(expert_activation, expert_norm, dropout))


def _multi_gate(
    schema: Schema,
    dim: int,
    dropout: float,
    num_experts: int = 8,
    expert_dims: Sequence[int] = (16,),
    router: Any = "DenseRouter",
    losses: Any = None,
    expert_activation: str = "relu",
    expert_norm: str | None = None,
    one_gate: bool = False,
) -> Any:
    from .recommendation_sharing import MultiGate

    options = _options(expert_activation, expert_norm, dropout)
    return MultiGate(dim, len(schema.tasks), num_experts, expert_dims, router, losses, one_gate, **options)


def _levels(sees: str, shared: int) -> Callable[..., Any]:
    def maker(
        schema: Schema,
        dim: int,
        dropout: float,
        task_experts: int = 2,
        shared_experts: int = shared,
        expert_dims: Sequence[int] = (16,),
        num_levels: int = 2,
        router: Any = "DenseRouter",
        losses: Any = None,
        expert_activation: str = "relu",
        expert_norm: str | None = None,
    ) -> Any:
        from .recommendation_levels import Levels

        options = _options(expert_activation, expert_norm, dropout)
        sizes = (task_experts, shared_experts, expert_dims, num_levels)
        return Levels(dim, len(schema.tasks), *sizes, sees, router, losses, **options)  # type: ignore[arg-type]

    return maker


def _snr_trans(
    schema: Schema,
    dim: int,
    dropout: float,
    num_experts: int = 4,
    expert_dims: Sequence[int] = (16,),
    num_levels: int = 2,
    l0: float = 1e-4,
    expert_activation: str = "relu",
    expert_norm: str | None = None,
) -> Any:
    from .recommendation_snr import SNRTrans

    options = _options(expert_activation, expert_norm, dropout)
    return SNRTrans(dim, len(schema.tasks), num_experts, expert_dims, num_levels, l0, **options)


def _m3oe(
    schema: Schema,
    dim: int,
    dropout: float,
    num_experts: int = 4,
    bottom_dims: Sequence[int] = (32, 32),
    expert_dims: Sequence[int] = (16,),
    router: Any = "DenseRouter",
    losses: Any = None,
) -> Any:
    from .recommendation_m3oe import M3oE

    domains = 1 if schema.domain is None else schema[schema.domain].num_embeddings  # type: ignore[union-attr]
    return M3oE(dim, len(schema.tasks), domains or 1, num_experts, bottom_dims, expert_dims, router, losses, dropout)


def _options(activation: str, norm: str | None, dropout: float) -> dict[str, Any]:
    return {"activation": activation, "norm": norm, "dropout": dropout}


_MAKERS: dict[str, Callable[..., Any]] = {
    "single_task": _single_task,
    "shared_bottom": _shared_bottom,
    "multi_gate": _multi_gate,
    "ple": _levels("own", 2),
    "adatt": _levels("all", 0),
    "snr_trans": _snr_trans,
    "m3oe": _m3oe,
}
