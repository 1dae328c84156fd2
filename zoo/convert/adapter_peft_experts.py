"""LoRAs of stacked experts as peft holds them: A [E r, I], expert after expert, and B [O, r E], the experts innermost.

They are for experts as transformers holds them: as [E, out, in] or [E, in, out], gate and up one after the other or in
turns. Since 0.19 peft takes the last dimension for what goes in where the module does not say `is_transposed`; before,
it always took the middle one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe import LoRAOfExperts

VERSION = "0.19.0"  # of peft, whose order of dimensions is written

# Parts of experts, which expert, A [r, D] and B [O, r].
Part = tuple[str, int, Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """How transformers holds the experts of a module: [E, in, out] or not, whether it says so, gate and up in turns."""

    transposed: bool
    says: bool
    interleaved: bool

    def straight(self, version: str) -> bool:
        """Whether A reads what experts read; otherwise it is for the transposed weight."""
        numbers = [int(n) for n in version.split(".")[:2] if n.isdigit()]
        return (numbers >= [0, 19] and not self.says) != self.transposed


def layouts(model: nn.Module) -> dict[str, Layout]:
    """The layouts of transformers' modules of stacked experts, by name; empty for models of other libraries."""
    if not hasattr(model, "config"):
        return {}
    with torch.device("meta"):
        theirs: Any = type(model)(model.config)
    found = {}
    for name, module in theirs.named_modules():
        down = getattr(module, "down_proj", None)
        if isinstance(down, nn.Parameter) and down.dim() == 3:
            ours: Any = model.get_submodule(name)
            ours = ours.base if isinstance(ours, LoRAOfExperts) else ours
            says = bool(getattr(module, "is_transposed", False))
            transposed = says or tuple(down.shape[1:]) != (ours.dim, ours.hidden_dim)
            found[name] = Layout(transposed, says, not getattr(module, "is_concatenated", True))
    return found


def parts(experts: Any, layout: Layout, version: str, a: Tensor, b: Tensor) -> Iterator[Part] | None:
    """Each expert's A and B of a pair, those of gate and up apart; None where the shapes are not those of `experts`."""
    number = experts.num_experts
    into = experts.dim, experts.hidden_dim * (2 if experts.gated else 1)
    out = experts.hidden_dim, experts.dim
    if a.shape[0] % number or b.shape[1] != a.shape[0] or not a.shape[0]:
        return None
    r = a.shape[0] // number
    a, b = a.view(number, r, -1), b.reshape(-1, r, number).permute(2, 0, 1)
    for straight in (layout.straight(version), not layout.straight(version)):
        there = (a, b) if straight else (b.transpose(1, 2), a.transpose(1, 2))
        sizes = there[0].shape[2], there[1].shape[1]
        if sizes in (into, out):
            return _each(experts.gated, "down" if sizes == out else "up", layout.interleaved, *there)
    return None


def _each(gated: bool, part: str, interleaved: bool, a: Tensor, b: Tensor) -> Iterator[Part]:
    for e in range(a.shape[0]):
        if part == "down" or not gated:
            yield part, e, a[e], b[e]
        else:
            gate, up = (b[e, 0::2], b[e, 1::2]) if interleaved else b[e].chunk(2)
            yield "gate", e, a[e], gate
            yield "up", e, a[e], up


def matrices(module: LoRAOfExperts, pairs: dict[str, tuple[Tensor, Tensor]], layout: Layout) -> dict[str, Any]:
    """Each expert's A [E, r, I] and B [E, O, r] by transformers' parameter, of A and B for our parts.

    Gate and up, which have pairs of their own here, have one of twice the rank.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    into = [pairs[part] for part in ("gate", "up") if part in pairs]
    if module.base.gated and into:
        wide = {"gate": (0, module.hidden_dim), "up": (module.hidden_dim, 0)}
        a = torch.cat([a for a, _ in into], 1)
        b = torch.cat([F.pad(pairs[part][1], (0, 0, *wide[part])) for part in ("gate", "up") if part in pairs], 2)
        if layout.interleaved:
            b = b.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        found["gate_up_proj"] = a, b
    elif into:
        found["up_proj"] = into[0]
    if "down" in pairs:
        found["down_proj"] = pairs["down"]
    if not layout.straight(VERSION):
        found = {name: (b.transpose(1, 2), a.transpose(1, 2)) for name, (a, b) in found.items()}
    return found
