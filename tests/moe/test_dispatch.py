"""Experts spread over processes give every process what whole experts would, and learn from all tokens."""

from __future__ import annotations

import copy
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

sys.path.append(str(Path(__file__).parent / "routers"))
from gate_cases import DIM, GATES, HIDDEN, Gate, layer, tokens

from zoo.moe import Blend, ExpertParallel, Experts, HierarchicalExpertParallel, MoE, Routing, StaticExpertParallel
from zoo.moe.dispatch import _Flight
from zoo.moe.routers import TopKRouter

# Processes, and how many sequences each has: uneven, and one without any token.
WORLDS = {3: [3, 0, 5], 4: [2, 4, 1, 3]}
# Parts of 3, 3 and 2 experts; of 2, 2, 1 and none.
EXPERTS = {3: 8, 4: 5}
FEW = ("dense", "top-1", "top-2 with capacity")


def inputs(gate: Gate, sequences: int, rank: int) -> tuple[Tensor, dict[str, Any]]:
    torch.manual_seed(100 + rank)
    x, cluster = tokens(sequences, dtype=torch.float64)
    return x, gate.context(x, cluster)


def step(moe: MoE, x: Tensor, context: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Output and gradient of the tokens; gradients of parameters add up."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = moe(x, **context)
    (y * torch.linspace(-1, 1, DIM, dtype=y.dtype)).sum().backward()
    return y.detach(), x.grad


def spread(moe: MoE, chunks: int = 1, nodes: Any = None) -> Any:
    """Keep this process's part of the experts; nodes: groups of processes between and within them."""
    holder: Any = moe.experts if isinstance(moe.experts, Experts) else moe.experts.mlp
    parallel: Any = ExpertParallel(holder.num_experts, chunks=chunks)
    if nodes is not None:
        parallel = HierarchicalExpertParallel(holder.num_experts, *nodes, chunks=chunks)
    holder.keep_own(parallel)
    return parallel


def merges(gate: Gate) -> bool:
    x, context = inputs(gate, 1, 0)
    return isinstance(layer(gate, torch.float64).router(x, **context), Blend)


NAMES = [name for name, gate in GATES.items() if not merges(gate)]
PLAIN, NODES = 1, 2
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "bincount")


class NoSyncs(TorchDispatchMode):
    """Fails where the host would wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        masks = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a
        )
        assert not masks, f"{name} of a mask waits for the device"
        assert name not in SYNCS, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


CASES = [(3, name, 1, PLAIN) for name in NAMES]
CASES += [(4, name, chunks, kind) for name in FEW for chunks in (1, 3) for kind in (PLAIN, NODES)]


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    saved: dict[str, Any] = {}
    nodes = None
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("between", "within"))
        nodes = mesh["between"].get_group(), mesh["within"].get_group()
    for size, name, chunks, kind in CASES:
        if size != world:
            continue
        gate = GATES[name]
        moe = layer(gate, torch.float64, num_experts=EXPERTS[world])
        parallel = spread(moe, chunks, nodes if kind == NODES else None)
        x, context = inputs(gate, WORLDS[world][rank], rank)
        y, gradient = step(moe, x, context)
        own = {name: p.grad for name, p in moe.named_parameters()}
        saved[name, chunks, kind] = y, gradient, own, (parallel.own.start, parallel.own.stop)
    saved["traffic"] = counted(world)
    if nodes is not None:
        saved["between nodes"] = counted_by_node(nodes)
        saved["static"] = [static(13), static(2), static(13, True), static(2, True)]
    saved["events"] = [events(chunks) for chunks in (1, 3)]
    torch.save(saved, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()


def counted(world: int) -> tuple[int, int]:
    """Bytes of rows that a forward and a backward count, and what the closed form says."""
    torch.manual_seed(7 + dist.get_rank())
    router = TopKRouter(DIM, EXPERTS[world], 3)
    moe = MoE(router, Experts(EXPERTS[world], DIM, HIDDEN))
    parallel = spread(moe)
    x = torch.randn(11, DIM, requires_grad=True)
    chosen = (x @ router.weight.T).topk(3).indices.tolist()
    part = -(-EXPERTS[world] // world)
    there = sum(len({e // part for e in experts} - {dist.get_rank()}) for experts in chosen)
    arrived = torch.zeros(world, dtype=torch.long)
    for experts in chosen:
        for holder in {e // part for e in experts} - {dist.get_rank()}:
            arrived[holder] += 1
    dist.all_reduce(arrived)
    moe(x).sum().backward()
    # Rows there and gradients there; results back and gradients back are sent by those that hold the experts.
    return parallel.traffic.rows, 2 * (there + int(arrived[dist.get_rank()])) * DIM * 4


class Noted(nn.Module):
    """A layer that notes when it runs, forward and backward."""

    def __init__(self, inner: nn.Module, name: str, notes: list[str]) -> None:
        super().__init__()
        self.inner, self.name, self.notes = inner, name, notes

    def forward(self, x: Tensor) -> Tensor:
        self.notes.append(self.name)
        y = self.inner(x)
        y.register_hook(lambda _: self.notes.append(f"{self.name} backward"))
        return y


def events(chunks: int) -> list[str]:
    """What happens in which order in a layer with a shared expert: tokens set out and land, experts run."""
    notes: list[str] = []
    torch.manual_seed(0)
    moe = MoE(TopKRouter(DIM, 4, 2), Experts(4, DIM, HIDDEN), shared=Noted(nn.Linear(DIM, DIM), "shared", notes))
    spread(moe, chunks)
    experts: Any = moe.experts
    compute, start, land = experts.compute, _Flight.start, _Flight.land

    def noted(x: Tensor, routing: Routing) -> Tensor:
        notes.append("experts")
        return compute(x, routing)

    def starts(flight: Any, values: Tensor, splits: Any) -> Tensor:
        if values.dim() > 1:
            notes.append("start")
        return start(flight, values, splits)

    def lands(flight: Any) -> None:
        if flight._pending[1].dim() > 1:
            notes.append("land")
        land(flight)

    experts.compute, _Flight.start, _Flight.land = noted, starts, lands  # type: ignore[method-assign]
    moe(torch.randn(9, DIM, requires_grad=True)).sum().backward()
    _Flight.start, _Flight.land = start, land  # type: ignore[method-assign]
    return notes


def counted_by_node(nodes: Any) -> tuple[int, int, int, int]:
    """Bytes of rows between and within nodes, counted, and as nodes and processes with a token's experts say."""
    torch.manual_seed(7 + dist.get_rank())
    # Parts of 3, 3, 3 and none, as without nodes.
    router, part = TopKRouter(DIM, 9, 3), 3
    moe = MoE(router, Experts(9, DIM, HIDDEN))
    parallel = spread(moe, nodes=nodes)
    assert parallel.own == ExpertParallel(9).own
    x = torch.randn(11, DIM, requires_grad=True)
    chosen = (x @ router.weight.T).topk(3).indices.tolist()
    node, place = divmod(dist.get_rank(), 2)
    between, within = torch.zeros(4), torch.zeros(4)  # rows that each process sends on this one's tokens, there alone
    for experts in chosen:
        for other in {e // (2 * part) for e in experts}:
            at = 2 * other + place
            between[dist.get_rank()] += other != node
            between[at] += other != node  # what comes back
            for holder in {e // part for e in experts if e // (2 * part) == other} - {at}:
                within[at] += 1
                within[holder] += 1
    dist.all_reduce(between)
    dist.all_reduce(within)
    moe(x).sum().backward()
    rows = [2 * int(n[dist.get_rank()]) * DIM * 4 for n in (between, within)]
    return parallel.traffic_between.rows, rows[0], parallel.traffic_within.rows, rows[1]


def static(places: int, weigh_input: bool = False) -> tuple[dict[str, Tensor], int, int, int, int]:
    """What a layer with fixed places makes, what went missing, and the bytes sent."""
    torch.manual_seed(3)
    moe = MoE(TopKRouter(DIM, 8, 2), Experts(8, DIM, HIDDEN, bias=True, weigh_input=weigh_input)).double()
    whole = copy.deepcopy(moe)
    parallel = StaticExpertParallel(8, places)
    moe.experts.keep_own(parallel)
    torch.manual_seed(50 + dist.get_rank())
    x = torch.randn(13, DIM, dtype=torch.float64, requires_grad=True)
    routing = moe.router(x)

    def experts(rows: Tensor, arrived: Routing) -> Tensor:
        with _disable_current_modes():  # CPU kernels look at offsets; those of GPUs do not
            return moe.experts.compute(rows, arrived)

    with NoSyncs():
        y = parallel(x, routing, experts)
    (y * torch.linspace(-1, 1, DIM, dtype=y.dtype)).sum().backward()
    kept = Routing.from_choices(torch.zeros(0, 1, dtype=torch.long), x.new_zeros(0, 1), 8)
    first = torch.cat([torch.arange(a, min(a + places, b)) for a, b in pairwise(routing.offsets.tolist())])
    counts = routing.counts.clamp(max=places)
    kept.token_index, kept.weight = routing.token_index[first], routing.weight.detach()[first]
    kept.offsets, kept.num_tokens = torch.cat([counts.new_zeros(1), counts.cumsum(0).int()]), 13
    other = x.detach().clone().requires_grad_()
    expected = whole.experts(other, kept)
    (expected * torch.linspace(-1, 1, DIM, dtype=y.dtype)).sum().backward()
    own = {f"own {n}": p.grad for n, p in moe.experts.named_parameters() if p.grad is not None}
    summed = {}
    for n, p in whole.experts.named_parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)
        summed[f"own {n}"] = p.grad[parallel.own]
    found = {"y": y.detach(), **own}
    assert found.keys() == {"y", *summed}
    wrong = {n: float((found[n] - v).abs().max()) for n, v in {"y": expected.detach(), **summed}.items()}
    sent = 4 * (8 - 8 // dist.get_world_size()) * places * DIM * 8
    missing = int(routing.token_index.numel() - len(first))
    assert parallel.dropped is not None
    return {n: torch.tensor(e) for n, e in wrong.items()}, int(parallel.dropped), missing, parallel.traffic.rows, sent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder, saved = tmp_path_factory.mktemp("ranks"), {}
    for world in WORLDS:
        mp.start_processes(worker, args=(world, str(folder)), nprocs=world, start_method="fork")
        saved[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return saved


def close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * scale, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize(("world", "name", "chunks", "kind"), CASES)
def test_every_gate_gives_what_it_gives_with_whole_experts(
    ranks: Any, world: int, name: str, chunks: int, kind: int
) -> None:
    gate, summed, run = GATES[name], {}, (name, chunks, kind)
    for rank, sequences in enumerate(WORLDS[world]):
        moe, (x, context) = layer(gate, torch.float64, num_experts=EXPERTS[world]), inputs(gate, sequences, rank)
        y, gradient = step(moe, x, context)
        found, found_gradient, parameters, _ = ranks[world][rank][run]
        close(found, y, f"outputs of process {rank}")
        close(found_gradient, gradient, f"gradients of tokens of process {rank}")
        for parameter, p in moe.named_parameters():
            if p.grad is None:
                continue
            if is_spread(moe, parameter):
                summed[parameter] = summed.get(parameter, torch.zeros_like(p)) + p.grad
            elif p.grad.any():
                close(parameters[parameter], p.grad, parameter)
    assert summed
    for parameter, total in summed.items():
        for rank, saved in enumerate(ranks[world]):
            _, _, parameters, own = saved[run]
            if own[0] < own[1]:
                close(parameters[parameter], total[slice(*own)], f"{parameter} of process {rank}")
        held = [e for saved in ranks[world] for e in range(*saved[run][3])]
        assert held == list(range(len(total)))


def is_spread(moe: nn.Module, parameter: str) -> bool:
    """Whether a parameter is of experts that processes share out."""
    holder = "experts." if isinstance(moe.experts, Experts) else "experts.mlp."
    return parameter.startswith(holder)


@pytest.mark.parametrize("world", list(WORLDS))
def test_bytes_sent_are_those_of_the_closed_form(ranks: Any, world: int) -> None:
    for rank in ranks[world]:
        found, expected = rank["traffic"]
        assert found == expected > 0


def test_tokens_cross_once_to_a_node(ranks: Any) -> None:
    for rank in ranks[4]:
        between, expected_between, within, expected_within = rank["between nodes"]
        assert between == expected_between > 0
        assert within == expected_within > 0


def test_messages_of_fixed_size_carry_what_fits_and_wait_for_no_device(ranks: Any) -> None:
    for rank in ranks[4]:
        roomy = rank["static"][0]
        for wrong, dropped, missing, sent, expected in rank["static"]:
            assert all(error < 1e-9 for error in wrong.values())
            assert dropped == missing
            assert sent == expected
        assert roomy[1] == 0
    assert sum(rank["static"][1][1] for rank in ranks[4]) > 0


@pytest.mark.parametrize("world", list(WORLDS))
def test_shared_expert_and_chunks_run_while_tokens_travel(ranks: Any, world: int) -> None:
    for rank in ranks[world]:
        plain, chunked = rank["events"]
        assert plain[:4] == ["start", "shared", "land", "experts"]
        assert plain[4:6] == ["start", "land"]  # on the way back
        # Backward: gradients of results set out and land, those of tokens set out, the shared expert, they land.
        back = plain[6:]
        assert back == ["start", "land", "start", "shared backward", "land"]
        # The next chunk has set out before the experts take one; the last results are waited for at the end.
        assert chunked[:5] == ["start", "shared", "start", "land", "experts"]
        assert chunked[5:9] == ["start", "start", "land", "experts"]
        assert chunked.count("experts") == 3


def lone(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        ExpertParallel(0)
    with pytest.raises(ValueError, match="places must be at least 1, got 0"):
        StaticExpertParallel(3, 0)
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        ExpertParallel(3, chunks=0)
    with pytest.raises(ValueError, match="1 parts of 2 do not hold 3 experts"):
        ExpertParallel(3, part=2)
    parallel, experts = ExpertParallel(3), Experts(3, 4, 5)
    with pytest.raises(ValueError, match="4 whole experts cannot be spread as 3"):
        Experts(4, 4, 5).keep_own(parallel)
    experts.keep_own(parallel)
    with pytest.raises(ValueError, match="spread over processes already"):
        experts.keep_own(parallel)
    x, one = torch.randn(2, 4), torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="3 experts are spread, but the router routes 4"):
        experts(x, Routing.from_choices(one, torch.ones(2, 1), 4))
    assert experts(x, Routing.from_choices(one, torch.ones(2, 1), 3)).shape == x.shape
    assert parallel.traffic.rows == 0
    dist.destroy_process_group()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    mp.start_processes(lone, args=(str(tmp_path),), nprocs=1, start_method="fork")
