"""Adapters as a folder of their own: adapters.json says how they are made and beside what, adapters.safetensors holds
their tensors under the model's own names, experts stacked, and what else is trained. Frozen weights are not in it."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Experts, OffloadedExperts, QuantisedExperts, Router
from ..moe.quantised import KINDS
from ..pretrained.language import resolve_dtype
from ..pretrained.staging import staged
from ..pretrained.storable import storable
from ..pretrained.tensorfile import read_all, read_header, write_file
from . import adapter_peft
from .adapting import adapt, adapter_state, base_state
from .origin import converted_by, files_of

RECORD, WEIGHTS = "adapters.json", "adapters.safetensors"
SAMPLE = 16  # numbers of every tensor that tell base weights apart


def is_adapted(folder: Path) -> bool:
    """Whether a folder is one that `save` wrote, or has a LoRA in peft's layout."""
    return (folder / RECORD).is_file() or adapter_peft.is_peft(folder)


def save(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    peft: bool = False,
) -> None:
    """Write the adapters of an adapted model, and what is needed to put them beside the same weights again.

    state_dict as in `zoo.save_pretrained`. With `peft` a LoRA is written as peft does (`adapter_peft.write`). A model
    in parts is put together by all its processes, and written by the first. Raises ValueError for an argument that JSON
    cannot hold, such as a router given as a function, and for more than peft's layout holds; and FileExistsError as
    `staged`, and for a folder that holds a model.
    """
    from ..parallel.parts import is_spread, whole_state

    target = Path(folder).expanduser()
    if (target / "config.json").is_file() and not is_adapted(target):
        raise FileExistsError(f"{target} holds a model; adapters need a folder of their own")
    state: Mapping[str, Tensor] = model.state_dict()
    if is_spread(model):
        state = whole_state(model)
        if torch.distributed.get_rank():
            return
    more = _learnt_beside(model)
    if peft:
        learns = {name for name, _ in model.named_parameters()}.intersection(more)
        return adapter_peft.write(model, folder, state if state_dict is None else state_dict, learns, overwrite)
    if how := converted_by(model):
        warnings.warn(
            f"save_pretrained: {target} has adapters alone, and no folder has the model that {how} made, which they "
            "stand beside; save that too",
            stacklevel=3,
        )
    record = {
        "adapted": storable(model.adapted, "argument"),
        "more": more,
        "base": {
            "class": type(model).__name__,
            "name": files_of(model),
            "converted": converted_by(model),
            "quantise": next((m.format for m in map(_kept, model.modules()) if isinstance(m, QuantisedExperts)), None),
            "tensors": dict(sorted(_shapes(model, state).items())),
            "weights": _fingerprint(model, state, more),
        },
    }
    written = state if state_dict is None else state_dict
    with staged(folder, overwrite) as staging:
        (staging / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_file(
            staging / WEIGHTS,
            sorted({**adapter_state(model, written), **{name: written[name] for name in more}}.items()),
        )


def load(
    folder: str | os.PathLike[str],
    *,
    base: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    share: bool = False,
    **options: Any,
) -> Any:
    """The adapted model of a folder that `save` or peft wrote, in eval mode.

    base: the model that the adapters stand beside, which stays as it is, or where `zoo.from_pretrained` finds it, the
    folder or repository that it was read from by default; options go there. Without the option `quantise` its experts
    have the format that they had; `quantise=None` reads them whole. share as in `zoo.adapt`. Raises ValueError where
    no base is known, and as `read_onto`.
    """
    from ..pretrained.dispatch import from_pretrained

    path = Path(folder).expanduser()
    is_peft = adapter_peft.is_peft(path)
    known = {"name": adapter_peft.base_name(path)} if is_peft else _record(path)["base"]
    if base is None:
        base = known["name"]
        if not base:
            said = path / (adapter_peft.CONFIG if is_peft else RECORD)
            how = "" if is_peft else known.get("converted", "")
            why = f"is what {how} made of another" if how else "was read from nowhere"
            raise ValueError(f"{said}: the model that adapters stand beside {why}; give base")
    if not isinstance(base, nn.Module):
        if format := known.get("quantise"):
            options = {"quantise": format, **options}
        base, share = from_pretrained(base, **options), True  # nobody else has it
    elif options:
        raise ValueError(f"from_pretrained: base is a model; {', '.join(options)} would have no effect")
    model = read_onto(base, path, share=share)
    place: dict[str, Any] = {"dtype": resolve_dtype(dtype), "device": device}
    return model.to(**{name: value for name, value in place.items() if value is not None}).eval()


def read_onto(model: nn.Module, folder: str | os.PathLike[str], share: bool = False) -> nn.Module:
    """A copy of a model with the adapters of a folder beside its weights, which are copied unless it is to share them.

    The folder is ours, or a LoRA in peft's layout (`adapter_peft.read_onto`).

    Its experts may be in other numbers than those that the adapters were trained beside: of few bits, or of many.
    Warns where other weights are not those. Raises ValueError naming file and tensor for a model of another shape, one
    that has adapters, missing and surplus tensors and a damaged file, and FileNotFoundError for a file that is not
    there.
    """
    path = Path(folder).expanduser()
    if getattr(model, "adapted", None):
        raise ValueError(f"{path}: expected the model that these adapters stand beside, got one that has adapters")
    if adapter_peft.is_peft(path):
        return adapter_peft.read_onto(model, path, share)
    record = _record(path)
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{path / WEIGHTS}: no such file")
    stored, base = record["base"]["tensors"], _shapes(model, model.state_dict())
    for name in dict.fromkeys([*stored, *base]):
        found = base.get(name, "none")
        if found != stored.get(name, "none"):
            raise ValueError(
                f"{path / RECORD}: these adapters stand beside a {record['base']['class']} whose {name} has shape "
                f"{stored.get(name, 'none')}, the model's has {found}"
            )
    for how in record["adapted"]:
        model, share = adapt(model, **how, share=share), True  # the second stands beside our own copy
    for name, parameter in model.named_parameters():
        if name in record["more"]:
            parameter.data = parameter.data.clone()  # what was trained is no longer the given model's
    whole, more = model.state_dict(), record["more"]
    then, now = record["base"]["weights"], _fingerprint(model, whole, more)
    if then and now and then != now:
        warnings.warn(f"{path}: these adapters were trained beside other weights than the model's", stacklevel=3)
    state = {**adapter_state(model), **{name: whole[name] for name in more}}
    if not any(tensor.is_meta for tensor in state.values()):
        read_all(state, read_header(path / WEIGHTS), path / WEIGHTS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in more)
    return model


def weights_fingerprint(model: nn.Module) -> str | None:
    """Tells apart what adapters, or other parameters that learn, stand beside; None for a model in parts or on meta."""
    from ..parallel.parts import is_spread

    return None if is_spread(model) else _fingerprint(model, model.state_dict(), _learnt_beside(model))


def _learnt_beside(model: nn.Module) -> list[str]:
    """What else training changes, in order: parameters that are not frozen, as a new head's, running statistics, and
    what the model's own gates count, as a temperature's steps."""
    adapters = adapter_state(model)
    names = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, Router)):
            names |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers()}
    return sorted(names & model.state_dict().keys() - adapters.keys())


def _kept(module: nn.Module) -> nn.Module:
    """A module, of offloaded experts those that stand for them where tokens are."""
    return module.held if isinstance(module, OffloadedExperts) else module


def _matrices(model: nn.Module) -> dict[str, list[int]]:
    """The experts' own matrices and biases by name, as they are called and shaped when they are not in few bits."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):  # layers may share experts in few bits
        if isinstance(module, (Experts, OffloadedExperts, QuantisedExperts)):
            part = "gate_up_proj" if module.gated else "up_proj"
            wide = module.hidden_dim * (2 if module.gated else 1)
            found[f"{name}.{part}"] = [module.num_experts, wide, module.dim]
            found[f"{name}.down_proj"] = [module.num_experts, module.dim, module.hidden_dim]
            if _kept(module).b_in is not None:  # offloaded ones are in no state
                found[f"{name}.{part}_bias"] = [module.num_experts, wide]
                found[f"{name}.down_proj_bias"] = [module.num_experts, module.dim]
    return found


def _coded(matrices: Collection[str]) -> set[str]:
    return {f"{name}_{kind}" for name in matrices for kind in KINDS}


def _shapes(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Of what adapters stand beside, whatever numbers its experts are in."""
    matrices = _matrices(model)
    shapes: Any = {name: list(tensor.shape) for name, tensor in state.items() if name not in _coded(matrices)}
    shapes.update(matrices)
    return base_state(model, shapes)  # type: ignore[return-value]


def _record(path: Path) -> dict[str, Any]:
    if not (path / RECORD).is_file():
        raise FileNotFoundError(f"{path / RECORD}: no such file; expected a folder of adapters")
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / RECORD}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or not {"adapted", "more", "base"} <= set(record):
        raise ValueError(f"{path / RECORD}: expected an object with adapted, more and base")
    return record


def _fingerprint(model: nn.Module, state: Mapping[str, Tensor], more: Collection[str]) -> str | None:
    """Tells weights apart by a few numbers of each, as bfloat16 so that a narrower copy is the same; None on meta.

    Experts' matrices, which may be in few bits, and what is trained are left out.
    """
    digest, matrices = hashlib.sha256(), _matrices(model)
    left = {*more, *matrices, *_coded(matrices)}
    for name, tensor in sorted(base_state(model, {n: t for n, t in state.items() if n not in left}).items()):
        if tensor.is_meta:
            return None
        some = tensor.detach().flatten()[:SAMPLE]
        some = some.to(torch.bfloat16) if some.is_floating_point() else some
        digest.update(name.encode() + some.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
