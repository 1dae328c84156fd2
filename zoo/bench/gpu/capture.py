"""Sections about how the layer fits into a step: no waiting, CUDA graphs, torch.compile, memory kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...moe.kernels import moe_mlp
from ..contestants import Problem, Shape
from .setting import Row, Setting, distance, outputs_and_gradients, route, text

# Between the same layer run in two ways, where other kernels may round otherwise.
CLOSE = 1e-2
# Memory kept may be this share beyond what must be.
SLACK = 0.05


@contextmanager
def waiting_is_an_error(setting: Setting) -> Iterator[None]:
    """Raise where the host waits for the GPU; nothing on a CPU."""
    setting.wait()
    if setting.cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if setting.cuda:
            torch.cuda.set_sync_debug_mode("default")


def sync(setting: Setting) -> Iterator[Row]:
    """Forward and backward of a dropless top-k layer never wait for the GPU."""
    shape = setting.shapes[0]
    p, layer = setting.problem(shape), setting.layer(shape)
    dy = torch.randn_like(p.x)
    few = setting.problem(shape._replace(tokens=1))
    dy_few = torch.randn_like(few.x)
    cases: dict[str, Callable[[], object]] = {
        "gate and experts": lambda: outputs_and_gradients(setting, p, dy),
        "gate and experts, one token": lambda: outputs_and_gradients(setting, few, dy_few),
        "layer": lambda: layer(p.x).backward(dy),
    }
    for what, run in cases.items():
        run()  # compiles
        try:
            with waiting_is_an_error(setting):
                run()
            yield Row(what, True, "the host waits for nothing" if setting.cuda else "ran; only a GPU is waited for")
        except RuntimeError as error:
            if "synchroniz" not in str(error).lower():
                raise
            yield Row(what, False, str(error).splitlines()[0])


def tensors_of(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What gets a gradient."""
    return [x, *layer.parameters()]


def clear(leaves: list[Tensor]) -> None:
    """Forget gradients, so that the next backward makes new ones."""
    for leaf in leaves:
        leaf.grad = None


def captured(setting: Setting, step: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Tensor]:
    """`step` as a CUDA graph; on a CPU as it is."""
    if not setting.cuda:

        def plain() -> Tensor:
            clear(leaves)
            return step()

        return plain
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            clear(leaves)
            step()
    torch.cuda.current_stream().wait_stream(stream)
    clear(leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


def graphs(setting: Setting) -> Iterator[Row]:
    """Forward and backward of a layer, captured once and replayed with other inputs, give what eager mode gives."""
    full = setting.shapes[0]
    for shape in (full._replace(tokens=min(full.tokens, 4096)), full._replace(tokens=1)):
        layer = setting.layer(shape)
        x = torch.randn(shape.tokens, shape.dim, dtype=setting.dtype, device=setting.device, requires_grad=True)
        dy = torch.randn_like(x)
        leaves = tensors_of(layer, x)

        def step(layer: nn.Module = layer, x: Tensor = x, dy: Tensor = dy) -> Tensor:
            y: Tensor = layer(x)
            y.backward(dy)
            return y.detach()

        replay = captured(setting, step, leaves)
        fresh = torch.randn_like(x).detach()
        for what, tokens in (("other tokens", fresh), ("all tokens alike", fresh[:1].expand_as(fresh))):
            with torch.no_grad():
                x.copy_(tokens)
                dy.copy_(torch.randn_like(dy))
            results = [replay().clone(), *_gradients(leaves)]
            static = [leaf.grad for leaf in leaves]
            clear(leaves)
            expected = [step().clone(), *_gradients(leaves)]
            for leaf, grad in zip(leaves, static):
                leaf.grad = grad  # the graph writes there
            yield _same(f"{text(shape)}, {what}", results, expected)


def _gradients(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]


def _same(what: str, results: list[Tensor], expected: list[Tensor]) -> Row:
    errors = [distance(a, b) for a, b in zip(results, expected)]
    exactly = all(torch.equal(a, b) for a, b in zip(results, expected))
    ok = len(results) == len(expected) and max(errors) <= CLOSE
    return Row(what, ok, "equal bit for bit" if exactly else f"{max(errors):.1e} apart at most", {"errors": errors})


def compiled(setting: Setting) -> Iterator[Row]:
    """torch.compile takes the layer as one graph, and gives the same outputs and gradients."""
    full = setting.shapes[0]
    shape = full._replace(tokens=min(full.tokens, 4096))
    layer = setting.layer(shape)
    other = torch.compile(layer, fullgraph=True, backend="inductor" if setting.cuda else "aot_eager")
    x = torch.randn(shape.tokens, shape.dim, dtype=setting.dtype, device=setting.device, requires_grad=True)
    dy, leaves = torch.randn_like(x), tensors_of(layer, x)
    found = []
    for run in (layer, other):
        clear(leaves)
        y = run(x)
        y.backward(dy)
        found.append([y.detach(), *_gradients(leaves)])
    yield _same(text(shape), found[1], found[0])


def kept_bytes(setting: Setting, run: Callable[[], Tensor], there: Sequence[Tensor]) -> int:
    """Bytes that stay allocated for the backward of `run`, but for its output and the inputs `there`.

    On a CPU: of the storages that autograd saves.
    """
    if setting.cuda:
        run()  # what stays in caches is not kept for the backward
        setting.wait()
        before = torch.cuda.memory_allocated()
        y = run()
        setting.wait()
        return torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    known = {tensor.untyped_storage().data_ptr() for tensor in there}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    saved.pop(y.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def memory(setting: Setting) -> Iterator[Row]:
    """What is kept for backward is x, the pre-activations [A, 2F] and the routing, at most 5% more."""
    for shape in setting.shapes:
        p = setting.problem(shape)
        assert p.logits is not None
        routing = p.routing
        pre = p.choice.numel() * 2 * shape.hidden_dim * p.x.element_size()
        inputs = p.x, routing.token_index, routing.offsets, routing.weight
        run = partial(moe_mlp, p.x, p.w_in, p.w_out, routing, "swiglu", setting.backend)
        kept = kept_bytes(setting, run, (*inputs, p.w_in, p.w_out))
        yield _kept(f"{text(shape)} experts", kept, pre, sum(t.numel() * t.element_size() for t in inputs))
        kept = kept_bytes(setting, partial(_with_gate, setting, p), (p.x, p.w_in, p.w_out, p.logits))
        beside = p.x.numel() * p.x.element_size()
        yield _kept(f"{text(shape)} with routing", kept, pre + metadata_bytes(shape), beside)


def _with_gate(setting: Setting, p: Problem) -> Tensor:
    return moe_mlp(p.x, p.w_in, p.w_out, route(setting, p), "swiglu", setting.backend)


def metadata_bytes(shape: Shape) -> int:
    """What a softmax top-k written in torch keeps: scores [T, E]; choices, order, tokens, weights [A]; offsets."""
    assignments = shape.tokens * shape.k
    return 4 * shape.tokens * shape.experts + assignments * (8 + 8 + 8 + 4) + 4 * (shape.experts + 1)


def _kept(what: str, found: int, expected: int, beside: int) -> Row:
    share = (found + beside) / (expected + beside)
    figures = {"kept": found, "expected": expected, "inputs": beside, "share": share}
    return Row(what, share <= 1 + SLACK, f"{share:.3f} of what must be kept ({found / 2**20:.1f} MiB new)", figures)
