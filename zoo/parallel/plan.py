"""What a mesh costs: memory, operations, bytes between processes and time of a training step, without running one.

Parameters are counted exactly, as `parallelize` lays them out. The rest is arithmetic that leaves out what is small:
operations are those of matrix products, routing is taken to be even, buffers are those of FSDP2 and of the exchange,
which is waited for where neither shared experts nor what a shortcut makes room for run meanwhile.
B bytes an element in computation (2 for bfloat16), T tokens of a process with data of its own, D the model's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .mesh import Sizes
from .plan_facts import Facts, Parameter, Stack
from .spread import divided


@dataclass(frozen=True)
class Machine:
    """GPUs: how many a node has, memory of each in bytes, operations a second, bytes a second each sends.

    `busy` is the share of the operations a second that real products reach, `within` the bandwidth inside a node and
    `between` that between nodes.
    """

    per_node: int = 8
    memory: float = 141e9
    flops: float = 989e12
    within: float = 450e9
    between: float = 50e9
    busy: float = 0.4

    def bandwidth(self, span: int) -> float:
        """Bytes a second of a process in a group that spans so many consecutive ones."""
        return self.within if span <= self.per_node else self.between


@dataclass(frozen=True)
class Work:
    """A step: tokens of a data process in a micro-batch, micro-batches, and bytes a number takes.

    `recompute` is activation checkpointing. parameter, gradient and state are what a number of the model keeps: AdamW
    in float32 has 4, 4 and 8.
    """

    tokens: int
    sequence: int
    accumulate: int = 1
    recompute: bool = True
    compute: int = 2
    parameter: int = 4
    gradient: int = 4
    state: int = 8


@dataclass
class Estimate:
    """What a step takes on each process: bytes of memory, operations, bytes sent, seconds."""

    sizes: Sizes
    parameters: int
    memory: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    sent: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def total_memory(self) -> float:
        """Bytes in all."""
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        """Seconds of a step: gathering overlaps with computation, of exchanges what `waited` leaves."""
        s = self.seconds
        return max(s["compute"], s["gather"]) + s["all-to-all"] + s["tensor"]


def _split(parameter: Parameter, tensor: int) -> tuple[int, ...]:
    """Shape of a parameter on one process of a tensor group."""
    shape = list(parameter.shape)
    if parameter.style is not None and shape:
        dim = 0 if parameter.style == "rows" else 1
        shape[dim] = -(-shape[dim] // tensor)
    return tuple(shape)


def _sharded(shape: tuple[int, ...], parts: int) -> int:
    """Numbers that the first of so many processes has of a tensor cut along its first dimension."""
    return -(-shape[0] // parts) * math.prod(shape[1:]) if shape else 1


def local_parameters(facts: Facts, sizes: Sizes) -> int:
    """How many parameters the first process holds, exactly."""
    return _held(facts, sizes, lambda _: 1)


def _held(facts: Facts, sizes: Sizes, each: Callable[[Parameter | Stack], int]) -> int:
    """The same, each number of a parameter, or of a stack, taken so many times."""
    parts = sizes.shard * sizes.expert
    dense = sum(each(p) * _sharded(_split(p, sizes.tensor), parts) for unit in facts.units for p in unit)
    return dense + sum(each(stack) * _stack_part(stack, sizes) for stack in facts.stacks)


def _stack_part(stack: Stack, sizes: Sizes) -> int:
    held = -(-stack.experts // sizes.expert)
    return sum(held * math.prod(shape[1:]) // (sizes.shard * sizes.tensor) for shape in stack.shapes)


def remote_processes(stack: Stack, parts: int) -> float:
    """To how many other processes a token goes, on average over even routing: k different experts of all."""
    held = -(-stack.experts // parts)
    if stack.slots:  # every process has slots of every expert
        return stack.k * (parts - 1) / parts
    k = min(round(stack.k), stack.experts)
    if parts == 1 or stack.experts - held < k:
        return float(parts - 1)
    missed = math.comb(stack.experts - held, k) / math.comb(stack.experts, k)
    return (parts - 1) * (1 - missed)


def estimate(facts: Facts, sizes: Sizes, work: Work, machine: Machine) -> Estimate:
    """What a step takes on a mesh of these sizes."""
    facts = facts.at(work.sequence)
    found = Estimate(sizes, local_parameters(facts, sizes))
    tensor, fsdp, parts = sizes.tensor, sizes.shard * sizes.expert, sizes.shard * sizes.tensor
    tokens, width, itemsize = work.tokens, facts.width, work.compute

    def kept(p: Parameter | Stack) -> int:
        return work.parameter if p.learns else min(p.itemsize, work.parameter)

    def gradient(p: Parameter | Stack) -> int:
        return work.gradient if p.learns else 0

    def whole(each: Callable[[Parameter | Stack], int]) -> tuple[list[int], list[int]]:
        units = [sum(each(p) * math.prod(_split(p, tensor)) for p in unit) for unit in facts.units]
        return units, [each(stack) * _stack_part(stack, sizes) * parts for stack in facts.stacks]

    def scattered(units: list[int], stacks: list[int]) -> float:
        return sum(units) * (fsdp - 1) / fsdp + sum(stacks) * (parts - 1) / parts

    def largest(units: list[int], stacks: list[int]) -> int:
        return max(units[:-1], default=0) + max(stacks, default=0)

    # Two blocks are whole at a time, the one at work and the next, and one block's gradients; the root stays whole.
    weights, gradients = whole(kept), whole(gradient)
    gathered = weights[0][-1] + gradients[0][-1] + 2 * largest(*weights) + largest(*gradients)
    found.memory = {
        "parameters": _held(facts, sizes, kept) + facts.coded,
        "gradients": _held(facts, sizes, gradient),
        "optimizer": _held(facts, sizes, lambda p: work.state if p.learns else 0),
        "gathered": gathered if fsdp * parts > 1 else 0.0,
        "activations": _activations(facts, sizes, work),
        "exchange": max((_arriving(s, sizes, tokens) * width * itemsize * 2 for s in facts.stacks), default=0.0),
    }
    passes = 4 if work.recompute else 3  # of the forward's cost: backward is two
    matmul = 2 * (facts.active - facts.embedded) + 2 * work.sequence * facts.attention * facts.layers
    found.flops = work.accumulate * (passes * matmul - 2 * facts.frozen) * tokens / tensor
    # Rows go and come back, and so do gradients; a recomputation goes and comes once more.
    trips = 6 if work.recompute else 4
    exchange = sum(tokens / tensor * remote_processes(s, sizes.expert) for s in facts.stacks) * width * itemsize * trips
    copies = 2 * (sizes.replicate - 1) / sizes.replicate * found.memory["gradients"]
    reductions = (passes + 1) * facts.layers * 2 * (tensor - 1) / tensor * tokens * width * itemsize
    # Forward and backward, the root's once; autocast casts what has come.
    gathers = 2 * scattered(*weights) - scattered(weights[0][-1:], [])
    found.sent = {
        "all-to-all": work.accumulate * exchange,
        "all-gather": work.accumulate * gathers,
        "reduce-scatter": work.accumulate * scattered(*gradients) + copies,
        "tensor": work.accumulate * reductions,
    }
    found.seconds = {
        "compute": found.flops / (machine.flops * machine.busy),
        "gather": (found.sent["all-gather"] + found.sent["reduce-scatter"]) / machine.bandwidth(sizes.world),
        "all-to-all": work.accumulate * sum(_exchanging(s, facts, sizes, work, machine) for s in facts.stacks),
        "tensor": found.sent["tensor"] / machine.bandwidth(tensor),
    }
    return found


def waited(way: float, beside: float, window: float = 0.0) -> tuple[float, float]:
    """Seconds that a forward and a backward wait for tokens and results, of which one way takes `way`.

    `beside` is what the shared expert takes, which runs while tokens travel, forward; `window` what runs between the
    experts and their results' use, which a shortcut makes room for. Both take twice as long backward.
    """
    forward, backward = (max(0.0, way - n * beside) + max(0.0, way - n * window) for n in (1, 2))
    return forward, backward


def _exchanging(stack: Stack, facts: Facts, sizes: Sizes, work: Work, machine: Machine) -> float:
    """Seconds of a micro-batch in which a layer's exchange is waited for."""
    tokens, speed = work.tokens / sizes.tensor, machine.flops * machine.busy
    rows = tokens * remote_processes(stack, sizes.expert) * facts.width * work.compute
    way = rows / machine.bandwidth(sizes.expert * sizes.tensor)
    window = stack.pair / 2 + work.sequence * facts.attention if stack.pair else 0.0
    forward, backward = waited(way, 2 * stack.beside * tokens / speed, 2 * window * tokens / speed)
    return forward * (2 if work.recompute else 1) + backward


def _arriving(stack: Stack, sizes: Sizes, tokens: int) -> float:
    """Rows that come to a process with even routing, its own among them."""
    own = stack.k / sizes.expert if stack.slots else 1
    return tokens / sizes.tensor * (remote_processes(stack, sizes.expert) + own)


def _activations(facts: Facts, sizes: Sizes, work: Work) -> float:
    """What backward needs of forward: inputs of blocks and, unless recomputed, what is inside them; and the logits."""
    tokens, itemsize = work.tokens, work.compute
    inputs = facts.layers * tokens * facts.width * itemsize
    inside = (
        facts.kept / sizes.tensor + facts.layers * (4 * facts.width + 3 * facts.attention / sizes.tensor)
    ) * tokens
    for stack in facts.stacks:
        assignments = tokens / sizes.tensor * stack.k
        inside += assignments * stack.rows + _arriving(stack, sizes, tokens) * facts.width
    if work.recompute:
        inside /= max(facts.layers, 1)
    logits = tokens * facts.vocabulary * (itemsize + 8)  # and in float32, with their gradient
    return inputs + inside * itemsize + logits


def meshes(facts: Facts, world: int, per_node: int) -> Iterator[Sizes]:
    """All sizes that make a world of so many processes, and that the model divides into."""
    experts = math.gcd(*(stack.experts for stack in facts.stacks)) if facts.stacks else 1
    for tensor in (n for n in _divisors(world) if n <= per_node):
        if tensor > 1 and (not facts.heads or facts.heads % tensor or facts.kv_heads % tensor):
            continue
        for expert in (n for n in _divisors(world // tensor) if experts % n == 0):
            for shard in _divisors(world // tensor // expert):
                shapes = [shape for stack in facts.stacks for shape in stack.shapes]
                if all(divided(shape, shard * tensor, expert) is not None for shape in shapes):
                    yield Sizes(world // tensor // expert // shard, shard, expert, tensor)


def check(facts: Facts, sizes: Sizes) -> None:
    """Raise ValueError for a mesh that `parallelize` refuses."""
    for stack in facts.stacks:
        part, parts = -(-stack.experts // sizes.expert), sizes.shard * sizes.tensor
        if part * (sizes.expert - 1) >= stack.experts:
            raise ValueError(f"expert={sizes.expert}: {stack.experts} experts leave some processes without any")
        for shape in stack.shapes:
            if divided(shape, parts, sizes.expert) is None:
                raise ValueError(f"experts' {shape[1]} rows do not divide into shard * tensor = {parts} parts")
    for heads in (facts.heads, facts.kv_heads):
        if heads % sizes.tensor:
            raise ValueError(f"tensor={sizes.tensor}: {heads} heads do not divide over so many processes")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def ranked(facts: Facts, world: int, work: Work, machine: Machine) -> list[Estimate]:
    """Estimates of all meshes: those that fit into memory first, the fastest a token of them first."""
    found = [estimate(facts, sizes, work, machine) for sizes in meshes(facts, world, machine.per_node)]
    return sorted(found, key=lambda e: (e.total_memory > machine.memory, e.step / e.sizes.data))
