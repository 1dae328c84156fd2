"""Experts that stay on the host or in files, and come to where tokens are when tokens meet them.

T tokens, D width, E experts, S slots for them where tokens are, A assignments sorted by expert.
"""

from __future__ import annotations

import copy
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .expert_sources import Held, Source, tensors_of
from .experts import Experts
from .quantised import Compute, QuantisedExperts, computed_in
from .routing import Routing

if TYPE_CHECKING:
    from .routers import TopKRouter

READERS = 4  # threads that read experts while others are computed

Slots = Callable[[Tensor, Routing, list[int], list[int]], Tensor]


class OffloadedExperts(nn.Module):
    """E frozen experts of which S at most have memory where tokens are (Mixtral offloading, arXiv 2312.17238).

    held: `Experts` or `QuantisedExperts` of S experts, the slots; source: where all of them stay. An expert that tokens
    meet and that no slot holds takes the place of the one that was met longest ago. It comes while those that are there
    are computed; where tokens meet more experts than there are slots, these come by turns. Outputs, and gradients of
    tokens and combine weights, are those of all E experts in `held`'s kind, up to rounding: a token's experts are added
    in parts, without gradients in those that what was there makes. For the backward nothing is kept but the tokens,
    experts come again.

    With `follow`, what the next layer's gate would choose for this layer's tokens comes as soon as this layer's own
    experts have been asked for (2312.17238, section 3.2): a guess, which changes no output. It is made in eval mode for
    as few tokens as leave the next layer's slots free for its own choice.

    Several threads may call it at once, but none while another one's backward runs.

    `met`, `read` and `guessed` count experts met by tokens, those read for that, and those read on a guess. The
    experts are no parameters, and not in the state_dict.
    """

    parallel = None
    dropout = 0.0

    def __init__(self, held: Held, num_experts: int, source: Source) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden_dim = num_experts, held.dim, held.hidden_dim
        self.activation, self.gated, self.weigh_input = held.activation, held.gated, held.weigh_input
        self.source = source
        # No submodule: what is in the slots is no state of the model.
        object.__setattr__(self, "held", held.requires_grad_(False).eval())
        self.met = self.read = self.guessed = 0
        self._next: tuple[TopKRouter, OffloadedExperts] | None = None
        self._forget()

    held: Held

    @property
    def slots(self) -> int:
        """S, how many experts there is memory for."""
        return self.held.num_experts

    @property
    def numbers(self) -> int:
        """How many weights and biases all E experts have."""
        held = self.held
        count = (
            held.numbers if isinstance(held, QuantisedExperts) else sum(t.numel() for t in tensors_of(held).values())
        )
        return count // self.slots * self.num_experts

    def follow(self, router: TopKRouter, experts: OffloadedExperts) -> None:
        """Guess, by the gate of the next layer, which of its experts will be met."""
        self._next = router, experts

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As any module's, the slots moving along, but empty."""
        self._forget()
        super()._apply(fn, recurse)
        self.held._apply(fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy's slots hold nothing.
        return {name: value for name, value in self.__dict__.items() if name not in _PASSING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self, forked: bool = False) -> None:
        """Let no slot hold any expert."""
        if not forked:  # a forked process has none of its parent's threads
            wait(self.__dict__.get("_coming", {}).values())
        self._lock = threading.RLock()  # held while slots are chosen, and while what is in them is computed
        self._slot: OrderedDict[int, int] = OrderedDict()  # of each expert that is there, the one met last in the end
        self._free = list(range(self.slots))
        self._coming: dict[int, Future[Any]] = {}
        self._stream: Any = None
        self._users: set[Any] = set()  # streams that have computed with the slots
        _layers.add(self)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]."""

        def of_slots(x: Tensor, part: Routing, there: list[int], slots: list[int]) -> Tensor:
            if isinstance(self.held, Experts):
                return self.held(x, part)
            return self.held(x, part, _sent(np.array(slots), x.device))

        return self._by_turns(x, routing, of_slots)

    def in_groups(self, x: Tensor, routing: Routing, compute: Compute, learns: bool = False) -> Tensor:
        """The same, compute(weights, experts [G], x, part) saying what some experts add, as `QuantisedExperts`'."""

        def of_slots(x: Tensor, part: Routing, there: list[int], slots: list[int]) -> Tensor:
            experts = _sent(np.array(there), x.device)
            if isinstance(self.held, Experts):
                return compute(self.held.held, experts, x, part)
            which = _sent(np.array(slots), x.device)
            return self.held.in_groups(x, part, lambda w, n, x, p: compute(w, experts[n], x, p), learns, which)

        return self._by_turns(x, routing, of_slots, learns)

    # Which experts are needed the host decides.
    @torch.compiler.disable
    def _by_turns(self, x: Tensor, routing: Routing, compute: Slots, learns: bool = False) -> Tensor:
        """The sum of compute(x, part, there, slots) for parts of a decision.

        A part refers to the experts `there`, in these slots: in all of them for `Experts`, whose weights are a stack.
        In few bits experts have an order of their own. As they are decoded by a checkpoint inside ours, all but the
        slots must be in a backward what it was before.
        """
        if not routing.token_index.numel():
            dtype = computed_in(x)
            return x.to(dtype) * routing.weight.sum().to(dtype)  # no assignments, but gradients go back all the same
        bounds, likely = self._bounds(x, routing)
        busy = [e for e in range(self.num_experts) if bounds[e] < bounds[e + 1]]
        self.met += len(busy)
        kept = torch.is_grad_enabled() and (learns or x.requires_grad or routing.weight.requires_grad)
        groups = self._groups(busy, kept)
        total = None
        for n, group in enumerate(groups):
            # The next ones come while these are computed, into other slots.
            self.read += self._bring(group, groups[n + 1] if n + 1 < len(groups) and self.slots > 1 else [])
            if self._next is not None and n + 1 == len(groups):
                self._next[1].guessed += self._next[1]._bring(likely)
            given = (x, routing.weight, routing.token_index, bounds, group, compute)
            y = (
                checkpoint(self._some, *given, use_reentrant=False, preserve_rng_state=learns)
                if kept
                else self._some(*given)
            )
            total = y if total is None else total + y
        assert total is not None
        return total

    def _bounds(self, x: Tensor, routing: Routing) -> tuple[list[int], list[int]]:
        """Where each expert's assignments begin, and the experts that the next layer's tokens will probably meet."""
        if self._next is None or not self._may_guess(x, routing):
            return routing.offsets.tolist(), []
        chosen = self._next[0].likeliest(x).flatten()
        # One wait for both.
        found = torch.cat([routing.offsets, chosen.to(routing.offsets.dtype)]).tolist()
        return found[: self.num_experts + 1], sorted({*found[self.num_experts + 1 :]})

    def _may_guess(self, x: Tensor, routing: Routing) -> bool:
        assert self._next is not None
        router, experts = self._next
        elsewhere = router.weight.device != x.device  # as where layers are spread over devices
        if router.training or elsewhere or len(experts._slot) == experts.num_experts:
            return False
        return routing.num_tokens * router.k <= experts.slots

    def _groups(self, busy: list[int], kept: bool) -> list[list[int]]:
        """Experts that are computed together: those that are there, then others in halves of the slots.

        For a backward they do not depend on what is there: under activation checkpointing they are found once more.
        """
        here = busy if kept else [e for e in busy if e in self._slot]
        away = [] if kept else [e for e in busy if e not in self._slot]
        if len(busy) <= self.slots:
            return [group for group in (here, away) if group]
        size = max(1, self.slots // 2)
        order = [here[n : n + size] for n in range(0, len(here), size)]
        return order + [away[n : n + size] for n in range(0, len(away), size)]

    def _some(
        self, x: Tensor, weight: Tensor, token: Tensor, bounds: list[int], experts: list[int], compute: Slots
    ) -> Tensor:
        """What some experts, no more than there are slots, add."""
        with self._lock:
            self.read += self._bring(experts)  # others may have come since, in a backward or for another thread
            self._wait(experts)
            there, slots = experts, [self._slot[e] for e in experts]
            if isinstance(self.held, Experts):
                holders, slots = dict(zip(slots, experts)), list(range(self.slots))
                there = [holders.get(slot, -1) for slot in slots]
            ends = np.cumsum([0, *(bounds[e + 1] - bounds[e] if e >= 0 else 0 for e in there)], dtype=np.int32)
            spans = _sent(np.concatenate([np.arange(bounds[e], bounds[e + 1]) for e in there if e >= 0]), token.device)
            offsets = _sent(ends, token.device)
            part = Routing(token.index_select(0, spans), offsets, weight.index_select(0, spans), x.shape[0])
            y = compute(x, part, [max(e, 0) for e in there], slots)
            if self._stream is not None:
                self._users.add(torch.cuda.current_stream(self._stream.device))
            return y

    def _bring(self, experts: Sequence[int], more: Sequence[int] = ()) -> int:
        """Ask for experts that are not there, and for more that come after them; returns how many of them all."""
        with self._lock:
            wanted = [*experts, *more][: self.slots]
            for e in wanted:
                if e in self._slot:
                    self._slot.move_to_end(e)
            away = [e for e in wanted if e not in self._slot]
            done = self._done() if away else []
            for e in away:
                if not self._free:
                    old = next(other for other in self._slot if other not in wanted)
                    if old in self._coming and not self._coming[old].cancel():
                        wait([self._coming[old]])
                    self._coming.pop(old, None)
                    self._free.append(self._slot.pop(old))
                self._coming[e] = _readers().submit(self._fetch, e, self._free[-1], done)
                self._slot[e] = self._free.pop()
            return len(away)

    @property
    def _any(self) -> Tensor:
        """One of the slots' tensors."""
        found: Tensor = getattr(self.held, "down_proj" if isinstance(self.held, Experts) else "down_proj_codes")
        return found

    def _done(self) -> list[Any]:
        """When all that was computed with the slots so far is done; nothing where the host computes itself."""
        device = self._any.device
        if device.type != "cuda":
            return []
        current = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
            for tensor in tensors_of(self.held).values():
                tensor.record_stream(self._stream)  # its memory is nobody else's before what comes has come
        return [stream.record_event() for stream in {current, *self._users}]

    def _fetch(self, expert: int, slot: int, done: list[Any]) -> Any:
        """Fill a slot, on a stream of its own on a GPU: when that is done there."""
        # What was made in inference mode is written to in it alone.
        with torch.inference_mode() if self._any.is_inference() else torch.no_grad():
            held = _uncounted(self.held)
            if not done:
                return self.source.read(expert, held, slot)
            with torch.cuda.stream(self._stream):
                for event in done:
                    self._stream.wait_event(event)
                self.source.read(expert, held, slot)
                return self._stream.record_event()

    def _wait(self, experts: Sequence[int]) -> None:
        """Let what is computed from now on find these experts in their slots; raises what reading them raised."""
        for e in experts:
            coming = self._coming.get(e)
            if coming is None:
                continue
            if coming.exception() is not None:
                # It may be long ago that this was asked for, and the reason may have gone.
                del self._coming[e]
                self._free.append(self._slot.pop(e))
                self._bring([e])
                coming = self._coming[e]
                if coming.exception() is not None:
                    del self._coming[e]
                    self._free.append(self._slot.pop(e))
            event = coming.result()
            if event is None or event.query():
                del self._coming[e]
            else:  # kept: another stream may ask for it before it is there
                torch.cuda.current_stream(self._stream.device).wait_event(event)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        kind = self.held.format if isinstance(self.held, QuantisedExperts) else "whole"
        return f"{self.num_experts}, slots={self.slots}, dim={self.dim}, hidden_dim={self.hidden_dim}, {kind}"


def _uncounted(held: Any) -> Any:
    """The same memory, writes to which autograd does not count.

    Slots are one tensor: where an expert comes to one of them while another's is saved for a backward, autograd would
    take that for a change of what it saves. A backward brings its experts again.
    """
    twin = copy.copy(held)
    twin._parameters = {n: p if p is None else nn.Parameter(p.data, False) for n, p in held._parameters.items()}
    twin._buffers = {name: buffer if buffer is None else buffer.data for name, buffer in held._buffers.items()}
    return twin


def _sent(numbers: Any, device: torch.device) -> Tensor:
    """Numbers where tokens are; the host does not wait for a GPU, which may be waiting for experts."""
    found = torch.from_numpy(numbers)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)


_PASSING = ("_lock", "_slot", "_free", "_coming", "_stream", "_users")
_layers: weakref.WeakSet[OffloadedExperts] = weakref.WeakSet()
_pool: ThreadPoolExecutor | None = None


def _readers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(READERS, thread_name_prefix="experts")
    return _pool


def _forget_readers() -> None:
    global _pool
    _pool = None
    for layer in list(_layers):
        layer._forget(forked=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_readers)
