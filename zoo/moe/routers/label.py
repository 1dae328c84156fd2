"""Gates that are told what to do: a domain, task or language label picks the expert."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..routing import Routing
from .base import Router
from .context import per_token, to_experts
from .topk import TopKRouter


class LabelRouter(Router):
    """One expert a label, weight one: y = f_label(x). Nothing is learnt, there is no loss.

    The context's keyword `label` gives the expert of each token ([T] or [B, S]), of each sequence ([B]) or of all.
    With label="language" it is M2M-100's language-specific layers (2010.11125), with label="task" routing by a known
    task. Context: that keyword, mask. Raises ValueError when it is missing or names no expert.
    """

    k = 1

    def __init__(self, dim: int, num_experts: int, label: str = "label") -> None:
        super().__init__(dim, num_experts)
        self.label, self.num_labels = label, num_experts

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D] by their labels alone."""
        expert = per_token(type(self).__name__, context, self.label, x, self.num_experts)
        return to_experts(expert, self.num_experts, x, context.get("mask"))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, label={self.label!r}"


class DomainRouter(LabelRouter):
    """DEMix (2108.05036, section 3): the expert is the text's domain, `domain` in the context, in every layer.

    At test the domain may be unknown: run the model once with every domain, and mix what it predicts by the posterior
    over domains so far, p(x_t | x_<t) = sum_j p(x_t | x_<t, j) p(j | x_<t): `domain_posterior`, `mix_domains`
    and `updated_prior`.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts, "domain")


def domain_posterior(log_probs: Tensor, prior: Tensor | None = None, history: Literal["all", "last"] = "all") -> Tensor:
    """p(j | x_<t) from log p(x_t | x_<t, j): [J, ..., S] -> [J, ..., S], as DEMix does.

    Bayes: proportional to p(x_<t | j) p(j), with prior [J], uniform by default; at the first position the prior itself.
    history="last" is the authors' code: there only the token before counts, and the first position is uniform.
    Raises ValueError for an unknown history.
    """
    if history not in ("all", "last"):
        raise ValueError(f"domain_posterior: history must be 'all' or 'last', got {history!r}")
    domains = log_probs.shape[0]
    start = torch.full_like(log_probs[..., :1], 1 / domains)
    log_prior = start.log()
    if prior is not None:
        log_prior = prior.to(log_probs).log().view(-1, *[1] * (log_probs.dim() - 1))
    past = log_probs[..., :-1]
    if history == "last":
        return torch.cat([start, (past + log_prior).softmax(0)], dim=-1)
    evidence = torch.cat([torch.zeros_like(start), past.cumsum(-1)], dim=-1)
    return (evidence + log_prior).softmax(0)


def mix_domains(log_probs: Tensor, posterior: Tensor) -> Tensor:
    """log sum_j posterior_j p_j: [J, ...] and [J, ...] -> [...]."""
    return (log_probs + posterior.log()).logsumexp(0)


def updated_prior(posteriors: Tensor, decay: float = 0.3) -> Tensor:
    """The prior [J] for the next text, from the posteriors [N, J] at the ends of the N texts before, latest last.

    p(j) is proportional to the sum over texts of decay^age times their posterior (DEMix's updating prior, decay 0.3;
    the authors' code averages with alpha 0.3, which is decay=0.7).
    """
    age = torch.arange(posteriors.shape[0] - 1, -1, -1, device=posteriors.device, dtype=posteriors.dtype)
    summed = (decay**age) @ posteriors
    return summed / summed.sum()


class TaskRouter(TopKRouter):
    """Task-MoE (2110.03742): GShard's top-2 gate on a learnt embedding of the task, so that a task has fixed experts.

    p = softmax(t W^T) of the task's embedding t, the two best experts and their p divided by p1 + p2 + 1e-9; every
    token of a sequence goes where its task goes, so that a task's experts can be cut out for serving. Options as in
    `TopKRouter`, but jitter and noise, which would part the tokens of a task. For experts fixed by hand instead of
    learnt see `LabelRouter(label="task")`. Context: task, a number for all, [B] or a token each; mask.

    Raises ValueError without task, for a task out of range, and for jitter or noise.
    """

    def __init__(
        self, dim: int, num_experts: int, k: int = 2, *, num_tasks: int, label: str = "task", **options: Any
    ) -> None:
        if options.get("jitter") or options.get("noise"):
            raise ValueError("TaskRouter: jitter and noise differ between the tokens of a task; leave them out")
        if num_tasks < 1:
            raise ValueError(f"TaskRouter: num_tasks must be at least 1, got {num_tasks}")
        super().__init__(dim, num_experts, k, **{"normalize": True, "normalize_eps": 1e-9, **options})
        self.label, self.num_labels = label, num_tasks
        self.task_embedding = nn.Parameter(torch.empty(num_tasks, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W as `TopKRouter` does, and the embeddings from N(0, 1)."""
        super().reset_parameters()
        if hasattr(self, "task_embedding"):  # not yet, when the parent class is made
            self.task_embedding.normal_()

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D] by their tasks alone."""
        task = per_token("TaskRouter", context, self.label, x, self.task_embedding.shape[0])
        return super().forward(F.embedding(task, self.task_embedding).view(x.shape), **context)


class PanGuRouter(Router):
    """Random routed experts of PanGu-Sigma (2303.10845): a token's domain gives a group of experts, a table one of it.

    Experts e with e // (E / num_domains) = domain are that domain's; inside, the expert of a token id is drawn once,
    uniformly, and kept in the buffer `table` [num_domains, V]. Weight one, no parameters, no loss. Each layer draws its
    own table, from `seed` or, where that is None, from torch's generator. Experts of one domain can be taken out alone.

    Context: domain (a number, [B], or one a token), token_ids, mask. Raises ValueError when one is missing or out of
    range, and when the experts do not split evenly over the domains.
    """

    k = 1
    label = "domain"
    table: Tensor

    def __init__(
        self, dim: int, num_experts: int, vocab_size: int, num_domains: int = 1, *, seed: int | None = None
    ) -> None:
        super().__init__(dim, num_experts)
        if num_domains < 1 or num_experts % num_domains:
            raise ValueError(f"PanGuRouter: {num_experts} experts do not split evenly over num_domains={num_domains}")
        self.num_domains, self.num_labels, self.seed = num_domains, num_domains, seed
        self.register_buffer("table", torch.empty(num_domains, vocab_size, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the table."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        size = self.num_experts // self.num_domains
        if not self.table.is_meta:
            drawn = torch.randint(size, self.table.shape, generator=generator, device="cpu")
            self.table.copy_(drawn + size * torch.arange(self.num_domains, device="cpu")[:, None])

    def forward(self, x: Tensor, **context: Any) -> Routing:
        """Route tokens x [T, D] or [B, S, D] by the context's domain and token_ids."""
        domain = per_token("PanGuRouter", context, self.label, x, self.num_domains)
        ids = per_token("PanGuRouter", context, "token_ids", x, self.table.shape[1])
        return to_experts(self.table[domain, ids], self.num_experts, x, context.get("mask"))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, num_domains={self.num_domains}"
