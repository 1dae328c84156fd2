"""`from_pretrained` and `save_pretrained`: from a folder in a family's published layout to our layers, and back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import offloading, quantising
from ..gates import gate_factory
from ..moe import MoE
from ..moe.residual import folded_state
from ..moe.routers import TopKRouter
from ..parallel import Mesh
from ..parallel.parts import is_spread, whole_state
from . import adopt, few_bits, hub, sharded
from .language import ALSO, TABLES, Family, resolve_dtype, tensors_on_disk
from .peek import peek
from .quantised import dequantised, method_of, plain
from .shards import INDEX, WEIGHTS, bytes_of, write_configs, write_weights
from .sparse_relatives import published_config
from .staging import staged
from .tensorfile import DTYPES, Entry, read_header

CONFIG, GENERATION = "config.json", "generation_config.json"
FLOATS = ("F64", "F32", "F16", "BF16")
GATE = re.compile(r".*\.gate\.(weight|e_score_correction_bias)")


def has_table(folder: Path) -> bool:
    """Whether a folder's config.json names one of the families that are read here."""
    return peek(folder).get("model_type") in TABLES.keys() | ALSO.keys()


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str | None = None,
    backend: str = "auto",
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    capacity: Any = None,
    attn_implementation: str | None = None,
    mesh: Mesh | None = None,
    quantise: str | None = None,
    offload: int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Any:
    """A published checkpoint of a language model as a transformers model on our layers.

    Families: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V3, and those of `zoo.pretrained.language.READABLE`:
    FlexOlmo, Mellum, DeepSeek-V2 and V3.2, dots.llm1, GLM-4.5, 4.7 Flash and 5, Kimi K2, Solar Open.

    source: a folder with config.json and safetensors files, or a hub repository id (then revision, cache_dir,
    local_files_only and token are the hub's). dtype "auto" keeps the checkpoint's. router, losses and capacity are
    those of `create_model`, for training on: a gate given here takes over the checkpoint's weight and selection bias
    where it has such, and starts fresh otherwise. backend is that of `moe_mlp`. The model is in eval mode. Tensors go
    from the files straight into the stacked weights: peak memory is the model's plus one tensor. DeepSeek-V3's
    multi-token prediction layers are left out, as transformers does. Weights in few bits are dequantised while they are
    read (`zoo.pretrained.quantised`, `compressed`, `gptq`, `bitsandbytes`), to config.json's dtype with "auto", and the
    model has no quantization_config.

    With `mesh` the model is spread over processes (`zoo.parallel.parallelize`) before it is read: each reads the bytes
    of its own parts, of stacked experts only its own, and has counted them in `model.bytes_read`.

    With `quantise`, a format of `zoo.quantise`, experts are kept in numbers of few bits: a checkpoint in MXFP4 read as
    "mxfp4" has the numbers of its files, one in FP8 with a matrix an expert and blocks of 128 x 128 read as "float8"
    its codes and scales.

    With `offload`, experts stay in their files, and come when tokens meet them: there is memory for that many of each
    layer (`zoo.offload`), of the kind that `quantise` names.

    Raises ValueError for an unknown family, another quantisation, missing or surplus keys, a wrong shape, or a
    damaged file; FileNotFoundError and ConnectionError where there is nothing to read. Messages name file and key.
    """
    folder = hub.local_folder(
        source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
    )
    raw = _read_json(folder / CONFIG)
    family = adopt.family_of(str(raw.get("model_type")), where=f" in {folder / CONFIG}")
    entries = entries_of(folder, raw)
    config = plain(family.classes()[0].from_pretrained(folder))
    config.model_type = type(config).model_type  # of what is of this family by another name
    vars(config).pop("auto_map", None)  # names code beside the checkpoint, which is not used
    as_stored = dtype == "auto"
    if as_stored:
        dtype = config.dtype or stored_dtype(entries)
    given = adopt.gate_arguments(losses, capacity)
    make = None
    check_router(router, mesh, quantise, offload)
    if router is not None:
        sizes = (config.hidden_size, getattr(config, family.num_experts))
        make = gate_factory(router, *sizes, k=config.num_experts_per_tok, **given)
    model = adopt.build(
        config,
        router=make,
        router_args=given,
        backend=backend,
        dtype=resolve_dtype(dtype),
        device=device if mesh is None and quantise is None and offload is None else "meta",
        attn_implementation=attn_implementation,
        initialize=False,
    )
    if as_stored:
        _widen_gates(model, family, entries)
    if mesh is not None:
        targets = _targets(model, family, entries, folder, own_gates=True)
        sharded.spread_and_fill(model, targets, entries, mesh, device)
    elif quantise is not None or offload is not None:
        targets = _targets(model, family, entries, folder, own_gates=True)
        read_expert_by_expert(model, targets, entries, quantise, offload, device)
    elif torch.device(next(model.parameters()).device).type != "meta":
        targets = _targets(model, family, entries, folder, own_gates=router is None)
        with torch.no_grad():
            for key, target in sorted(
                targets.items(), key=lambda item: (entries[item[0]].path, entries[item[0]].start)
            ):
                entries[key].read_into(target)
    read_generation(model, folder)
    return model


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model in its family's own published layout, one tensor an expert, so that plain transformers loads it.

    Writes config.json, generation_config.json and model.safetensors, or shards and their index where the weights are
    larger than max_shard_size (bytes, or "5GB"). Everything is written beside the folder first and moved when
    complete: a save that fails leaves nothing behind. With `overwrite` the checkpoint files of an existing folder are
    replaced and its other files stay. A model in parts is put together by all its processes, which call this
    together, and written by the first. state_dict: what to write instead of the model's own tensors, by its names.
    Experts in float8 (`zoo.quantise`) are written in DeepSeek-V3's FP8, codes and scales as they are.

    Raises TypeError for a model that has no such layout, ValueError for one whose gates that layout cannot express, and
    FileExistsError for a folder that is not empty.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    config = published_config(model)
    family = adopt.family_of(config.model_type)
    limit = bytes_of(max_shard_size)
    state = state_dict
    if is_spread(model):
        state = whole_state(model)
        if torch.distributed.get_rank():
            return
    with staged(folder, overwrite) as staging:
        tensors = dict(tensors_on_disk(model, family, state=folded_state(model, state)))
        write_configs(model, config, family.classes()[1].__name__, few_bits.settings_for(tensors), staging)
        write_weights(tensors.items(), few_bits.numbers(model), staging, limit)


def check_router(router: Any, mesh: Mesh | None, quantise: str | None = None, offload: int | None = None) -> None:
    """Raise ValueError for other gates than a checkpoint's in a model that is read in parts, or expert by expert."""
    given = {"a mesh": mesh, "quantise": quantise, "offload": offload}
    options = [name for name, value in given.items() if value is not None]
    if mesh is not None and len(options) > 1:
        kind = "quantised" if quantise is not None else "offloaded"
        raise ValueError(f"from_pretrained: {kind} experts are not spread over processes; give mesh or {options[1]}")
    if router is not None and options:
        raise ValueError(f"from_pretrained: with {options[0]} the gates are the checkpoint's own; leave out router")


def read_expert_by_expert(
    model: Any,
    targets: Mapping[str, Tensor],
    entries: Mapping[str, Entry],
    quantise: str | None,
    offload: int | None,
    device: Any,
) -> None:
    """Fill a model that has no memory, its experts in few bits, or staying in their files, or both."""
    if offload is not None:
        offloading.read(model, targets, entries, offload, quantise, device)
    else:
        assert quantise is not None
        quantising.read(model, targets, entries, quantise, device)


def stored_dtype(entries: Mapping[str, Entry]) -> torch.dtype:
    """That of the first tensor of floating point numbers, float32 where there is none."""
    return next((DTYPES[e.dtype] for e in entries.values() if e.dtype in FLOATS), torch.float32)


def read_generation(model: Any, folder: Path) -> None:
    """Give a model the settings of generation that its folder has, if it has any."""
    if (folder / GENERATION).is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint in the Hugging Face layout")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def entries_of(folder: Path, raw: Mapping[str, Any]) -> dict[str, Entry]:
    """Every tensor of a checkpoint by name, quantised ones as the numbers they mean; `raw` is its configuration."""
    method_of(raw, folder / CONFIG)  # refused before any weights are looked for
    # What stays in its files is read when the working directory may be another.
    return dequantised(_entries(folder.absolute()), raw, folder / CONFIG)


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by name, from its index and shards or its single file."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            found = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".safetensors"))
            raise FileNotFoundError(
                f"{folder}: neither {WEIGHTS} nor {INDEX}; found {', '.join(found) or 'no weights'} "
                "(pickled weights are not read, because unpickling executes code)"
            )
        return read_header(folder / WEIGHTS)
    shards = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{folder / INDEX}: expected an object weight_map from tensors to files")
    entries: dict[str, Entry] = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX}: shard {name!r} is not a file name")
        if not (folder / name).is_file():
            key = next(key for key, shard in shards.items() if shard == name)
            raise FileNotFoundError(f"{folder / name}: no such file; {INDEX} places tensor {key} in it")
        header = read_header(folder / name)
        entries.update(header)
        for key, shard in shards.items():
            if shard == name and key not in header:
                raise ValueError(f"{folder / name}: tensor {key} is missing; {INDEX} places it there")
    return entries


def _targets(model: Any, family: Family, entries: dict[str, Entry], folder: Path, own_gates: bool) -> dict[str, Tensor]:
    """What each tensor of the files fills, a view into the model; all is checked, and nothing read."""
    where = folder / INDEX if (folder / INDEX).is_file() else folder / WEIGHTS
    targets = dict(tensors_on_disk(model, family, gates=own_gates))
    if not own_gates:
        targets = {key: tensor for key, tensor in targets.items() if key in entries or not GATE.fullmatch(key)}
    if missing := [key for key in targets if key not in entries]:
        raise ValueError(f"{where}: {_some(missing)} missing; {model.config.model_type} needs them")
    unread = re.compile(_unread(model) + ("" if own_gates else f"|{GATE.pattern}"))
    if surplus := [key for key in entries if key not in targets and not unread.fullmatch(key)]:
        file = entries[surplus[0]].path
        raise ValueError(f"{file}: {_some(surplus)} unknown to {model.config.model_type} as {CONFIG} describes it")
    for key, target in targets.items():
        entries[key].check(target)
    return targets


def _widen_gates(model: Any, family: Family, entries: Mapping[str, Entry]) -> None:
    """Let gates be float32 where files hold them so beside narrower weights, as transformers 5.24 writes DeepSeek's."""
    for name, module in model.named_modules():
        entry = entries.get(f"{name.removesuffix('mlp')}{family.block}.gate.weight")
        if entry and isinstance(module, MoE) and isinstance(module.router, TopKRouter):
            weight = module.router.weight
            weight.data = weight.data.to(torch.promote_types(weight.dtype, DTYPES[entry.dtype]))


def _unread(model: Any) -> str:
    """Pattern of keys that published files may hold beyond the model: tables computed anew, tied and extra layers."""
    ignored = [r".*\.rotary_emb\.inv_freq", *(re.escape(key) for key in model.all_tied_weights_keys)]
    first = model.config.num_hidden_layers
    extra = getattr(model.config, "num_nextn_predict_layers", 0) or 0
    ignored += [rf"model\.layers\.{layer}\..*" for layer in range(first, first + extra)]
    ignored += [f".*(?:{pattern}).*" for pattern in model._keys_to_ignore_on_load_unexpected or ()]  # transformers' own
    return "|".join(ignored)


def _some(keys: list[str]) -> str:
    shown = ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
    return f"{len(keys)} tensor{'s' if len(keys) > 1 else ''} ({shown})"
