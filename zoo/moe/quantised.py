"""Experts that are kept in numbers of few bits, and computed with in those of their tokens.

T tokens, D width, F hidden, H = 2F (gated) or F, E experts, A assignments sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import autocast
from .experts import Experts, Weights, check_sizes
from .kernels import check_backend, coded, get_activation
from .kernels.codes import FORMATS
from .routing import Routing, count_experts

DECODED = 1 << 27  # numbers that are decoded at a time on a GPU, on the CPU a quarter
FEW = 32  # rows an expert has on average up to which the CPU multiplies what it decodes at once
KINDS = ("codes", "scales")

Compute = Callable[[Weights, Tensor, Tensor, Routing], Tensor]


def _waits(x: Tensor) -> bool:
    """Whether the host knows numbers where x is as soon as they are computed."""
    return x.device.type == "cpu"


def computed_in(x: Tensor) -> torch.dtype:
    """The type that products of x have."""
    rounded = x.dtype != torch.float64 and autocast.is_on(x)
    return torch.get_autocast_dtype(x.device.type) if rounded else x.dtype


class QuantisedExperts(nn.Module):
    """E MLPs as `Experts`, frozen, their matrices kept in one of `zoo.moe.kernels.codes.FORMATS` (MoQE 2310.02410).

    A float8 matrix takes half the memory of a bfloat16 one, an int8 one too, an MXFP4 one 0.27 of it. Outputs, and
    gradients of tokens and combine weights, are those of `Experts` with the numbers that `held` gives. On a GPU Triton
    kernels read the codes and decode them in registers, without waiting for the host, where experts have up to
    `kernels.coded.FUSED` rows on average; the backward keeps what that of `Experts` does. Elsewhere those that tokens
    meet are decoded when they are needed, some at a time, to the tokens' dtype, and again in the backward, for which
    nothing is kept but the tokens.

    Buffers: NAME_codes and NAME_scales of gate_up_proj [E, 2F, D] (gate and up have scales of their own) or up_proj
    [E, F, D], and of down_proj [E, D, F], and with `bias` gate_up_proj_bias or up_proj_bias, and down_proj_bias.
    Raises ValueError for an unknown format or activation, sizes below one, and rows that a format does not divide.
    """

    parallel = None
    down_proj_bias: Tensor | None
    dropout = 0.0

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        bias: bool = False,
        format: str = "float8",
        backend: str = "auto",
        weigh_input: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("QuantisedExperts", num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        check_backend(backend)
        if format not in FORMATS:
            raise ValueError(f"QuantisedExperts: unknown format {format!r}; known: {', '.join(FORMATS)}")
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.activation, self.format, self.backend = activation, format, backend
        self.weigh_input = weigh_input
        self.gated = get_activation(activation).gated
        self._in = "gate_up_proj" if self.gated else "up_proj"
        self.parts = {self._in: 2 if self.gated else 1, "down_proj": 1}  # matrices with scales of their own
        self._shapes = {self._in: (hidden_dim, dim), "down_proj": (dim, hidden_dim)}
        for name, (rows, columns) in self._shapes.items():
            for kind, (size, dtype) in zip(KINDS, FORMATS[format].sizes(rows, columns)):
                stacked = (num_experts, self.parts[name] * size[0], size[1])
                self.register_buffer(f"{name}_{kind}", torch.zeros(stacked, dtype=dtype))
        wide = hidden_dim * self.parts[self._in]
        self.register_buffer(f"{self._in}_bias", torch.zeros(num_experts, wide) if bias else None)
        self.register_buffer("down_proj_bias", torch.zeros(num_experts, dim) if bias else None)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As any module's, but scales keep their dtype when a model is cast."""
        scales = {name: getattr(self, name) for name in (f"{part}_scales" for part in self.parts)}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            if (now := getattr(self, name)).dtype != before.dtype:
                setattr(self, name, before.to(now.device))
        return self

    @classmethod
    @torch.no_grad()
    def of(cls, experts: Experts, format: str = "float8") -> QuantisedExperts:
        """The same experts, rounded to a format, without dropout; raises ValueError for numbers that are not finite."""
        if experts.parallel is not None:
            raise ValueError("QuantisedExperts: experts that are spread over processes cannot be quantised")
        sizes = (experts.num_experts, experts.dim, experts.hidden_dim, experts.activation, experts.b_in is not None)
        with experts.w_out.device:
            found = cls(*sizes, format, experts.backend, experts.weigh_input)
        if not experts.w_out.is_meta:
            for e in range(experts.num_experts):
                found.encode(found._in, e, experts.w_in[e])
                found.encode("down_proj", e, experts.w_out[e])
        for name, value in ((f"{found._in}_bias", experts.b_in), ("down_proj_bias", experts.b_out)):
            if value is not None:
                setattr(found, name, value.detach().clone())
        return found.train(experts.training)

    @torch.no_grad()
    def encode(self, name: str, e: int, values: Tensor) -> None:
        """Keep one expert's matrix [2F, D], [F, D] or [D, F]; name is gate_up_proj, up_proj or down_proj."""
        codes, scales = FORMATS[self.format].encode(values.unflatten(0, (self.parts[name], -1)))
        getattr(self, f"{name}_codes")[e] = codes.flatten(0, 1)
        getattr(self, f"{name}_scales")[e] = scales.flatten(0, 1)

    def decoded(self, name: str, experts: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """The matrices [G, R, C] of some experts."""
        parts = self.parts[name]
        codes, scales = (getattr(self, f"{name}_{kind}")[experts] for kind in KINDS)
        values = FORMATS[self.format].decode(
            codes.unflatten(1, (parts, -1)).flatten(0, 1), scales.unflatten(1, (parts, -1)).flatten(0, 1), dtype
        )
        return values.unflatten(0, (-1, parts)).flatten(1, 2)

    @property
    def numbers(self) -> int:
        """How many weights and biases that is."""
        each = sum(self.parts[name] * rows * columns for name, (rows, columns) in self._shapes.items())
        return self.num_experts * each + sum(b.numel() for b in (self.b_in, self.b_out) if b is not None)

    @property
    def w_in(self) -> Tensor:
        """Stacked input projection, [E, 2F, D] or [E, F, D], decoded to float32."""
        return self.decoded(self._in, slice(None), torch.float32)

    @property
    def w_out(self) -> Tensor:
        """Stacked output projection, [E, D, F], decoded to float32."""
        return self.decoded("down_proj", slice(None), torch.float32)

    @property
    def b_in(self) -> Tensor | None:
        """Bias of the input projection, [E, 2F] or [E, F], or None."""
        bias: Tensor | None = getattr(self, f"{self._in}_bias")
        return bias

    @property
    def b_out(self) -> Tensor | None:
        """Bias of the output projection, [E, D], or None."""
        return self.down_proj_bias

    @property
    def held(self) -> Weights:
        """All of them, decoded to float32."""
        return Weights(self.w_in, self.w_out, self.b_in, self.b_out)

    compute_with: Any = Experts.compute_with

    # Which experts are decoded the host decides.
    @torch.compiler.disable
    def forward(self, x: Tensor, routing: Routing, which: Tensor | None = None) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D].

        which: of the experts that `routing` refers to, which they are here; None where they are the same.
        """
        dtype, count = computed_in(x), routing.token_index.numel()
        kept = torch.is_grad_enabled() and (x.requires_grad or routing.weight.requires_grad)
        if not kept and _waits(x) and count and count <= FEW * self.num_experts and dtype != torch.float64:
            return self._few(x, routing, dtype, which)
        if not _waits(x) and count <= coded.FUSED * self.num_experts and self.unfused(x) is None:
            return self.fused(x, routing, which)
        return self.decoded_first(x, routing, which)

    def unfused(self, x: Tensor) -> str | None:
        """Why `fused` cannot compute tokens x; None where it can."""
        if self.backend not in ("auto", "triton"):
            return f"backend {self.backend!r} multiplies whole weights"
        return coded.unsupported(x, computed_in(x), self.activation)

    def fused(self, x: Tensor, routing: Routing, which: Tensor | None = None) -> Tensor:
        """The same by kernels that read codes: nothing decoded reaches memory."""
        if which is not None:
            routing = _in_order(routing, which, self.num_experts)
        token, weight, place = routing.token_index, routing.weight, routing.place
        rows = x.to(computed_in(x))
        if self.weigh_input:
            # Every assignment is a token of its own, weighed before the experts.
            rows = rows.index_select(0, token) * weight[:, None].to(rows.dtype)
            token, weight, place = torch.arange(token.numel(), device=x.device), torch.ones_like(weight), None
        w_in, w_out = ((getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales")) for name in self._shapes)
        b_in, b_out = (b if b is None else b.to(rows.dtype) for b in (self.b_in, self.b_out))
        how = (token, routing.offsets, self.activation, self.format, place)
        y = coded.moe_mlp_coded(rows, w_in, w_out, b_in, b_out, weight, *how)
        return y.new_zeros(x.shape).index_add(0, routing.token_index, y) if self.weigh_input else y

    def decoded_first(self, x: Tensor, routing: Routing, which: Tensor | None = None) -> Tensor:
        """The same by whole weights, a few experts decoded at a time."""
        compute: Compute = lambda weights, _, x, part: self.compute_with(weights, x, part)  # noqa: E731
        return self.in_groups(x, routing, compute, which=which)

    def in_groups(
        self, x: Tensor, routing: Routing, compute: Compute, learns: bool = False, which: Tensor | None = None
    ) -> Tensor:
        """The same, a few experts decoded at a time: compute(weights, experts [G], x, part) says what these add.

        `part` is of their assignments alone. `learns` where what `compute` holds itself has gradients.
        """
        dtype = computed_in(x)
        kept = torch.is_grad_enabled() and (learns or x.requires_grad or routing.weight.requires_grad)
        total = None
        for experts, part in self._groups(x, routing):
            # An argument: where experts come and go it is another one in a backward.
            given = (x, part.weight, experts if which is None else which[experts], experts, part, dtype, compute)
            y = checkpoint(self._some, *given, use_reentrant=False) if kept else self._some(*given)
            total = y if total is None else total + y
        if total is None:
            return x.to(dtype) * routing.weight.sum().to(dtype)  # no assignments, but gradients go back all the same
        return total

    def _some(
        self,
        x: Tensor,
        weight: Tensor,
        which: Tensor,
        experts: Tensor,
        part: Routing,
        dtype: torch.dtype,
        compute: Compute,
    ) -> Tensor:
        """What some experts add."""
        with torch.no_grad():
            w_in, w_out = (self.decoded(name, which, dtype) for name in self._shapes)
            b_in, b_out = (b if b is None else b[which].to(dtype) for b in (self.b_in, self.b_out))
        routing = Routing(part.token_index, part.offsets, weight, part.num_tokens)
        return compute(Weights(w_in, w_out, b_in, b_out), experts, x, routing)

    def _few(self, x: Tensor, routing: Routing, dtype: torch.dtype, which: Tensor | None) -> Tensor:
        """The same on the CPU for a few tokens, without gradients: nothing decoded leaves the cache."""
        act, form, bounds = get_activation(self.activation), FORMATS[self.format], routing.offsets.tolist()
        rows = x.index_select(0, routing.token_index).to(dtype)
        weight = routing.weight[:, None].to(dtype)
        if self.weigh_input:
            rows = rows * weight
        out, here = torch.empty_like(rows), range(self.num_experts) if which is None else which.tolist()
        for n, e in ((n, e) for n, e in enumerate(here) if bounds[n] < bounds[n + 1]):
            hidden, span = rows[bounds[n] : bounds[n + 1]], slice(bounds[n], bounds[n + 1])
            for name, bias in zip(self._shapes, (self.b_in, self.b_out)):
                codes, scales = (
                    getattr(self, f"{name}_{kind}")[e].unflatten(0, (self.parts[name], -1)) for kind in KINDS
                )
                product = hidden.new_empty(len(hidden), len(codes), codes.shape[1])
                for part in range(len(codes)):
                    form.linear(hidden, codes[part], scales[part], product[:, part])
                product = product.flatten(1)
                if bias is not None:
                    product += bias[e].to(dtype)
                hidden = product if name == "down_proj" else act.forward(product)
            out[span] = hidden
        if not self.weigh_input:
            out *= weight
        return out.new_zeros(x.shape).index_add_(0, routing.token_index, out)

    def _groups(self, x: Tensor, routing: Routing) -> Iterator[tuple[Tensor, Routing]]:
        """Experts [G] that are decoded together, and the decision about them alone."""
        count, tokens = routing.token_index.numel(), routing.num_tokens
        each = (self.parts[self._in] + 1) * self.dim * self.hidden_dim
        if not count:
            return
        if not _waits(x) and count * each <= DECODED:
            # An expert for each assignment, so that the host need not know which.
            starts = torch.arange(count + 1, dtype=routing.offsets.dtype, device=x.device)
            yield routing.expert_index, Routing(routing.token_index, starts, routing.weight, tokens)
            return
        bounds = routing.offsets.tolist()
        busy = [e for e in range(routing.num_experts) if bounds[e] < bounds[e + 1]]
        size = max(1, (DECODED // 4 if _waits(x) else DECODED) // each)
        for group in (busy[n : n + size] for n in range(0, len(busy), size)):
            first, last = bounds[group[0]], bounds[group[-1] + 1]
            ends = torch.tensor([0, *(bounds[e + 1] - first for e in group)], dtype=routing.offsets.dtype)
            span = slice(first, last)
            experts = torch.tensor(group, device=x.device)
            offsets = ends.to(x.device)
            yield experts, Routing(routing.token_index[span], offsets, routing.weight[span], tokens)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        sizes = f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}"
        return f"{sizes}, activation={self.activation!r}, format={self.format!r}"


def _in_order(routing: Routing, which: Tensor, num_experts: int) -> Routing:
    """A decision about the experts `which`, in any order, as one about all, in theirs."""
    expert = which[routing.expert_index]
    order = expert.argsort(stable=True)
    offsets = torch.zeros(num_experts + 1, dtype=routing.offsets.dtype, device=expert.device)
    offsets[1:] = count_experts(expert, num_experts).cumsum(0)
    return Routing(routing.token_index[order], offsets, routing.weight[order], routing.num_tokens)
