"""Attention experts, mixture of depths and shortcuts in the decoder layers of a transformers causal language model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import DepthRouter, MixtureOfDepths, Shortcut
from ..moe.routers import MoEPlusPlusRouter
from .context import KEY

PER_TOKEN = ("token_ids", "position_ids", "index", "cos", "sin", "seen")
CACHES = ("cache", "past_key_values")  # what transformers calls its cache, from 5.24 and before


class DecoderAttention(nn.Module):
    """An attention of `zoo.moe` (`MoA`, `MoH`, `SwitchHead`) where a decoder layer has its own.

    transformers' mask, which knows of padding, windows and documents packed into one sequence, says what a query sees;
    keys and values are kept in its cache, rotary positions are its own.
    """

    hears_context = True

    def __init__(self, attention: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.attention, self.layer_idx = attention, layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, None]:
        """Attend from tokens [B, S, D]; the second value, attention weights, is None."""
        kept = _kept(keywords)
        cache = None if kept is None else _Cache(kept, self.layer_idx)
        context = {name: value for name, value in (keywords.get(KEY) or {}).items() if name != "causal"}
        seen = visible(attention_mask)
        return self.attention(
            hidden_states, attention_mask=seen, cache=cache, rotary=position_embeddings, **context
        ), None


class _Cache:
    """One layer of a transformers cache, as `zoo.moe.attention_experts` asks for it."""

    def __init__(self, cache: Any, layer_idx: int) -> None:
        self.cache, self.layer_idx = cache, layer_idx

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(keys, values, self.layer_idx)


class DecoderDepth(nn.Module):
    """A decoder layer that only some tokens of a sequence go through (`MixtureOfDepths`); attention is among these.

    The cache of keys and values would be of other tokens for every sequence, so that there is none: generation runs the
    whole sequence at every step.
    """

    def __init__(self, layer: nn.Module, router: DepthRouter) -> None:
        super().__init__()
        self.depth = MixtureOfDepths(_Chosen(layer), router, residual=True, per_token=PER_TOKEN)

    @property
    def attention_type(self) -> Any:
        """What transformers asks of a layer with more than one kind of mask in a model."""
        block: Any = self.depth.block
        return block.layer.attention_type

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Tokens [B, S, D] to tokens [B, S, D]. Raises ValueError when a cache is given."""
        if _kept(keywords) is not None:
            raise ValueError("mixture of depths keeps no keys and values: call the model with use_cache=False")
        batch, length = hidden_states.shape[:2]
        context = dict(keywords.pop(KEY, None) or {})
        index = torch.arange(length, device=hidden_states.device)[None]
        cos, sin = position_embeddings or (None, None)
        seen = visible(attention_mask)
        rows = None if seen is None else seen[:, 0]
        each = {"position_ids": position_ids, "index": index, "cos": cos, "sin": sin, "seen": rows}
        context.update({n: None if v is None else v.expand(batch, *v.shape[1:]) for n, v in each.items()})
        return self.depth(hidden_states, keywords=keywords, **context)


class _Chosen(nn.Module):
    """A decoder layer, called with the chosen tokens of a sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        *,
        index: Tensor,
        position_ids: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Tensor | None,
        keywords: dict[str, Any],
        mask: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        """Tokens x [B, C, D], at index [B, C] of their sequences, whose tokens they see as `seen` [B, C, S] says.

        mask [B, C] is False where a token only fills up.
        """
        among = _among(index, seen, mask)
        bias = torch.zeros(among.shape, dtype=x.dtype, device=x.device).masked_fill(~among, torch.finfo(x.dtype).min)
        if mask is not None:
            context["mask"] = mask
        return self.layer(
            x,
            attention_mask=bias,
            position_ids=position_ids,
            use_cache=False,
            position_embeddings=None if cos is None else (cos, sin),
            **keywords,
            **{KEY: context},
        )


class DecoderPair(nn.Module):
    """Two decoder layers with a shortcut from the first to the second (`ShortcutMoE`), to be recomputed together."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def attention_type(self) -> Any:
        """What transformers asks of a layer with more than one kind of mask in a model."""
        return self.first.attention_type

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        """Tokens [B, S, D] to tokens [B, S, D] of two layers, with a decoder layer's keywords."""
        if not (self.gradient_checkpointing and self.training):
            return self._both(hidden_states, **keywords)
        # A layer recomputed alone would miss the other end of the shortcut, and a cache would be filled twice.
        for layer in (self.first, self.second):
            layer.gradient_checkpointing = False  # type: ignore[assignment]
        _kept(keywords)
        keywords["use_cache"] = False
        return self._gradient_checkpointing_func(partial(self._both, **keywords), hidden_states)

    def _both(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        return self.second(self.first(hidden_states, **keywords), **keywords)


def _kept(keywords: dict[str, Any]) -> Any:
    """Take transformers' cache of keys and values out of a layer's keywords; None where there is none."""
    found = [keywords.pop(name, None) for name in CACHES]
    return next((cache for cache in found if cache is not None), None)


def _among(index: Tensor, seen: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which of the tokens at index [B, C] see which, [B, 1, C, C]: as in the whole sequence, and each itself."""
    columns = index[:, None, :].expand(-1, index.shape[1], -1)
    among = columns <= index[:, :, None] if seen is None else seen.gather(2, columns)
    if mask is not None:
        among = among & mask[:, None, :]
    return (among | torch.eye(index.shape[1], dtype=torch.bool, device=index.device))[:, None]


def visible(attention_mask: Tensor | None) -> Tensor | None:
    """transformers' mask of one layer as [B or 1, 1, S, K], True where a query sees a key; None for all before it.

    Raises ValueError for the masks of flash and flex attention, which are of another form.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        kind = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(
            f'attention experts and depth need attn_implementation="sdpa" or "eager", whose masks are [B, 1, S, K]; '
            f"got {kind}"
        )
    return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0


def put_attention(model: Any, layers: Iterable[int], make: Callable[[], nn.Module]) -> None:
    """Give some decoder layers an attention that `make` makes; call it before `pass_context`."""
    like = next(model.parameters())
    for i in layers:
        with like.device:
            attention = make().to(like.dtype)
        model.model.layers[i].self_attn = DecoderAttention(attention, i)


def put_depth(model: Any, layers: Iterable[int], make: Callable[[], DepthRouter]) -> None:
    """Let only some tokens through some decoder layers, chosen by a router that `make` makes; after `pass_context`.

    Raises ValueError for MoE++'s gates, which hear the gate below: it was of other tokens.
    """
    if any(isinstance(module, MoEPlusPlusRouter) for module in model.modules()):
        raise ValueError("mixture_of_depths: MoEPlusPlusRouter hears the gate of the layer below, of the same tokens")
    like = next(model.parameters())
    for i in layers:
        with like.device:
            router = make().to(like.dtype)
        model.model.layers[i] = DecoderDepth(model.model.layers[i], router)
    model.config.use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = False


def put_shortcuts(model: Any, ends: Collection[int]) -> None:
    """Pair the layers of each shortcut, the second at index `ends`; after `pass_context`.

    Raises ValueError where the two layers of a pair do not have the same kind of attention mask.
    """
    layers, kinds = list(model.model.layers), getattr(model.config, "layer_types", None)
    if kinds is not None and len(set(kinds)) > 1:
        raise ValueError(
            f"shortcut: layers with several kinds of attention masks, {sorted(set(kinds))}, are not paired"
        )
    paired: list[nn.Module] = []
    for i, layer in enumerate(layers):
        if i in ends:
            layer.mlp = Shortcut(layer.mlp, layers[i - 1].mlp)
            paired[-1] = DecoderPair(layers[i - 1], layer)
        else:
            paired.append(layer)
    model.model.layers = nn.ModuleList(paired)
