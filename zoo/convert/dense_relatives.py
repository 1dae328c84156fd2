"""The plain dense model that a sparse one becomes, of transformers or timm, and where its MLPs are.

Mixtral without experts is Mistral, Qwen2-MoE is Qwen2, Qwen3-MoE Qwen3; a family that says which of its layers are
dense (DeepSeek-V3 and its kin, Qwen's) says so of more; and what was upcycled is what it was before. Whether that holds
of a model is seen by its tensors: the other must have the same ones, but for the MLPs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..pretrained.context import decoder_of
from ..pretrained.sparse_relatives import OWN
from .dense_mlps import DenseMLP, is_mlp, places, recognise

DENSE = {"mixtral": "Mistral", "qwen2_moe": "Qwen2", "qwen3_moe": "Qwen3"}
WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim")


def plain_twin(model: Any, widths: Mapping[str, int]) -> Any:
    """The plain transformers model, on the meta device, that a model is once its `MoE`s are MLPs of these widths.

    widths are by the name of the `MoE`, all that the model has. None where transformers has no such model.
    """
    for make, config in _candidates(model, set(widths.values())):
        twin = _built(make, config, model)
        if twin is not None and _fits(twin, model, widths):
            return twin
    return None


def partly_dense(model: Any, widths: Mapping[str, int]) -> tuple[Any, Any]:
    """The configuration of a transformers model some of whose `MoE`s are MLPs now, and a model of it without memory.

    Its own configuration where that says nothing of dense layers; None for a model that cannot be made.
    """
    config = copy.deepcopy(model.config)
    inner = config.get_text_config()
    if hasattr(inner, "mlp_only_layers") or getattr(inner, "first_k_dense_replace", None) is not None:
        others = dense_layers(model)
        say_dense(inner, sorted({*others, *(_index(name) for name in widths)}))
        if not others and hasattr(inner, "moe_intermediate_size") and len(set(widths.values())) == 1:
            inner.intermediate_size = next(iter(widths.values()))
    return config, _built(type(model), config, model)


def say_dense(config: Any, dense: list[int]) -> None:
    """Let a configuration say which layers are dense, where it can say that of these."""
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers, config.decoder_sparse_step = dense, 1
    elif getattr(config, "first_k_dense_replace", None) is not None and dense == list(range(len(dense))):
        config.first_k_dense_replace = len(dense)


def mlp_at(twin: nn.Module | None, name: str) -> DenseMLP | None:
    """The MLP of a dense model where another has an `MoE` of this name, or the layer around it; None without one."""
    for candidate in places(name):
        try:
            module = twin.get_submodule(candidate) if twin is not None else None
        except AttributeError:
            continue
        if module is not None and is_mlp(module):
            return recognise(candidate, module)
    return None


def _candidates(model: Any, widths: set[int]) -> Iterator[tuple[Any, Any]]:
    import transformers

    if len(widths) != 1:
        return
    (width,) = widths
    config = model.config
    if config.model_type in DENSE:
        kind = getattr(transformers, f"{DENSE[config.model_type]}Config")
        known = kind().to_dict().keys() | {"head_dim"}
        fields = {name: v for name, v in config.to_dict().items() if name in known and name not in OWN}
        fields |= {"intermediate_size": width}
        if not fields.get("head_dim"):  # Qwen3 would take 128
            fields["head_dim"] = config.hidden_size // config.num_attention_heads
        if not getattr(config, "use_sliding_window", False):  # Qwen's families lay windows out each in its own way
            dense = getattr(transformers, f"{DENSE[config.model_type]}ForCausalLM")
            yield dense, kind(**copy.deepcopy(fields))
    own = copy.deepcopy(config)
    inner = own.get_text_config()
    if hasattr(inner, "num_hidden_layers"):
        say_dense(inner, list(range(inner.num_hidden_layers)))
    yield type(model), copy.deepcopy(own)
    for name in WIDTHS:
        if hasattr(inner, name):
            setattr(inner, name, width)
    yield type(model), own


def _built(make: Any, config: Any, model: Any) -> Any:
    """A model of a configuration without memory; None where transformers refuses it."""
    config._attn_implementation = model.config._attn_implementation
    try:
        with torch.device("meta"):
            return make._from_config(config, dtype=next(model.parameters()).dtype)
    except (ValueError, TypeError, AttributeError):
        return None


def _fits(twin: Any, model: Any, widths: Mapping[str, int]) -> bool:
    """Whether a dense model has the tensors of another but for its `MoE`s, and MLPs of these widths in their place."""
    places = {name: mlp_at(twin, name) for name in widths}
    for name, mlp in places.items():
        moe = model.get_submodule(name)
        if mlp is None or mlp.sizes != (moe.experts.dim, widths[name]) or mlp.activation != moe.experts.activation:
            return False
    inside = {f"{mlp.name}.{part}." for mlp in places.values() if mlp for part in mlp.layout if part}
    theirs = _shapes(twin, inside)
    return theirs == _shapes(model, {f"{name}." for name in widths})


def _shapes(model: nn.Module, without: Iterable[str]) -> dict[str, tuple[int, ...]]:
    skipped = tuple(without)
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.startswith(skipped)}


def _index(name: str) -> int:
    """The number of the layer in a module's name."""
    return next(int(part) for part in reversed(name.split(".")) if part.isdigit())


def dense_layers(model: Any) -> list[int]:
    """Which decoder layers have an MLP."""
    return [i for i, layer in enumerate(decoder_of(model).layers) if any(is_mlp(child) for child in layer.children())]
