"""Branch-Train-Merge's ensemble: language models of domains, mixed by what a text so far says of its domain."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Past:
    """What an ensemble has read: each model's cache, and of the newest token what the next one is weighed by.

    log_prior [B, N] is the domains' logarithm before the next token, seen [B] whether the newest token was a real one,
    last [B, N, V] what the models give after it.
    """

    caches: list[Any]
    log_prior: Tensor
    seen: Tensor
    last: Tensor


@dataclass
class EnsembleOutput:
    """logits [B, S, V] are logarithms of probabilities; posterior [B, S, N] the models' weights for each next token."""

    logits: Tensor
    posterior: Tensor
    loss: Tensor | None = None
    past_key_values: Past | None = None


class DomainEnsemble(nn.Module):
    """Causal language models, one a domain, mixed by each domain's posterior given the text so far (2208.03306).

    p(x_t | x_<t) = sum_j p_j(x_t | x_<t) p(j | x_<t), p(j | x_<t) ~ p(j) p_j(x_<t), updated by Bayes with each token
    (DEMix, 2108.05036, section 5). The first token, which no model predicts, says nothing. models are transformers'
    causal language models, or any called as they are, with one vocabulary. prior [N] is uniform if not given; the
    authors estimate one on text of the target domain (`estimate_prior`). With top_k only so many domains of the highest
    posterior are mixed, their weights divided by their sum; all models run nevertheless, as each may come back.

    evidence="text" weighs by the whole text, as the papers say; "token" by the newest token alone, p(j) p_j(x_(t-1) |
    x_<(t-1)), as the authors' code does (`fairseq/sequence_scorer.py` of DEMix). That code also starts every text from
    equal weights where a prior is given; here it starts from the prior.

    Raises ValueError for fewer than one model, different vocabularies, a prior that is none, another evidence, or a
    top_k that is not among 1..N.
    """

    log_prior: Tensor

    def __init__(
        self,
        models: Iterable[nn.Module],
        prior: Sequence[float] | Tensor | None = None,
        top_k: int | None = None,
        evidence: Literal["text", "token"] = "text",
    ) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        number = len(self.models)
        if not number:
            raise ValueError("DomainEnsemble: expected at least one model")
        said = [getattr(getattr(model, "config", None), "vocab_size", None) for model in self.models]
        if len(sizes := {size for size in said if size is not None}) > 1:
            raise ValueError(f"DomainEnsemble: the models' vocabularies have different sizes, {sorted(sizes)}")
        if top_k is not None and not 1 <= top_k <= number:
            raise ValueError(f"DomainEnsemble: top_k must be between 1 and {number}, got {top_k}")
        if evidence not in ("text", "token"):
            raise ValueError(f"DomainEnsemble: evidence must be 'text' or 'token', got {evidence!r}")
        self.top_k, self.evidence = top_k, evidence
        self.register_buffer("log_prior", torch.empty(number, dtype=torch.float64))
        self.set_prior([1.0] * number if prior is None else prior)

    @property
    def prior(self) -> Tensor:
        """p(j) of every domain, [N]."""
        return self.log_prior.exp()

    def set_prior(self, prior: Sequence[float] | Tensor) -> None:
        """Let every text start from these shares of the domains [N], divided by their sum."""
        shares = torch.as_tensor(prior, dtype=torch.float64)
        if shares.shape != self.log_prior.shape or not (shares >= 0).all() or not 0 < shares.sum() < math.inf:
            raise ValueError(
                f"DomainEnsemble: a prior has a share of at least 0 for each of {len(self.models)} models, and one "
                f"above it; got {shares.tolist()}"
            )
        self.log_prior.copy_((shares / shares.sum()).log())

    @property
    def device(self) -> torch.device:
        """Where the first model is."""
        return next(self.models.parameters()).device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
    ) -> EnsembleOutput:
        """Probabilities of the token after each of ids [B, S]; the mask [B, past and S] is 0 for padding.

        labels [B, S] are ids, -100 where there is no loss; loss is the mean negative log-likelihood of each next one.
        With use_cache there is a past only where every model gives past_key_values; else give the whole text again.
        """
        logp, caches = [], []
        padding = {} if attention_mask is None else {"attention_mask": attention_mask}
        counted = {}
        if attention_mask is not None:  # models of absolute positions count padding otherwise
            places = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            counted = {"position_ids": places[:, -input_ids.shape[1] :]}
        for j, model in enumerate(self.models):
            past = {} if past_key_values is None else {"past_key_values": past_key_values.caches[j]}
            options = padding | (counted if _takes_positions(model) else {})
            out = model(input_ids=input_ids, use_cache=use_cache, **past, **options)
            wide = torch.promote_types(out.logits.dtype, torch.float32)
            logp.append(out.logits.to(wide).log_softmax(-1))
            caches.append(getattr(out, "past_key_values", None))
        each = torch.stack(logp, dim=2)  # [B, S, N, V]
        batch, length = input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, -length:].bool()
        told = each.new_zeros(batch, length, len(self.models))
        # What token s says is what the models gave for it after token s - 1.
        told[:, 1:] = each[:, :-1].gather(-1, input_ids[:, 1:, None, None].expand(-1, -1, told.shape[-1], 1))[..., 0]
        known = torch.zeros_like(real)
        known[:, 1:] = real[:, 1:] & real[:, :-1]
        start = self.log_prior.to(told).expand(batch, -1)
        if past_key_values is not None:
            first = input_ids[:, :1, None].expand(-1, told.shape[-1], 1)
            told[:, 0] = past_key_values.last.gather(-1, first)[..., 0]
            known[:, 0] = real[:, 0] & past_key_values.seen
            start = past_key_values.log_prior
        told = told.where(known[..., None], 0)
        weight = start[:, None] + (told.cumsum(1) if self.evidence == "text" else told)
        weight = weight.log_softmax(-1)
        after = weight[:, -1] if self.evidence == "text" else self.log_prior.to(told).expand(batch, -1)
        if self.top_k is not None and self.top_k < len(self.models):
            kept = torch.zeros_like(weight, dtype=torch.bool).scatter(-1, weight.topk(self.top_k).indices, True)
            weight = weight.masked_fill(~kept, -math.inf).log_softmax(-1)
        logits = (each + weight[..., None]).logsumexp(2)
        loss = None
        if labels is not None:
            loss = F.nll_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        cached = use_cache and all(cache is not None for cache in caches)
        kept_for_next = Past(caches, after, real[:, -1], each[:, -1]) if cached else None
        return EnsembleOutput(logits, weight.exp(), loss, kept_for_next)

    @torch.no_grad()
    def estimate_prior(self, batches: Iterable[Tensor], rate: float = 0.3) -> Tensor:
        """Set the prior to what texts of ids [B, S] say of their domain, and give it, [N] (2208.03306).

        As the authors do on 100 sequences: after each batch its mean posterior counts for `rate` of a running mean,
        which the first batch begins, and which is the prior of the next batch. Raises ValueError without any batch.
        """
        mean: Tensor | None = None
        top_k, self.top_k = self.top_k, None  # or domains beside the likeliest would lose their share for good
        try:
            for ids in batches:
                last = self(ids).posterior[:, -1].double().mean(0)
                mean = last if mean is None else torch.lerp(mean, last, rate)
                self.set_prior(mean)
        finally:
            self.top_k = top_k
        if mean is None:
            raise ValueError("DomainEnsemble: estimate_prior needs at least one batch")
        return self.prior

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
    ) -> Tensor:
        """Ids [B, S + new] that continue prompts [B, S], which padding [B, S] may precede; named as transformers' own.

        The likeliest token each time, or one drawn among the top_k likeliest (0: all) of which top_p is the share.
        After eos_token_id, or any of several, a text has pad_token_id, or the first of those. Models that give no
        past_key_values read the whole text for each token.

        Raises ValueError for prompts that end with padding or are empty, and for numbers that sampling does not know.
        """
        mask = attention_mask
        if not input_ids.shape[1] or not (mask is None or bool((mask[:, -1] != 0).all())):
            raise ValueError("DomainEnsemble: a prompt has a token at least, and padding stands before it, not after")
        if max_new_tokens < 0 or (do_sample and not (temperature > 0 and 0 < top_p <= 1 and top_k >= 0)):
            raise ValueError(
                "DomainEnsemble: expected max_new_tokens and top_k of at least 0, temperature above 0 and top_p above "
                f"0 and at most 1, got {max_new_tokens}, {top_k}, {temperature} and {top_p}"
            )
        given = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        ends = torch.tensor(given, dtype=input_ids.dtype, device=input_ids.device)
        ids, new, past = input_ids, input_ids, None
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            out = self(new, attention_mask=mask, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits = out.logits[:, -1]
            token = _draw(logits / temperature, top_p, top_k) if do_sample else logits.argmax(-1)
            if given:
                token = token.masked_fill(done, given[0] if pad_token_id is None else pad_token_id)
                done = done | torch.isin(token, ends)
            ids = torch.cat([ids, token[:, None]], 1)
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            new = ids if past is None else token[:, None]
            if bool(done.all()):
                break
        return ids


def _takes_positions(model: nn.Module) -> bool:
    """Whether a model can be told positions from 0; RoBERTa's begin after the row of its table that is for padding."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    tables = [table for name, table in model.named_modules() if name.endswith("position_embeddings")]
    return all(getattr(table, "padding_idx", None) is None for table in tables)


def _draw(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """One token of each row [B, V]: among the top_k likeliest, of them the fewest that hold a share of top_p."""
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    if top_k:
        probs[:, top_k:] = 0
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= top_p * probs.sum(-1, keepdim=True), 0)
    return order.gather(-1, torch.multinomial(probs, 1))[:, 0]
