"""Where the tensors of a file that transformers wrote lie in a model of ours, by transformers' own conversions.

transformers knows what every wrapper's files call a tensor and how they lay it out, as conversions that it applies to
tensors. Here they are applied, the way it does on saving, to views of a model that has no memory: what comes out under
a file's name is the part of the model that this tensor fills. What a conversion computes has no such part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import folder as files
from . import sharded
from .sparse_blocks import row_of, tensors_of_transformers
from .tensorfile import Entry, Strand

UNREAD = r".*\.rotary_emb\.inv_freq"


class _Traced(Tensor):
    """A view that stays one where a conversion would copy it.

    Concatenated ones remember their `pieces`, those with two that take turns along the last dimension their `strands`.
    """

    pieces: tuple[list[Tensor], int]
    strands: list[Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.contiguous, Tensor.clone):
            return args[0]
        made = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.cat:
            made.pieces = list(args[0]), (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
        if func is Tensor.flatten and args[0].shape[-1] == 2:
            made.strands = list(args[0].unbind(-1))
        return made


class _Shapes:
    """In the place of a model, where a conversion asks for a parameter's shape: that of the file."""

    def __init__(self, theirs: Any, entries: Mapping[str, Entry]) -> None:
        self.theirs, self.entries = theirs, entries

    def get_parameter(self, name: str) -> Any:
        """The file's entry of that name, or the model's own parameter."""
        return self.entries[name] if name in self.entries else self.theirs.get_parameter(name)


def targets_of(
    model: Any, theirs: Any, entries: Mapping[str, Entry], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Entry]]:
    """What each tensor of the files fills, views into the model's state, and the entries by the same keys.

    `theirs` is transformers' model without memory, `model` the same one with our layers. A tensor of the files that is
    several of the model's end to end has a key for each. All is checked, and nothing read.

    Raises ValueError naming file and tensor for what is missing, surplus or of another shape, and naming the family
    where transformers' conversions do not say which part of the model a tensor of the files is.
    """
    label, own = model.config.model_type, theirs.state_dict()
    tied = set(model.all_tied_weights_keys or {})
    renamed = _used(model, theirs, entries, own)
    targets = _written(model, theirs, entries, tied)
    if missing := sorted(targets.keys() - entries.keys()):
        odd = [key for key in entries if key not in targets and renamed[key] in own.keys() - tied]
        if odd:
            raise _unknown_part(label, odd[0])
        raise ValueError(f"{folder}: {files._some(missing)} missing; {label} needs them")
    allowed = re.compile("|".join([UNREAD, *(f".*({p}).*" for p in theirs._keys_to_ignore_on_load_unexpected or ())]))
    surplus = [k for k in entries if k not in targets and renamed[k] not in tied and not allowed.fullmatch(k)]
    if surplus := sorted(surplus):
        path = entries[surplus[0]].path
        raise ValueError(f"{path}: {files._some(surplus)} unknown to {label} as {files.CONFIG} describes it")
    found: dict[str, Tensor] = {}
    parts: dict[str, Entry] = {}
    for key, target in targets.items():
        entries[key].check(target)
        for name, tensor, entry in _pieces(key, target, entries[key], label):
            found[name], parts[name] = tensor, entry
    try:
        sharded.views(model, found)
    except ValueError as error:
        raise _unknown_part(label, str(error)) from None
    return found, parts


def _used(model: Any, theirs: Any, entries: Mapping[str, Entry], own: Mapping[str, Tensor]) -> dict[str, str]:
    """The model's name of each tensor of the files; what was used to find it is what the model is saved with."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    conversions = get_model_conversion_mapping(theirs)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    names = {}
    for key in sorted(entries, key=dot_natural_key):
        names[key], _ = rename_source_key(key, renamings, converters, theirs.base_model_prefix, dict(own))
        if names[key] not in own and key in own:
            names[key] = key
    model._weight_conversions = [c for c in conversions if c.was_used()]
    return names


def _written(model: Any, theirs: Any, entries: Mapping[str, Entry], tied: set[str]) -> dict[str, Tensor]:
    """The model's state, traced, as transformers would write it after reading files of these names."""
    from transformers.core_model_loading import revert_weight_conversion

    state: Any = {name: t.as_subclass(_Traced) for name, t in model.state_dict().items() if name not in tied}
    if row_of(model) is not None:
        state = dict(tensors_of_transformers(model, state))
    shapes: Any = _Shapes(theirs, entries)
    shapes._weight_conversions, shapes.config = model._weight_conversions, model.config
    try:
        return revert_weight_conversion(shapes, state)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise _unknown_part(model.config.model_type, str(error)) from error


def _pieces(key: str, target: Tensor, entry: Entry, label: str) -> Iterator[tuple[str, Tensor, Entry]]:
    """A tensor of the files in the pieces that it is of several of the model's."""
    for n, strand in enumerate(getattr(target, "strands", ())):
        yield f"{key} ({n})", strand, Strand.of(entry, n)
    if hasattr(target, "strands"):
        return
    pieces, dim = getattr(target, "pieces", ([target], 0))
    if dim != 0:
        raise _unknown_part(label, key)
    if len(pieces) == 1:
        yield key, pieces[0], entry
        return
    start = 0
    for n, piece in enumerate(pieces):
        yield f"{key} ({n})", piece, entry.rows(start, len(piece))
        start += len(piece)


def _unknown_part(label: str, what: str) -> ValueError:
    return ValueError(
        f"{label} cannot be read in parts: transformers' conversions do not say which part of the model a tensor of "
        f"its files is ({what}). Read it whole, and then zoo.parallel.parallelize, zoo.quantise or zoo.offload"
    )
