"""Text from a trained model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.data import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """A prompt as the beginning of a document, [1, S]."""
    [(ids, _)] = tokenizer.encode([prompt])
    return torch.tensor([[tokenizer.start, *ids.tolist()]])


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Tokenizer,
    ids: Tensor,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> str:
    """Text that continues prompt ids [1, S], prompt included; temperature 0 takes the likeliest token each time."""
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
        )
    finally:
        model.train(training)
    return tokenizer.decode(out[0].tolist())
