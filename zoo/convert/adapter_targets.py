"""Which linear layers of a model get experts beside them: by their part in a block, or by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..moe import LatentExperts, LoRAExperts, MixLoRAExperts, MoE, ZeroComputationExperts
from ..moe.adapted import Columns, _Beside, features
from ..moe.lora_of_experts import unfit
from ..pretrained.context import MIXERS
from .dense_mlps import LAYOUTS, _is_linear, part_of

# The parts of a block, and how families call the linear layer of each; those of an MLP go by `dense_mlps.LAYOUTS`.
ATTENTION = {
    "query": ("q_proj", "q_b_proj", "query", "wq", "q", "to_q"),
    "key": ("k_proj", "key", "wk", "k", "to_k"),
    "value": ("v_proj", "value", "wv", "v", "to_v"),
    "output": ("o_proj", "out_proj", "proj", "c_proj", "wo", "o", "dense", "to_out"),
}
MLP = ("gate", "up", "down")
PARTS = (*ATTENTION, *MLP)
_QKV = ("query", "key", "value")
FUSED = {**dict.fromkeys(("qkv", "c_attn", "qkv_proj", "query_key_value", "Wqkv"), _QKV), "kv_b_proj": _QKV[1:]}
# Attention whose fused projection is [queries; keys; values], and not all three of one head after another.
IN_THIRDS = {
    "qkv": ("Attention", "WindowAttention", "EvaAttention", "AttentionRope"),
    "c_attn": ("GPT2Attention",),
}


@dataclass(frozen=True)
class Site:
    """A linear layer that gets experts, or some of its outputs; `block` is the name of the repeated block it is in.

    parts are those that these outputs are: several where a fused projection is taken as a whole. `experts`: it is no
    linear layer but the stacked experts of a `MoE`, in which these parts get pairs.
    """

    name: str
    linear: nn.Module
    block: str
    parts: tuple[str, ...]
    columns: Columns | None = None
    experts: bool = False


def find(model: nn.Module, targets: Sequence[str], within: str = "", experts: bool = False) -> list[Site]:
    """The linear layers of the model's repeated blocks that targets name, in order, under the submodule `within`.

    A target is a part, one of PARTS, or a name: the whole of it, or its end after a dot. A fused projection that holds
    a part as consecutive outputs is found as these, any other fused one as a whole. Linear layers inside a `MoE`, and
    those whose block computes with the weight itself, are none of them; with `experts` a `MoE`'s stacked experts are,
    whose names are those of their parameters, as "down_proj". Raises ValueError listing what there is where nothing is
    found, and for experts that cannot have pairs.
    """
    sites, seen = [], []
    for name, stack, home in _stacks(model, within) if experts else ():
        into = {"gate": "gate_up_proj", "up": "gate_up_proj"} if getattr(stack, "gated", True) else {"up": "up_proj"}
        chosen = []
        for part, parameter in {**into, "down": "down_proj"}.items():
            seen.append(f"{name}.{parameter}".removeprefix(f"{home}."))
            if part in targets or any(f".{name}.{parameter}".endswith(f".{t}") for t in targets if t not in PARTS):
                chosen.append(part)
        if chosen:
            sites.append(Site(name, stack, home, tuple(chosen), experts=True))
    for name, linear, parent in _linears(model, within):
        if (block := block_of(model, name)) is None:
            continue
        plain = plain_name(name)
        leaf = plain.rpartition(".")[2]
        seen.append(plain.removeprefix(f"{block}."))
        parts = _parts(model, plain)
        wanted = [part for part in parts if part in targets]
        columns = _columns(leaf, linear, parent) if len(parts) > 1 else {}
        if any(f".{plain}".endswith(f".{t}") for t in targets if t not in PARTS) or (wanted and not columns):
            sites.append(Site(name, linear, block, parts))
        else:
            sites += [Site(name, linear, block, (part,), columns[part]) for part in wanted]
    if not sites:
        where = f" under {within!r}" if within else ""
        there = ", ".join(dict.fromkeys(seen)) or "none"
        raise ValueError(
            f"adapt: no linear layer of {type(model).__name__}{where} is called {' or '.join(targets)}; its blocks "
            f"have: {there}"
        )
    for site in sites:
        _check(model, site)
    order = {name: at for at, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(sites, key=lambda site: order[site.name])


def plain_name(name: str) -> str:
    """A layer's name without the adapters that stand around it already."""
    return re.sub(r"(\.base)+$", "", name)


def block_of(model: nn.Module, name: str) -> str | None:
    """The repeated block that a module is in: the innermost entry of a list of modules all of one class."""
    found, path = None, name.split(".")
    for end in range(len(path)):
        if not path[end].isdigit() or path[:end][-1:] == ["experts"]:
            continue
        entries = model.get_submodule(".".join(path[:end]))
        # T5's block is a list of attention and MLP: that is one block, not two.
        if len({type(entry) for entry in entries.children()}) == 1:
            found = ".".join(path[: end + 1])
    return found


def _linears(model: nn.Module, within: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Linear layers by name, with the modules they are in."""
    skipped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, MoE) or hasattr(module, "experts"):
            layer = any(hasattr(module, mixer) for mixer in MIXERS)  # Gemma 4's has its experts itself
            skipped += (f"{name}.experts.", f"{name}.router.") if layer else (f"{name}.",)
        inside = not within or name.startswith(f"{within}.")
        if not inside or (skipped and name.startswith(skipped)) or not _is_linear(module):
            continue
        parent = model.get_submodule(plain_name(name).rpartition(".")[0])
        if not isinstance(parent, nn.MultiheadAttention):  # which never calls its linear layer
            yield name, module, parent


def _stacks(model: nn.Module, within: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Stacked experts by name, with the block that they are in; adapters are none."""
    for name, module in model.named_modules():
        inside = not within or f"{name}.".startswith(f"{within}.")
        if inside and isinstance(module, MoE) and not isinstance(module.experts, (LoRAExperts, MixLoRAExperts)):
            around = isinstance(module.experts, (LatentExperts, ZeroComputationExperts))
            path = "experts.mlp" if around else "experts"
            yield f"{name}.{path}".lstrip("."), module.get_submodule(path), block_of(model, name) or name


def _parts(model: nn.Module, name: str) -> tuple[str, ...]:
    """The parts of a block that a linear layer computes."""
    *path, leaf = name.split(".")
    for cut in (len(path), len(path) - 1):  # BERT's layers have their MLP in modules of two
        owner = model.get_submodule(".".join(path[:cut])) if cut >= 0 else model
        layout, inside = _layout(owner), ".".join([*path[max(cut, 0) :], leaf])
        if layout is not None and inside in layout:
            part = MLP[layout.index(inside)]
            fused = layout[0] is None and part == "up" and _is_gated(owner, layout)
            return ("gate", "up") if fused else (part,)
    kind = type(model.get_submodule(".".join(path))).__name__.lower()  # Nemotron-H calls all its parts alike
    if not any("att" in step.lower() for step in (*path, kind)):
        return ()
    if leaf in FUSED:
        return FUSED[leaf]
    return tuple(part for part, names in ATTENTION.items() if leaf in names)


def _layout(owner: nn.Module) -> tuple[str | None, str, str] | None:
    """How a module calls its MLP's linear layers, whether adapters stand around them or not."""
    for layout in LAYOUTS:
        found = [part_of(owner, name) for name in layout if name is not None]
        if all(_is_linear(linear) or isinstance(linear, _Beside) for linear in found):
            return layout
    return None


def _is_gated(owner: nn.Module, layout: tuple[str | None, str, str]) -> bool:
    """Whether up holds gate and up together: twice as many rows as down reads."""
    up, down = (part_of(owner, name) for name in layout[1:])
    return features(up)[1] == 2 * features(down)[0]


def _columns(leaf: str, linear: Any, parent: Any) -> dict[str, Columns]:
    """The outputs of a fused projection that are queries, keys and values; none where they are not consecutive."""
    outputs = features(linear)[1]
    if type(parent).__name__ in IN_THIRDS.get(leaf, ()):
        sizes = [outputs // 3] * 3
    elif leaf == "qkv_proj" and hasattr(parent, "config") and hasattr(parent, "head_dim"):
        heads = parent.config.num_attention_heads
        few = getattr(parent.config, "num_key_value_heads", heads) or heads
        sizes = [n * parent.head_dim for n in (heads, few, few)]
    else:
        return {}
    if sum(sizes) != outputs:
        return {}
    ends = [sum(sizes[: i + 1]) for i in range(3)]
    return {part: (end - size, end) for part, end, size in zip(_QKV, ends, sizes)}


def _check(model: nn.Module, site: Site) -> None:
    parent, _, leaf = site.name.rpartition(".")
    owner: Any = model.get_submodule(parent)
    if site.experts:
        reason = unfit(site.linear)
        if isinstance(owner, MoE) and owner.router.merges:  # a mean of products is no product of means
            reason = f"{type(owner.router).__name__} merges experts, which it needs whole"
        if reason is not None:
            raise ValueError(f"adapt: {site.name}: {reason}; choose other targets")
    if leaf == "qkv" and getattr(owner, "q_bias", None) is not None:
        raise ValueError(
            f"adapt: {type(owner).__name__} computes with the weight of {site.name} itself, so that experts beside it "
            "would never run; choose other targets"
        )
