"""Experts whose weights are stacked into one tensor a projection, laid out as `transformers` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from . import shadows
from .dispatch import ExpertParallel
from .dispatch_nodes import HierarchicalExpertParallel
from .kernels import check_backend, get_activation, moe_mlp
from .routing import Routing


def check_sizes(kind: str, **sizes: int) -> None:
    """Raise ValueError naming the first size that is no whole number, or below one."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
            raise ValueError(f"{kind}: {name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{kind}: {name} must be at least 1, got {value}")


class _ScaleGradient(torch.autograd.Function):
    """What is given, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class Weights(NamedTuple):
    """Stacked weights of some experts, as `Experts.w_in`, w_out, b_in and b_out."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None


@contextmanager
def _draws_of_its_own(device: torch.device) -> Iterator[None]:
    """Random numbers of this process alone, however many; those drawn after it are as in step as those before."""
    seed = int(torch.randint(2**48, ())) + dist.get_rank()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Experts(nn.Module):
    """E two-layer MLPs computed together: gated (SwiGLU, GeGLU, ReGLU, gpt-oss) or plain (ReLU, GELU, SiLU).

    Parameters: gate_up_proj [E, 2F, D] as [gate; up] (gated) or up_proj [E, F, D] (plain); down_proj [E, D, F];
    with `bias`, gate_up_proj_bias [E, 2F] or up_proj_bias [E, F], and down_proj_bias [E, D]. Weights start as
    `nn.Linear`'s do, each expert on its own. activation may have a limit behind it: "swiglu:10" clamps gates to at most
    10 and ups to [-10, 10] before they meet (DeepSeek-V4). `backend` goes to `zoo.moe.kernels.moe_mlp`. `dropout` acts
    in training on hidden units and outputs (V-MoE, Switch's expert dropout); no kernel has it, so that such steps are
    slower.
    `weigh_input` multiplies what an expert reads by the combine weight, instead of what it gives: f_e(g_e x), Llama 4.

    With `parallel` set, to an `ExpertParallel`, the parameters hold that process's part of the experts (`keep_own`);
    gradient_scale multiplies the gradients of parameters. A subclass that computes something else overrides
    `compute_with`, which gets the weights as they are held here, and not `forward`.

    Raises ValueError on an unknown activation or backend, a size below one, a dropout outside [0, 1), or one with
    weigh_input.
    """

    parallel: Callable[..., Tensor] | None = None
    gradient_scale = 1.0

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        bias: bool = False,
        backend: str = "auto",
        dropout: float = 0.0,
        weigh_input: bool = False,
    ) -> None:
        super().__init__()
        check_sizes("Experts", num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        check_backend(backend)
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        if not 0 <= dropout < 1:
            raise ValueError(f"Experts: dropout must be at least 0 and below 1, got {dropout}")
        if dropout and weigh_input:
            raise ValueError("Experts: dropout and weigh_input exclude each other")
        self.activation, self.backend, self.dropout = activation, backend, dropout
        self.weigh_input = weigh_input
        self.gated = get_activation(activation).gated
        rows = 2 * hidden_dim if self.gated else hidden_dim
        self._in = "gate_up_proj" if self.gated else "up_proj"
        self.register_parameter(self._in, nn.Parameter(torch.empty(num_experts, rows, dim)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        bias_in = nn.Parameter(torch.empty(num_experts, rows)) if bias else None
        self.register_parameter(f"{self._in}_bias", bias_in)
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every weight uniformly within 1/sqrt(fan in), and zero the biases."""
        for weight, fan_in in ((self.w_in, self.dim), (self.w_out, self.hidden_dim)):
            weight.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        for bias in (self.b_in, self.down_proj_bias):
            if bias is not None:
                bias.zero_()

    @torch.no_grad()
    def keep_own(self, parallel: ExpertParallel | HierarchicalExpertParallel, mesh: DeviceMesh | None = None) -> None:
        """Keep this process's part of the experts, the same processes' `parallel` bringing tokens to it from now on.

        With `mesh`, which has these processes and no others, parameters are DTensors of all experts, of which this
        process holds its part. Raises ValueError for experts that are spread already, or of another number.
        """
        if self.parallel is not None:
            raise ValueError("Experts: these are spread over processes already")
        if parallel.num_experts != self.num_experts:
            raise ValueError(f"Experts: {self.num_experts} whole experts cannot be spread as {parallel.num_experts}")
        for name, value in list(self.named_parameters()):
            own: Tensor = value[parallel.own].clone()
            if mesh is not None:
                shape, stride = value.shape, value.stride()
                own = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
            setattr(self, name, nn.Parameter(own, value.requires_grad))
        self.parallel = parallel

    @property
    def w_in(self) -> Tensor:
        """Stacked input projection, [E, 2F, D] or [E, F, D], of the experts held here."""
        return self._held(getattr(self, self._in))

    @property
    def w_out(self) -> Tensor:
        """Stacked output projection, [E, D, F], of the experts held here."""
        return self._held(self.down_proj)

    @property
    def b_in(self) -> Tensor | None:
        """Bias of the input projection, [E, 2F] or [E, F], or None."""
        bias = getattr(self, f"{self._in}_bias")
        return None if bias is None else self._held(bias)

    @property
    def b_out(self) -> Tensor | None:
        """Bias of the output projection, [E, D], or None."""
        return None if self.down_proj_bias is None else self._held(self.down_proj_bias)

    def _held(self, parameter: Tensor) -> Tensor:
        """A parameter's part on this process, whose gradient is scaled where processes average it in the end."""
        if isinstance(parameter, DTensor):
            parameter = parameter.to_local()
        return parameter if self.gradient_scale == 1 else _ScaleGradient.apply(parameter, self.gradient_scale)

    @property
    def held(self) -> Weights:
        """All of the experts held here."""
        return Weights(self.w_in, self.w_out, self.b_in, self.b_out)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]."""
        if self.parallel is None:
            return self.compute(x, routing)
        return self._apart(self.parallel, x, routing)

    # torch.compile would trace the collectives in the backward of these functions, and lose what they sum in place.
    @torch.compiler.disable
    def _apart(self, parallel: Callable[..., Tensor], x: Tensor, routing: Routing) -> Tensor:
        def there(flat: Callable[..., Tensor], x: Tensor, routing: Routing) -> Tensor:
            if isinstance(flat, ExpertParallel) and flat.shadows:
                return shadows.run(flat, self, x, routing)
            return flat(x, routing, self.compute)

        # Where processes share tokens out, each lends for its own.
        return parallel.shared(x, routing, there) if hasattr(parallel, "shared") else there(parallel, x, routing)

    def compute(self, x: Tensor, routing: Routing) -> Tensor:
        """The same of the experts that this process holds, to which `routing` refers."""
        return self.compute_with(self.held, x, routing)

    def compute_with(self, weights: Weights, x: Tensor, routing: Routing) -> Tensor:
        """The same of experts with these weights."""
        if not weights.w_out.shape[0]:
            return x * routing.weight.sum().to(x.dtype)  # no tokens, but gradients go back all the same
        if self.dropout and self.training:
            with nullcontext() if self.parallel is None else _draws_of_its_own(x.device):
                return self._with_dropout(x, routing, weights)
        token = routing.token_index
        if self.weigh_input:
            # Every assignment is a token of its own, weighed before the experts.
            rows = x.index_select(0, token) * routing.weight[:, None].to(x.dtype)
            each = torch.arange(token.numel(), device=token.device)
            routing = Routing(each, routing.offsets, torch.ones_like(routing.weight), token.numel())
        else:
            rows = x
        w_in, w_out, b_in, b_out = weights
        y = moe_mlp(rows, w_in, w_out, routing, self.activation, self.backend, b_in=b_in, b_out=b_out)
        return y.new_zeros(x.shape).index_add(0, token, y) if self.weigh_input else y

    def _with_dropout(self, x: Tensor, routing: Routing, weights: Weights) -> Tensor:
        """The same with units dropped, one expert at a time, through autograd."""
        forward, bounds = get_activation(self.activation).forward, routing.offsets.tolist()
        rows, outputs = x.index_select(0, routing.token_index), []
        b_in, b_out = weights.b_in, weights.b_out
        # unbind: the gradient of w[e] would be as large as w for every expert.
        for e, (w_in, w_out) in enumerate(zip(weights.w_in.unbind(), weights.w_out.unbind())):
            hidden = F.linear(rows[bounds[e] : bounds[e + 1]], w_in, None if b_in is None else b_in[e])
            hidden = F.dropout(forward(hidden), self.dropout)
            outputs.append(F.dropout(F.linear(hidden, w_out, None if b_out is None else b_out[e]), self.dropout))
        out = torch.cat(outputs)
        out = out * routing.weight[:, None].to(out.dtype)
        return out.new_zeros(x.shape).index_add(0, routing.token_index, out)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, activation={self.activation!r}"


class MLP(nn.Module):
    """One dense expert with the same activations: a shared expert, a dense twin.

    Linear layers gate_proj and up_proj (gated) or up_proj (plain), then down_proj; x [..., D] -> [..., D].
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.activation = activation
        gated = get_activation(activation).gated
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias) if gated else None
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [..., D]."""
        act, up = get_activation(self.activation), self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(act.forward(up))
        gate = self.gate_proj(x)
        # Put together only where both sides are clamped: the copy costs a tenth of a small layer's time.
        return self.down_proj(act.point.f(gate) * up if act.plain else act.forward(torch.cat([gate, up], dim=-1)))
