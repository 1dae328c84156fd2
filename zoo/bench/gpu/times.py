"""Sections about speed: decoding against reading the chosen experts, and the benchmark with routing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ...moe.kernels import moe_mlp
from ..contestants import Problem, Shape
from ..moe import measured
from ..turns import marks
from .setting import Row, Setting, route, text, tried

# Share of the measured bandwidth of a copy at which decoding should read the chosen experts.
WANTED = 0.8
# Calls in a captured sequence, each of other experts: together larger than a GPU's cache.
SEQUENCE = {True: 16, False: 1}


def seconds(setting: Setting, run: Callable[[], object], repeats: int) -> float:
    """Median time of `run`, after one that warms up."""
    times = []
    for i in range(1 + repeats):
        mark, between = marks(setting.device)
        mark()
        run()
        mark()
        (took,) = between()
        if i:
            times.append(took)
    return statistics.median(times)


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    size = 2**32 if setting.cuda else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=setting.device).random_(0, 255)
    target = torch.empty_like(source)
    return 2 * size / seconds(setting, lambda: target.copy_(source), 10)


def product_rate(setting: Setting) -> float:
    """Floating-point operations a second of a large matrix product."""
    n = 8192 if setting.cuda else 256
    a, b = (torch.randn(n, n, dtype=setting.dtype, device=setting.device) for _ in range(2))
    return 2 * n**3 / seconds(setting, lambda: a @ b, 10)


def ceilings(setting: Setting) -> Iterator[Row]:
    """What this device does at best: a copy, and a dense product."""
    bandwidth, rate = copy_bandwidth(setting), product_rate(setting)
    note = f"copies {bandwidth / 1e12:.2f} TB/s, dense products {rate / 1e12:.0f} TFLOP/s"
    yield Row("device", None, note, {"bytes_per_second": bandwidth, "flops_per_second": rate})


def decode(setting: Setting) -> Iterator[Row]:
    """Forward of one and of a few tokens, against reading the experts that they choose from memory."""
    bandwidth = copy_bandwidth(setting)
    for shape in setting.shapes:
        for tokens in setting.few[:2]:
            few = shape._replace(tokens=tokens)
            yield from tried(setting, text(few), partial(decode_row, setting, few, bandwidth))


@torch.no_grad()
def decode_row(setting: Setting, shape: Shape, bandwidth: float) -> Row:
    """Times of a call: eager, and in a captured sequence, given the routing and with the gate."""
    first = setting.problem(shape)
    problems = [first]
    calls = SEQUENCE[setting.cuda]
    for _ in range(calls - 1):  # the same experts, other tokens
        other = Problem.random(shape._replace(dim=1, hidden_dim=1), setting.dtype, setting.device, routing=True)
        other.x, other.w_in, other.w_out = torch.randn_like(first.x), first.w_in, first.w_out
        problems.append(other)

    def given() -> None:
        for p in problems:
            moe_mlp(p.x, p.w_in, p.w_out, p.routing, "swiglu", setting.backend)

    def routed() -> None:
        for p in problems:
            moe_mlp(p.x, p.w_in, p.w_out, route(setting, p), "swiglu", setting.backend)

    an_expert = first.w_in[0].numel() + first.w_out[0].numel()
    chosen = statistics.mean(p.choice.unique().numel() for p in problems)
    read = chosen * an_expert * first.x.element_size()
    target = read / (WANTED * bandwidth)
    figures = {"target_us": 1e6 * target, "bytes": read, "experts": chosen}
    for name, run in (("eager", given), ("graph", given), ("graph_with_routing", routed)):
        step = run if name == "eager" else in_graph(setting, run)
        figures[f"{name}_us"] = 1e6 * seconds(setting, step, 3 * setting.repeats) / calls
    share = read / bandwidth / (figures["graph_us"] / 1e6)
    note = (
        f"{figures['graph_us']:.1f} us in a graph, {figures['eager_us']:.1f} eager, "
        f"{figures['graph_with_routing_us']:.1f} with routing; target {figures['target_us']:.1f}; "
        f"{share:.2f} of copy bandwidth"
    )
    ok = figures["graph_us"] <= figures["target_us"]
    return Row(text(shape), ok if setting.cuda else None, note, figures)


def in_graph(setting: Setting, run: Callable[[], None]) -> Callable[[], None]:
    """`run` as a CUDA graph; on a CPU as it is."""
    if not setting.cuda:
        return run
    run()
    setting.wait()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(setting: Setting) -> Iterator[Row]:
    """`zoo bench moe --routing` on every shape, then forward alone of few tokens on two of them."""
    cases = [(shape, True) for shape in setting.shapes]
    cases += [
        (shape._replace(tokens=t), False) for shape in (setting.shapes[0], setting.shapes[-1]) for t in setting.few
    ]
    for shape, backward in cases:
        yield from tried(setting, text(shape), partial(_timed_shape, setting, shape, backward))


def _timed_shape(setting: Setting, shape: Shape, backward: bool) -> Row:
    dtype, backends = str(setting.dtype).removeprefix("torch."), (setting.backend, "grouped_mm")
    result = measured(shape, dtype, setting.device, backends, setting.repeats, backward, routing=True)
    mine = next(row for row in result["rows"] if row["name"] == f"zoo {setting.backend}")
    what = f"{text(shape)} {result['what']}"
    if mine["refuses"]:
        return Row(what, False, mine["refuses"], result)
    return Row(what, None, _summary(mine), result)


def _summary(row: dict[str, float]) -> str:
    parts = [f"{row['ms']:.3f} ms"]
    if "forward_tflops" in row:
        parts.append(f"{row['forward_tflops']:.3g} / {row['backward_tflops']:.3g} TFLOP/s forward / backward")
    for key, label in (("of_dense", "of dense"), ("against_best_rival", "times the best rival's speed")):
        if row[key]:
            parts.append(f"{row[key]:.2f} {label}")
    return ", ".join(parts)
