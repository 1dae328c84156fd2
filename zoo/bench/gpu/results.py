"""Sections about what is computed: against plain loops, in repeated runs, and far out in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..contestants import Problem, Shape
from .setting import Row, Setting, distance, outputs_and_gradients, text, tried

# Our error may be this many times that of a plain loop in the same dtype.
MOST = 2.0
# Assignments below which the logits' gradients are not looked at: each is a sum that may cancel to nearly nothing.
FEW = 16
# Where only samples are looked at: what a handful of roundings to bfloat16 may do.
SAMPLED = 2e-2


def expert(p: Problem, e: int, token: Tensor, weight: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of expert e for some tokens [N] with combine weights [N], and the gradients of x, w_in, w_out, weight."""
    given = (p.x[token], p.w_in[e], p.w_out[e], weight)
    x, w_in, w_out, w = (t.detach().to(dtype).requires_grad_() for t in given)
    gate, up = F.linear(x, w_in).chunk(2, dim=-1)
    y = F.linear(F.silu(gate) * up, w_out) * w[:, None]
    return [y.detach(), *torch.autograd.grad(y, [x, w_in, w_out, w], dy[token].to(dtype))]


class Sums:
    """Squared errors of ours and of the plain loop, and the squared norm of what is exact."""

    def __init__(self) -> None:
        self.ours, self.loop, self.norm, self.count = 0.0, 0.0, 0.0, 0

    def add(self, ours: Tensor, loop: Tensor, exact: Tensor) -> None:
        """Add a part of a tensor."""
        exact = exact.double()
        self.ours += float((ours.double() - exact).square().sum())
        self.loop += float((loop.double() - exact).square().sum())
        self.norm += float(exact.square().sum())
        self.count += exact.numel()

    def figures(self, epsilon: float, assignments: int) -> dict[str, float]:
        """Relative errors, and ours as a multiple of what is allowed for the loop's."""
        if self.norm == 0:
            return {"ours": self.ours, "loop": self.loop, "ratio": 0.0 if self.ours <= epsilon**2 else float("inf")}
        ours, loop = ((part / self.norm) ** 0.5 for part in (self.ours, self.loop))
        # The errors of a few numbers are luck, those of many are not; few assignments make few different ones.
        luck = 6 * epsilon / min(self.count, 4 * assignments) ** 0.5
        ratio = ours / (loop + luck)
        return {"ours": ours, "loop": loop, "ratio": ratio if ratio == ratio else float("inf")}


def against_loops(p: Problem, dy: Tensor, ours: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Errors of our outputs and gradients beside those of a loop over experts in the same dtype.

    Exact is the loop in float32, in float64 for float32 inputs; it takes the k best logits as torch's topk does.
    """
    assert p.logits is not None
    dtype = p.x.dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    logits = p.logits.detach().to(wide).requires_grad_()
    weight, choice = logits.softmax(-1).topk(p.shape.k)
    sums = {name: Sums() for name in ours}
    totals = {
        each: [torch.zeros(p.x.shape, dtype=wide, device=p.x.device) for _ in range(2)]
        + [torch.zeros(choice.shape, dtype=wide, device=p.x.device)]
        for each in (wide, dtype)
    }
    for e in range(p.shape.experts):
        token, slot = (choice == e).nonzero(as_tuple=True)
        found = {each: expert(p, e, token, weight[token, slot], dy, each) for each in (wide, dtype)}
        for each, (y, dx, _, _, dweight) in found.items():
            totals[each][0].index_add_(0, token, y.to(wide))
            totals[each][1].index_add_(0, token, dx.to(wide))
            totals[each][2][token, slot] = dweight.to(wide)
        for i, name in ((2, "dw_in"), (3, "dw_out")):
            sums[name].add(ours[name][e], found[dtype][i], found[wide][i])
    for i, name in ((0, "y"), (1, "dx")):
        sums[name].add(ours[name], totals[dtype][i].to(dtype), totals[wide][i])
    exact, loop = (torch.autograd.grad(weight, logits, totals[each][2], retain_graph=True)[0] for each in (wide, dtype))
    sums["dlogits"].add(ours["dlogits"], loop, exact)
    if choice.numel() < FEW:
        del sums["dlogits"]
    return {name: each.figures(torch.finfo(dtype).eps, choice.numel()) for name, each in sums.items()}


def _unusual(setting: Setting) -> Iterator[tuple[str, Shape, torch.dtype, bool]]:
    """Shapes no tile divides, one expert, float32, and skewed choices."""
    small = setting.shapes[0]
    odd = Shape(997, 1001, 503, 7, 3) if setting.cuda else Shape(19, 33, 21, 5, 3)
    mean = small._replace(tokens=min(small.tokens, 2048))
    yield "no tile divides", odd, setting.dtype, False
    yield "one expert", odd._replace(experts=1, k=1), setting.dtype, False
    yield "nearly all to one expert", mean._replace(k=1), setting.dtype, True
    yield "float32", mean, torch.float32, False


def correct(setting: Setting) -> Iterator[Row]:
    """Outputs and all gradients, the logits' too, against a loop over experts: at most twice a plain loop's error."""
    torch.set_float32_matmul_precision("highest")
    cases = [("", shape, setting.dtype, False) for shape in (*setting.shapes, *setting.decoding)]
    for label, shape, dtype, skewed in (*cases, *_unusual(setting)):
        what = f"{text(shape)} {label}".strip()
        yield from tried(setting, what, partial(_correct_case, setting, label, shape, dtype, skewed))


def _correct_case(setting: Setting, label: str, shape: Shape, dtype: torch.dtype, skewed: bool) -> Row:
    try:
        p = Problem.random(shape, dtype, setting.device, routing=True)
        if skewed:
            with torch.no_grad():
                assert p.logits is not None
                p.logits[:, shape.experts // 2] += 8
        dy = torch.randn_like(p.x)
        figures = against_loops(p, dy, outputs_and_gradients(setting, p, dy))
    except torch.cuda.OutOfMemoryError:
        if shape.tokens < 4096:
            raise
        figures = None
    if figures is None:  # outside the handler, which holds on to tensors
        torch.cuda.empty_cache()
        return _correct_case(setting, label, shape._replace(tokens=shape.tokens // 2), dtype, skewed)
    worst = max(figures, key=lambda name: figures[name]["ratio"])
    ratio, error = figures[worst]["ratio"], figures[worst]["ours"]
    note = f"worst {worst}: {ratio:.2f} times a loop's error, {error:.1e} of its norm"
    return Row(f"{text(shape)} {label}".strip(), ratio <= MOST, note, dict(figures))


def repeat(setting: Setting) -> Iterator[Row]:
    """Every result is the same, bit for bit, in repeated runs."""
    few = [shape._replace(tokens=setting.few[-1]) for shape in setting.shapes[:2]]
    for shape in (*setting.shapes[:4], *few):
        yield from tried(setting, text(shape), partial(_repeated, setting, shape))


def _repeated(setting: Setting, shape: Shape) -> Row:
    p = setting.problem(shape)
    dy = torch.randn_like(p.x)
    first = outputs_and_gradients(setting, p, dy)
    other: set[str] = set()
    for _ in range(4):
        again = outputs_and_gradients(setting, p, dy)
        other |= {name for name in first if not torch.equal(first[name], again[name])}
    note = f"{', '.join(sorted(other))} differ" if other else "y and all gradients equal in 5 runs"
    return Row(text(shape), not other, note)


def far(setting: Setting) -> Iterator[Row]:
    """Tensors with more than 2^31 elements: first and last tokens, and the last expert's gradients."""
    shape = setting.far
    p = setting.problem(shape)
    dy = torch.randn_like(p.x)
    ours = outputs_and_gradients(setting, p, dy)
    assert p.logits is not None
    weight, choice = p.logits.detach().softmax(-1).topk(shape.k)
    sizes = {
        "x": p.x.numel(),
        "w_in": p.w_in.numel(),
        "pre-activations": choice.numel() * 2 * shape.hidden_dim,
        "expert outputs": choice.numel() * shape.dim,
    }
    for where in (slice(0, 8), slice(-64, None)):
        sample = torch.arange(shape.tokens, device=p.x.device)[where]
        y, dx, dweight = (torch.zeros(len(sample), n, device=p.x.device) for n in (shape.dim, shape.dim, shape.k))
        for i, t in enumerate(sample):
            for j in range(shape.k):
                found = expert(p, int(choice[t, j]), t[None], weight[t, j][None], dy, torch.float32)
                y[i] += found[0][0]
                dx[i] += found[1][0]
                dweight[i, j] = found[4][0]
        logits = p.logits.detach()[sample].requires_grad_()
        (dlogits,) = torch.autograd.grad(logits.softmax(-1).gather(1, choice[sample]), logits, dweight)
        exact = {"y": y, "dx": dx, "dlogits": dlogits}
        yield _sampled(f"tokens {int(sample[0])} to {int(sample[-1])}", {n: ours[n][sample] for n in exact}, exact)
    token, slot = (choice == shape.experts - 1).nonzero(as_tuple=True)
    last = expert(p, shape.experts - 1, token, weight[token, slot], dy, torch.float32)
    exact = {"dw_in": last[2], "dw_out": last[3]}
    row = _sampled(f"expert {shape.experts - 1}", {name: ours[name][-1] for name in exact}, exact)
    row.figures["elements"] = sizes
    yield row


def _sampled(what: str, ours: dict[str, Tensor], exact: dict[str, Tensor]) -> Row:
    errors = {name: distance(ours[name], exact[name]) for name in exact}
    worst = max(errors, key=lambda name: errors[name])
    return Row(what, errors[worst] <= SAMPLED, f"worst {worst}: {errors[worst]:.1e} of its norm", dict(errors))
