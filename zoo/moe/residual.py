"""Experts that are one MLP and what each of them adds to its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .experts import Experts, Weights, check_sizes
from .kernels import check_backend, get_activation, moe_mlp
from .routing import Routing

CORE, RESIDUAL = "core_", "residual_"


class ResidualExperts(nn.Module):
    """E MLPs of a core that all share and a residual of each, theta_e = theta_core + theta_res,e (RMoE, 2204.09636).

    The core is a dense model's MLP, the residuals, which start at zero, are what fine-tuning as a mixture adds
    (`zoo.upcycle(..., residual=True)`). The paper's abstract calls the core independent of the input and the residuals
    cheap to train on downstream data; how it schedules both could not be checked: here both learn, or with
    train_core=False the residuals alone. Weight decay draws residuals to zero, and experts to the core.

    Parameters: core_gate_up_proj [2F, D] or core_up_proj [F, D], core_down_proj [D, F], with `bias` core_..._bias, and
    residual_... of the same with E in front. activation, bias and backend are those of `Experts`, whose kernels
    compute: sums of core and residual are made anew in each forward pass. Over processes the experts are sharded as
    dense parameters are, not shared out. Raises ValueError on an unknown activation and a size below one.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        bias: bool = False,
        backend: str = "auto",
        train_core: bool = True,
    ) -> None:
        super().__init__()
        check_sizes("ResidualExperts", num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        check_backend(backend)
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        self.activation, self.backend = activation, backend
        gated = get_activation(activation).gated
        self._in = "gate_up_proj" if gated else "up_proj"
        rows = 2 * hidden_dim if gated else hidden_dim
        shapes: dict[str, tuple[int, ...]] = {self._in: (rows, dim), "down_proj": (dim, hidden_dim)}
        if bias:
            shapes |= {f"{self._in}_bias": (rows,), "down_proj_bias": (dim,)}
        for name, shape in shapes.items():
            self.register_parameter(CORE + name, nn.Parameter(torch.empty(shape), requires_grad=train_core))
            self.register_parameter(RESIDUAL + name, nn.Parameter(torch.empty(num_experts, *shape)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the core uniformly within 1/sqrt(fan in), and zero its biases and all residuals."""
        for name, parameter in self.named_parameters():
            if name.startswith(RESIDUAL) or name.endswith("bias"):
                parameter.zero_()
            else:
                bound = 1 / math.sqrt(parameter.shape[-1])
                parameter.uniform_(-bound, bound)

    @property
    def numbers(self) -> int:
        """How many weights the experts have that are not all tokens'."""
        return sum(p.numel() for name, p in self.named_parameters() if name.startswith(RESIDUAL))

    def residual(self, core: nn.Parameter) -> nn.Parameter:
        """What experts add to a parameter of the core, [E, ...]."""
        name = next(name for name, parameter in self.named_parameters() if parameter is core)
        return getattr(self, RESIDUAL + name.removeprefix(CORE))

    def whole(self, name: str) -> Tensor:
        """The sum of core and residuals [E, ...] of a parameter by its name in `Experts`."""
        return getattr(self, CORE + name) + getattr(self, RESIDUAL + name)

    @property
    def weights(self) -> Weights:
        """All experts' weights, as `Experts` hold them."""
        biased = hasattr(self, f"{CORE}down_proj_bias")
        biases = [self.whole(f"{name}_bias") if biased else None for name in (self._in, "down_proj")]
        return Weights(self.whole(self._in), self.whole("down_proj"), *biases)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum [T, D] of what each token's experts make of tokens x [T, D]."""
        w_in, w_out, b_in, b_out = self.weights
        return moe_mlp(x, w_in, w_out, routing, self.activation, self.backend, b_in=b_in, b_out=b_out)

    @torch.no_grad()
    def folded(self) -> Experts:
        """The same experts as `Experts`, each with weights of its own."""
        like = getattr(self, f"{CORE}down_proj")
        with torch.device("meta"):
            sizes = (self.num_experts, self.dim, self.hidden_dim)
            plain = Experts(*sizes, self.activation, hasattr(self, f"{CORE}down_proj_bias"), self.backend)
        plain.to(like.dtype).to_empty(device=like.device)
        for name, parameter in plain.named_parameters():
            parameter.copy_(self.whole(name))
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, activation={self.activation!r}"


def folded_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A model's tensors by name, or those of `state`, with residual experts as `Experts` hold theirs."""
    found = dict(model.state_dict() if state is None else state)
    for prefix in [f"{name}." for name, module in model.named_modules() if isinstance(module, ResidualExperts)]:
        for name in [n for n in found if n.startswith(prefix + CORE)]:
            plain = name.removeprefix(prefix + CORE)
            found[prefix + plain] = found.pop(name) + found.pop(prefix + RESIDUAL + plain)
    return found
