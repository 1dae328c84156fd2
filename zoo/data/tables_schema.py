"""What the columns of a table mean to a recommendation model: features, tasks, and groups of rows.

Plain data, read from YAML or written in Python. Nothing here looks at a table; see `zoo.data.tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from ..nearest import unknown


@dataclass(frozen=True)
class Dense:
    """A number. `transform` "log" is sign(v) log(1 + |v|), "standard" subtracts the training mean and divides by the
    training deviation, "log_standard" does both, in this order. `missing` stands for an absent value or nan; None makes
    one an error.
    """

    name: str
    column: str | None = None
    transform: Literal["none", "log", "standard", "log_standard"] = "none"
    missing: float | None = None


@dataclass(frozen=True)
class Categorical:
    """One id a row, looked up in an embedding table.

    `ids` says how a value becomes a row of the table: "vocabulary" numbers the values seen in training from 1, and 0
    stands for every other; "hash" takes any value to one of num_embeddings rows; "index" takes the value as it is, an
    integer from 0. num_embeddings may be left out for a vocabulary, which then has as many rows as it needs. A value
    out of range of an "index" is an error, or with out_of_range="hash" goes where its hash says. Features that name the
    same `table` share its rows. `dim` is the width of the table, by default the schema's.
    """

    name: str
    column: str | None = None
    num_embeddings: int | None = None
    dim: int | None = None
    ids: Literal["vocabulary", "hash", "index"] = "vocabulary"
    out_of_range: Literal["error", "hash"] = "error"
    table: str | None = None


@dataclass(frozen=True)
class Bag(Categorical):
    """Any number of ids a row, in no order, pooled. `weights` names a column of as many numbers, one an id.

    In a CSV file the values of a row are joined by `separator`; in Parquet the column is a list.
    """

    pooling: Literal["sum", "mean"] = "sum"
    weights: str | None = None
    separator: str = "|"


@dataclass(frozen=True)
class Sequence(Categorical):
    """The ids of a history, oldest first, of which the last max_length count.

    Pooled by their sum or mean, or by "attention" from the feature `target` (Deep Interest Network, 1706.06978), which
    must be a categorical of the same width.
    """

    max_length: int = 50
    pooling: Literal["mean", "sum", "attention"] = "mean"
    target: str | None = None
    separator: str = "|"


@dataclass(frozen=True)
class Target:
    """What a task predicts from a row.

    `kind`: "binary" (0 or 1; with `positive`, 1 where the column holds one of these values), "regression" (a number) or
    "ordinal" (classes 0 .. classes - 1, in order). Rows with no label do not count for this task. `weight` multiplies
    its loss. With `given` the task happens only where another binary task did (a conversion after a click): its label
    is read everywhere, and how it is trained is the model's affair (see `esmm`).
    """

    name: str
    column: str | None = None
    kind: Literal["binary", "regression", "ordinal"] = "binary"
    positive: tuple[Any, ...] | None = None
    classes: int | None = None
    weight: float = 1.0
    given: str | None = None


# Ids are kept in 32 bits.
_MOST_ROWS = 2**31 - 1


def given_chain(tasks: Several[Target], task: Target) -> list[str]:
    """The tasks that a task is given, nearest first."""
    found = []
    while task.given:
        found.append(task.given)
        task = next(t for t in tasks if t.name == task.given)
    return found


_KINDS: dict[str, type] = {"dense": Dense, "categorical": Categorical, "bag": Bag, "sequence": Sequence}


@dataclass(frozen=True)
class Schema:
    """Features and tasks of a table, in order; `dim` is the width of embeddings that do not say their own.

    group: the column whose values part the rows into lists that are ranked apart (a user or a request), for GAUC and
    NDCG. domain: the categorical feature that names the scenario of a row, for models that tell them apart. weight: the
    column of sample weights. Raises ValueError for what does not fit together.
    """

    features: tuple[Dense | Categorical, ...]
    tasks: tuple[Target, ...]
    dim: int = 8
    group: str | None = None
    domain: str | None = None
    weight: str | None = None
    _by_name: dict[str, Dense | Categorical] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        _check_types("", self)
        if self.dim < 1:
            raise ValueError(f"schema: dim must be at least 1, got {self.dim}")
        self._by_name.update({feature.name: feature for feature in self.features})
        for what, names in (("feature", [f.name for f in self.features]), ("task", [t.name for t in self.tasks])):
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"schema: {what} {min(twice)!r} is named twice")
        for label, kept in (("features", self.features), ("tasks", self.tasks)):
            if not kept:
                raise ValueError(f"schema: expected at least one of {label}")
        for f in self.features:
            _check_feature(f, self)
        for task in self.tasks:
            _check_task(task, self)
        _check_columns(self.tasks)
        if self.domain is not None and type(self._by_name.get(self.domain)) is not Categorical:
            raise ValueError(f"schema: domain {self.domain!r} is no categorical feature")

    def __getitem__(self, name: str) -> Dense | Categorical:
        """The feature called `name`; raises ValueError naming the nearest ones."""
        if name not in self._by_name:
            raise unknown("feature", name, list(self._by_name))
        return self._by_name[name]

    def of(self, kind: type) -> list[Any]:
        """The features of exactly this kind, in order."""
        return [f for f in self.features if type(f) is kind]

    @classmethod
    def read(cls, given: Schema | Mapping[str, Any]) -> Schema:
        """From YAML: {features: {name: {kind: ..., ...}}, tasks: {name: {...}}, and the other fields}."""
        if isinstance(given, Schema):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"schema: expected keys features and tasks, got {_short(given)}")
        rest = dict(given)
        tables = {name: rest.pop(name, None) for name in ("features", "tasks")}
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise ValueError(f"schema: expected {name}: a table of names, got {_short(table)}")
        features = [_feature(name, spec) for name, spec in (tables["features"] or {}).items()]
        tasks = [_made(Target, "task", name, spec) for name, spec in (tables["tasks"] or {}).items()]
        known = {f.name for f in fields(cls) if f.init}
        for name in rest:
            if name not in known:
                raise unknown("key of schema", str(name), sorted(known))
        return cls(tuple(features), tuple(tasks), **_read(cls, rest))

    def difference(self, other: Schema) -> str | None:
        """The first thing in which another differs, such as "feature 'age'", or None; an open size is like any."""
        for what in ("feature", "task"):
            mine, theirs = ({made.name: made for made in getattr(s, f"{what}s")} for s in (self, other))
            for name in [*mine, *theirs]:
                if name not in mine or name not in theirs or not _alike(mine[name], theirs[name]):
                    return f"{what} {name!r}"
            if list(mine) != list(theirs):
                return f"order of {what}s"
        keys = ("dim", "group", "domain", "weight")
        return next((key for key in keys if getattr(self, key) != getattr(other, key)), None)

    def table(self) -> dict[str, Any]:
        """What `read` reads, for a JSON or YAML file."""
        kinds = {made: name for name, made in _KINDS.items()}
        features = {f.name: {"kind": kinds[type(f)], **_given(f)} for f in self.features}
        rest = {"dim": self.dim, "group": self.group, "domain": self.domain, "weight": self.weight}
        return {"features": features, "tasks": {t.name: _given(t) for t in self.tasks}, **rest}


def _short(value: Any) -> str:
    """A value for a message; of another file that was taken for a schema its beginning."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _alike(one: Any, other: Any) -> bool:
    """Whether two features or tasks are the same, but for a num_embeddings that one of them leaves open."""
    if None in (sizes := [getattr(made, "num_embeddings", None) for made in (one, other)]) and any(sizes):
        one, other = (replace(made, num_embeddings=None) for made in (one, other))
    return bool(one == other)


def _given(made: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not their defaults, without the name."""
    defaults = {f.name: f.default for f in fields(made)}
    values = asdict(made).items()
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values if k != "name" and v != defaults[k]}


def _feature(name: Any, spec: Any) -> Dense | Categorical:
    rest = _keys("feature", name, spec)
    kind = rest.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"schema: feature {name!r} has kind {kind!r}; known: {', '.join(_KINDS)}")
    return _made(_KINDS[kind], "feature", name, rest)


def _made(kind: type, what: str, name: Any, spec: Any) -> Any:
    known = [f.name for f in fields(kind) if f.name != "name"]
    rest = _keys(what, name, spec)
    for key in rest:
        if key not in known:
            raise unknown(f"key of {what} {name!r}", str(key), known)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"schema: {what} {name!r}: expected a name (YAML reads yes, no, on and off as truth values)")
    return kind(str(name), **_read(kind, rest))


def _keys(what: str, name: Any, spec: Any) -> dict[str, Any]:
    if spec is not None and not isinstance(spec, Mapping):
        raise ValueError(f"schema: {what} {name!r}: expected keys and values, such as kind: ..., got {spec!r}")
    return dict(spec or {})


def _read(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values from YAML as a dataclass has them: lists as tuples, and names that are numbers, such as 101, as texts."""
    texts = {f.name for f in fields(kind) if str(f.type).startswith("str")}
    found = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    return {key: str(v) if key in texts and type(v) is int else v for key, v in found.items()}


def _check_types(where: str, made: Any) -> None:
    """Raise ValueError for a value of another type than its field says; choices and lists have checks of their own."""
    for f in fields(made):
        kind, value = str(f.type), getattr(made, f.name)
        types, expected = next((t for name, t in _TYPES.items() if kind.startswith(name)), (object, ""))
        if value is None and kind.endswith("None"):
            continue
        if not isinstance(value, types) or (expected and isinstance(value, bool)) or value == "" or value != value:
            raise ValueError(f"schema: {f.name}{where and f' of {where}'}: expected {expected}, got {value!r}")


_TYPES: dict[str, tuple[Any, str]] = {
    "str": (str, "a text"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
}


def _check_choice(where: str, made: Any, key: str, known: tuple[str, ...]) -> None:
    if getattr(made, key) not in known:
        raise unknown(f"{key} of {where}", str(getattr(made, key)), known)


def _check_feature(f: Dense | Categorical, schema: Schema) -> None:
    where = f"feature {f.name!r}"
    _check_types(where, f)
    if isinstance(f, Dense):
        _check_choice(where, f, "transform", ("none", "log", "standard", "log_standard"))
        return
    _check_choice(where, f, "ids", ("vocabulary", "hash", "index"))
    _check_choice(where, f, "out_of_range", ("error", "hash"))
    if f.ids != "vocabulary" and f.num_embeddings is None:
        raise ValueError(f"schema: {where} has ids {f.ids!r}, so that num_embeddings must be given")
    for key in ("num_embeddings", "dim", "max_length"):
        if (value := getattr(f, key, None)) is not None and value < 1:
            raise ValueError(f"schema: {key} of {where} must be at least 1, got {value}")
    if (f.num_embeddings or 0) > _MOST_ROWS:
        raise ValueError(f"schema: num_embeddings of {where} must be at most {_MOST_ROWS}, got {f.num_embeddings}")
    if f.ids != "index" and f.out_of_range != "error":
        raise ValueError(f"schema: out_of_range of {where} is for ids 'index', got ids {f.ids!r}")
    if isinstance(f, Bag):
        _check_choice(where, f, "pooling", ("sum", "mean"))
    if not isinstance(f, Sequence):
        return
    _check_choice(where, f, "pooling", ("mean", "sum", "attention"))
    if f.pooling != "attention" and f.target is not None:
        raise ValueError(f"schema: target of {where} is for pooling 'attention', got pooling {f.pooling!r}")
    if f.pooling == "attention":
        target = schema[f.target] if f.target else None
        if type(target) is not Categorical or (target.dim or schema.dim) != (f.dim or schema.dim):
            raise ValueError(
                f"schema: {where} attends from target {f.target!r}; expected a categorical feature of width "
                f"{f.dim or schema.dim}"
            )


def _check_task(task: Target, schema: Schema) -> None:
    where = f"task {task.name!r}"
    _check_types(where, task)
    _check_choice(where, task, "kind", ("binary", "regression", "ordinal"))
    if not 0 <= task.weight < float("inf"):
        raise ValueError(f"schema: weight of {where} must be at least 0 and finite, got {task.weight}")
    for key, kind in (("positive", "binary"), ("classes", "ordinal")):
        if getattr(task, key) is not None and task.kind != kind:
            raise ValueError(f"schema: {key} of {where} is for a task of kind {kind}, got kind {task.kind}")
    if task.positive is not None and not (isinstance(task.positive, tuple) and task.positive):
        raise ValueError(f"schema: positive of {where}: expected a list of values, got {task.positive!r}")
    if task.kind == "ordinal" and (task.classes is None or task.classes < 2):
        raise ValueError(f"schema: {where} is ordinal, so that classes must be 2 or more, got {task.classes}")
    seen, at = [task.name], task
    while at.given is not None:
        other = next((t for t in schema.tasks if t.name == at.given), None)
        if other is None or other.name in seen or other.kind != "binary" or at.kind != "binary":
            raise ValueError(
                f"schema: {where} is given {task.given!r}; both must be binary tasks of the schema, and none given "
                "itself"
            )
        seen, at = [*seen, other.name], other


def _check_columns(tasks: Several[Target]) -> None:
    """Raise ValueError where what is predicted would have one name twice: rows have the column row."""
    taken = {
        "row": "the number of a row",
        **{f"{t.name}_joint": f"{t.name} and what it is given" for t in tasks if t.given},
    }
    for task in tasks:
        if task.name in taken:
            raise ValueError(
                f"schema: predictions have a column {task.name!r} for {taken[task.name]}; name the task otherwise"
            )
