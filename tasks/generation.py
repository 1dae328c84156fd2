"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.data import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """A prompt as the beginning of a document, [1, S]."""
    [(ids, _)] = tokenizer.encode([prompt])
    return torch.tensor([[tokenizer.start, *ids.tolist()]])


def check_sampling(max_new_tokens: int, temperature: float, top_p: float = 1.0) -> None:
    """Raise ValueError for what nothing can be generated with."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Tokenizer,
    ids: Tensor,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    context: Mapping[str, Any] | None = None,
) -> str:
    """Text that continues prompt ids [1, S], prompt included; temperature 0 takes the likeliest token each time.

    context has further arguments of the model, such as what its gates are told.
    Raises ValueError as `check_sampling`.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    training = model.training
    model.eval()
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    try:
        out = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids, device=model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.end,
            pad_token_id=tokenizer.pad,
            **(sampling or {"do_sample": False}),
            **(context or {}),
        )
    finally:
        model.train(training)
    return tokenizer.decode(out[0].tolist())
