"""Finding the dense MLPs of any backbone, and reading their weights in our layout.

An MLP is known by the names of its linear layers, its activation by its values, and what was found is held against the
module itself on a few random tokens: a backbone that is not in the table is either understood or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Experts, MoE, ResidualExperts, Routing
from ..moe.kernels import ACTIVATIONS, moe_mlp
from ..moe.residual import CORE
from ..pretrained.sparse_blocks import in_pair

# gate, up, down; without a gate the MLP is plain, or gate and up are one matrix where it has twice the rows.
LAYOUTS: tuple[tuple[str | None, str, str], ...] = (
    ("gate_proj", "up_proj", "down_proj"),  # Llama, Mistral, Qwen, Gemma, and zoo.moe.MLP
    ("fc1_g", "fc1_x", "fc2"),  # timm's SwiGLU
    ("wi_0", "wi_1", "wo"),  # T5 v1.1
    ("w1", "w3", "w2"),  # Llama's own code
    (None, "gate_up_proj", "down_proj"),  # Phi-3, GLM
    (None, "up_proj", "down_proj"),  # Nemotron, zoo.moe.MLP
    (None, "fc_in", "fc_out"),  # GPT-J, CodeGen
    (None, "fc1", "fc2"),  # timm's Mlp and GluMlp, SigLIP, Phi; and OPT, BART, Whisper inside the layer itself
    (None, "c_fc", "c_proj"),  # GPT-2, StarCoder 2
    (None, "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX, Falcon
    (None, "wi", "wo"),  # T5
    (None, "intermediate.dense", "output.dense"),  # BERT, RoBERTa, transformers' ViT: inside the layer, in two modules
)
LIMITS = ("limit", "swiglu_limit")  # what gate and up are clamped at: DeepSeek-V4, GLM-5
FAR = 30.0  # pre-activations that any clamp would show at
ACTIVATION_NAMES = ("act", "act_fn", "activation_fn", "activation", "intermediate.intermediate_act_fn")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class DenseMLP:
    """One dense MLP: its name in the model, its linear layers, and the activation's name in `zoo.moe.kernels`.

    `inline` where the linear layers belong to a whole transformer layer, as OPT's do; `gate_last` where the fused
    matrix is [up; gate].
    """

    name: str
    module: nn.Module
    layout: tuple[str | None, str, str]
    activation: str
    gate_last: bool
    inline: bool

    @property
    def down(self) -> Any:
        """The output projection; its weight's dtype, device and requires_grad stand for all."""
        return self.linears[-1]

    @property
    def sizes(self) -> tuple[int, int]:
        """D and F."""
        out, hidden = _rows(self.down).shape
        return out, hidden

    @property
    def has_bias(self) -> bool:
        """Whether any of the linear layers has a bias."""
        return any(linear.bias is not None for linear in self.linears)

    @property
    def linears(self) -> list[Any]:
        """The linear layers, gate first."""
        return [part_of(self.module, name) for name in self.layout if name is not None]

    @property
    def dropout(self) -> float:
        """The rate where the MLP drops hidden units and outputs alike, as experts can; else zero."""
        rates = self.dropout_rates
        return rates[0] if len(rates) == 2 and rates[0] == rates[1] else 0.0

    @property
    def dropout_rates(self) -> list[float]:
        """Rates of all dropouts inside the MLP, zero ones included."""
        return [] if self.inline else [m.p for m in self.module.modules() if isinstance(m, nn.Dropout)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the linear layers."""
        return [parameter for linear in self.linears for parameter in linear.parameters()]

    def weights(self, read: Callable[[Any], Tensor | None] = lambda parameter: parameter) -> dict[str, Tensor]:
        """What one expert holds: w_in [2F or F, D], w_out [D, F], and b_in [2F or F], b_out [D] where biases are.

        `read` may give another tensor of the same shape in a parameter's place, such as an optimizer's moment of it.
        """
        found = {}
        *into, down = self.linears
        found["w_in"] = torch.cat([_rows(linear, read) for linear in into])
        found["w_out"] = _rows(down, read)
        if self.has_bias:
            found["b_in"] = torch.cat([_bias(linear, read) for linear in into])
            found["b_out"] = _bias(down, read)
        if self.gate_last:
            for name in found.keys() & {"w_in", "b_in"}:
                found[name] = torch.cat(found[name].chunk(2)[::-1])
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """What the dense MLP itself computes of tokens x [T, D], without dropout."""
        if not self.inline:
            was = self.module.training
            try:
                found = self.module.eval()(x)
                return found[0] if answers_in_pair(self.module) else found
            finally:
                self.module.train(was)
        _, up, down = self.layout
        act, into, out = (part_of(self.module, n) for n in (activation_attribute(self.module), up, down))
        return out(act(into(x)))

    @torch.no_grad()
    def check(self) -> None:
        """Raise ValueError unless the weights, read as an expert, compute what the module computes."""
        weight = _rows(self.down)
        if weight.is_meta:
            return
        one = {name: tensor.to(weight.dtype).unsqueeze(0) for name, tensor in self.weights().items()}
        with torch.device(weight.device):
            generator = torch.Generator(weight.device).manual_seed(0)  # the user's own random state stays as it is
            x = torch.randn(4, self.sizes[0], generator=generator).to(weight.dtype)
            routing = Routing(torch.arange(4), torch.tensor([0, 4], dtype=torch.int32), x.new_ones(4), 4)
        biases = one.get("b_in"), one.get("b_out")
        units = (x @ one["w_in"][0].T).abs().max().clamp(min=1e-3)
        for tokens in (x, x * (FAR / units)):
            found = moe_mlp(
                tokens,
                one["w_in"],
                one["w_out"],
                routing,
                self.activation,
                "reference",
                b_in=biases[0],
                b_out=biases[1],
            )
            try:
                expected = self(tokens)
            except TypeError as wrong:  # MPT's MLP, say, adds the residual itself
                raise ValueError(f"{self.name} takes more than tokens: {wrong}") from wrong
            error = (found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
            if found.shape != expected.shape or not error < TOLERANCE.get(weight.dtype, 0.1):
                raise ValueError(
                    f"{self.name} ({type(self.module).__name__}) computes something else than its layers "
                    f"{', '.join(n for n in self.layout if n)} with {self.activation} (relative difference {error:.1e})"
                )


def answers_in_pair(module: nn.Module) -> bool:
    """Whether the block around an MLP or a `MoE` wants (output, None) of it, as gpt-oss's does."""
    return in_pair in module._forward_hooks.values()


def expert_parameter(experts: Experts | ResidualExperts, name: str) -> nn.Parameter:
    """The parameter for a name of `DenseMLP.weights`: the stacked one, or the core's where experts share one."""
    mapped = {"w_in": experts._in, "b_in": f"{experts._in}_bias", "w_out": "down_proj", "b_out": "down_proj_bias"}
    prefix = CORE if isinstance(experts, ResidualExperts) else ""
    return getattr(experts, prefix + mapped[name])


def blocks_with_mlps(model: nn.Module, within: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Dense MLPs and `MoE`s of the model's repeated blocks, in order, under the submodule called `within`.

    Repeated blocks are those with a number in their name: the MLP of a pooling head is none of them. Nor is one inside
    attention, which learns biases of relative positions.
    """
    skipped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        inside = not within or name == within or name.startswith(f"{within}.")
        if not inside or (skipped and name.startswith(skipped)) or not re.search(r"(^|\.)\d+(\.|$)", name):
            continue
        if ".attn." in name:
            continue
        if isinstance(module, MoE) or hasattr(module, "experts") or _layout(module):
            skipped += (f"{name}.",)
            yield name, module


def recognise(name: str, module: nn.Module) -> DenseMLP:
    """The dense MLP that a module is; raises ValueError naming it and the part that experts cannot have."""
    layout = _layout(module)
    assert layout is not None
    children = dict(module.named_children())
    inline = "." in layout[1] or any("attn" in child for child in children)
    for linear in (n for n in layout if n):
        part = part_of(module, linear)
        if not part.weight.is_floating_point():
            raise ValueError(
                f"{name}.{linear} is a {type(part).__name__} of {part.weight.dtype}; expected unquantised weights"
            )
    extra = [n for n, child in children.items() if n not in layout and any(True for _ in child.parameters())]
    if extra and not inline:
        raise ValueError(f"{name} has a {type(children[extra[0]]).__name__} ({extra[0]}); experts have none")
    rows, (dim, hidden) = _rows(part_of(module, layout[1])), _rows(part_of(module, layout[2])).shape
    fused = layout[0] is None and rows.shape[0] == 2 * hidden
    if rows.shape[0] != (2 * hidden if fused else hidden) or rows.shape[1] != dim:
        raise ValueError(f"{name} leads from width {rows.shape[1]} to {dim}; experts keep the width")
    activation = _activation_name(name, module, gated=fused or layout[0] is not None)
    return DenseMLP(name, module, layout, activation, fused and bool(getattr(module, "gate_last", False)), inline)


def is_mlp(module: nn.Module) -> bool:
    """Whether the module's children are those of a dense MLP, or of a layer with one inside."""
    return _layout(module) is not None


def _layout(module: nn.Module) -> tuple[str | None, str, str] | None:
    for layout in LAYOUTS:
        if all(_is_linear(part_of(module, name)) for name in layout if name is not None):
            return layout
    return None


def places(name: str) -> tuple[str, str, str]:
    """Names under which a dense model may have the MLP that is an `MoE` of this name in another: it, or around it."""
    around = name.rpartition(".")[0]
    return name, around, around.rpartition(".")[0]  # of a layer's own linear layers; of those in modules of it


def part_of(module: Any, name: str) -> Any:
    """What a module, or one inside it, has under a name with dots; None where there is nothing."""
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def put_part(module: Any, name: str, value: Any) -> None:
    """Put something where `part_of` finds it."""
    owner, _, leaf = name.rpartition(".")
    setattr(part_of(module, owner) if owner else module, leaf, value)


def _is_linear(module: nn.Module | None) -> bool:
    """Whether it is a linear layer: transformers' Conv1D is one, a 1x1 convolution over images is none."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _rows(linear: Any, read: Callable[[Any], Any] = lambda parameter: parameter) -> Tensor:
    """A linear layer's weight as [out, in]; transformers' Conv1D holds [in, out]."""
    weight = read(linear.weight)
    return weight if isinstance(linear, nn.Linear) else weight.T


def _bias(linear: Any, read: Callable[[Any], Any]) -> Tensor:
    return _rows(linear, read).new_zeros(_rows(linear).shape[0]) if linear.bias is None else read(linear.bias)


def activation_attribute(module: nn.Module) -> str:
    """Under which name a module holds its activation; raises ValueError where there is none."""
    for name in ACTIVATION_NAMES:
        if callable(part_of(module, name)):
            return name
    raise ValueError(f"{type(module).__name__} has no activation under {', '.join(ACTIVATION_NAMES)}")


def _activation_name(name: str, module: nn.Module, gated: bool) -> str:
    """The core's name of a module's activation, told by its values; raises ValueError naming one it does not have."""
    if isinstance(getattr(module, "activation", None), str):
        return module.activation  # type: ignore[return-value]
    function = part_of(module, activation_attribute(module))
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        values = function(x.clone())  # it may work in place
    for known in ACTIVATIONS.values():
        if known.gated == gated and known.plain and torch.allclose(known.point.f(x), values, rtol=0, atol=1e-6):
            limits = [limit for limit in (getattr(module, n, None) for n in LIMITS) if isinstance(limit, (int, float))]
            return f"{known.name}:{float(limits[0])}" if gated and limits else known.name
    known_names = ", ".join(a.name for a in ACTIVATIONS.values() if a.gated == gated)
    label = getattr(function, "__name__", type(function).__name__)
    raise ValueError(
        f"{name} has the {'gated ' if gated else ''}activation {label}, which the experts do not have; "
        f"they have {known_names}"
    )
