"""Fewer experts, layers and blocks in a sparse model (2406.02500; expert pruning at training time: `tasks.schemes`)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..moe import MoE
from ..moe.kept import check_kept, rows_of, set_number
from ..pretrained.placement import moe_layers
from .again import made_again_by
from .arguments import Calibrate, whole, whole_each
from .numbers_said import say_numbers
from .origin import made_by
from .trimming import block_similarity, blocks_of, drop_blocks, drop_moe, layer_similarity
from .usage import is_meta, layers_of, measure

By = Literal["probs", "weight", "counts"]
PerLayer = Mapping[str, Sequence[Any]] | Sequence[Sequence[Any]]


def _again(model: nn.Module, decided: Mapping[str, Any], **arguments: Any) -> Any:
    """What `prune` makes, with the experts, layers and blocks that it decided on."""
    return prune(model, **decided)


@made_again_by(_again)
def prune(
    model: nn.Module,
    keep: int | Sequence[int] | None = None,
    *,
    layers: str | int | Iterable[int] = "all",
    by: By = "probs",
    scope: Literal["layer", "model"] = "layer",
    scores: PerLayer | None = None,
    experts: PerLayer | None = None,
    drop_layers: int | Sequence[int] = 0,
    drop_blocks: int | Sequence[int] = 0,
    calibrate: Calibrate | None = None,
) -> Any:
    """A copy of a sparse model with fewer experts, layers or blocks (He et al., 2406.02500). The given one stays.

    Experts (expert drop): keep says how many each of the layers keeps (those of `moe_layers`, counted over the layers
    that have an `MoE`), those with the highest scores; a list has one number a layer. Scores are measured over the
    batches that calibrate runs, in evaluation mode: "probs", the gate's probability of an expert, summed over tokens
    (the authors' for Mixtral and Qwen), "weight", its combine weights (theirs for DeepSeek), or "counts", how many
    tokens met it; or given, a list [E] a layer or by the `MoE`'s name. With scope="model" scores are compared over all
    layers, which then keep `keep` on average and one at least. Or experts lists what each layer keeps.
    Layers that share their experts (`zoo.share_depth`) keep the same ones, by the sum of their scores.
    Gate and selection bias lose the rows of what is dropped: the copy routes as the original does with the logits of
    these at minus infinity, its softmax over what is left. k goes down to what is left, with a warning. Of a gate that
    chooses among groups as many experts are kept in each; with one in each it chooses without groups, the same.

    Layers (layer drop): drop_layers is how many `MoE`s to leave out with the norm before them, the most similar ones
    by the mean over tokens of cos(h, h + MoE(norm(h))), with all that a block does to what its `MoE` gives before it
    is added (Gemma 2's norm, Granite's factor), or their numbers. Blocks (block drop): drop_blocks is how many
    whole blocks, by the cosine of what goes in and what comes out, or their numbers among all blocks. Similarities are
    of the given model; both are for transformers' decoders and timm's ViTs.

    Where all layers keep as many, configuration and arguments say so, and `zoo.save_pretrained` writes what
    transformers or timm reads; blocks are fewer in any case where that is all that changed. Layers with different
    numbers, and dropped layers, have no published layout: keep the state_dict. On the meta device calibrate is not
    called, and the first ones are kept.

    Raises ValueError naming what does not fit: a gate whose parameters are not rows an expert, numbers of experts that
    are not there, nothing to do, calibrate missing, a model spread over processes.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    every = layers_of("prune", model)
    names = list(every)
    if keep is None and experts is None and not drop_layers and not drop_blocks:
        raise ValueError("prune: nothing to do; give keep, experts, drop_layers or drop_blocks")
    if keep is not None and experts is not None:
        raise ValueError("prune: keep and experts exclude each other: a number of experts, or which ones")
    chosen = {names[i]: every[names[i]] for i in moe_layers(layers, len(names))}
    kept: dict[str, list[int]] = {}
    if experts is not None:
        kept = {
            name: sorted(whole(f"prune: experts of {name}", e) for e in own)
            for name, own in _by_name("experts", experts, chosen).items()
        }
    elif keep is not None:
        for name, moe in chosen.items():
            rows_of(f"prune: {name}", moe)  # before data are looked at
        kept = _best(model, chosen, keep, by, scope, scores, calibrate)
    for name, numbers in kept.items():
        rows_of(f"prune: {name}", every[name])
        check_kept(f"prune: {name}", every[name], numbers)
    gone = _least(model, names, drop_layers, "drop_layers", lambda: layer_similarity(model, calibrate, names))
    fewer: list[int] = []
    if drop_blocks:
        blocks = [f"{i}" for i in range(len(blocks_of(model)[1]))]
        similar = lambda: {n.rpartition(".")[2]: v for n, v in block_similarity(model, calibrate).items()}  # noqa: E731
        fewer = _least(model, blocks, drop_blocks, "drop_blocks", similar)
    pruned = _with_experts(model, kept)
    say_numbers(pruned)
    for i in gone:
        drop_moe(pruned, names[i])
    if fewer:
        _drop_blocks(pruned, fewer)
    pruned.reshaped = True
    made_by("prune", pruned)
    pruned.decided = {"experts": kept, "drop_layers": gone, "drop_blocks": fewer}  # what does the same without data
    return pruned


_drop_blocks = drop_blocks  # an argument of `prune` has the same name


@torch.no_grad()
def _with_experts(model: nn.Module, kept: Mapping[str, list[int]]) -> Any:
    """A copy of a model with these experts of some of its layers; the others are not copied."""
    memo: dict[int, Any] = {}
    users: dict[int, tuple[str, list[int]]] = {}
    for name, numbers in kept.items():
        for tensor in rows_of(name, model.get_submodule(name)).values():  # type: ignore[arg-type]
            other, theirs = users.setdefault(id(tensor), (name, numbers))
            if theirs != numbers:
                raise ValueError(
                    f"prune: {name} and {other} share their weights and must keep the same experts, got {numbers} and "
                    f"{theirs}"
                )
            rows = tensor.detach()[torch.tensor(numbers, device=tensor.device)]
            memo[id(tensor)] = nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows
    pruned = copy.deepcopy(model, memo)
    for name, numbers in kept.items():
        moe: Any = pruned.get_submodule(name)
        kept_of = f"{len(numbers)} of {moe.router.num_experts} experts"
        if hasattr(moe.router, "load_since_update"):
            moe.router.load_since_update = None
        if (lower := set_number(moe, len(numbers))) is not None:
            before, after = lower
            warnings.warn(f"prune: {name} keeps {kept_of}, so that k goes from {before} to {after}", stacklevel=4)
    return pruned


def _best(
    model: nn.Module,
    chosen: Mapping[str, MoE],
    keep: int | Sequence[int],
    by: str,
    scope: str,
    scores: PerLayer | None,
    calibrate: Calibrate | None,
) -> dict[str, list[int]]:
    """The experts with the highest scores of each layer, ascending."""
    given = whole_each("prune: keep", keep)
    counts = [given] * len(chosen) if isinstance(given, int) else given
    if len(counts) != len(chosen):
        raise ValueError(f"prune: keep has {len(counts)} numbers, for {len(chosen)} layers")
    for (name, moe), count in zip(chosen.items(), counts):
        if not 1 <= count <= moe.router.num_experts:
            raise ValueError(f"prune: {name} has {moe.router.num_experts} experts, keep={count} is not among 1 to that")
    known = _scores(model, chosen, by, scores, calibrate)
    if scope == "model":
        return _best_of_all(chosen, counts, known)
    if scope != "layer":
        raise ValueError(f"prune: scope is 'layer' or 'model', got {scope!r}")
    found = {}
    for (name, moe), count in zip(chosen.items(), counts):
        groups = getattr(moe.router, "num_groups", 1)
        if count % groups:
            raise ValueError(f"prune: the gate of {name} has {groups} groups, which keep={count} experts do not fill")
        grouped = known[name].unflatten(0, (groups, -1))
        order = grouped.sort(dim=1, descending=True, stable=True).indices[:, : count // groups]
        first = torch.arange(groups, device="cpu")[:, None] * grouped.shape[1]
        found[name] = sorted((order + first).flatten().tolist())
    return found


def _best_of_all(chosen: Mapping[str, MoE], counts: list[int], known: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """The same compared over all layers, with one expert a layer at least."""
    for name, moe in chosen.items():
        if getattr(moe.router, "num_groups", 1) > 1:
            raise ValueError(
                f"prune: the gate of {name} has groups of experts, which scope='model' would not keep even"
            )
    found = {name: {int(known[name].argmax())} for name in chosen}
    left = [(float(score), name, e) for name in chosen for e, score in enumerate(known[name]) if e not in found[name]]
    for _, name, e in sorted(left, key=lambda item: -item[0])[: sum(counts) - len(found)]:
        found[name].add(e)
    return {name: sorted(experts) for name, experts in found.items()}


def _scores(
    model: nn.Module, chosen: Mapping[str, MoE], by: str, scores: PerLayer | None, calibrate: Calibrate | None
) -> dict[str, Tensor]:
    """A score [E] of every expert, float64 on the CPU."""
    if by not in ("probs", "weight", "counts"):
        raise ValueError(f"prune: by is 'probs', 'weight' or 'counts', got {by!r}")
    if scores is not None:
        given = _by_name("scores", scores, chosen)
        found = {name: torch.as_tensor(own, dtype=torch.float64, device="cpu") for name, own in given.items()}
    elif is_meta(model):
        found = {name: torch.zeros(moe.router.num_experts, device="cpu") for name, moe in chosen.items()}
    else:
        found = {}
        for name, usage in measure("prune", model, calibrate, chosen.keys()).items():
            if (score := getattr(usage, by)) is None:
                kind = type(chosen[name].router).__name__
                raise ValueError(f"prune: {kind} of {name} has no probabilities; give by='weight' or by='counts'")
            found[name] = score.cpu()
        _pool(chosen, found)
    for name, moe in chosen.items():
        if found[name].shape != (moe.router.num_experts,):
            shape = list(found[name].shape)
            raise ValueError(
                f"prune: scores of {name}: expected [{moe.router.num_experts}], one an expert, got {shape}"
            )
        if found[name].isnan().any():
            raise ValueError(f"prune: scores of {name} must be numbers, got {found[name].tolist()}")
    return found


def _pool(chosen: Mapping[str, MoE], scores: dict[str, Tensor]) -> None:
    """Let layers that share their experts (`zoo.share_depth`) have the sum of their scores."""
    groups: dict[int, list[str]] = {}
    for name, moe in chosen.items():
        groups.setdefault(id(next(moe.experts.parameters())), []).append(name)
    for names in groups.values():
        total = torch.stack([scores[name] for name in names]).sum(0)
        scores.update(dict.fromkeys(names, total))


def _by_name(what: str, given: PerLayer, chosen: Mapping[str, MoE]) -> dict[str, Sequence[Any]]:
    """What was given for each of the chosen layers, by its name."""
    if isinstance(given, Mapping):
        if missing := [name for name in given if name not in chosen]:
            raise ValueError(f"prune: {what}: {missing[0]} is none of the chosen layers {', '.join(chosen)}")
        if what == "scores" and (missing := [name for name in chosen if name not in given]):
            raise ValueError(f"prune: {what} has no entry for {missing[0]}")
        return dict(given)
    if len(given) != len(chosen):
        raise ValueError(f"prune: {what} has {len(given)} entries, for {len(chosen)} layers")
    return dict(zip(chosen, given))


def _least(model: nn.Module, names: Sequence[str], wanted: int | Sequence[int], what: str, similar: Any) -> list[int]:
    """Numbers among names, ascending, of those given, or of the `wanted` most similar ones."""
    wanted = whole_each(f"prune: {what}", wanted)
    if not isinstance(wanted, int):
        return list(moe_layers(wanted, len(names))) if wanted else []
    if not wanted:
        return []
    if not 0 < wanted <= len(names):
        raise ValueError(f"prune: {what}={wanted} of {len(names)}")
    if is_meta(model):
        return list(range(wanted))
    values = similar()
    order = sorted(range(len(names)), key=lambda i: -values[names[i]])
    return sorted(order[:wanted])
