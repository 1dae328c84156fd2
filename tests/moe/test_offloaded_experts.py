"""Experts that come when tokens meet them, against a float64 loop over all of them."""

import copy
import gc
import multiprocessing
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import zoo
from zoo.moe import Experts, LoRAOfExperts, MoE, OffloadedExperts, QuantisedExperts, Routing
from zoo.moe.capacity import Capacity
from zoo.moe.expert_sources import OnHost
from zoo.moe.routers import TopKRouter

D, F = 24, 20


def experts_of(count: int, activation: str = "swiglu", bias: bool = False) -> Experts:
    experts = Experts(count, D, F, activation=activation, bias=bias)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.requires_grad_(False)


def offloaded(experts: Experts, slots: int) -> OffloadedExperts:
    held = Experts(slots, D, F, activation=experts.activation, bias=experts.b_in is not None)
    return OffloadedExperts(held, experts.num_experts, OnHost(experts))


def random_routing(tokens: int, count: int, k: int) -> Routing:
    expert = torch.stack([torch.randperm(count)[:k] for _ in range(tokens)]) if tokens else torch.zeros(0, k).long()
    return Routing.from_choices(expert, torch.rand(tokens, k), count)


def loop(experts: Experts, x: Tensor, routing: Routing, weight: Tensor) -> Tensor:
    """The definition, one assignment at a time, in float64."""
    w_in, w_out = experts.w_in.double(), experts.w_out.double()
    rows = [torch.zeros(D, dtype=torch.float64) for _ in range(routing.num_tokens)]
    for n, (t, e) in enumerate(zip(routing.token_index.tolist(), routing.expert_index.tolist())):
        hidden = w_in[e] @ x[t]
        if experts.b_in is not None:
            hidden = hidden + experts.b_in[e].double()
        gate, up = hidden.chunk(2)
        out = w_out[e] @ (torch.nn.functional.silu(gate) * up)
        if experts.b_out is not None:
            out = out + experts.b_out[e].double()
        rows[t] = rows[t] + weight[n] * out
    return torch.stack(rows) if rows else torch.zeros(0, D, dtype=torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("slots", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_all_experts(slots: int, bias: bool) -> None:
    experts = experts_of(7, bias=bias)
    layer = offloaded(experts, slots)
    for tokens, k in [(1, 1), (1, 3), (5, 2), (40, 7)]:  # the last: all experts, whatever the slots
        routing = random_routing(tokens, 7, k)
        x = torch.randn(tokens, D, requires_grad=True)
        routing.weight.requires_grad_()
        y = layer(x, routing)
        x64, weight64 = x.detach().double().requires_grad_(), routing.weight.detach().double().requires_grad_()
        expected = loop(experts, x64, routing, weight64)
        assert error(y, expected) < 1e-6
        g = torch.randn_like(y)
        dx, dw = torch.autograd.grad(y, [x, routing.weight], g)
        ex, ew = torch.autograd.grad(expected, [x64, weight64], g.double())
        assert error(dx, ex) < 2e-6
        assert (dw.double() - ew).norm() < 1e-6 * g.norm() * expected.norm() / weight64.min()  # of products that cancel


def test_backward_after_other_experts_came() -> None:
    """A slot holds another expert by then: it comes again."""
    experts = experts_of(6)
    layer = offloaded(experts, 2)
    x = torch.randn(4, D, requires_grad=True)
    first, second = (Routing.from_choices(torch.full((4, 1), e), torch.ones(4, 1), 6) for e in (1, 4))
    y = layer(x, first)
    for e in range(6):
        layer(torch.randn(4, D), Routing.from_choices(torch.full((4, 1), e), torch.ones(4, 1), 6))
    z = layer(x, second)
    (found,) = torch.autograd.grad(y.sum() + 2 * z.sum(), x)
    x64 = x.detach().double().requires_grad_()
    one = torch.ones(4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(
        loop(experts, x64, first, one).sum() + 2 * loop(experts, x64, second, one).sum(), x64
    )
    assert error(found, expected) < 1e-6


def test_no_tokens_and_no_assignments() -> None:
    layer = offloaded(experts_of(4), 2)
    x = torch.randn(0, D, requires_grad=True)
    y = layer(x, random_routing(0, 4, 2))
    assert y.shape == (0, D)
    assert torch.autograd.grad(y.sum(), x)[0].shape == (0, D)
    x = torch.randn(3, D, requires_grad=True)
    none = Routing.from_choices(torch.zeros(3, 1).long(), torch.rand(3, 1), 4, keep=torch.zeros(3, 1).bool())
    assert not layer(x, none).any()
    assert layer.read == 0


def test_those_met_last_stay() -> None:
    layer = offloaded(experts_of(5), 2)
    order = [0, 1, 0, 2, 0, 1, 1, 3, 1]  # by hand: read 0, 1, 2 (for 1), 1 (for 2), 3 (for 0)
    for e in order:
        layer(torch.randn(2, D), Routing.from_choices(torch.full((2, 1), e), torch.ones(2, 1), 5))
    assert (layer.met, layer.read) == (len(order), 5)


@pytest.mark.parametrize("format", ["float8", "int8", "mxfp4"])
def test_experts_in_few_bits_come_as_codes(format: str) -> None:
    whole = Experts(5, 64, 32)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    few = QuantisedExperts.of(whole, format)
    layer = OffloadedExperts(QuantisedExperts(2, 64, 32, format=format), 5, OnHost(few))
    routing = random_routing(30, 5, 2)
    x = torch.randn(30, 64)
    assert torch.allclose(layer(x, routing), few(x, routing), rtol=1e-4, atol=1e-4)
    assert layer.numbers == few.numbers


def test_it_has_no_parameters_and_no_state_and_can_be_cast_and_copied() -> None:
    experts = experts_of(4)
    layer = offloaded(experts, 2)
    x, routing = torch.randn(6, D), random_routing(6, 4, 2)
    before = layer(x, routing)
    assert not list(layer.parameters())
    assert not layer.state_dict()
    copied = copy.deepcopy(layer)
    assert copied.source is layer.source
    assert copied.held is not layer.held
    assert torch.equal(copied(x, routing), before)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, routing), before)
    assert torch.allclose(layer.double()(x.double(), routing), before.double(), atol=1e-5)
    low = layer.bfloat16()(x.bfloat16(), routing)
    assert low.dtype == torch.bfloat16
    assert error(low, before.double()) < 0.02


class Failing(OnHost):
    """A source that cannot be read for a while."""

    broken = False

    def read(self, expert: int, held: Experts | QuantisedExperts, slot: int) -> None:
        if self.broken:
            raise OSError("the disk is gone")
        super().read(expert, held, slot)


def test_an_expert_that_cannot_be_read_is_asked_for_again() -> None:
    experts = experts_of(4)
    source = Failing(experts)
    layer = OffloadedExperts(Experts(2, D, F), 4, source)
    x, routing = torch.randn(6, D), random_routing(6, 4, 2)
    source.broken = True
    with pytest.raises(OSError, match="the disk is gone"):
        layer(x, routing)
    source.broken = False
    for _ in range(2):
        assert error(layer(x, routing), loop(experts, x.double(), routing, routing.weight.double())) < 1e-6


class Slow(OnHost):
    """A source that waits until it may be read."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        self.may, self.asked = threading.Event(), threading.Event()

    def read(self, expert: int, held: Experts | QuantisedExperts, slot: int) -> None:
        self.asked.set()
        assert self.may.wait(20)
        super().read(expert, held, slot)


def layers(sources: list[OnHost], slots: int) -> list[MoE]:
    found = []
    for source in sources:
        held = Experts(slots, D, F)
        found.append(MoE(TopKRouter(D, 8, k=2), OffloadedExperts(held, 8, source)).eval())  # type: ignore[arg-type]
    return found


def test_the_next_layers_experts_come_on_a_guess_before_it_is_asked() -> None:
    experts = experts_of(8)
    slow = Slow(experts)
    first, second = layers([OnHost(experts), slow], 4)
    first.experts.follow(second.router, second.experts)  # type: ignore[operator, arg-type]
    x = torch.randn(1, D)
    with torch.no_grad():
        y = first(x)
        assert slow.asked.wait(20)  # while nobody has called the second layer
        slow.may.set()
        chosen = second.router(x).expert_index
        z = second(x)
    assert second.experts.guessed == 2
    assert second.experts.read == 0
    routing = second.router(x)
    assert sorted(chosen.tolist()) == sorted(routing.expert_index.tolist())
    assert error(z, loop(experts, x.double(), routing, routing.weight.double())) < 1e-6
    routing = first.router(x)
    assert error(y, loop(experts, x.double(), routing, routing.weight.double())) < 1e-6


def test_nothing_is_guessed_in_training_or_for_more_tokens_than_there_is_room() -> None:
    experts = experts_of(8)
    first, second = layers([OnHost(experts), OnHost(experts)], 4)
    first.experts.follow(second.router, second.experts)  # type: ignore[operator, arg-type]
    first(torch.randn(3, D))
    second.train()
    first(torch.randn(1, D))
    second.eval()
    second.router.to("meta")  # another device than the tokens'
    first(torch.randn(1, D))
    assert second.experts.guessed == 0


def test_activation_checkpointing_around_it() -> None:
    """What is there when a forward is repeated is not what was there the first time."""
    experts = experts_of(7)
    layer = offloaded(experts, 4)
    for _ in range(6):
        tokens = int(torch.randint(1, 9, ()))
        routing = random_routing(tokens, 7, 2)
        x = torch.randn(tokens, D, requires_grad=True)
        routing.weight.requires_grad_()
        y = checkpoint(layer, x, routing, use_reentrant=False)
        layer(torch.randn(5, D), random_routing(5, 7, 1))
        g = torch.randn_like(y)
        dx, dw = torch.autograd.grad(y, [x, routing.weight], g)
        x64, weight64 = x.detach().double().requires_grad_(), routing.weight.detach().double().requires_grad_()
        expected = loop(experts, x64, routing, weight64)
        ex, ew = torch.autograd.grad(expected, [x64, weight64], g.double())
        assert error(dx, ex) < 2e-6
        assert torch.allclose(dw.double(), ew, rtol=1e-4, atol=1e-4)


def test_threads_call_it_at_once() -> None:
    experts = experts_of(7)
    layer = offloaded(experts, 2)
    given = [(torch.randn(6, D), random_routing(6, 7, 2)) for _ in range(40)]
    expected = [loop(experts, x.double(), r, r.weight.double()) for x, r in given]
    errors: list[float] = []

    def call(first: int) -> None:
        for n in range(first, len(given), 4):
            errors.append(error(layer(*given[n]), expected[n]))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(given)
    assert max(errors) < 1e-6


def while_experts_come() -> tuple[Experts, Slow, MoE]:
    """A layer whose experts have been asked for on a guess, and do not come."""
    experts = experts_of(8)
    slow = Slow(experts)
    first, second = layers([OnHost(experts), slow], 4)
    first.experts.follow(second.router, second.experts)  # type: ignore[operator, arg-type]
    with torch.no_grad():
        first(torch.randn(2, D))
    assert slow.asked.wait(20)
    return experts, slow, second


def test_it_is_copied_while_experts_come() -> None:
    experts, slow, layer = while_experts_come()
    copied, again = copy.deepcopy(layer), copy.deepcopy(layer.experts)
    slow.may.set()
    x = torch.randn(5, D)
    routing = layer.router(x)
    expected = loop(experts, x.double(), routing, routing.weight.double())
    for y in (layer(x), copied(x), again(x, routing)):
        assert error(y, expected) < 1e-6


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_process_waits_for_none_of_its_parents_reads() -> None:
    experts, slow, layer = while_experts_come()
    x = torch.randn(5, D)
    with torch.no_grad():
        routing = layer.router(x)
        expected = loop(experts, x.double(), routing, routing.weight.double())

    def child() -> None:
        slow.may = threading.Event()
        slow.may.set()
        with torch.no_grad():
            assert error(layer(x), expected) < 1e-6

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    slow.may.set()
    process.kill()
    assert process.exitcode == 0


def test_made_and_called_in_inference_mode() -> None:
    experts = experts_of(5)
    with torch.inference_mode():
        layer = offloaded(experts, 2)
        x, routing = torch.randn(6, D), random_routing(6, 5, 2)
        assert error(layer(x, routing), loop(experts, x.double(), routing, routing.weight.double())) < 1e-6


def test_pages_are_locked_as_long_as_their_memory_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own calls are stood in for: no GPU is needed to see when they are made."""
    locked: dict[int, int] = {}
    runtime = SimpleNamespace(
        cudaHostRegister=lambda at, size, flags: locked.setdefault(at, size) and 0, cudaHostUnregister=locked.pop
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    experts = Experts(4, 512, 256, bias=True).requires_grad_(False)
    matrices = (experts.gate_up_proj, experts.down_proj)
    expected = {w.data_ptr(): w.numel() * w.itemsize for w in matrices}
    source = OnHost(experts, lock=True)
    assert locked == expected  # and no biases, which share their pages with others
    del source
    gc.collect()
    assert locked == expected
    del experts, matrices
    gc.collect()
    assert not locked


@pytest.mark.parametrize(
    "options",
    [{"capacity": Capacity(1.0), "group_size": "sequence"}, {"losses": {"sequence": 1.0}, "eval_losses": True}],
)
def test_a_guess_needs_no_more_than_tokens(options: dict[str, Any]) -> None:
    """What a gate is told besides, as which tokens make a sequence, is not known yet; and hooks see decisions alone."""
    experts = experts_of(8)
    first, second = layers([OnHost(experts), OnHost(experts)], 4)
    second.router = TopKRouter(D, 8, k=2, **options).eval()
    first.experts.follow(second.router, second.experts)  # type: ignore[operator, arg-type]
    calls: list[int] = []
    second.router.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(1, 2, D)
    with torch.no_grad():
        first(x)
        assert second.experts.guessed == len({*(x[0] @ second.router.weight.T).topk(2).indices.flatten().tolist()})
        assert not calls
        second(x)
    assert len(calls) == 1


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid"])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_likeliest_experts_are_those_a_gate_chooses(score: str, groups: int) -> None:
    given: dict[str, Any] = {
        "score": score,
        "num_groups": groups,
        "group_topk": min(2, groups),
        "normalize_logits": 1.0,
    }
    router = TopKRouter(D, 16, k=3, selection_bias=True, bias=True, **given).eval()
    router.selection_bias.normal_(std=0.1)  # type: ignore[union-attr]
    x = torch.randn(30, D, dtype=torch.bfloat16)
    routing = router(x)
    chosen = sorted(zip(routing.token_index.tolist(), routing.expert_index.tolist()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sorted((t, e) for t, row in enumerate(router.likeliest(x).tolist()) for e in row) == chosen


def test_no_assignments_have_the_type_of_others_under_autocast() -> None:
    layer, x = offloaded(experts_of(4), 2), torch.randn(3, D)
    none = Routing.from_choices(torch.zeros(3, 1).long(), torch.rand(3, 1), 4, keep=torch.zeros(3, 1).bool())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x, none).dtype == layer(x, random_routing(3, 4, 1)).dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["float8", "int8", "mxfp4"])
@pytest.mark.parametrize("decoded", [1, 1 << 27])  # one expert at a time, all of them
def test_gradients_through_few_bits_when_experts_come_to_other_slots(
    format: str, decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.moe.quantised.DECODED", decoded)
    whole = Experts(12, 64, 32, bias=True)
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    few = QuantisedExperts.of(whole, format)
    exact = Experts(12, 64, 32, bias=True)
    for name, value in zip(("gate_up_proj", "down_proj"), (few.w_in, few.w_out)):
        getattr(exact, name).data.copy_(value)
    exact.gate_up_proj_bias.data.copy_(few.b_in)  # type: ignore[union-attr, arg-type]
    exact.down_proj_bias.data.copy_(few.b_out)  # type: ignore[union-attr, arg-type]
    for slots in (3, 5, 11):
        layer = OffloadedExperts(QuantisedExperts(slots, 64, 32, bias=True, format=format), 12, OnHost(few))
        tuned = LoRAOfExperts(layer, 2, parts=["gate", "down"])
        for pair in tuned.lora.parameters():
            torch.nn.init.normal_(pair, std=0.3)
        merged = copy.deepcopy(exact)
        with torch.no_grad():
            a, b = tuned.lora["gate"].a, tuned.lora["gate"].b
            merged.gate_up_proj[:, :32] += 8.0 * b @ a
            merged.down_proj += 8.0 * tuned.lora["down"].b @ tuned.lora["down"].a
        for experts, reference in ((layer, exact), (tuned, merged), (layer, exact)):
            routing = random_routing(20, 12, 7)
            x = torch.randn(20, 64, requires_grad=True)
            routing.weight.requires_grad_()
            y = experts(x, routing)
            g = torch.randn_like(y)
            x64, weight64 = x.detach().double().requires_grad_(), routing.weight.detach().double().requires_grad_()
            rows = []
            for n, (t, e) in enumerate(zip(routing.token_index.tolist(), routing.expert_index.tolist())):
                into = reference.gate_up_proj[e].double() @ x64[t] + reference.gate_up_proj_bias[e].double()
                hidden = torch.nn.functional.silu(into[:32]) * into[32:]
                rows.append(weight64[n] * (reference.down_proj[e].double() @ hidden + reference.down_proj_bias[e]))
            expected = torch.zeros(20, 64, dtype=torch.float64).index_add(0, routing.token_index, torch.stack(rows))
            assert error(y, expected) < 1e-5
            found = torch.autograd.grad(y, [x, routing.weight], g)
            wanted = torch.autograd.grad(expected, [x64, weight64], g.double())
            assert all(error(a, b) < 1e-4 for a, b in zip(found, wanted))


@pytest.mark.parametrize("format", [None, "int8"])
def test_experts_that_come_are_no_change_of_what_a_backward_saves(format: str | None) -> None:
    """They come from another thread while others, in the same tensor, are saved: autograd would raise."""
    moe: Any = MoE(TopKRouter(8, 6, k=2), Experts(6, 8, 12))
    made: Any = zoo.offload(moe if format is None else zoo.quantise(moe, format), 2)
    held = made.experts.held
    before = {name: tensor._version for name, tensor in held.state_dict(keep_vars=True).items()}
    x = torch.randn(20, 8, requires_grad=True)
    made(x).sum().backward()
    assert made.experts.read >= 6
    assert before == {name: tensor._version for name, tensor in held.state_dict(keep_vars=True).items()}
