"""Fusion of Experts (2310.01542): a small network that learns what frozen classifiers of other domains say together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FusionOfExperts(nn.Module):
    """y = W_2 relu(W_1 [f_1(x); ...; f_N(x)] + b_1) + b_2 of the outputs of frozen models (FoE, 2310.01542).

    models: classifiers [.., C_j], timm's, transformers' or any; `widths` are their C_j where they do not say it
    themselves as num_classes or config.num_labels. They stay in eval mode and without gradients; only the fuser learns,
    on data of all domains. num_outputs is the number of classes or, to choose a model for each input as the authors do
    for generation, of models. The authors' code has this network with the size of the hidden layer as an argument. Its
    weights start as `nn.Linear`'s. Raises ValueError without models, for sizes below one, for widths that are neither
    said nor given, and when called for those that are not what a model gives.
    """

    def __init__(
        self, models: Iterable[nn.Module], num_outputs: int, hidden_dim: int = 256, widths: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models).requires_grad_(False).eval()
        if not len(self.models):
            raise ValueError("FusionOfExperts: expected at least one model")
        said = [_width(model) for model in self.models] if widths is None else list(widths)
        if len(said) != len(self.models) or not all(said):
            raise ValueError(f"FusionOfExperts: expected the width of each of {len(self.models)} models, got {said}")
        if num_outputs < 1 or hidden_dim < 1:
            raise ValueError(
                f"FusionOfExperts: num_outputs={num_outputs} and hidden_dim={hidden_dim}; expected at least 1"
            )
        self.widths: list[Any] = list(said)
        self.hidden = nn.Linear(sum(self.widths), hidden_dim)
        self.out = nn.Linear(hidden_dim, num_outputs)

    def train(self, mode: bool = True) -> FusionOfExperts:
        """Set the mode of the fuser; the models stay in eval mode."""
        super().train(mode)
        self.models.eval()
        return self

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """Logits [.., num_outputs] of what every model is called with."""
        with torch.no_grad():
            found = [model(*inputs, **keywords) for model in self.models]
        logits = [getattr(out, "logits", out) for out in found]
        if (widths := [values.shape[-1] for values in logits]) != self.widths:
            raise ValueError(f"FusionOfExperts: expected models that give {self.widths} numbers each, got {widths}")
        each = torch.cat(logits, -1)
        return self.out(self.hidden(each.to(self.hidden.weight.dtype)).relu())


def _width(model: Any) -> int | None:
    return getattr(model, "num_classes", None) or getattr(getattr(model, "config", None), "num_labels", None)
