"""Vision-language models: transformers' own, read from a folder, with our layers in the language model, and back.

transformers reads and writes the files, because what a checkpoint calls a tensor differs for every wrapper, and it
knows them all; what is missing, surplus or of another shape is an error here, not a warning.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..gates import gate_factory, layer_gates
from ..moe import MoE
from ..nearest import unknown
from ..parallel import Mesh
from ..parallel.parts import is_spread, whole_state
from . import adopt, few_bits, moe_llava, quantised, sharded, shards
from . import folder as files
from .context import decoder_of, pass_context
from .language import resolve_dtype
from .peek import peek
from .sparse_blocks import adopt_blocks, check_gates, row_of, tensors_of_transformers
from .staging import staged
from .stand_in import stand_in
from .tensorfile import Entry
from .transformers_names import targets_of

IMPLEMENTATION = "zoo"  # the name of our kernels in transformers, which `import zoo` registers


def is_image_text(folder: Path) -> bool:
    """Whether a folder's config.json is one of a model that transformers counts among those from images to text."""
    config = peek(folder)
    return "vision_config" in config or config.get("model_type") in known_types()


@functools.cache
def known_types() -> dict[str, str]:
    """transformers' model types from images and text to text, and the class of each."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as names

    return first_classes(names)


def class_of(model_type: str, where: str = "") -> Any:
    """transformers' class of a vision-language model type; raises ValueError naming the nearest ones."""
    return named_class(f"vision-language family{where}", model_type, known_types())


def first_classes(names: Mapping[str, Any]) -> dict[str, str]:
    """The class of each model type in a table of transformers, the first where it has several."""
    return {kind: found if isinstance(found, str) else found[0] for kind, found in names.items()}


def named_class(what: str, model_type: str, known: Mapping[str, str]) -> Any:
    """transformers' class of a model type by a table of names; raises ValueError naming the nearest types."""
    import transformers

    if model_type not in known:
        raise unknown(what, str(model_type), known)
    return getattr(transformers, known[model_type])


def from_pretrained(
    folder: Path,
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
    find: Callable[[str, str], Any] | None = None,
    put: Callable[..., Any] | None = None,
) -> Any:
    """A published vision-language checkpoint as transformers' model, the sparse blocks of its language model on `MoE`.

    Options are those of `zoo.pretrained.folder.from_pretrained`, `mesh`, `quantise` and `offload` too; for other
    models than these, `find` gives the class of a model type in place of `class_of`, and `put` changes it in place of
    `put_layers`. A dense model is transformers' own as it is, for `zoo.upcycle`; so is one whose sparse blocks
    `zoo.pretrained.sparse_rows` has no row for, with its experts behind transformers' own routers on our kernels where
    they can. FP8 and MXFP4 weights are dequantised while they are read, by us: transformers reads its tensors from
    `zoo.pretrained.quantised`.

    Raises ValueError for an unknown family, another quantisation, missing or surplus keys or a wrong shape, and for
    gates or losses where no block of ours would have them, and with a mesh for a router, and for a family whose
    tensors transformers computes from those of its files; FileNotFoundError where there are no weights.
    """
    raw = files._read_json(folder / files.CONFIG)
    if not isinstance(model_type := raw.get("model_type"), str):
        raise ValueError(f"{folder / files.CONFIG}: no model_type; expected the configuration of a transformers model")
    found = (find or class_of)(model_type, f" in {folder / files.CONFIG}")
    entries = files.entries_of(folder, raw)  # names the file that is missing or damaged
    files.check_router(router, mesh, quantise, offload)
    device = torch.device(device) if device is not None else torch.get_default_device()
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    dtype = resolve_dtype(dtype) if dtype != "auto" else "auto"
    in_parts = mesh is not None or quantise is not None or offload is not None
    if in_parts or device.type == "meta":
        config = quantised.plain(found.config_class.from_pretrained(folder))
        if dtype == "auto":
            dtype = config.dtype or files.stored_dtype(entries)
        with torch.device("meta"):
            model = found._from_config(config, dtype=dtype, **options)
    else:
        model = _read(found, folder, dtype, options, entries if quantised.settings_of(raw) else None)
    theirs = copy.deepcopy(model) if in_parts else None
    model = (put or put_layers)(model, backend=backend, router=router, losses=losses, capacity=capacity).eval()
    if in_parts:
        targets, parts = targets_of(model, theirs, entries, folder)
        if mesh is not None:
            sharded.spread_and_fill(model, targets, parts, mesh, device)
        else:
            files.read_expert_by_expert(model, targets, parts, quantise, offload, device)
        files.read_generation(model, folder)
        return model
    return model if device.type == "meta" else model.to(device)


def _read(
    found: Any, folder: Path, dtype: Any, options: dict[str, Any], entries: Mapping[str, Entry] | None = None
) -> Any:
    """transformers' model; it reads `entries`, of dequantised tensors, in place of the files of a quantised folder."""
    source: Path | None = folder
    if entries is not None:
        # transformers itself would need a package more for FP8, and has no cut blocks.
        config = quantised.plain(found.config_class.from_pretrained(folder))
        dtype = (config.dtype if dtype == "auto" else dtype) or torch.get_default_dtype()
        state = {key: quantised.Unread(entry, dtype) for key, entry in entries.items()}
        source, options = None, {"config": config, "state_dict": state, **options}
    with torch.device("cpu"):
        model, report = found.from_pretrained(
            source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    label = model.config.model_type
    if wrong := sorted(report["mismatched_keys"]):
        key, theirs, ours = wrong[0]
        raise ValueError(f"{folder}: tensor {key} has shape {list(theirs)}, expected {list(ours)} ({label})")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{folder}: {files._some(missing)} missing; {label} needs them")
    if surplus := sorted(report["unexpected_keys"]):
        raise ValueError(f"{folder}: {files._some(surplus)} unknown to {label} as {files.CONFIG} describes it")
    if source is None:
        files.read_generation(model, folder)
    return model


def put_layers(
    model: Any,
    *,
    backend: str = "auto",
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    capacity: Any = None,
) -> Any:
    """The model with its sparse blocks on our layers, changed in place; options as in `from_pretrained`."""
    given = adopt.gate_arguments(losses, capacity)
    row, config = row_of(model), decoder_of(model).config
    make = None
    if router is not None and row is not None:
        k, factory = row.router(config).get("k"), layer_gates if isinstance(router, (list, tuple)) else gate_factory

        @functools.cache  # one for all layers: a list gives the first ones gates of their own
        def make(dim: int, num_experts: int) -> Any:
            return factory(router, dim, num_experts, k=k, **given)

    if adopt_blocks(model, make, given, backend):
        pass_context(model)
        stand_in(model)
        return model
    if router is not None or given:
        raise ValueError(
            f"{config.model_type}: router, losses and capacity are for sparse blocks of ours, and there are none"
        )
    use_our_kernels(model)
    return model


def use_our_kernels(model: Any) -> None:
    """Let experts that stay behind transformers' own routers run on our kernels, where these compute what they do."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ours = ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION]
    for module in model.modules():
        if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
            continue
        token = module.down_proj.new_zeros(1, module.down_proj.shape[2 if module.is_transposed else 1])
        first = token.new_zeros(1, 1)
        try:
            with torch.no_grad():
                ours(module, token, first.long(), first)
        except ValueError:
            continue
        except RuntimeError:
            if not token.is_meta:  # nothing can be computed there, but what is not supported is refused before
                raise
        module.config._experts_implementation = IMPLEMENTATION


def save(
    model: Any,
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    state_dict: Mapping[str, Any] | None = None,
) -> None:
    """Write a vision-language model in its family's own published layout, so that plain transformers loads it.

    An upcycled LLaVA is written as `zoo.pretrained.moe_llava.save` does. A model in parts is put together by all its
    processes, which call this together, and written by the first. gpt-oss's experts in MXFP4 (`zoo.quantise`) are
    written as they are published.
    Raises ValueError for gates that the layout cannot express, and FileExistsError for a folder that is not empty.
    """
    check(model)
    if _is_upcycled_llava(model):
        return moe_llava.save(model, folder, max_shard_size=max_shard_size, overwrite=overwrite)
    limit = shards.bytes_of(max_shard_size)
    whole = None
    if is_spread(model):
        whole = whole_state(model)
        if torch.distributed.get_rank():
            return
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    # Put together, tied weights are copies, which transformers would not know as one.
    state = {n: t for n, t in whole.items() if n not in tied} if whole is not None else model.state_dict()
    if state_dict is not None:
        state = dict(state_dict)
    state = _own(state, tied)
    if row_of(model) is not None:
        state = dict(tensors_of_transformers(model, state))
    settings = few_bits.settings_for(state)
    with staged(folder, overwrite) as staging:
        if settings:
            shards.write_configs(model, model.config, type(model).__name__, settings, staging)
            plain = {name: tensor for name, tensor in state.items() if name not in tied}
            shards.write_weights(plain.items(), few_bits.numbers(model), staging, limit)
        else:
            type(model).save_pretrained(model, staging, state_dict=state, max_shard_size=limit)
    return None


def _own(state: Mapping[str, Any], tied: Collection[str]) -> dict[str, Any]:
    """A tensor of its own for each name, which transformers asks for, but for those that it ties itself."""
    found, seen = {}, set()
    for name, tensor in state.items():
        place = tensor.data_ptr() if isinstance(tensor, torch.Tensor) and name not in tied else 0
        found[name] = tensor.clone() if place and place in seen else tensor
        seen.add(place)
    return found


def check(model: Any) -> None:
    """Raise TypeError or ValueError, as `save`, for a model that no published layout has a place for."""
    if _is_upcycled_llava(model):
        moe_llava.check(model)
    else:
        check_reshaped(model)
        check_gates(model)


def _is_upcycled_llava(model: Any) -> bool:
    return row_of(model) is None and any(isinstance(module, MoE) for module in model.modules())


def check_reshaped(model: Any, put: Callable[[Any], Any] | None = None) -> None:
    """Raise ValueError where a model that was converted is not as its configuration says.

    put puts our layers into a model of that; by default the family's own do.
    """
    if not any(getattr(model, note, False) for note in ("reshaped", "upcycled", "split_how")):
        return
    with torch.device("meta"):
        twin = type(model)._from_config(copy.deepcopy(model.config))
        if put is not None:
            put(twin)
        elif row_of(model) is not None:
            adopt_blocks(twin)
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, twin))
    if other := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        shown = f"{other[0]} {ours.get(other[0], 'missing here')}/{theirs.get(other[0], 'missing there')}"
        raise ValueError(
            f"save_pretrained: {model.config.model_type} has no way to say which of its layers upcycle, split, "
            f"to_dense or prune changed ({len(other)} tensors differ: {shown}); keep its state_dict"
        )


def is_wrapper(model: nn.Module) -> bool:
    """Whether a model of ours has a language model inside, rather than being one."""
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and config.get_text_config() is not config
