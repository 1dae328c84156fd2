"""Section about experts that stay on the host: what they compute, and what their coming costs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import torch

from ...moe import Experts, OffloadedExperts, Routing
from ...moe.expert_sources import OnHost
from ..contestants import Shape
from .setting import Row, Setting, differences, text, tried
from .times import seconds

# The same products, of fewer experts at a time.
CLOSE = 1e-2


def offloaded(setting: Setting) -> Iterator[Row]:
    """One layer, for one token and for many, slots for a quarter of its experts, beside all of them there."""
    shape = setting.shapes[0]
    for tokens in (1, min(shape.tokens, 1024)):
        case = shape._replace(tokens=tokens)
        yield from tried(setting, text(case), partial(_one, setting, case))


def _one(setting: Setting, shape: Shape) -> Row:
    slots = max(shape.k, shape.experts // 4)
    host = Experts(shape.experts, shape.dim, shape.hidden_dim).to(setting.dtype).requires_grad_(False)
    with torch.device(setting.device):
        held = Experts(slots, shape.dim, shape.hidden_dim, backend=setting.backend).to(setting.dtype)
        whole = Experts(shape.experts, shape.dim, shape.hidden_dim, backend=setting.backend).to(setting.dtype)
    whole.load_state_dict(host.state_dict())
    layer = OffloadedExperts(held, shape.experts, OnHost(host, lock=setting.cuda))
    p = setting.problem(shape, routing=False)
    errors = differences(layer, whole, p)
    # k experts that are there, and k others every time, so that none of them is.
    groups = shape.experts // shape.k if shape.tokens == 1 else 1
    others = cycle([_of(p.x, n * shape.k, shape) for n in range(groups)])
    with torch.no_grad():
        same = [1e6 * seconds(setting, partial(e, p.x, p.routing), setting.repeats) for e in (layer, whole)]
        read = layer.read
        away = seconds(setting, lambda: layer(p.x, next(others) if groups > 1 else p.routing), setting.repeats)
        came = (layer.read - read) / (setting.repeats + 1)
    each = sum(t[0].numel() * t.itemsize for t in host.parameters())
    note = f"{max(errors):.1e} apart at most; {same[0]:.0f} us, {same[1]:.0f} with all on the device; "
    note += f"{1e6 * away:.0f} us where {came:.1f} come, {came * each / away / 1e9:.1f} GB/s"
    figures = {"errors": errors, "us": same, "us_away": 1e6 * away, "came": came, "bytes_each": each}
    return Row(text(shape), max(errors) <= CLOSE, note, figures)


def _of(x: torch.Tensor, first: int, shape: Shape) -> Routing:
    """All tokens to k experts from the first on."""
    expert = torch.arange(first, first + shape.k, device=x.device).expand(len(x), -1)
    return Routing.from_choices(expert, torch.ones_like(expert, dtype=torch.float32), shape.experts)
