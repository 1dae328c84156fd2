"""Mixture of depths: only some tokens of a sequence go through a block, the others pass it by."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from . import autocast
from .layer import Recorded
from .routers.base import Router
from .routing import Routing


class DepthRouter(Router):
    """Chooses the tokens of a sequence that a block computes (2404.02258, section 3.3): expert choice, with one expert.

    r_i = w . x_i, and the C = ceil(capacity * S) tokens of largest r of a sequence are chosen, each with weight r. That
    depends on later tokens. For causal use `sampling` trains what can be told from the token alone (section 3.5):
        "loss"       binary cross-entropy between sigmoid(r) and being among the C, which pulls at r itself
        "predictor"  the same for a small network on the token, without gradient into token or r
    Then outside training the tokens with r > 0, or that the network gives more than even odds, are chosen, however many
    they are. With None the C largest are taken there too, and the context causal=True makes the router warn, once.
    The loss "depth" weighs loss_weight; the paper names none. There is no bias, as in the paper.

    Context: mask [B, S]; padding is never chosen, nor counted in the loss; C counts it in S.
    Raises ValueError where tokens come as one list, and for an option out of range.
    """

    def __init__(
        self,
        dim: int,
        capacity: float = 0.125,
        *,
        sampling: Literal["loss", "predictor"] | None = None,
        loss_weight: float = 0.01,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__(dim, 1)
        if sampling not in (None, "loss", "predictor"):
            raise ValueError(f"DepthRouter: sampling must be None, 'loss' or 'predictor', got {sampling!r}")
        if not 0 < capacity <= 1:
            raise ValueError(f"DepthRouter: capacity must be in (0, 1], got {capacity}")
        self.capacity, self.sampling, self.loss_weight, self.dtype = capacity, sampling, loss_weight, dtype
        self.weight = nn.Parameter(torch.empty(1, dim))
        hidden = max(1, dim // 4)
        predictor = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.predictor = predictor if sampling == "predictor" else None
        self._warned = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw w uniformly within 1/sqrt(dim), and the predictor as linear layers start."""
        bound = 1 / math.sqrt(self.dim)
        self.weight.uniform_(-bound, bound)
        for module in self.predictor or ():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Choose among tokens x [B, S, D]."""
        if x.dim() != 3:
            raise ValueError(f"DepthRouter chooses within sequences: expected tokens as [B, S, D], got {list(x.shape)}")
        if x.shape[-1] != self.dim:
            raise ValueError(f"DepthRouter: expected tokens [B, S, {self.dim}], got {list(x.shape)}")
        if autocast.is_on(x):
            with autocast.off(x):
                return self.forward(x, **context)
        if x.dtype != torch.float64:
            x = x.to(self.dtype or x.dtype)
        mask = context.get("mask")
        if mask is not None:
            mask = mask.reshape(x.shape[:2]).bool()
            x = x.where(mask.unsqueeze(-1), 0)
        score = F.linear(x, self.weight.to(x.dtype)).squeeze(-1)
        odds = score if self.predictor is None else self._predict(x.detach())
        if not self.training and self.sampling is not None:
            chosen = odds.detach() > 0
            return self._routing(score, chosen if mask is None else chosen & mask)
        if context.get("causal") and self.sampling is None and not self._warned:
            self._warned = True
            warnings.warn(
                "DepthRouter in a causal model: whether a token is computed depends on later ones; set sampling",
                stacklevel=2,
            )
        return self._largest(score, odds, mask)

    def _largest(self, score: Tensor, odds: Tensor, mask: Tensor | None) -> Routing:
        """The C tokens of largest score [B, S] of each sequence, and the loss on `odds`."""
        batch, length = score.shape
        places = math.ceil(round(self.capacity * length, 9))
        wanted = score.detach() if mask is None else score.detach().where(mask, -math.inf)
        index = wanted.topk(places, dim=-1).indices.sort(dim=-1).values
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, index, True)
        losses = {}
        if self.training and self.sampling is not None:
            each = F.binary_cross_entropy_with_logits(odds, chosen.to(odds.dtype), reduction="none")
            count = max(each.numel(), 1) if mask is None else mask.sum().clamp(min=1)
            losses["depth"] = self.loss_weight * (each if mask is None else each.where(mask, 0)).sum() / count
        if mask is not None:
            return self._routing(score, chosen & mask, losses)
        token = (index + length * torch.arange(batch, device=index.device)[:, None]).flatten()
        offsets = torch.arange(2, dtype=torch.int32, device=index.device) * (batch * places)
        return Routing(token, offsets, score.flatten().index_select(0, token), batch * length, losses)

    def _routing(self, score: Tensor, chosen: Tensor, losses: dict[str, Tensor] | None = None) -> Routing:
        weight, keep = score.reshape(-1, 1), chosen.reshape(-1, 1)
        return Routing.from_matrix(weight, keep, losses=losses or {})

    def _predict(self, x: Tensor) -> Tensor:
        assert self.predictor is not None
        for module in self.predictor:
            if isinstance(module, nn.Linear):
                x = F.linear(x, module.weight.to(x.dtype), module.bias.to(x.dtype))
            else:
                x = module(x)
        return x.squeeze(-1)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, capacity={self.capacity}, sampling={self.sampling!r}"


class MixtureOfDepths(Recorded):
    """A block that only the tokens its router chooses go through (2404.02258, eq. 1): y_i = x_i + r_i f(X)_i, else x_i.

    X are the chosen tokens of a sequence, in their order, so that attention inside the block is among them alone.
    `block` is any module [B, C, D] -> [B, C, D]; with residual=True it adds its input itself, and f(X) = block(X) - X.
    The paper's models have such a block in every other layer, with capacity 0.125.

    Keywords go to the block. Those named in per_token, [B, S, ...] each, are cut down to the chosen tokens, as is mask,
    which goes to the router too. Sequences of which unequal numbers are chosen run one by one, unless there is a mask:
    then the shorter ones are filled up, and the block's mask is False there. `record` collects the router's decisions.
    """

    router: DepthRouter

    def __init__(
        self,
        block: nn.Module,
        router: DepthRouter,
        *,
        residual: bool = False,
        per_token: Sequence[str] = ("position_ids", "token_ids"),
    ) -> None:
        super().__init__()
        self.block, self.router, self.residual, self.per_token = block, router, residual, tuple(per_token)

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Apply to tokens x [B, S, D]."""
        routing = self.router(x, **context)
        self._keep(routing)
        update = self._updates(x, routing.token_index, context)
        update = update * routing.weight.unsqueeze(-1).to(update.dtype)
        return x.flatten(0, 1).index_add(0, routing.token_index, update.to(x.dtype)).view(x.shape)

    def _updates(self, x: Tensor, chosen: Tensor, context: dict[str, Any]) -> Tensor:
        """f of the chosen tokens [A], which are sorted by sequence, [A, D]."""
        batch, length, dim = x.shape
        masked = context.get("mask") is not None
        if not masked and (self.router.training or self.router.sampling is None):
            if not chosen.numel():
                return x.new_zeros(0, dim)
            return self._run(x, (chosen % length).view(batch, -1), context, None).flatten(0, 1)
        counts = torch.bincount(chosen // length, minlength=batch)  # for which the host waits
        rows, numbers = chosen % length, counts.tolist()
        runs: list[Callable[[], Tensor]] = []
        if rows.numel() and rows.numel() == batch * max(numbers):
            runs = [lambda: self._run(x, rows.view(batch, -1), context, None).flatten(0, 1)]
        elif rows.numel() and masked:
            index = nn.utils.rnn.pad_sequence(list(rows.split(numbers)), batch_first=True)
            here = torch.arange(index.shape[1], device=x.device) < counts[:, None]
            runs = [lambda: self._run(x, index, context, here)[here]]
        elif rows.numel():
            each = enumerate(rows.split(numbers))
            runs = [partial(self._run_one, x, b, row, context) for b, row in each if row.numel()]
        # Where experts are spread, processes with fewer runs take part in those of the others, with a token of zeros.
        nothing = partial(self._run_one, torch.zeros_like(x), 0, rows.new_zeros(1), context)
        idle = self._most(len(runs), x.device) - len(runs)
        parts = [run() for run in runs] + [nothing()[:0] for _ in range(idle)]
        return torch.cat(parts) if parts else x.new_zeros(0, dim)

    def _most(self, runs: int, device: torch.device) -> int:
        """How many times the block is run on the process that has most; all call it together if experts are spread."""
        if all(getattr(module, "parallel", None) is None for module in self.block.modules()):
            return runs
        most = torch.tensor(runs, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def _run_one(self, x: Tensor, b: int, row: Tensor, context: dict[str, Any]) -> Tensor:
        """f of the tokens at row [C] of sequence b, [C, D]."""
        names = (*self.per_token, "mask")
        own = {n: v[b : b + 1] if n in names and v is not None else v for n, v in context.items()}
        return self._run(x[b : b + 1], row[None], own, None)[0]

    def _run(self, x: Tensor, index: Tensor, context: dict[str, Any], here: Tensor | None) -> Tensor:
        """f of the tokens at index [B, C]; here [B, C] is False where one only fills up."""
        kept = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        given = dict(context)
        for name in self.per_token:
            if (value := given.get(name)) is not None:
                places = index.view(*index.shape, *[1] * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
                given[name] = value.gather(1, places)
        if given.get("mask") is not None:
            given["mask"] = torch.ones_like(index, dtype=torch.bool) if here is None else here
            kept = kept.where(given["mask"].unsqueeze(-1), 0)
        out = self.block(kept, **given)
        return out - kept if self.residual else out
