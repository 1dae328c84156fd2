"""Growing a sparse model by experts, old ones frozen: Lifelong-MoE (2305.12281)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe import Experts, MoE, Router
from ..moe.grown import FROZEN, NEW, GrownExperts, empty_like, freeze_rows, rows, thaw_rows
from ..moe.routers import PrototypeRouter, TopKRouter
from ..moe.routers.linear import LinearRouter
from ..pretrained import switch
from ..pretrained.context import decoder_of
from ..pretrained.sparse_blocks import row_of
from .arguments import whole
from .numbers_said import say_timm
from .origin import made_by

# What a gate may hold a row an expert of.
PER_EXPERT = ("weight", "bias", "noise_weight", "selection_bias", "expert_scale")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@torch.no_grad()
def grow(
    model: nn.Module,
    *,
    num_new: int,
    init: Literal["copy", "random"] = "copy",
    freeze_old: bool = True,
    noise: float = 0.0,
) -> nn.Module:
    """A copy of a sparse model with num_new more experts in every `MoE` (Lifelong-MoE, 2305.12281).

    Gates get a row for each new expert, the choice k stays. init="copy": new experts are copies of old ones in turn,
    and so are their rows of the gate and biases of the choice; "random": weights and rows are drawn normally with the
    spread of the old ones, biases start at zero and biases of the choice at the mean. To copies N(0, (noise * s)^2) is
    added, s being the spread of the weights they copy. (There is no code of the authors', and which start they take
    could not be checked.) Outputs stay for every token whose chosen experts are still the same. With "copy" and k=1
    they stay for all where the one expert's weight is 1 or a sigmoid: a copy ties with what it copies. Softmax over all
    experts gives each a smaller share, and of k > 1 choices an expert and its copy take two.

    With freeze_old the old experts and rows of gates are frozen, under any optimizer, and have no state in one: they
    are parameters of their own without gradients (`zoo.moe.grown`), in state dicts too; what `zoo.save_pretrained`
    writes is whole, and knows nothing of freezing. What is not expert or gate learns on, and biases of
    the choice move; `output_regularization` keeps outputs near the old model's. A grown model may be grown again.

    Works for families on our layers, whose configuration gets the new number, upcycled and timm models, LIMoE. Where
    the gate chooses among groups of experts each group gets its share. New parameters take dtype, device and mode.

    Raises ValueError for num_new below one or one that groups do not divide, an unknown init, a model without `MoE`,
    experts and gates of a kind that has no rows to add, and a configuration that does not say how many experts it has.
    """
    num_new = whole("grow: num_new", num_new)
    if num_new < 1:
        raise ValueError(f"grow: num_new must be at least 1, got {num_new}")
    if init not in ("copy", "random"):
        raise ValueError(f"grow: init must be 'copy' or 'random', got {init!r}")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ValueError(f"grow: {type(model).__name__} has no MoE layers")
    for name, moe in layers.items():
        _check(name, moe, num_new)
    fields = _fields(model, {moe.experts.num_experts for moe in layers.values()})
    memo: dict[int, Any] = {}
    for moe in layers.values():
        origin, is_new = _order(moe.experts.num_experts, num_new, getattr(moe.router, "num_groups", 1))
        memo[id(moe.router)] = _grown_router(moe.router, origin, is_new, init, freeze_old, noise)
        memo[id(moe.experts)] = _grown_experts(moe.experts, origin, is_new, init, freeze_old, noise)
    # What has a replacement is not copied.
    grown: Any = copy.deepcopy(model, memo)
    for of_config, field in fields:
        number = getattr(decoder_of(grown).config if of_config else grown, field)
        # An encoder and a decoder have copies of their own.
        holders = {id(m.config): m.config for m in grown.modules() if hasattr(m, "config")} if of_config else {0: grown}
        for holder in holders.values():
            if getattr(holder, field, None) == number:
                setattr(holder, field, number + num_new)
    _share(layers, grown)
    _tell(grown)
    made_by("grow", grown)
    return grown


def output_regularization(logits: Tensor, old_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(old || new), in nats a token, of logits [..., V] from those of the model before it grew (2305.12281).

    Added to the loss with a weight, it keeps what the model gave before; the old logits get no gradient. mask [...] is
    False for tokens to leave out. Zero where there are none.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    old, new = (x.to(wide).log_softmax(-1) for x in (old_logits.detach(), logits))
    each = F.kl_div(new, old, reduction="none", log_target=True).sum(-1)
    if mask is None:
        return each.sum() / max(each.numel(), 1)
    real = mask.to(each.dtype)
    return (each.where(mask.bool(), 0)).sum() / real.sum().clamp(min=1)


def _check(name: str, moe: MoE, num_new: int) -> None:
    router, experts = moe.router, moe.experts
    if type(experts) not in (Experts, GrownExperts):
        raise ValueError(f"grow: {name} has {type(experts).__name__}; expected Experts")
    inner: Any = experts.old if isinstance(experts, GrownExperts) else experts
    if inner.parallel is not None:
        raise ValueError(f"grow: {name} is spread over processes; grow the model before it is")
    known = isinstance(router, (TopKRouter, LinearRouter)) and not isinstance(router, PrototypeRouter)
    tensors = {n: t for n, t in {**dict(router.named_parameters()), **dict(router.named_buffers())}.items() if t.dim()}
    odd = [n for n in tensors if n.removeprefix(FROZEN).removeprefix(NEW) not in (*PER_EXPERT, *router.of_tokens)]
    sizes = {t.shape[0] for n in PER_EXPERT if (t := getattr(router, n, None)) is not None} if known else set()
    if not known or odd or sizes != {router.num_experts}:
        what = f" ({odd[0]} {list(tensors[odd[0]].shape)})" if odd else ""
        raise ValueError(f"grow: {name}.router, {type(router).__name__}, has more than a row an expert{what}")
    groups = getattr(router, "num_groups", 1)
    if num_new % groups:
        raise ValueError(f"grow: num_new={num_new} does not divide into the {groups} groups of {name}.router")


def _order(old: int, num_new: int, groups: int) -> tuple[list[int], list[bool]]:
    """Of each expert in the new order: the old one that it is or copies, and whether it is new."""
    size, more = old // groups, num_new // groups
    origin, is_new = [], []
    for first in range(0, old, size):
        origin += [*range(first, first + size), *(first + i % size for i in range(more))]
        is_new += [False] * size + [True] * more
    return origin, is_new


def _grown(value: Tensor, origin: list[int], is_new: list[bool], spread: tuple[float, bool]) -> Tensor:
    """Rows [E, ...] of `value` in the new order; new ones are copies with noise, or drawn: spread (noise, random)."""
    found = value.detach()[torch.tensor(origin, device=value.device)]
    noise, random = spread
    if value.dim() < 2 and not random:
        return found
    new = [i for i, is_it in enumerate(is_new) if is_it]
    if random:
        if value.dim() < 2:
            found[new] = 0
        else:
            found[new] = torch.randn_like(found[new]) * value.float().std().to(value.dtype)
    elif noise:
        found[new] += torch.randn_like(found[new]) * (noise * value.float().std()).to(value.dtype)
    return found


def _grown_router(
    router: Any, origin: list[int], is_new: list[bool], init: str, freeze_old: bool, noise: float
) -> Router:
    grown = copy.deepcopy(router)
    thaw_rows(grown)
    for name in PER_EXPERT:
        value = getattr(grown, name, None)
        if value is None:
            continue
        more = _grown(value, origin, is_new, (noise, init == "random"))
        if name in ("selection_bias", "expert_scale") and init == "random":
            more[[i for i, new in enumerate(is_new) if new]] = value.mean()
        if name == "selection_bias":
            setattr(grown, name, more)
            continue
        setattr(grown, name, nn.Parameter(more, value.requires_grad))
        if freeze_old:
            freeze_rows(grown, name, is_new)
    grown.num_experts = len(origin)
    if getattr(grown, "load_since_update", None) is not None:
        grown.load_since_update = None  # of fewer experts
    return grown


def _grown_experts(
    experts: Experts | GrownExperts, origin: list[int], is_new: list[bool], init: str, freeze_old: bool, noise: float
) -> nn.Module:
    whole = experts.whole() if isinstance(experts, GrownExperts) else experts
    parts = [empty_like(whole, len(origin) - sum(is_new)), empty_like(whole, sum(is_new))] if freeze_old else []
    grown = empty_like(whole, len(origin)) if not freeze_old else None
    for name, value in whole.named_parameters():
        more = _grown(value, origin, is_new, (noise, init == "random"))
        if grown is not None:
            getattr(grown, name).copy_(more)
            getattr(grown, name).requires_grad_(value.requires_grad)
        for part, new in zip(parts, (False, True)):
            getattr(part, name).copy_(rows(more, is_new, new))
            getattr(part, name).requires_grad_(value.requires_grad)
    made = grown if grown is not None else GrownExperts(parts[0], parts[1], is_new)
    return made.train(experts.training)


def _fields(model: Any, numbers: set[int]) -> list[tuple[bool, str]]:
    """Where a model says how many experts it has: fields of its decoder's configuration (True), and of its own."""
    if not hasattr(model, "config") or not hasattr(model, "get_decoder"):
        return []
    config = decoder_of(model).config
    if row_of(model) is None and config.model_type != switch.MODEL_TYPE:
        return []  # an upcycled dense one
    said = {name: getattr(config, name, None) for name in COUNTS if name not in config.attribute_map}
    known = [name for name, number in said.items() if isinstance(number, int) and number in numbers]
    if not known or len(numbers) > 1:
        raise ValueError(
            f"grow: the configuration of {config.model_type} does not say that there are {sorted(numbers)} experts; "
            f"looked for {', '.join(COUNTS)}"
        )
    # By which transformers' load balancing loss goes.
    own = [(False, "num_experts")] if getattr(model, "num_experts", None) in numbers else []
    return [*((True, name) for name in known), *own]


def _tell(model: Any) -> None:
    """Let a model of timm or of ours say the new number of experts where it is written down how it was made."""
    numbers = {module.experts.num_experts for module in model.modules() if isinstance(module, MoE)}
    if hasattr(model, "pretrained_cfg"):
        say_timm(model, numbers, set())
        model.reshaped = True
    made = getattr(model, "made_with", None)
    if made is not None and not hasattr(model, "config"):  # a LIMoE
        made["overrides"]["num_experts"] = next(iter(numbers))


def _share(layers: Mapping[str, MoE], grown: nn.Module) -> None:
    """Let grown layers share their gate and experts where the layers before they grew did (`zoo.share_depth`)."""
    for part in ("router", "experts"):
        first: dict[int, str] = {}
        for name, moe in layers.items():
            if (own := next(getattr(moe, part).parameters(), None)) is None:
                continue
            if (owner := first.setdefault(id(own), name)) == name:
                continue
            theirs = grown.get_submodule(f"{owner}.{part}")
            for path, module in grown.get_submodule(f"{name}.{part}").named_modules():
                for parameter, _ in list(module.named_parameters(recurse=False)):
                    setattr(module, parameter, getattr(theirs.get_submodule(path), parameter))
