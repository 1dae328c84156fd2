"""Tables for recommendation models: known data sets, and any CSV or Parquet with a schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..nearest import unknown
from .corpus import SPLITS
from .images import ALIASES
from .tables_encode import Preparation
from .tables_files import TableFiles, is_table, open_files
from .tables_rows import Rows
from .tables_schema import Schema
from .tables_split import HELD_OUT, Table, held_out_of

__all__ = ["KNOWN", "Preparation", "Rows", "Table", "open_files", "open_table"]

# name: (module, function, arguments that the name stands for)
KNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "synthetic": ("tables_synthetic", "synthetic_table", {}),
    "census:income": ("tables_census", "census_table", {"group": "income"}),
    "census:education": ("tables_census", "census_table", {"group": "education"}),
    "movielens": ("tables_movielens", "movielens_table", {}),
    "criteo": ("tables_criteo", "criteo_table", {}),
    "aliccp": ("tables_aliccp", "aliccp_table", {}),
}


def open_table(
    source: str | Sequence[str] = "synthetic",
    schema: Schema | Mapping[str, Any] | str | None = None,
    *,
    root: str = "data",
    download: bool = False,
    held_out: float = HELD_OUT,
    **options: Any,
) -> Table:
    """Open a known data set by its name (a key of KNOWN), or CSV or Parquet files, folders and patterns.

    Known sets bring their schema along; those that are files lie under `root`, and are fetched only with `download`,
    where their licence allows it. `options` are arguments of their readers. Other tables need a schema: one, a mapping
    as `Schema.read` takes it, or a YAML file. A single folder may have folders or files called train, val and test.
    `held_out` is the share of the rows that val and test get each, by a hash of their numbers, where a source has no
    such split. Raises ValueError or FileNotFoundError naming what is wrong.
    """
    if not 0 <= held_out < 0.5:
        raise ValueError(f"held_out must be at least 0 and below 0.5, got {held_out}")
    if isinstance(source, str) and source in KNOWN:
        if schema is not None:
            raise ValueError(f"schema: {source} has its own; give none, or name files instead")
        return _known(source, options, root=root, download=download, held_out=held_out)
    if isinstance(source, str) and not any(mark in source for mark in "/\\.*") and not Path(source).exists():
        raise unknown("source of tables", source, [*KNOWN, "a CSV or Parquet file, folder or pattern"])
    if options:
        raise ValueError(f"option {min(options)!r}: expected none beside files, got it for {source!r}")
    if download:
        raise ValueError(f"download: expected the name of a data set to fetch, got {source!r}")
    if schema is None:
        raise ValueError(f"{source}: expected a schema that says what its columns mean, got none")
    read = Schema.read(_yaml(schema) if isinstance(schema, str) else schema)
    return Table(
        source if isinstance(source, str) else ", ".join(source), read, held_out_of(_by_split(source), held_out)
    )


def _known(source: str, options: Mapping[str, Any], **common: Any) -> Table:
    module, function, fixed = KNOWN[source]
    opener: Callable[..., Table] = getattr(import_module(f".{module}", __package__), function)
    accepted = set(inspect.signature(opener).parameters)
    for name in options:
        if name not in (own := accepted - set(fixed) - set(common)):
            raise unknown(f"option of {source}", name, own or {"none"})
    if common["download"] and "download" not in accepted and "root" in accepted:
        raise ValueError(f"download: the licence of {source} forbids it; put its files into {common['root']!r}")
    return opener(**fixed, **{name: value for name, value in common.items() if name in accepted}, **options)


def _by_split(source: str | Sequence[str]) -> dict[str, TableFiles]:
    """Files by the split that the names of folders or files in a single folder say; all to train on otherwise."""
    sources = [source] if isinstance(source, str) else list(source)
    folder = Path(sources[0]).expanduser() if sources else Path()
    if len(sources) == 1 and folder.is_dir():
        found = {split: _called(folder, ALIASES[split]) for split in SPLITS}
        if found["train"]:
            return {split: open_files([str(path)]) for split, path in found.items() if path}
    return {"train": open_files(sources)}


def _called(folder: Path, aliases: Sequence[str]) -> Path | None:
    """The folder or table in `folder` with one of these names."""
    inside = sorted(folder.iterdir())
    return next((p for p in inside if p.name.split(".")[0] in aliases and (p.is_dir() or is_table(p))), None)


def _yaml(path: str) -> Any:
    import yaml

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"schema: there is no file {path!r} (from {Path.cwd()})")
    try:
        return yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"schema: {path} is not YAML: {' '.join(str(error).split())}") from error
