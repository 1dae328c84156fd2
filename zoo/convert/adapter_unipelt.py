"""The places of UniPELT's three methods: LoRA beside queries and values, prefixes, and adapters behind MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..moe import AdaptedLinear, FollowedLinear, GatedPrefix
from ..moe.adapted import features
from ..pretrained.placement import moe_layers
from .adapter_build import Maker, Place
from .adapter_kinds import Kind
from .adapter_prefix import heads_of
from .adapter_targets import Site, find, plain_name

PARTS = {"lora": ("query", "value"), "prefix": ("key", "value"), "adapter": ("down",)}
DEFAULT = {"lora": 8, "prefix": 10}
REDUCTION = 16  # how many times narrower than the layer an adapter is by default


def unipelt(model: nn.Module, kind: Kind, how: dict[str, Any]) -> list[Place]:
    """Adapters of all three methods that are not left out; writes the layers that were chosen into `how`."""
    sizes = _sizes(how["rank"])
    found = {name: find(model, parts, how["within"]) for name, parts in PARTS.items() if sizes.get(name) != 0}
    if not found:
        raise ValueError(f"adapt: {how['kind']}: all of {', '.join(PARTS)} are left out")
    blocks = list(dict.fromkeys(site.block for sites in found.values() for site in sites))
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    blocks.sort(key=lambda block: order[block])
    how["layers"] = list(moe_layers(how["layers"], len(blocks)))
    chosen = {blocks[at] for at in how["layers"]}
    places = []
    for name, sites in found.items():
        here = [site for site in sites if site.block in chosen]
        maker = {"lora": _loras, "prefix": _prefixes, "adapter": _adapters}[name]
        places += maker(model, here, kind, how, sizes.get(name))
    return places


def _sizes(rank: Any) -> dict[str, int]:
    given = rank if isinstance(rank, Mapping) else {} if rank is None else {"lora": rank}
    for name, size in given.items():
        if name not in PARTS or isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"adapt: UniPELT: rank takes whole numbers for {', '.join(PARTS)}; got {dict(given)}")
    return {**DEFAULT, **given}


def _loras(model: nn.Module, sites: list[Site], kind: Kind, how: dict[str, Any], rank: Any) -> list[Place]:
    places = []
    for site in sites:
        dim, out = features(site.linear)
        out = out if site.columns is None else site.columns[1] - site.columns[0]
        maker = Maker(kind, {**how, "rank": rank, "alpha": rank}, site.linear.weight)  # type: ignore[arg-type]
        lora = AdaptedLinear(site.linear, maker.gate(dim, 1), maker.lora(1, dim, out), site.columns)
        places.append(Place(site.name, site.block, "base", lora))
    return places


def _adapters(model: nn.Module, sites: list[Site], kind: Kind, how: dict[str, Any], rank: Any) -> list[Place]:
    places = []
    for site in sites:
        width = features(site.linear)[1]
        maker, own = Maker(kind, how, site.linear.weight), ("down", "down_bias", "up", "up_bias")  # type: ignore[arg-type]
        router, size = maker.gate(width, 1), rank or max(1, width // REDUCTION)
        adapter = maker.place(lambda: FollowedLinear(site.linear, router, size), own)  # noqa: B023
        places.append(Place(site.name, site.block, "base", adapter))
    return places


def _prefixes(model: nn.Module, sites: list[Site], kind: Kind, how: dict[str, Any], length: Any) -> list[Place]:
    widths: dict[str, dict[str, Site]] = {}
    for site in sites:
        for part in site.parts:
            widths.setdefault(plain_name(site.name).rpartition(".")[0], {})[part] = site
    places = []
    for name, parts in widths.items():
        attention: Any = model.get_submodule(name)
        sizes = [_width(parts[part]) if part in parts else 0 for part in PARTS["prefix"]]
        heads = heads_of(attention, *sizes)
        site = next(iter(parts.values()))
        maker = Maker(kind, how, site.linear.weight)  # type: ignore[arg-type]
        router = maker.gate(features(site.linear)[0], 1)
        prefix = maker.place(lambda: GatedPrefix(router, heads[0], length, *heads[1:]), ("keys", "values"))  # noqa: B023
        places.append(Place(name, site.block, "", prefix))
    return places


def _width(site: Site) -> int:
    """How many outputs are this part alone; none where they are not known."""
    if site.columns is not None:
        return site.columns[1] - site.columns[0]
    return features(site.linear)[1] if len(site.parts) == 1 else 0
