"""Who takes part in `zoo bench moe`: the dense limit, our backends, and the rivals that are installed.

All share one set of tensors: T tokens, D width, F hidden, E experts, K choices a token. They are given each token's
choices, or, where routing is measured too, the router's logits, whose K best by softmax each of them finds itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe import Routing
from ..moe.kernels import moe_mlp
from ..moe.kernels.ops import BACKENDS, backend_module
from ..moe.routers import TopKRouter
from .turns import Contestant

# A rival that copies the weights of every assignment needs this many bytes at most, or it is left out.
LARGEST_COPY = 4 << 30


class Shape(NamedTuple):
    """Tokens, width, hidden width, experts, choices a token."""

    tokens: int
    dim: int
    hidden_dim: int
    experts: int
    k: int


@dataclass
class Problem:
    """One layer's inputs, its gradient from above, and the same work as one dense MLP."""

    shape: Shape
    x: Tensor
    w_in: nn.Parameter
    w_out: nn.Parameter
    choice: Tensor
    weight: Tensor
    routing: Routing
    logits: Tensor | None = None

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, device: str, routing: bool = False) -> Problem:
        """Normal tokens and weights; a random router's choices and softmax weights, and with `routing` its logits.

        Logits [T, E] in float32 differ by at least 2^-14 within a token, so that no rounding changes a choice.
        """

        def draw(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device)

        logits = _distinct_logits(shape, device)
        chosen, choice = logits.softmax(-1).topk(shape.k)
        weight = chosen.to(dtype).requires_grad_()
        given = Routing.from_choices(choice, weight.detach(), shape.experts)
        given.weight.requires_grad_()
        return cls(
            shape,
            draw(shape.tokens, shape.dim).requires_grad_(),
            nn.Parameter(draw(shape.experts, 2 * shape.hidden_dim, shape.dim) / shape.dim**0.5),
            nn.Parameter(draw(shape.experts, shape.dim, shape.hidden_dim) / shape.hidden_dim**0.5),
            choice,
            weight,
            given,
            logits.requires_grad_() if routing else None,
        )

    def chosen(self) -> tuple[Tensor, Tensor]:
        """Each token's experts and their weights [T, K]: as given, or by torch from the logits."""
        if self.logits is None:
            return self.choice, self.weight
        weight, choice = self.logits.softmax(-1).topk(self.shape.k)
        return choice, weight.to(self.x.dtype)

    @property
    def weigher(self) -> Tensor:
        """The leaf that the gradient of the chosen weights goes to."""
        return self.weight if self.logits is None else self.logits


def _distinct_logits(shape: Shape, device: str) -> Tensor:
    """Near-normal logits [T, E], float32: multiples of 1/64, and for each expert a fraction of its own below that."""
    step = 2.0 ** -max(14, 6 + (shape.experts - 1).bit_length())
    drawn = torch.randn(shape.tokens, shape.experts, device=device).mul_(64).round_().div_(64)
    return drawn + torch.randperm(shape.experts, device=device) * step


def dense(p: Problem) -> Contestant:
    """One gated MLP on T*K rows: the same multiplications without any routing."""
    rows = p.shape.tokens * p.shape.k
    x = torch.randn(rows, p.shape.dim, dtype=p.x.dtype, device=p.x.device, requires_grad=True)
    w_in, w_out = (w[0].detach().clone().requires_grad_() for w in (p.w_in, p.w_out))

    def run() -> Tensor:
        gate, up = F.linear(x, w_in).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w_out)

    return Contestant("dense", "limit", run, [x, w_in, w_out])


def ours(p: Problem, backend: str) -> Contestant:
    """`moe_mlp` with one backend, given the routing; or behind the softmax top-k gate, given its logits."""
    leaves = [p.x, p.w_in, p.w_out, p.routing.weight if p.logits is None else p.logits]
    refuses = backend_module(backend).unsupported(p.x, p.w_in, p.w_out, "swiglu")
    router = TopKRouter(p.shape.dim, p.shape.experts, p.shape.k).to(p.x.device)

    def run() -> Tensor:
        routing = p.routing if p.logits is None else router.route(p.logits)
        return moe_mlp(p.x, p.w_in, p.w_out, routing, "swiglu", backend)

    return Contestant(f"zoo {backend}", "zoo", run, leaves, refuses)


def transformers(p: Problem, implementation: str) -> Contestant:
    """Mixtral's experts in `transformers`, with one of its implementations, on the same weights and choices."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    config = MixtralConfig(
        hidden_size=p.shape.dim,
        intermediate_size=p.shape.hidden_dim,
        num_local_experts=p.shape.experts,
        num_experts_per_tok=p.shape.k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.gate_up_proj, experts.down_proj = p.w_in, p.w_out
    copied = p.choice.numel() * p.w_in[0].numel() * p.w_in.element_size()
    refuses = None
    if implementation == "batched_mm" and copied > LARGEST_COPY:
        refuses = f"copies {copied / 2**30:.0f} GiB of weights"
    leaves = [p.x, p.w_in, p.w_out, p.weigher]
    run = lambda: experts(p.x, *p.chosen())  # noqa: E731
    return Contestant(f"transformers {implementation}", "transformers", run, leaves, refuses)


def installed(p: Problem, backends: tuple[str, ...] = BACKENDS) -> list[Contestant]:
    """The dense limit, our `backends`, and transformers' implementations."""
    field = [dense(p), *(ours(p, backend) for backend in backends)]
    if find_spec("transformers"):
        field += [transformers(p, name) for name in ("eager", "batched_mm", "grouped_mm")]
    return field


def everyone(p: Problem, backends: tuple[str, ...], backward: bool) -> list[Contestant]:
    """Those `installed` and all rivals; who is absent, fails or gives another result says so in `refuses`."""
    from .rivals import RIVALS, check

    field = [*installed(p, backends), *(rival(p) for rival in RIVALS)]
    check(field, backward)
    return field
