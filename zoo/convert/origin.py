"""Where the weights of a model are: in the files that it was read from, until a conversion makes others of them."""

from __future__ import annotations

from typing import Any


def made_by(conversion: str, model: Any) -> None:
    """Note that a model's weights are no longer those it was read with."""
    model.converted = {"by": conversion, "from": _name(model)}
    if hasattr(getattr(model, "config", None), "name_or_path"):
        model.config.name_or_path = ""  # where trainers read a second one like it


def files_of(model: Any) -> str:
    """The folder or repository that has a model's weights; empty where none is known to, as after a conversion."""
    return "" if converted_by(model) else _name(model)


def converted_by(model: Any) -> str:
    """What made other weights of those that a model was read with; empty where nothing did."""
    how = getattr(model, "converted", None)
    return how["by"] if how and how["from"] == _name(model) else ""


def _name(model: Any) -> str:
    return str(getattr(model, "name_or_path", "") or "")
