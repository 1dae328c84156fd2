"""Mixtures of experts and whole blocks that do little, left out (layer drop and block drop, 2406.02500)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pretrained.context import decoder_of
from ..pretrained.sparse_blocks import stand_alike
from .arguments import Calibrate, losses_of
from .dense_mlps import blocks_with_mlps
from .dense_relatives import dense_layers, say_dense
from .timm_layers import NOTES
from .usage import evaluating

LISTS = ("layers", "h", "blocks")
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers")  # in configurations


class Dropped(nn.Module):
    """In place of a `MoE` that was dropped: nothing is added to the residual stream."""

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Zeros of the shape of x [..., D]."""
        return torch.zeros_like(x)


def norm_before(model: nn.Module, name: str) -> str | None:
    """The name of the norm whose output the `MoE` of this name reads, as transformers and timm call it."""
    around = name.rpartition(".")[0]
    children = dict(model.get_submodule(around).named_children())
    after = "post_feedforward_layernorm" in children
    for candidate in (
        "pre_feedforward_layernorm",
        "pre_ff_layernorm",
        "pre_mlp_layernorm",
        "ffn_norm",
        "norm2",
        "ln_2",
    ):
        if candidate in children:
            return f"{around}.{candidate}"
    return f"{around}.post_attention_layernorm" if "post_attention_layernorm" in children and not after else None


def layer_similarity(model: nn.Module, calibrate: Calibrate | None, names: Collection[str]) -> dict[str, float]:
    """Mean over tokens of cos(h, h + MoE(norm(h))) of each `MoE`: near one where it hardly changes the stream h.

    As in the authors' code with the norm dropped too. h + MoE(norm(h)) is what the block gives, so that a norm or a
    factor after the `MoE` counts (Gemma 2, GLM-4, Granite); of a block whose attention reads the same h it is just the
    sum. Raises ValueError without calibrate, and for a `MoE` that reads no norm of the stream.
    """
    norms = {}
    for name in names:
        if (norm := norm_before(model, name)) is None:
            raise ValueError(f"prune: found no norm before {name}; give drop_layers as numbers of layers")
        norms[name] = norm
    sums = dict.fromkeys(names, (0.0, 0))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def after_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = args[0], output

        return hook

    def after_moe(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            stream, normed = seen.pop(name, (args[0], None))
            if normed is None or normed.data_ptr() != args[0].data_ptr():
                raise ValueError(f"prune: {name} does not read {norms[name]}; give drop_layers as numbers of layers")
            seen[name] = stream, _first(output)

        return hook

    def after_block(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            if name in seen:
                (stream, added), into = seen.pop(name), _into(args, kwargs)
                if not isinstance(into, Tensor):  # LIMoE's is of two modalities
                    raise ValueError(
                        f"prune: the block of {name} has no one stream; give drop_layers as numbers of layers"
                    )
                beside = into.data_ptr() == stream.data_ptr()  # attention is, and in what the block gives too
                sums[name] = _added(sums[name], stream, stream + added if beside else _first(output))

        return hook

    handles = [model.get_submodule(norm).register_forward_hook(after_norm(name)) for name, norm in norms.items()]
    handles += [model.get_submodule(name).register_forward_hook(after_moe(name)) for name in names]
    blocks = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    handles += [b.register_forward_hook(after_block(name), with_kwargs=True) for name, b in blocks.items()]
    _run(model, calibrate, handles)
    return _means(sums)


def block_similarity(model: Any, calibrate: Calibrate | None) -> dict[str, float]:
    """Mean over tokens of the cosine between what goes into each block of the model and what comes out."""
    place, blocks = blocks_of(model)
    sums = {f"{place}.{i}": (0.0, 0) for i in range(len(blocks))}

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            sums[name] = _added(sums[name], _into(args, kwargs), _first(output))

        return after

    handles = [b.register_forward_hook(hook(f"{place}.{i}"), with_kwargs=True) for i, b in enumerate(blocks)]
    _run(model, calibrate, handles)
    return _means(sums)


def blocks_of(model: Any) -> tuple[str, Any]:
    """The list of a model's blocks and its name; raises ValueError for a model that is no one list of blocks."""
    inside = decoder_of(model) if hasattr(model, "get_decoder") else model  # Swin's `layers` are stages
    lists = [getattr(inside, name, None) for name in (LISTS if inside is not model else LISTS[2:])]
    found = [blocks for blocks in lists if isinstance(blocks, (nn.ModuleList, nn.Sequential))]
    kinds = {(type(block), _width(block)) for block in found[0]} if found else set()
    if not found or len(kinds) > 1 or not (hasattr(model, "config") or hasattr(model, "pretrained_cfg")):
        raise ValueError(
            f"prune: {type(model).__name__} is not one list of equal blocks under {', '.join(LISTS)}, of which some "
            "could be dropped"
        )
    return next(name for name, module in model.named_modules() if module is found[0]), found[0]


def _width(block: nn.Module) -> tuple[int, ...] | None:
    """The shape of what a block's first norm multiplies by: that of the tokens that the block reads."""
    norms = (module for module in block.modules() if "Norm" in type(module).__name__)
    return next((tuple(p.shape) for norm in norms for p in norm.parameters()), None)


def drop_moe(model: nn.Module, name: str) -> None:
    """Leave out one `MoE`, in place."""
    dropped, moe = Dropped(), model.get_submodule(name)
    stand_alike(moe, dropped)
    if norm := norm_before(model, name):
        model.set_submodule(norm, nn.Identity().train(moe.training))
    model.set_submodule(name, dropped.train(moe.training))


def drop_blocks(model: Any, numbers: Collection[int]) -> None:
    """Leave out the blocks with these numbers, in place, and let configuration or arguments say so."""
    place, blocks = blocks_of(model)
    depth, left = len(blocks), [i for i in range(len(blocks)) if i not in numbers]
    if not left:
        raise ValueError(f"prune: all {depth} blocks of {type(model).__name__} would be dropped")
    order = [i for i, (name, _) in _places(model, place)]
    rest = [blocks[i] for i in left]
    kept = nn.ModuleList(rest) if isinstance(blocks, nn.ModuleList) else nn.Sequential(*rest)
    kept.training = blocks.training
    model.set_submodule(place, kept)
    if hasattr(model, "config"):
        _say_blocks(model, depth, left)
    else:
        _say_timm_blocks(model, left, order)


def _places(model: Any, place: str) -> list[tuple[int, tuple[str, nn.Module]]]:
    """The number of its block beside each MLP or `MoE` in the blocks."""
    inside = [found for found in blocks_with_mlps(model) if found[0].startswith(f"{place}.")]
    return [(int(found[0].removeprefix(f"{place}.").split(".")[0]), found) for found in inside]


def _say_blocks(model: Any, depth: int, left: list[int]) -> None:
    config = decoder_of(model).config
    dense = dense_layers(model) if hasattr(decoder_of(model), "layers") else []
    kept = {}
    for name in BY_LAYER:
        if isinstance(value := getattr(config, name, None), list) and len(value) == depth:
            kept[name] = [value[i] for i in left]
    config.num_hidden_layers = len(left)
    for name, value in kept.items():
        if not isinstance(getattr(type(config), name, None), property):
            setattr(config, name, value)
        elif getattr(config, name) != value:  # Jamba's, say, follow from other fields
            raise ValueError(f"prune: {config.model_type} has layers of several kinds in turn, of which none can go")
    if hasattr(config, "mlp_only_layers") or getattr(config, "first_k_dense_replace", None) is not None:
        say_dense(config, dense)
    for number, block in enumerate(blocks_of(model)[1]):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number


def _say_timm_blocks(model: Any, left: list[int], order: list[int]) -> None:
    arguments = dict(getattr(model, "_model_args", None) or {})
    arguments["depth"] = len(left)
    # Places are counted over the MLPs, of which a block with parallel ones has several.
    after = {place: i for i, place in enumerate(place for place, block in enumerate(order) if block in left)}
    if hasattr(model, "moe_layers"):
        model.moe_layers = tuple(after[i] for i in model.moe_layers if i in after)
        arguments["moe_layers"] = list(model.moe_layers) or "none"
    for note in (note for note in NOTES if hasattr(model, note)):
        notes = [{**how, "layers": [after[i] for i in how["layers"] if i in after]} for how in getattr(model, note)]
        setattr(model, note, [how for how in notes if how["layers"]])
    if isinstance(getattr(model, "feature_info", None), list):
        model.feature_info = model.feature_info[: len(left)]
    model._model_args = arguments


def _run(model: nn.Module, calibrate: Calibrate | None, handles: list[Any]) -> None:
    try:
        if calibrate is None:
            raise ValueError(
                "prune: how much layers and blocks do shows on data: give calibrate, a function that runs the model "
                "over batches and yields the loss of each, or the numbers of those to drop"
            )
        with evaluating(model):
            for _ in losses_of("prune", calibrate, model):
                pass
    finally:
        for handle in handles:
            handle.remove()


def _into(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _added(sums: tuple[float, int], before: Tensor, after: Tensor) -> tuple[float, int]:
    cosines = F.cosine_similarity(before.flatten(0, -2).float(), after.flatten(0, -2).float(), dim=-1)
    return sums[0] + float(cosines.double().sum()), sums[1] + len(cosines)


def _means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    if unseen := [name for name, (_, tokens) in sums.items() if not tokens]:
        raise ValueError(f"prune: calibrate ran no batch through {unseen[0]}")
    return {name: total / tokens for name, (total, tokens) in sums.items()}
