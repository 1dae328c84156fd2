"""Hash layers: a fixed table decides by token id; nothing is learnt."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..routing import Routing
from .base import Router
from .context import per_token, to_experts


class HashRouter(Router):
    """Hash layer (2106.04426, section 3): y = f_e(x) with e = hash(token id), weight one, no parameters, no loss.

    hash is a lookup in `table` [V], the expert of every token id. Without one `random_table(vocab_size, E, seed)` makes
    it as the authors' code does; `balanced_table`, `clustered_table` and `dispersed_table` make the paper's others.
    feature says what is hashed: the "token" itself, the "previous" token alone, or the "bigram" of both.
    There is no table of all pairs: a bigram goes to `hash_pairs(previous, token, seed) % E`. A token with none before
    it in its row (padding does not count) counts as its own previous token; where a row goes on from an earlier call,
    as in cached decoding, previous_ids [B] are the tokens before (a language model's `generate` tells them). All layers
    of one seed have the same table.

    With `hashes` = N > 1 it is the paper's MultiHash: an expert is cut in N segments of its units, and a token has
    segment m of the expert that hash m names. So f_e(x) is a sum of N narrow experts, here experts of their own: hash m
    has the m-th part of E / N of them, and its seed is seed + m; `table` is [N, V].

    Context: token_ids [T] or [B, S]; previous_ids; mask. Training and evaluation are the same.
    Raises ValueError without token_ids, without table and vocab_size, for a table that names no expert of E (or of the
    part of a hash), and for E that is no multiple of `hashes`.
    """

    table: Tensor | None

    unit_weights = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        vocab_size: int | None = None,
        *,
        table: Tensor | Sequence[int] | None = None,
        feature: Literal["token", "previous", "bigram"] = "token",
        hashes: int = 1,
        seed: int = 42,
    ) -> None:
        super().__init__(dim, num_experts)
        if hashes < 1 or num_experts % hashes:
            raise ValueError(f"HashRouter: {num_experts} experts cannot be shared by {hashes} hashes")
        if feature not in ("token", "previous", "bigram"):
            raise ValueError(f"HashRouter: feature must be 'token', 'previous' or 'bigram', got {feature!r}")
        if feature == "bigram" and table is not None:
            raise ValueError("HashRouter: a bigram is not looked up in a table; leave it out")
        if feature != "bigram" and table is None and vocab_size is None:
            raise ValueError("HashRouter: give vocab_size, or a table with the expert of every token id")
        self.feature, self.k, self.seed, self.vocab_size = feature, hashes, seed, vocab_size
        self._given = None if table is None else torch.as_tensor(table, device="cpu").long()
        if self._given is not None:
            self.vocab_size = self._given.shape[-1]
            own = self._given - self._first(torch.device("cpu"))
            fits = bool(((own >= 0) & (own < num_experts // hashes)).all())
            if list(self._given.shape[:-1]) != ([] if hashes == 1 else [hashes]) or not fits:
                each = f"[V] with experts 0..{num_experts - 1}"
                if hashes > 1:
                    each = f"[{hashes}, V], row m with experts {num_experts // hashes} m and the next ones of its part"
                raise ValueError(f"HashRouter: table must be {each}")
        shape = (self.vocab_size or 0,) if hashes == 1 else (hashes, self.vocab_size or 0)
        self.register_buffer("table", None if feature == "bigram" else torch.empty(shape, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the table as it was made."""
        if self.table is not None and not self.table.is_meta:
            self.table.copy_(self._random() if self._given is None else self._given)

    def _random(self) -> Tensor:
        """A table of random hashes, [V] or [N, V]."""
        size, own = self.vocab_size or 0, self.num_experts // self.k
        tables = torch.stack([random_table(size, own, self.seed + m) for m in range(self.k)])
        return tables[0] if self.k == 1 else tables + self._first()

    def _first(self, device: torch.device | None = None) -> Tensor | int:
        """The first expert of each hash, [N, 1]; 0 for a single one."""
        own = self.num_experts // self.k
        return 0 if self.k == 1 else (torch.arange(self.k, device=device) * own).unsqueeze(1)

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D] by the context's token_ids alone."""
        limit = None if self.table is None else self.table.shape[-1]
        ids, mask = per_token("HashRouter", context, "token_ids", x, limit), context.get("mask")
        if self.feature != "token":
            before = self._previous(ids, x, mask, context.get("previous_ids"))
        if self.table is None:
            own = self.num_experts // self.k
            pairs = torch.stack([hash_pairs(before, ids, self.seed + m) % own for m in range(self.k)])
            return to_experts(pairs + self._first(x.device), self.num_experts, x, mask)
        chosen = self.table[..., ids if self.feature == "token" else before]
        return to_experts(chosen, self.num_experts, x, mask)

    def _previous(self, ids: Tensor, x: Tensor, mask: Tensor | None, before_row: Tensor | None) -> Tensor:
        """The token before each, [T]."""
        if x.dim() != 3:
            raise ValueError(f"HashRouter: feature={self.feature!r} needs tokens as [B, S, D], got one list of tokens")
        rows = ids.view(x.shape[:2])
        first = rows[:, :1] if before_row is None else before_row.to(rows).view(-1, 1)
        before = torch.cat([first, rows[:, :-1]], dim=1) if rows.shape[1] else rows
        if mask is not None:
            real = mask.reshape(rows.shape).bool()
            known = torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1)
            before = before.where(known, rows)
        return before.reshape(-1)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, vocab_size={self.vocab_size}, feature={self.feature!r}" + (
            f", hashes={self.k}" if self.k > 1 else ""
        )


def random_table(vocab_size: int, num_experts: int, seed: int = 42) -> Tensor:
    """An expert for every token id at random, [V]: the table of the authors' code (ParlAI) for the same sizes."""
    draw = random.Random(seed)
    return torch.tensor([draw.randrange(num_experts) for _ in range(vocab_size)], dtype=torch.int64)


def balanced_table(frequencies: Tensor | Sequence[float], num_experts: int) -> Tensor:
    """Tokens by frequency [V], most frequent first, each to the emptiest expert so far (balanced assignment), [V]."""
    counts = torch.as_tensor(frequencies, dtype=torch.float64)
    table = [0] * counts.numel()
    # Of experts with equal load the one with fewer tokens: tokens that never occur must not all go to one.
    experts = [(0.0, 0, e) for e in range(num_experts)]
    values = counts.tolist()
    for token in counts.argsort(descending=True, stable=True).tolist():
        load, size, e = experts[0]
        table[token] = e
        heapq.heapreplace(experts, (load + values[token], size + 1, e))
    return torch.tensor(table, dtype=torch.int64)


@torch.no_grad()
def clustered_table(embeddings: Tensor, num_clusters: int, seed: int = 42, iterations: int = 50) -> Tensor:
    """The k-means cluster of every token embedding [V, D], [V]: similar tokens share an expert (clustered hash).

    Lloyd's algorithm from distinct tokens drawn by `seed`. Raises ValueError for fewer tokens than clusters.
    """
    vectors = embeddings.detach().double().cpu()
    if vectors.shape[0] < num_clusters:
        raise ValueError(f"clustered_table: {vectors.shape[0]} tokens do not make {num_clusters} clusters")
    order = torch.randperm(vectors.shape[0], generator=torch.Generator().manual_seed(seed))
    centers = vectors[order[:num_clusters]].clone()
    table = torch.cdist(vectors, centers).argmin(1)
    for _ in range(iterations):
        sums = torch.zeros_like(centers).index_add_(0, table, vectors)
        sizes = torch.bincount(table, minlength=num_clusters)[:, None]
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
        moved = torch.cdist(vectors, centers).argmin(1)
        if torch.equal(moved, table):
            break
        table = moved
    return table


def dispersed_table(clusters: Tensor, num_experts: int) -> Tensor:
    """Tokens of each cluster [V] spread evenly over the experts, [V]: similar tokens part (dispersed hash)."""
    table = torch.empty_like(clusters)
    table[clusters.argsort(stable=True)] = torch.arange(clusters.numel()) % num_experts
    return table


def hash_pairs(first: Tensor, second: Tensor, seed: int) -> Tensor:
    """A number in 0..2^31-1 for every pair of whole numbers, the same on every device: rounds of multiply and xor."""
    mixed = torch.full_like(first, seed)
    for part in (first, second):
        # Below 2^31 before every product, which then fits an int64: no overflow to differ between devices.
        mixed = (mixed ^ part) & 0x7FFFFFFF
        for factor in (0x45D9F3B, 0x119DE1F3):
            mixed = (mixed * factor) & 0x7FFFFFFF
            mixed = mixed ^ (mixed >> 15)
    return mixed
