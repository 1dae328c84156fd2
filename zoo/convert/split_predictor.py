"""Foretelling which pieces of an MLP a token needs (MoEfication, 2110.01786), and knowing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe import Experts, MoE
from ..moe.kernels import get_activation
from ..moe.routers import MoEficationRouter
from ..moe.routers.unweighted import UnweightedRouter


@torch.no_grad()
def activation_sums(experts: Experts, x: Tensor) -> Tensor:
    """Sum of each expert's positive activations for tokens x [.., D], [.., E]: what MoEfication chooses experts by.

    Gated units have no sign that means anything: theirs are summed as they are, without it.
    """
    forward, found = get_activation(experts.activation).forward, []
    b_in = experts.b_in
    for e, w_in in enumerate(experts.w_in.unbind()):
        hidden = forward(F.linear(x.to(w_in.dtype), w_in, None if b_in is None else b_in[e]))
        units = hidden.abs() if experts.gated else hidden.clamp(min=0)
        found.append(units.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)))
    return torch.stack(found, dim=-1)


def captured(logits: Tensor, sums: Tensor, k: int) -> float:
    """Share of all activation, sums [T, E], that is in the k experts of largest logit [T, E]; mean over tokens."""
    share = sums.gather(-1, logits.topk(k, dim=-1).indices).sum(-1) / sums.sum(-1)
    return float(share[sums.sum(-1) > 0].mean())


def fit_predictor(
    router: MoEficationRouter, experts: Experts, x: Tensor, *, epochs: int = 30, lr: float = 1e-2, batch_size: int = 512
) -> float:
    """Train a gate to foretell `activation_sums` of tokens x [T, D]; returns the share it captures of unseen ones.

    As the authors do: from the experts' mean keys (rows of length one) and the identity, by Adam, with the binary cross
    entropy of the logits and the sums divided by the batch's largest; a tenth of the tokens is kept apart, and the
    epoch that captures most of their activation with the router's k is taken. Raises ValueError where x has no token.
    """
    if not x.shape[0]:
        raise ValueError("fit_predictor: expected tokens to learn from, got none")
    sums = activation_sums(experts, x)
    x = x.to(torch.promote_types(x.dtype, torch.float32)).detach()
    seen = max(1, x.shape[0] * 9 // 10)
    held = slice(seen if seen < x.shape[0] else 0, None)
    twin = MoEficationRouter(router.dim, router.num_experts, router.k, dtype=None).to(x.device, x.dtype)
    rows = F.normalize(experts.w_in.detach()[:, : experts.hidden_dim].to(x.dtype), dim=-1)
    twin.weight.data.copy_(rows.mean(1))
    parameters = [twin.weight.requires_grad_(), twin.out.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    best, state = -1.0, twin.state_dict()
    for _ in range(epochs):
        for part in torch.randperm(seen, device="cpu").to(x.device).split(batch_size):
            target = sums[part] / sums[part].amax().clamp(min=torch.finfo(sums.dtype).tiny)
            with torch.enable_grad():
                loss = F.binary_cross_entropy_with_logits(twin._logits(x[part]), target.to(x.dtype))
                loss.backward(inputs=parameters)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            found = captured(twin._logits(x[held]), sums[held], router.k)
        if not found <= best:  # nan where no unseen token is active at all
            best, state = found, {name: value.clone() for name, value in twin.state_dict().items()}
    router.load_state_dict(state)
    return best


@contextmanager
def oracle(model: nn.Module) -> Iterator[None]:
    """While the block runs, gates of weight one choose by `activation_sums` themselves: the best a predictor can do.

    For evaluation alone: every expert's hidden units are computed to find out (MoEfication's "ground truth").
    """
    layers = [m for m in model.modules() if isinstance(m, MoE) and isinstance(m.router, UnweightedRouter)]
    try:
        for moe in layers:
            router: Any = moe.router
            router._logits = lambda x, experts=moe.experts, **context: activation_sums(experts, x)
        yield
    finally:
        for moe in layers:
            del moe.router._logits
