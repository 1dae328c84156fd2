"""Filling a vision model from stored arrays: every name and shape is checked before the first byte is read."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RANDOM = {torch.Tensor.uniform_, torch.Tensor.normal_, nn.init.trunc_normal_, torch.Tensor.erfinv_}
POSITIONS = "pos_embed"
# What has another shape for images, patches or windows of another size.
SIZED = (POSITIONS, "relative_position_bias_table", "patch_pos", "rel_pos_h", "rel_pos_w")
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
    kernel: tuple[int, ...] | None = None,
    grid: tuple[int, int] | None = None,
    head: bool = True,
) -> None:
    """Read `stored` into the model, what hangs on the size of images and patches adapted to the model's, as timm does.

    name_of gives the parameter that holds a stored array, view_of the view of it in the array's shape. channels, kernel
    (the shape of the first convolution's weight here, where it is stored otherwise) and grid are the checkpoint's, the
    grid a square one unless said. Without `head` the stored one is left out, and the layer before it where the model
    has none. Raises ValueError naming `where`, for missing and surplus arrays and wrong shapes.
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
        shape = tuple(stored[key].shape)
        targets[name] = _as_stored(name, state[name], (kernel or shape) if name in patches else shape, patches)
        if name == POSITIONS and len(shape) == 3 and (own := _own_grid(model)):
            grid = _grid_of(shape[1] - _prefix(model, own), grid)
            if grid is not None and grid != own:  # also where both have as many patches
                targets[name] = state[name].new_empty(shape)
    views = {key: _view(view_of, key, name, targets[name], stored[key], where) for key, name in names.items()}
    filled = dict.fromkeys(state, 0)
    for key, view in views.items():
        filled[names[key]] += view.numel()
    needed = {name: targets.get(name, tensor).numel() for name, tensor in state.items() if name not in left_out}
    if missing := [name for name, count in needed.items() if filled[name] < count]:
        raise ValueError(f"{where}: {some(missing)} missing; {type(model).__name__} needs them with these arguments")
    for key, view in views.items():
        stored[key].read_into(view)
    other = {name: target for name, target in targets.items() if target is not state[name]}
    for name, adapted in _adapted(model, other, patches, channels, grid).items():
        if adapted.shape != state[name].shape:
            raise ValueError(_misfit(where, name, other[name].shape, name, state[name].shape))
        state[name].copy_(adapted)


def _names(entry: Any) -> tuple[str, ...]:
    """Modules named by an entry of timm's configuration: one, several or none."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _as_stored(name: str, ours: Tensor, shape: tuple[int, ...], patches: set[str]) -> Tensor:
    """The tensor to read into: the model's own, or one of the checkpoint's shape where that is adapted afterwards."""
    if len(shape) != ours.dim():
        return ours
    first = name in patches and shape[0] == ours.shape[0]
    sized = name.endswith(SIZED) and shape[-1] == ours.shape[-1]
    return ours.new_empty(shape) if (first or sized) and shape != tuple(ours.shape) else ours


def _adapted(
    model: Any, other: dict[str, Tensor], patches: set[str], channels: int, grid: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Tensors of other shapes than the model's as timm fits them to it, where it does."""
    if not other:
        return other
    found = dict(other)
    if POSITIONS in other and other[POSITIONS].dim() == 3 and (own := _own_grid(model)):
        prefix = _prefix(model, own)
        old = None if grid is None else list(grid)
        found[POSITIONS] = resample_abs_pos_embed(other[POSITIONS], list(own), old, num_prefix_tokens=prefix)
    modules = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    fit: Any = next((m.checkpoint_filter_fn for m in modules if hasattr(m, "checkpoint_filter_fn")), None)
    rest = [name for name in other if found[name] is other[name]]
    if fit is not None and rest:
        theirs = fit({**model.state_dict(), **found}, model)
        found |= {name: theirs[name] for name in rest if name in theirs}
    for name in found.keys() & patches:
        found[name] = _first_layer(model, name, found[name], channels)
    return found


def _first_layer(model: Any, name: str, weight: Tensor, channels: int) -> Tensor:
    """The first layer's weight for the model's channels and, where it is a matrix [D, H*W*C], for its patches."""
    own = model.get_parameter(name)
    if weight.dim() == 4:
        # A layer before it may fold several pixels into channels.
        return adapt_input_conv(max(1, own.shape[1] * channels // weight.shape[1]), weight, channels)
    parent = model.get_submodule(name.rsplit(".", 2)[0])
    if not hasattr(parent, "patch_size"):
        return weight
    height, width = parent.patch_size
    if weight.shape[1] != height * width * channels:
        height = width = math.isqrt(weight.shape[1] // channels)
    if weight.shape[1] != height * width * channels:
        return weight
    weight = resample_patch_embed(weight.view(-1, height, width, channels).permute(0, 3, 1, 2), parent.patch_size)
    return adapt_input_conv(parent.in_chans, weight, channels).permute(0, 2, 3, 1).flatten(1)


def _view(view_of: Any, key: str, name: str, target: Tensor, source: Stored, where: Path) -> Tensor:
    """How `target` looks to the stored array; raises ValueError where their shapes do not go together."""
    shape = tuple(source.shape)
    view = view_of(key, target, shape)
    if view is None or tuple(view.shape) != shape:
        raise ValueError(_misfit(where, key, shape, name, target.shape))
    return view


def _misfit(where: Path, key: str, shape: Sequence[int], name: str, ours: Sequence[int]) -> str:
    return f"{where}: {key} has shape {list(shape)}, which does not fit {name} of shape {list(ours)}"


def _own_grid(model: Any) -> tuple[int, ...] | None:
    """Rows and columns of patches that learnt positions of a model are for; None where it does not say."""
    if getattr(model, POSITIONS, None) is None:
        return None
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if grid is None else tuple(int(n) for n in grid)


def _prefix(model: Any, grid: Sequence[int]) -> int:
    """How many learnt positions are of tokens before the patches."""
    return model.pos_embed.shape[1] - math.prod(grid)


def _grid_of(count: int, said: tuple[int, int] | None) -> tuple[int, int] | None:
    """The grid of so many stored positions: the one that is said if it has as many, else a square one, if any."""
    side = math.isqrt(max(count, 0))
    if said is not None and math.prod(said) == count:
        return said
    return (side, side) if side * side == count else None


def some(keys: list[str]) -> str:
    """Number and first names of missing or surplus tensors."""
    shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} ({shown})"
