"""Filling a vision model from stored arrays: every name and shape is checked before the first byte is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RANDOM = {torch.Tensor.uniform_, torch.Tensor.normal_, nn.init.trunc_normal_, torch.Tensor.erfinv_}
POSITIONS = "pos_embed"
PRE_LOGITS = ("pre_logits.fc.weight", "pre_logits.fc.bias")


class Stored(Protocol):
    """An array in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape there."""

    def read_into(self, target: Tensor) -> None:
        """Fill a tensor of that shape."""


class Unset(TorchFunctionMode):
    """Leaves weights undrawn inside the block: they are about to be read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in RANDOM else func(*args, **(kwargs or {}))


@torch.no_grad()
def fill(
    model: Any,
    stored: Mapping[str, Stored],
    where: Path,
    name_of: Callable[[str], str | None] = lambda key: key,
    view_of: Callable[[str, Tensor, tuple[int, ...]], Tensor | None] = lambda key, ours, shape: ours,
    *,
    channels: int = 3,
    grid: tuple[int, int] | None = None,
    head: bool = True,
) -> None:
    """Read `stored` into the model, positions resampled to its grid and patches adapted to its channels, as timm does.

    name_of gives the parameter that holds a stored array, view_of the view of it in the array's shape. channels and
    grid are the checkpoint's, a square one unless said. Without `head` the stored one is left out, and the layer before
    it where the model has none. Raises ValueError naming `where`, for missing and surplus arrays and wrong shapes.
    """
    state = model.state_dict()
    cfg = model.pretrained_cfg
    heads = [f"{name}.{kind}" for name in _names(cfg.get("classifier")) for kind in ("weight", "bias")]
    left_out = set() if head else {*heads, *(name for name in PRE_LOGITS if name not in state)}
    names = {key: str(name) for key in stored if (name := name_of(key)) not in left_out}
    if surplus := [key for key, name in names.items() if name not in state]:
        raise ValueError(f"{where}: {some(surplus)} unknown to {type(model).__name__} with these arguments")
    patches = {f"{name}.weight" for name in _names(cfg.get("first_conv"))}
    targets = {}
    for key, name in names.items():
        targets[name] = _as_stored(name, state[name], tuple(stored[key].shape), channels if name in patches else None)
    views = {key: _view(view_of, key, name, targets[name], stored[key], where) for key, name in names.items()}
    filled = dict.fromkeys(state, 0)
    for key, view in views.items():
        filled[names[key]] += view.numel()
    needed = {name: targets.get(name, tensor).numel() for name, tensor in state.items() if name not in left_out}
    if missing := [name for name, count in needed.items() if filled[name] < count]:
        raise ValueError(f"{where}: {some(missing)} missing; {type(model).__name__} needs them with these arguments")
    for key, view in views.items():
        stored[key].read_into(view)
    for name, target in targets.items():
        if target is not state[name]:
            ours = state[name]
            kept = adapt_input_conv(ours.shape[1], target, channels) if name in patches else None
            ours.copy_(_resampled(model, target, grid) if kept is None else kept)


def _names(entry: Any) -> tuple[str, ...]:
    """Modules named by an entry of timm's configuration: one, several or none."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _as_stored(name: str, ours: Tensor, shape: tuple[int, ...], channels: int | None) -> Tensor:
    """The tensor to read into: the model's own, or one of the checkpoint's size where that is adapted afterwards."""
    if name == POSITIONS and len(shape) == 3 and shape != tuple(ours.shape):
        return ours.new_empty(1, shape[1], ours.shape[2])
    if channels is not None and ours.dim() == 4 and channels != ours.shape[1]:
        return ours.new_empty(ours.shape[0], channels, *ours.shape[2:])
    return ours


def _view(view_of: Any, key: str, name: str, target: Tensor, source: Stored, where: Path) -> Tensor:
    """How `target` looks to the stored array; raises ValueError where their shapes do not go together."""
    shape = tuple(source.shape)
    view = view_of(key, target, shape)
    if view is None or tuple(view.shape) != shape:
        raise ValueError(
            f"{where}: {key} has shape {list(shape)}, which does not fit {name} of shape {list(target.shape)}"
        )
    return view


def _resampled(model: Any, positions: Tensor, grid: tuple[int, int] | None) -> Tensor:
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    new = [int(n) for n in model.patch_embed.grid_size]
    return resample_abs_pos_embed(positions, new, None if grid is None else list(grid), num_prefix_tokens=prefix)


def resample_positions(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A state dict whose positions fit the model's grid: what timm passes a checkpoint through before it loads it."""
    found = state.get(POSITIONS)
    if found is None or model.pos_embed is None or found.shape == model.pos_embed.shape:
        return state
    return {**state, POSITIONS: _resampled(model, found, None)}


def some(keys: list[str]) -> str:
    """Number and first names of missing or surplus tensors."""
    shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} ({shown})"
