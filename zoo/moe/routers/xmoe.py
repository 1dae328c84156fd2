"""X-MoE: cosine routing in few dimensions, which keeps tokens from collapsing onto the experts' embeddings."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import orthogonal_
from .topk import TopKRouter

LARGEST_SCALE = 100.0  # Tutel: exp of the logarithm is cut off here
SMALLEST_TEMPERATURE = 1e-4  # torchscale, in a function that nothing calls

Form = Literal["paper", "tutel", "torchscale"]


class XMoERouter(TopKRouter):
    """X-MoE (2204.09179, section 3.1): logits s_e = cos(P x, w_e) / tau, then as in `TopKRouter`; k = 1.

    P is a projection to routing_dim dimensions (E / 2 in the paper, and by default), w_e the embedding of an expert,
    tau a learnt number, init_temperature at first and at least 1e-4. The paper tries score="softmax" and "sigmoid".

    form="tutel" is s_e = exp(min(a, log 100)) cos(P x + b, w_e), a = log(1 / init_temperature) at first, w_e from
    N(0, 0.01^2). Swin-MoE's cosine router (2206.03382) is that with routing_dim=256, init_temperature=0.5,
    noise="fixed", noise_std=1/E, capacity=Capacity(1.25, drop="priority") and losses gshard; its other router is
    `TopKRouter` with the same. form="torchscale" is what the authors published, s_e = P x . w_e / |w_e|: no length of
    the token, no temperature, and routing_dim=16 there. The default is "paper", as that is not the paper's router.
    Other options as in `TopKRouter`.

    Raises ValueError for an unknown form and for a temperature that is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 1,
        *,
        routing_dim: int | None = None,
        init_temperature: float = 0.3,
        form: Form = "paper",
        **options: Any,
    ) -> None:
        if init_temperature <= 0:
            raise ValueError(f"XMoERouter: init_temperature must be positive, got {init_temperature}")
        if form not in get_args(Form):
            raise ValueError(f"XMoERouter: form must be one of {', '.join(get_args(Form))}, got {form!r}")
        super().__init__(dim, num_experts, k, **options)
        self.routing_dim = max(1, num_experts // 2) if routing_dim is None else routing_dim
        self.init_temperature, self.form = init_temperature, form
        self.projection = nn.Linear(dim, self.routing_dim, bias=form == "tutel")
        self.weight = nn.Parameter(torch.empty(num_experts, self.routing_dim))
        self.temperature = None if form == "torchscale" else nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw P as `nn.Linear` does, and the embeddings orthogonal with gain 0.32, as torchscale, or as Tutel."""
        super().reset_parameters()
        if not hasattr(self, "temperature"):  # not yet, when the parent class is made
            return
        self.projection.reset_parameters()
        if self.form == "tutel":
            self.weight.normal_(std=0.01)
        else:
            orthogonal_(self.weight, gain=0.32)
        if self.temperature is not None:
            self.temperature.fill_(-math.log(self.init_temperature) if self.form == "tutel" else self.init_temperature)

    def _logits(self, x: Tensor, **context: Any) -> Tensor:
        bias = None if self.projection.bias is None else self.projection.bias.to(x.dtype)
        projected = F.linear(x, self.projection.weight.to(x.dtype), bias)
        directions = F.normalize(self.weight.to(x.dtype), dim=-1)
        if self.temperature is None:
            return F.linear(projected, directions)
        cosine, temperature = F.linear(F.normalize(projected, dim=-1), directions), self.temperature.to(x.dtype)
        if self.form == "tutel":
            return cosine * temperature.clamp(max=math.log(LARGEST_SCALE)).exp()
        return cosine / temperature.clamp(min=SMALLEST_TEMPERATURE)
