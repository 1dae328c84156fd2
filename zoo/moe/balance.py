"""Auxiliary losses on routing, and the loss-free alternative.

Each loss is a plain function of tensors whose last dimensions are tokens and experts, [..., T, E]; leading dimensions
are groups that are judged apart (a sequence each, say) and averaged. `mask` [..., T] leaves tokens out. With every
normalisation named explicitly: at uniform routing `load_balance` is 1 ("assignments") or k ("tokens").

    probs     the router's distribution over experts (sigmoid scores divided by their sum), before noise
    logits    what it was computed from; noisy_logits with noise added, noise_std its width (None: no noise)
    selected  1, or True, where a token chose an expert, before capacity dropped any; first the same for first choices
    gates     the combine weights as a matrix, zero where not chosen
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .gate_losses import (
    conditional_budget,
    diverse_and_simple,
    stable_balance,
    stable_distill,
    top_any_cost,
    top_any_load,
)
from .label_losses import global_entropy, local_entropy, localized_balance, task_mutual_information
from .masked import choice_count, cv_squared, surprise, token_count, token_sum, world_size
from .topology import topology

__all__ = [
    "all_reduce",
    "communication",
    "conditional_budget",
    "consistency",
    "device_level",
    "diverse_and_simple",
    "global_entropy",
    "gshard",
    "hierarchical_load",
    "importance",
    "importance_probs",
    "load",
    "load_balance",
    "load_vmoe",
    "local_entropy",
    "localized_balance",
    "mutual_information",
    "null_load",
    "relu_l1",
    "selector_entropy",
    "selector_reach",
    "stable_balance",
    "stable_distill",
    "task_mutual_information",
    "top_any_cost",
    "top_any_load",
    "topology",
    "update_biases",
    "updated_bias",
    "win_probability",
    "z",
]


def load_balance(
    probs: Tensor,
    selected: Tensor,
    mask: Tensor | None = None,
    normalization: str = "assignments",
    global_batch: bool = False,
) -> Tensor:
    """E * sum_e f_e P_e with P_e the mean probability of expert e and f_e its share of the choices.

    `normalization="assignments"` divides the counts by all choices, so that f sums to 1: Switch (2101.03961, eq. 4),
    Megatron, MegaBlocks, DeepSeekMoE (2401.06066, eq. 12) and, a sequence a group and with the best scores as
    `selected`, DeepSeek-V3 (2412.19437, eq. 17).
    "tokens" divides by the number of tokens, so that f sums to k: transformers, flaxformer. `global_batch` sums the
    counts over all processes (2501.11873), probabilities stay local: the mean of the gradients over the processes, as
    data parallelism takes it, is that of one process with all tokens, however they are spread.
    """
    counts, tokens = choice_count(selected, mask, probs), token_count(probs, mask)
    mean_probs = token_sum(probs, mask)
    if global_batch and world_size() > 1:
        # Averaging gradients over processes divides by their number once more than a mean over all tokens does.
        mean_probs = mean_probs * world_size()
        counts, tokens = all_reduce(torch.cat([counts, tokens], dim=-1)).split([probs.shape[-1], 1], dim=-1)
    if normalization == "assignments":
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    elif normalization == "tokens":
        share = counts / tokens.clamp(min=1)
    else:
        raise ValueError(f"load_balance: normalization must be 'assignments' or 'tokens', got {normalization!r}")
    return (probs.shape[-1] * (share * (mean_probs / tokens.clamp(min=1))).sum(-1)).mean()


def gshard(probs: Tensor, first: Tensor, mask: Tensor | None = None, global_batch: bool = False) -> Tensor:
    """E * sum_e f_e P_e with f_e from first choices alone (GShard 2006.16668, algorithm 1); 1 when uniform."""
    return load_balance(probs, first, mask, global_batch=global_batch)


def importance(gates: Tensor, mask: Tensor | None = None, correction: int = 0) -> Tensor:
    """CV^2 of the summed combine weights of every expert (Shazeer 1701.06538, eq. 6-7).

    Population variance; correction=1 takes the unbiased one (MEO, Tutel).
    """
    return cv_squared(token_sum(gates, mask), correction).mean()


def importance_probs(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """CV^2 of the summed probabilities, before any choice (V-MoE 2106.05974, appendix A)."""
    return cv_squared(token_sum(probs, mask)).mean()


def load(
    logits: Tensor,
    noisy_logits: Tensor,
    noise_std: Tensor | None,
    k: int,
    selected: Tensor,
    mask: Tensor | None = None,
    correction: int = 0,
) -> Tensor:
    """CV^2 of the smooth load: the probability that fresh noise would put expert e among the k (Shazeer, eq. 8-11).

    The threshold of a chosen expert is the (k+1)-th largest noisy logit, of the others the k-th largest. Without noise,
    or with k = E, the load is the plain count, which has no gradient. correction as in `importance`.
    """
    if noise_std is None or k >= logits.shape[-1]:
        return cv_squared(choice_count(selected, mask, logits), correction).mean()
    return cv_squared(token_sum(win_probability(logits, noisy_logits, noise_std, k), mask), correction).mean()


def win_probability(logits: Tensor, noisy_logits: Tensor, noise_std: Tensor, k: int) -> Tensor:
    """Probability that fresh noise would put each expert among the k, the other experts' noise as it is."""
    top = noisy_logits.topk(k + 1, dim=-1).values
    threshold = torch.where(noisy_logits > top[..., k:], top[..., k:], top[..., k - 1 : k])
    return torch.special.ndtr((logits - threshold) / noise_std)


def hierarchical_load(
    level_logits: tuple[Tensor, Tensor],
    level_noisy: tuple[Tensor, Tensor],
    level_std: tuple[Tensor, Tensor] | None,
    level_k: tuple[int, int],
    entered: Tensor,
    selected: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """CV^2 of Load_H(X)_ij = Load_primary(X)_i Load_i(X^(i))_j / |X^(i)| (Shazeer 1701.06538, appendix B).

    Tuples hold the level of the groups [T, G] and that inside them [T, G, M]; entered [T, G] is where a token went into
    a group, X^(i) those that went into group i. Without noise the loads are the counts `selected` [T, E].
    """
    if level_std is None:
        return cv_squared(choice_count(selected, mask, level_logits[0])).mean()
    wins = [
        win_probability(*level) if level[3] < level[0].shape[-1] else torch.ones_like(level[0])
        for level in zip(level_logits, level_noisy, level_std, level_k)
    ]
    if mask is not None:
        entered = entered * mask.unsqueeze(-1)
        wins[0] = wins[0].where(mask.unsqueeze(-1), 0)
    inside = (wins[1] * entered.unsqueeze(-1)).sum(0)
    product = wins[0].sum(0).unsqueeze(-1) * inside / entered.sum(0).clamp(min=1).unsqueeze(-1)
    return importance(product.flatten()[None])


def load_vmoe(
    logits: Tensor, noisy_logits: Tensor, noise_std: Tensor | None, k: int, mask: Tensor | None = None
) -> Tensor:
    """CV^2 of the mean probability of beating the k-th largest noisy logit (V-MoE, appendix A).

    One threshold for all experts, where Shazeer's form has two. Without noise the step function takes its place.
    """
    threshold = noisy_logits.topk(k, dim=-1).values[..., -1:]
    margin = logits - threshold
    wins = (margin >= 0).to(logits.dtype) if noise_std is None else torch.special.ndtr(margin / noise_std)
    return cv_squared(token_sum(wins, mask) / token_count(logits, mask).clamp(min=1)).mean()


def z(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits (ST-MoE 2202.08906, eq. 5): keeps them small."""
    squared = logits.logsumexp(-1, keepdim=True).square()
    return (token_sum(squared, mask) / token_count(logits, mask).clamp(min=1)).mean()


def device_level(probs: Tensor, selected: Tensor, num_devices: int, mask: Tensor | None = None) -> Tensor:
    """D-group balance of DeepSeekMoE (2401.06066, eq. 15): sum over devices of mean f times summed P.

    Experts are split evenly, in order, over `num_devices`; f_e = E count_e / (k T), so 1 when uniform.
    """
    counts = choice_count(selected, mask, probs)
    f = probs.shape[-1] * counts / counts.sum(-1, keepdim=True).clamp(min=1)
    p = token_sum(probs, mask) / token_count(probs, mask).clamp(min=1)
    f, p = (_by_device("device_level", values, num_devices) for values in (f, p))
    return (f.mean(-1) * p.sum(-1)).sum(-1).mean()


def communication(
    probs: Tensor, selected: Tensor, num_devices: int, limit: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Balance of what devices receive (DeepSeek-V2 2405.04434, eq. 29-31): sum over devices of f times summed P.

    f_d = D / (M T) times the number of tokens sent to device d, where a token counts once however many experts it meets
    there; P as in `device_level`. M is `limit`, how many devices a token may reach (group_topk); by default as many as
    tokens reach on average, so that f has mean 1. 1 when uniform. Experts lie on devices in order.
    """
    here, p = (_by_device("communication", values, num_devices) for values in (selected > 0, token_sum(probs, mask)))
    sent, tokens = token_sum(here.any(-1).to(probs.dtype), mask), token_count(probs, mask)
    reached = sent.sum(-1, keepdim=True) if limit is None else limit * tokens
    f = num_devices * sent / reached.clamp(min=1)
    return (f * p.sum(-1) / tokens.clamp(min=1)).sum(-1).mean()


def _by_device(name: str, values: Tensor, num_devices: int) -> Tensor:
    """Values of experts [..., E] as those of devices [..., D, E / D]."""
    if values.shape[-1] % num_devices:
        raise ValueError(f"{name}: {values.shape[-1]} experts do not split evenly over num_devices={num_devices}")
    return values.unflatten(-1, (num_devices, -1))


def consistency(logits: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
    """THOR's consistency of two passes (2110.04260): mean over tokens of [KL(p||q) + KL(q||p)] / 2.

    logits and other [..., V] are what the model predicts in each pass, p and q their softmax; mask [...] leaves tokens
    out. THOR's objective is both cross-entropies plus alpha times this, alpha = 1. Gradients reach both passes.
    """
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    divergence = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2
    if mask is None:
        return divergence.sum() / max(divergence.numel(), 1)
    return divergence.where(mask, 0).sum() / mask.sum().clamp(min=1)


def mutual_information(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """-(H(mean_t p) - mean_t H(p_t)): minus the information that a token gives about its expert, in nats.

    ModuleFormer (2306.04640, section 3) and DS-MoE. Between -log E (every token sure, all experts used alike) and 0.
    """
    tokens = token_count(probs, mask).clamp(min=1)
    return (token_sum(surprise(probs), mask) / tokens - surprise(token_sum(probs, mask) / tokens)).sum(-1).mean()


def selector_entropy(selectors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Summed entropy -s log(s + 1e-6) of DSelect-k's single-expert selectors [..., T, K, E] (2106.03760, section 4.2).

    A sum over tokens and selectors, as in the authors' code: the weight (1e-6 there) must suit the number of tokens.
    """
    return _selector_sum(-(selectors * (selectors + 1e-6).log()).sum(-1), mask)


def selector_reach(selectors: Tensor, mask: Tensor | None = None) -> Tensor:
    """Summed 1 / sum_e s_e of DSelect-k's selectors [..., T, K, E]: keeps them off codes that no expert has."""
    return _selector_sum(1 / selectors.sum(-1), mask)


def _selector_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    # A static gate has one row of selectors for all tokens, which no mask can leave out.
    return (values if mask is None or values.shape[-2] != mask.shape[-1] else values.where(mask.unsqueeze(-1), 0)).sum()


def relu_l1(gates: Tensor, selected: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """E / (k T^2) sum_e mass_e count_e of ReLU gates: L1 that weighs busy experts more (ReMoE, 2412.14711)."""
    tokens = token_count(gates, mask).clamp(min=1)
    mass, count = token_sum(gates, mask) / tokens, choice_count(selected, mask, gates) / tokens
    return (gates.shape[-1] / k * (mass * count).sum(-1)).mean()


def null_load(probs: Tensor, selected: Tensor, num_null: int, mask: Tensor | None = None) -> Tensor:
    """E' sum_e f_e P_e over all E' experts of AdaMoE (2406.13233, section 3), the last num_null null ones with one f.

    f_e is the share of tokens that chose e, so that f sums to k, as in transformers; for null experts it is their mean.
    """
    true = probs.shape[-1] - num_null
    f = choice_count(selected, mask, probs) / token_count(probs, mask).clamp(min=1)
    f = torch.cat([f[..., :true], f[..., true:].mean(-1, keepdim=True).expand(*f.shape[:-1], num_null)], dim=-1)
    return (probs.shape[-1] * f * token_sum(probs, mask) / token_count(probs, mask).clamp(min=1)).sum(-1).mean()


def updated_bias(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Loss-free balancing (2408.15664, algorithm 1): bias + rate * sign(mean load - load), [E]."""
    # Load times E against their sum, so that integer counts are compared exactly.
    return bias + rate * torch.sign(counts.sum() - counts * counts.numel()).to(bias.dtype)


@torch.no_grad()
def update_biases(model: nn.Module) -> None:
    """Move the selection bias of every router in `model` by one step, and forget the counts it was based on.

    Call once an optimizer step. Counts are what training forwards saw since the last call, over all micro-batches and,
    where torch.distributed runs, all processes. A router that saw no token keeps its bias.
    """
    for router in model.modules():
        bias = getattr(router, "selection_bias", None)
        if not isinstance(bias, Tensor) or not hasattr(router, "load_since_update"):
            continue
        counts: Tensor | None = router.load_since_update  # type: ignore[assignment]
        if counts is None:
            counts = torch.zeros(bias.numel(), dtype=torch.int64, device=bias.device)
        bias.copy_(updated_bias(bias, all_reduce(counts), router.bias_update_rate))  # type: ignore[arg-type]
        router.load_since_update = torch.zeros_like(counts)


def all_reduce(values: Tensor) -> Tensor:
    """Sum over all processes; gradients do not cross, counts have none."""
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values
