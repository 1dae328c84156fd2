"""Section about experts in numbers of few bits: what they compute, whether the host waits, and how long they take."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ...moe import Experts, QuantisedExperts
from ...moe.kernels.codes import FORMATS, GROUP
from ..contestants import Shape
from .capture import waiting_is_an_error
from .setting import Row, Setting, distance, text, tried
from .times import seconds

# Rounded to bfloat16 after the scales in both, but summed in another order.
CLOSE = 1e-2


def few_bits(setting: Setting) -> Iterator[Row]:
    """Experts of each format, for one token and for many, beside experts with the same numbers in the full dtype."""
    shape = next(s for s in setting.shapes if s.dim % GROUP == 0 and s.hidden_dim % 16 == 0)
    shape = shape._replace(hidden_dim=-(-shape.hidden_dim // GROUP) * GROUP)
    for format in FORMATS:
        for tokens in (1, min(shape.tokens, 2048)):
            case = shape._replace(tokens=tokens)
            yield tried(f"{text(case)} {format}", partial(_one, setting, case, format))


def _one(setting: Setting, shape: Shape, format: str) -> Row:
    with torch.device(setting.device):
        whole = Experts(shape.experts, shape.dim, shape.hidden_dim).to(setting.dtype)
        few = QuantisedExperts.of(whole, format)
        with torch.no_grad():
            for name, value in zip((whole._in, "down_proj"), few.held):
                getattr(whole, name).copy_(value)
    p = setting.problem(shape, routing=False)
    dy, results = torch.randn_like(p.x), []
    for experts in (few, whole):
        y = experts(p.x, p.routing)
        results.append((y.detach(), *torch.autograd.grad(y, p.x, dy)))
    errors = [distance(a, b) for a, b in zip(*results)]
    with torch.no_grad():
        times = [1e6 * seconds(setting, partial(experts, p.x, p.routing), setting.repeats) for experts in (few, whole)]
        if shape.tokens == 1:
            with waiting_is_an_error(setting):
                few(p.x, p.routing)
    note = f"{max(errors):.1e} apart at most; {times[0]:.0f} us, {times[1]:.0f} with whole numbers"
    return Row(f"{text(shape)} {format}", max(errors) <= CLOSE, note, {"errors": errors, "us": times})
