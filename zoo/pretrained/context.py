"""What the routers of a transformers model may know of a batch: padding, token ids, and that the model is causal.

transformers calls a layer's MLP with hidden states alone. Its decoder layers do hand unknown keywords on to their
attention, and they do so inside the region that gradient checkpointing runs again. So the model's base puts the context
among the keywords, the attention call of each layer takes it out, and the MoE call that follows uses it up: nothing
stays behind after a layer, and a recomputation sees its own batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe import IsolatedMoE, MoE
from ..moe.routers import Gemma4Router, MoEPlusPlusRouter, ScoredHashRouter, TopKRouter
from ..moe.routers.moe_plus_plus import GatingResidual
from .generating import KEY, take_context

MIXERS = ("self_attn", "linear_attn", "mamba", "conv")  # what a decoder layer has before its MLP
ALONE = "mixer"  # what it has where it is attention or an MLP (Nemotron-H)


class _Link:
    """What an attention module leaves for the MoE of the same layer."""

    value: dict[str, Any] | None = None


def pass_context(model: Any) -> None:
    """Make every `MoE` of a transformers causal language model receive mask and token_ids where a caller gave them.

    In a vision-language model that is its language model, which is called with embeddings: token ids come from the
    whole model's call, and with them each token's modality, 0 for text and 1 for what was seen. Gates that hear the
    layer below, MoE++'s, get a `GatingResidual` each forward pass. Anything else that a gate may want, such as a
    domain, a caller gives as model(..., moe_context={"domain": ...}), and to model.generate alike.
    """
    take_context(model)
    base = decoder_of(model)
    if any(isinstance(getattr(moe_of(layer), "router", None), MoEPlusPlusRouter) for layer in base.layers):
        base.register_forward_pre_hook(_hear_below, with_kwargs=True)
    if model.config.get_text_config() is not model.config:
        model.register_forward_pre_hook(_tell_tokens, with_kwargs=True)
    if any(isinstance(moe_of(layer), IsolatedMoE) for layer in base.layers):
        base.register_forward_pre_hook(_tell_modality, with_kwargs=True)
    base.register_forward_pre_hook(_put, with_kwargs=True)
    for layer in base.layers:
        moe: Any = moe_of(layer)
        attention = hearer(layer)
        if moe is not None:
            # One plain object in both, so that deepcopy and pickle keep the pair together.
            link: Any = _Link()
            attention._moe_link = moe._moe_link = link
            attention.register_forward_pre_hook(_take, with_kwargs=True)
            moe.register_forward_pre_hook(_use, with_kwargs=True)
        else:
            attention.register_forward_pre_hook(_drop, with_kwargs=True)


def hearer(layer: Any) -> Any:
    """The module of a decoder layer that is handed its unknown keywords: its attention, or itself where it is one."""
    return layer if hasattr(layer, ALONE) else next(getattr(layer, name) for name in MIXERS if hasattr(layer, name))


def decoder_of(model: Any) -> Any:
    """The module with the decoder layers of a transformers model: its base, or the language model inside."""
    decoder = model.get_decoder()
    # Llama 4 gives its whole causal language model, which gives itself.
    return decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)


def moe_of(layer: nn.Module) -> MoE | IsolatedMoE | None:
    """The sparse module of a decoder layer, None for a dense one."""
    return next((child for child in layer.children() if isinstance(child, (MoE, IsolatedMoE))), None)


def _tell_tokens(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        return args, kwargs
    config = model.config
    seen = [getattr(config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id")]
    modality = torch.zeros_like(ids)
    for token in {token for token in seen if token is not None}:
        modality = modality.masked_fill(ids == token, 1)
    told = {"token_ids": ids, "modality": modality}
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:  # Gemma 4 makes several of it, before its language model is called
        real = mask[:, -ids.shape[1] :].bool()
        if torch.compiler.is_compiling() or not bool(real.all()):
            told["mask"] = real
    return args, {**kwargs, KEY: {**told, **(kwargs.get(KEY) or {})}}


def _tell_modality(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """ERNIE's processor says whose experts a token is for, those around an image too; without it all are text's."""
    kinds = kwargs.get("moe_mm_token_type_ids")
    return args, {
        **kwargs,
        KEY: {**(kwargs.get(KEY) or {}), "modality": None if kinds is None else kinds.bool().long()},
    }


def _hear_below(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, KEY: {"gating": GatingResidual(), **(kwargs.get(KEY) or {})}}


def _put(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    context: dict[str, Any] = {"causal": True, **(kwargs.get(KEY) or {})}
    if kwargs.get("output_router_logits") or getattr(base.config, "output_router_logits", False):
        _check_logits(base)
        context["record_logits"] = True
    ids = kwargs.get("input_ids", args[0] if args else None)
    embeds = kwargs.get("inputs_embeds")
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if ids is not None:
        context["token_ids"] = ids
    if isinstance(mask, Tensor) and mask.dim() == 2:
        length = ids.shape[1] if ids is not None else embeds.shape[1] if embeds is not None else mask.shape[1]
        real = mask[:, -length:].bool()  # with a cache the mask covers the past too
        if (told := context.pop("mask", None)) is not None:  # by the caller: rows that only fill a batch up, say
            real = real & told.bool()
        # One look at the values saves every layer the slower path of a masked batch; a graph cannot look.
        if torch.compiler.is_compiling() or not bool(real.all()):
            context["mask"] = real
    return args, {**kwargs, KEY: context}


def _take(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    attention._moe_link.value = kwargs.get(KEY)
    return _drop(attention, args, kwargs)


def _drop(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not getattr(attention, "hears_context", False):
        kwargs.pop(KEY, None)
    return args, kwargs


def _use(moe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    context, moe._moe_link.value = moe._moe_link.value or {}, None
    if "mask" in context and _mask_is_idle(moe):
        context = {key: value for key, value in context.items() if key != "mask"}
    if "record_logits" in context:
        context = {key: value for key, value in context.items() if key != "record_logits"}
        _record_logits(moe, kwargs.get("seen", args[0]), context.get("modality"))
    rows = next((t for t in (context.get("mask"), context.get("token_ids")) if t is not None), None)
    x = args[0]
    if rows is not None and rows.dim() == 2 == x.dim() and rows.numel() == x.shape[0]:
        args = (x.view(*rows.shape, x.shape[-1]), *args[1:])  # Gemma 4 calls its experts with one row of tokens
    return args, {**context, **kwargs}


def _mask_is_idle(moe: MoE | IsolatedMoE) -> bool:
    """Whether padding changes nothing for real tokens, nor anything that is counted: then all is as in transformers."""
    if isinstance(moe, IsolatedMoE):
        return all(_mask_is_idle(part) for part in moe.parts)  # type: ignore[arg-type]
    # A gate with a forward pass of its own may look at other tokens than the one it routes.
    by_itself = type(moe.router).forward in (TopKRouter.forward, ScoredHashRouter.forward, Gemma4Router.forward)
    dropless = by_itself and moe.router.capacity is None
    return dropless and not moe.training and not moe._recording


def _check_logits(base: Any) -> None:
    for router in (m.router for m in base.modules() if isinstance(m, MoE)):
        if not isinstance(router, TopKRouter):
            raise ValueError(
                f"output_router_logits: {type(router).__name__} has no logits for transformers' auxiliary loss; "
                "set config.output_router_logits=False and take losses from zoo.moe.record(model)"
            )


def _record_logits(moe: Any, x: Tensor, modality: Tensor | None) -> None:
    """Give transformers the router's logits, where it collects outputs for a caller.

    It collects none when a checkpointed layer is computed again, which must do the same as it did at first.
    """
    from transformers.utils.output_capturing import _active_collector

    parts = moe.parts if isinstance(moe, IsolatedMoE) else [moe]
    if isinstance(parts[0].router, ScoredHashRouter):
        return  # what a table chooses, no auxiliary loss can balance: transformers leaves it out
    found = _logits(parts[0].router, x)
    if modality is not None:
        for number, part in enumerate(parts[1:], 1):
            found = torch.where(modality.eq(number).reshape(-1, 1), _logits(part.router, x), found)
    wanted = _active_collector.get()
    if wanted is not None and "router_logits" in wanted:
        wanted["router_logits"].append(found)


def _logits(router: Any, x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1]).to(router.dtype or x.dtype)
    if isinstance(router, Gemma4Router):
        return router._logits(x).softmax(-1)  # its probabilities, in transformers too
    bias = None if router.bias is None else router.bias.to(x.dtype)
    return F.linear(x, router.weight.to(x.dtype), bias)
