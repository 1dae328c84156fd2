"""Token rounding: token choice with whole tiles of rows for every expert."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..routing import Routing
from .scores import OF_EACH, shares
from .topk import TopKRouter

Rounding = Literal["nearest", "up", "down", "balanced"]


class TokenRoundingRouter(TopKRouter):
    """SonicMoE's token rounding (2512.14080): top-k, then each expert's count made a multiple of a tile.

    A kernel computes an expert's rows in tiles of `multiple`, and half a tile an expert is lost on average. Here an
    expert chosen by f tokens keeps those of largest weight down to a multiple, or takes the best scores among the
    others up to one: never as much as a tile away from f, and no row is empty. rounding says which:
        nearest    whichever multiple is nearer (the paper's NR-f); of two as near the even one, as in the authors' code
        up, down   always this one
        balanced   so that the sum over experts 0..e is nearest to what it was, for every e; of two as near the larger
                   (the paper's Balance-f): the total differs by half a tile at most
    The tokens of one call are rounded together, those of each process apart: sums of multiples are multiples too.

    Weights are those of the authors' code: a choice keeps its own, with normalize divided by the sum over the token's
    k choices, dropped ones included; a token added to an expert has its score, with normalize or "softmax_topk" as a
    share of the scores of all experts. A token may end with less or more than k experts, of any group.
    Losses and the counts behind selection_bias are those of token choice. `Routing.asked` counts additions too, so that
    a drop rate is the share that was dropped.

    Where an expert would need more tokens than there are, it is rounded down; where nothing at all would be left, as
    with fewer tokens than a tile, nothing is rounded. The paper found training sound from two tiles an expert on; with
    less than half a tile on average the router warns, once. Evaluation is plain top-k, as in the paper, so that no
    token depends on others; in training, and with eval_rounding, it does, on later ones too. Other options as in
    `TopKRouter`; there is no capacity.

    Raises ValueError for an unknown rounding, a multiple below 1, or a capacity.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int = 2,
        *,
        multiple: int = 128,
        rounding: Rounding = "nearest",
        eval_rounding: bool = False,
        **options: Any,
    ) -> None:
        if rounding not in get_args(Rounding):
            raise ValueError(f"TokenRoundingRouter: rounding must be one of {get_args(Rounding)}, got {rounding!r}")
        if multiple < 1:
            raise ValueError(f"TokenRoundingRouter: multiple must be at least 1, got {multiple}")
        if options.get("capacity") is not None:
            raise ValueError("TokenRoundingRouter: capacity has no meaning here, since counts are rounded")
        super().__init__(dim, num_experts, k, **options)
        self.multiple, self.rounding, self.eval_rounding = multiple, rounding, eval_rounding
        self._warned = False

    def _routing(self, scores: Tensor, expert: Tensor, weight: Tensor, keep: Tensor | None, **told: Any) -> Routing:
        """Round the choices, unless this is evaluation."""
        if not (self.training or self.eval_rounding):
            return super()._routing(scores, expert, weight, keep, **told)
        self._warn_if_sparse(scores.shape[0])
        here = None if keep is None else keep[:, 0]  # without capacity only whole tokens are left out: masked ones
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, expert, True)
        if here is not None:
            chosen = chosen & here[:, None]
        shares = self._shares(scores)
        weight = (shares * self.scale).scatter(-1, expert, weight)
        # One choice's normalised weight is always one, and tells no token from another.
        taken = rounded_choice(shares if self.k == 1 else weight, chosen, here, self.multiple, self.rounding)
        told["asked"] = told["asked"] + (taken & ~chosen).sum(-1)
        return Routing.from_matrix(weight, taken, **told)

    def _shares(self, scores: Tensor) -> Tensor:
        """What an added token's result counts, [T, E]."""
        if self.score == "softmax_topk":
            return scores.softmax(-1)
        if self.score in OF_EACH and self.normalize:
            return shares(scores, self.normalize_eps)
        return scores

    def _warn_if_sparse(self, tokens: int) -> None:
        if not self._warned and tokens >= self.multiple > 2 * tokens * self.k / self.num_experts:
            self._warned = True
            warnings.warn(
                f"TokenRoundingRouter: {tokens} tokens are {tokens * self.k / self.num_experts:.3g} an expert on "
                f"average, less than half of multiple={self.multiple}, so that rounding changes most of the choices; "
                "expected more tokens at once, or a smaller multiple",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        """Sizes and options for `print(model)`."""
        return f"{super().extra_repr()}, multiple={self.multiple}, rounding={self.rounding!r}"


@torch.no_grad()
def rounded_choice(
    scores: Tensor, chosen: Tensor, here: Tensor | None = None, multiple: int = 128, rounding: Rounding = "nearest"
) -> Tensor:
    """Which tokens experts take, [T, E] bool, when counts of those that chose them [T, E] are rounded to a multiple.

    An expert drops those of its choosers with the least scores [T, E], or adds those of the others with the largest.
    Tokens that are not `here` [T] are taken by none.
    """
    tokens = scores.shape[0] if here is None else here.sum()
    counts = chosen.sum(0)
    change = _rounded(counts, tokens, multiple, rounding) - counts
    by_expert, chose, adds = scores.T, chosen.T, (change > 0)[:, None]
    movable = chose ^ adds
    if here is not None:
        movable = movable & here
    first = torch.where(adds, by_expert, -by_expert).masked_fill(~movable, -torch.inf)
    # Not a sort of all tokens: fewer than a tile's change sides.
    moved = first.topk(min(multiple - 1, scores.shape[0]), dim=-1).indices
    moves = torch.arange(moved.shape[-1], device=moved.device) < change.abs()[:, None]
    return (chose ^ torch.zeros_like(chose).scatter(-1, moved, moves)).T


def _rounded(counts: Tensor, tokens: Tensor | int, multiple: int, rounding: Rounding) -> Tensor:
    """How many tokens each expert takes, [E], where `counts` [E] of all `tokens` chose it."""
    down = counts // multiple
    if rounding == "nearest":
        tiles = (counts / multiple).round().long()
    elif rounding == "balanced":
        # Nearest multiples of the sums: each step between them is one of the two multiples around a count.
        sums = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        tiles = ((2 * sums + multiple) // (2 * multiple)).diff()
    else:
        tiles = down if rounding == "down" else (counts + multiple - 1) // multiple
    tiles = tiles.where(tiles * multiple <= tokens, down)
    return (tiles * multiple).where(tiles.any(), counts)
