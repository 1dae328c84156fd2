"""Section about experts in numbers of few bits: what they compute, whether the host waits, and how long they take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ...moe import Experts, QuantisedExperts, Routing
from ...moe.kernels.codes import FORMATS, GROUP
from ..contestants import Problem, Shape
from .capture import waiting_is_an_error
from .setting import Row, Setting, differences, distance, text, tried
from .times import SEQUENCE, copy_bandwidth, in_graph, seconds

# Rounded to bfloat16 after the scales in both, but summed in another order.
CLOSE = 1e-2
# Tokens of what is decoded in registers: one, few, a small prefill, and enough to tell when to decode first.
TOKENS = (1, 16, 128, 1024, 4096)


def few_bits(setting: Setting) -> Iterator[Row]:
    """Experts of each format, for one token and for many, beside experts with the same numbers in the full dtype.

    Then the kernels that read codes, beside decoding first: values, repetition, waiting, and time.
    """
    shape = next(s for s in setting.shapes if s.dim % GROUP == 0 and s.hidden_dim % 16 == 0)
    shape = shape._replace(hidden_dim=-(-shape.hidden_dim // GROUP) * GROUP)
    for format in FORMATS:
        for tokens in (1, min(shape.tokens, 2048)):
            case = shape._replace(tokens=tokens)
            yield from tried(setting, f"{text(case)} {format}", partial(_one, setting, case, format))
    bandwidth = copy_bandwidth(setting)
    for format in FORMATS:
        few = _made(setting, shape, format)
        if (reason := few.unfused(setting.problem(shape._replace(tokens=1)).x)) is not None:
            yield Row(f"{format} decoded in registers", None, f"not here: {reason}")
            continue
        for tokens in TOKENS if setting.cuda else setting.few:
            case = shape._replace(tokens=tokens)
            yield from tried(
                setting, f"{text(case)} {format} in registers", partial(_fused, setting, case, few, bandwidth)
            )


def _made(setting: Setting, shape: Shape, format: str) -> QuantisedExperts:
    with torch.device(setting.device):
        whole = Experts(shape.experts, shape.dim, shape.hidden_dim).to(setting.dtype)
        return QuantisedExperts.of(whole, format)


def _one(setting: Setting, shape: Shape, format: str) -> Row:
    with torch.device(setting.device):
        whole = Experts(shape.experts, shape.dim, shape.hidden_dim).to(setting.dtype)
        few = QuantisedExperts.of(whole, format)
        with torch.no_grad():
            for name, value in zip((whole._in, "down_proj"), few.held):
                getattr(whole, name).copy_(value)
    p = setting.problem(shape, routing=False)
    errors = differences(few, whole, p)
    with torch.no_grad():
        times = [1e6 * seconds(setting, partial(experts, p.x, p.routing), setting.repeats) for experts in (few, whole)]
        if shape.tokens == 1:
            with waiting_is_an_error(setting):
                few(p.x, p.routing)
    note = f"{max(errors):.1e} apart at most; {times[0]:.0f} us, {times[1]:.0f} with whole numbers"
    return Row(f"{text(shape)} {format}", max(errors) <= CLOSE, note, {"errors": errors, "us": times})


def _results(compute: Callable[[Tensor, Routing], Tensor], x: Tensor, routing: Routing, dy: Tensor) -> list[Tensor]:
    """Outputs, and gradients of tokens and of combine weights."""
    y = compute(x, routing)
    return [y.detach(), *torch.autograd.grad(y, [x, routing.weight], dy)]


def _exact(few: QuantisedExperts, p: Problem, dy: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same in float32 with the numbers that are held, an expert at a time; and sizes [A] of dy * its output.

    The gradient of a combine weight is the sum of these products, which may cancel.
    """
    x, weight = (t.detach().float().requires_grad_() for t in (p.x, p.routing.weight))
    bounds, results = p.routing.offsets.tolist(), [torch.zeros_like(x) for _ in range(2)]
    dweight, sizes = torch.zeros_like(weight), torch.zeros_like(weight)
    for e in range(few.num_experts):
        span = slice(bounds[e], bounds[e + 1])
        if span.start == span.stop:
            continue
        token = p.routing.token_index[span]
        rows, scale = (t.detach().requires_grad_() for t in (x[token], weight[span]))
        w_in, w_out = (few.decoded(name, slice(e, e + 1), torch.float32)[0] for name in few._shapes)
        gate, up = (rows @ w_in.T).chunk(2, 1)
        out, grad = torch.nn.functional.silu(gate) * up @ w_out.T, dy[token].float()
        y = out * scale[:, None]
        found = torch.autograd.grad(y, [rows, scale], grad)
        sizes[span] = (out.detach() * grad).norm(dim=1)
        results[0].index_add_(0, token, y.detach())
        results[1].index_add_(0, token, found[0])
        dweight[span] = found[1]
    return [results[0].detach(), results[1].detach(), dweight], sizes


def _fused(setting: Setting, shape: Shape, few: QuantisedExperts, bandwidth: float) -> Row:
    torch.set_float32_matmul_precision("highest")
    calls = SEQUENCE[setting.cuda]
    problems = [setting.problem(shape._replace(dim=1, hidden_dim=1), routing=False) for _ in range(calls)]
    for p in problems:  # other tokens and choices, the experts together larger than a GPU's cache
        p.x = torch.randn(shape.tokens, shape.dim, dtype=setting.dtype, device=setting.device, requires_grad=True)
    first = problems[0]
    dy = torch.randn_like(first.x)
    exact, sizes = _exact(few, first, dy)
    ways = (few.fused, few.decoded_first)
    ours, theirs = (_results(way, first.x, first.routing, dy) for way in ways)
    of = (exact[0], exact[1], sizes)
    errors, before = ([distance(*each) for each in zip(found, exact, of)] for found in (ours, theirs))
    again = _results(few.fused, first.x, first.routing, dy)
    repeats = all(torch.equal(a, b) for a, b in zip(ours, again))
    with waiting_is_an_error(setting):
        _results(few.fused, first.x, first.routing, dy)

    def backward(way: Callable[[Tensor, Routing], Tensor]) -> None:
        for p in problems:
            _results(way, p.x, p.routing, dy)

    @torch.no_grad()
    def forward(way: Callable[[Tensor, Routing], Tensor]) -> None:
        for p in problems:
            way(p.x, replace(p.routing, weight=p.routing.weight.detach()))

    times = {}
    for name, way in zip(("fused", "decoded_first"), ways):
        times[f"{name}_us"] = seconds(setting, partial(forward, way), setting.repeats)
        times[f"{name}_backward_us"] = seconds(setting, partial(backward, way), setting.repeats)
    times["graph_us"] = seconds(setting, in_graph(setting, partial(forward, few.fused)), 3 * setting.repeats)
    times = {name: 1e6 * took / calls for name, took in times.items()}
    chosen = statistics.mean(p.choice.unique().numel() for p in problems)
    stacks = [getattr(few, f"{name}_{kind}") for name in few._shapes for kind in ("codes", "scales")]
    read = chosen * sum(t[0].numel() * t.element_size() for t in stacks)
    share = read / bandwidth / (times["graph_us"] / 1e6)
    note = (
        f"{max(errors):.1e} from exact at most, {max(before):.1e} decoded first; "
        f"{times['graph_us']:.1f} us in a graph, {times['fused_us']:.1f} eager, "
        f"{times['decoded_first_us']:.1f} decoded first; with gradients {times['fused_backward_us']:.1f}, "
        f"{times['decoded_first_backward_us']:.1f}; codes at {share:.2f} of copy bandwidth"
        f"{'' if repeats else '; results do not repeat'}"
    )
    figures = {"errors": errors, "errors_decoded_first": before, "share": share, "bytes": read, **times}
    # The errors of a few numbers are luck, those of many are not.
    luck = [2 * torch.finfo(setting.dtype).eps / b.numel() ** 0.5 for b in exact]
    close = all(error <= CLOSE + each for error, each in zip(errors, luck))
    return Row(f"{text(shape)} {few.format} in registers", repeats and close, note, figures)
