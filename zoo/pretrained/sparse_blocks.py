"""transformers' sparse blocks as our layers, in place, and their tensors under transformers' names again.

Where `adopt` builds a language model and fills it from files of its own reading, here transformers has made the whole
model, fresh or from a folder, and only its sparse blocks change: weights in our layout stay the very tensors they are.
One row a language model (`sparse_rows`); everything else, vision towers and projectors too, stays transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import MLP, Experts, IsolatedMoE, LatentExperts, MoE, Router
from ..moe.grown import joined_state
from . import few_bits
from .context import decoder_of, moe_of
from .language import check_router
from .sparse_rows import BLOCKS, SparseBlock

LATENT = ("experts.to_latent.", "experts.from_latent.")
PLACES = ("mlp", "feed_forward", "block_sparse_moe", "mixer")


def row_of(model: Any) -> SparseBlock | None:
    """The row of a transformers model's language model, None for one without, or whose blocks are beyond it."""
    config = decoder_of(model).config
    row = BLOCKS.get(config.model_type)
    return None if row is None or row.beyond(config) else row


@torch.no_grad()
def adopt_blocks(
    model: Any,
    make: Callable[[int, int], Callable[[], Router]] | None = None,
    router_args: dict[str, Any] | None = None,
    backend: str = "auto",
    dense: bool = False,
) -> list[str]:
    """Replace every sparse block of the model's language model by ours, in place; returns the names of the new ones.

    With `dense` by one fresh MLP each, as wide as a token's experts and the shared ones together.

    make gives, for a width and a number of experts, what makes one gate; by default the family's own is made, with
    router_args on top. Gates take over the block's weight and selection bias where they have a place for it.
    """
    decoder = decoder_of(model)
    row = row_of(model)
    if row is None:
        return []
    config, found = decoder.config, []
    names = {module: name for name, module in model.named_modules()}
    for number, layer in enumerate(decoder.layers):
        for place in ("experts",) if row.apart else PLACES:
            block = getattr(layer, place, None)
            if block is None or not (
                row.apart or hasattr(block, "experts") or (row.parts and hasattr(block, row.parts[0]))
            ):
                continue
            block = layer if row.apart else block
            gate = make
            if make is None:
                kind, arguments = row.gate_of(config, number)
                gate = partial(partial, kind, **{**arguments, **(router_args or {})})
            ours = _ours(block, row, config, gate, backend)
            setattr(layer, place, _dense(ours, config) if dense else ours)
            if row.apart:
                layer.router = Seen()
                getattr(layer, place).register_forward_pre_hook(told_apart, with_kwargs=True)
            layer.is_moe_layer = False  # Llama 4's layer expects two results where it is
            if row.pair:
                getattr(layer, place).register_forward_hook(in_pair)
            if row.ids:
                getattr(layer, place).register_forward_pre_hook(without_ids, with_kwargs=True)
            found.append(f"{names[layer]}.{place}")
    return found


def _dense(moe: Any, config: Any) -> MLP:
    experts, shared, width = moe.experts, moe.shared, moe.router.k
    if isinstance(experts, LatentExperts):
        # As many numbers in all: k experts of narrower tokens, and the way in and out.
        parts = 3 if experts.mlp.gated else 2
        width = round((width * experts.mlp.hidden_dim + 2 * experts.dim / parts) * experts.latent_dim / experts.dim)
        experts = experts.mlp
    else:
        width *= experts.hidden_dim
    width += 0 if shared is None else shared.down_proj.in_features
    weight = experts.down_proj
    with weight.device:
        mlp = MLP(moe.router.dim, width, experts.activation, experts.b_in is not None).to(weight.dtype)
    for name, parameter in mlp.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(0.0, config.initializer_range)
    return mlp


def in_pair(module: nn.Module, args: Any, output: Tensor) -> tuple[Tensor, None]:
    """A hook for what stands where the block around it expects two results."""
    return output, None


def without_ids(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook for what stands where the block around it tells input_ids; gates hear of them from `pass_context`."""
    return args, {name: value for name, value in kwargs.items() if name != "input_ids"}


class Seen(nn.Module):
    """Stands where a layer has its gate, and hands on what that would see."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens in place of logits, weights and experts."""
        return x, x, x


def told_apart(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook for what stands where a layer calls its experts with tokens, and with what its gate gave: see `Seen`."""
    x, seen, *_ = args
    return (x,), {**kwargs, "seen": seen} if isinstance(module, MoE) else kwargs


def stand_alike(module: nn.Module, new: nn.Module) -> None:
    """Let what takes the place of an MLP or a `MoE` be called, and answer, as that."""
    if in_pair in module._forward_hooks.values():
        new.register_forward_hook(in_pair)
    if without_ids in module._forward_pre_hooks.values():
        new.register_forward_pre_hook(without_ids, with_kwargs=True)
    if told_apart in module._forward_pre_hooks.values():
        new.register_forward_pre_hook(told_apart, with_kwargs=True)


def _ours(block: Any, row: SparseBlock, config: Any, make: Any, backend: str) -> MoE | IsolatedMoE:
    shared = getattr(block, row.shared, None) if row.shared else None
    if row.parts:
        parts = [_moe(getattr(block, part), row, config, make, backend) for part in row.parts]
        return IsolatedMoE(parts, shared).train(block.training)
    return _moe(block, row, config, make, backend, shared).train(block.training)


def _moe(
    block: Any,
    row: SparseBlock,
    config: Any,
    make: Any,
    backend: str,
    shared: nn.Module | None = None,
) -> MoE:
    if not hasattr(block.experts, "down_proj"):
        import transformers

        raise ValueError(
            f"{type(block.experts).__name__} of transformers {transformers.__version__} does not hold its experts as "
            f"newer versions do (down_proj [E, D, F]); expected a newer transformers"
        )
    num_experts, dim, hidden = block.experts.down_proj.shape
    if row.transposed:
        dim, hidden = hidden, dim
    gate = block.get_submodule(row.gate)
    with torch.device("meta"):
        experts = Experts(
            num_experts,
            dim,
            hidden,
            row.activation(config),
            row.biases,
            backend=backend,
            weigh_input=row.weigh_input,
        )
    for name, _ in list(experts.named_parameters()):
        theirs = getattr(block.experts, name)
        weight = _to_ours(name, theirs.detach(), row)
        setattr(experts, name, theirs if weight is None else nn.Parameter(weight, theirs.requires_grad))
    around: Any = experts
    if row.latent and isinstance(getattr(block, row.latent[0]), nn.Linear):
        into, out = (getattr(block, name) for name in row.latent)
        with torch.device("meta"):
            around = LatentExperts(num_experts, into.in_features, hidden, experts.activation, latent_dim=dim)
        around.to_latent, around.mlp, around.from_latent = into, experts, out
    with torch.device(gate.weight.device):
        router = make(around.dim, num_experts)()
    for parameter in router.parameters():
        parameter.data = parameter.data.to(gate.weight.dtype)
    _take_over(router, block, row)
    moe = MoE(router, around, shared=shared, shared_gate=row.shared_gate is not None)
    if row.shared_gate and moe.shared_gate is not None:
        moe.shared_gate = getattr(block, row.shared_gate)
    return moe


def _to_ours(name: str, weight: Tensor, row: SparseBlock) -> Tensor | None:
    """An experts' tensor in our layout; None where that is transformers'."""
    turned, woven = row.transposed and weight.dim() == 3, row.interleaved and name.startswith("gate_up_proj")
    if not (turned or woven):
        return None
    weight = weight.transpose(1, 2) if turned else weight
    return weight.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if woven else weight.contiguous()


def _to_theirs(name: str, weight: Tensor, row: SparseBlock) -> Tensor:
    """An experts' tensor in transformers' layout."""
    turned, woven = row.transposed and weight.dim() == 3, row.interleaved and name.startswith("gate_up_proj")
    weight = weight.unflatten(1, (2, -1)) if woven else weight
    weight = weight.transpose(1, -1) if turned or woven else weight
    # Gates and ups are last of all now, but for weights that are not turned: no family has both.
    return weight.flatten(-2) if woven else weight.contiguous() if turned else weight


def _take_over(router: Router, block: Any, row: SparseBlock) -> None:
    gate = block.get_submodule(row.gate)
    for name in ("weight", "bias"):
        ours, theirs = getattr(router, name, None), getattr(gate, name, None)
        if isinstance(ours, nn.Parameter) and isinstance(theirs, nn.Parameter) and ours.shape == theirs.shape:
            setattr(router, name, theirs)
    for ours, path in row.beside:
        own, theirs = getattr(router, ours, None), _submodule_tensor(block, path)
        if isinstance(own, nn.Parameter):
            setattr(router, ours, theirs)
        # A fresh DeepSeek-V4 of transformers has a table of zeros: all tokens would meet one expert, several times.
        elif own is not None and theirs is not None and (theirs.is_meta or bool(theirs.any())):
            setattr(router, ours, theirs.detach().clone())
    bias, target = _submodule_tensor(block, row.bias), getattr(router, "selection_bias", None)
    if bias is not None and target is not None and target.numel() == bias.numel():
        router.selection_bias = bias.detach().reshape(target.shape).to(target.dtype).clone()


def _submodule_tensor(module: Any, path: str) -> Tensor | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def tensors_of_transformers(model: Any, state: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that transformers' own model would hold; raises ValueError for what it has no place for.

    Transposed weights are copies. `state` is the model's own, or what it would be in one process.
    """
    row = row_of(model)
    assert row is not None
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, (MoE, IsolatedMoE))}
    blocks = {name: m for name, m in blocks.items() if ".parts." not in name}
    for name, tensor in joined_state(model, state).items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is None:
            yield name, tensor
        else:
            yield _theirs(block, name.removeprefix(f"{block}."), tensor, row)


def _theirs(block: str, name: str, tensor: Tensor, row: SparseBlock) -> tuple[str, Tensor]:
    inside = block.rpartition(".")[0] if row.apart else block
    if name.startswith("parts."):
        _, number, name = name.split(".", 2)
        inside = f"{block}.{row.parts[int(number)]}"
    if row.latent and name.startswith(LATENT):
        _, ours, name = name.split(".", 2)
        return (f"{inside}.{row.latent[ours == 'from_latent']}.{name}", tensor)
    if row.latent:
        name = name.replace("experts.mlp.", "experts.")
    if name.startswith("experts.") and name.endswith(("_codes", "_scales")):
        name, tensor = few_bits.of_oss(name, tensor)
        return f"{inside}.{name}", tensor
    if name.startswith("experts."):
        return f"{inside}.{name}", _to_theirs(name.removeprefix("experts."), tensor, row)
    if name in ("router.weight", "router.bias"):
        return f"{inside}.{row.gate}.{name.removeprefix('router.')}", tensor
    if (path := dict(row.beside).get(name.removeprefix("router."))) is not None:
        return f"{inside}.{path}", tensor
    if name == "router.selection_bias":
        # ERNIE keeps a row for each group of experts, of which there is one.
        return f"{inside}.{row.bias}", tensor[None] if "moe_statics" in row.bias else tensor
    if name.startswith("shared.") and row.shared:
        return f"{block}.{row.shared}.{name.removeprefix('shared.')}", tensor
    if name == "shared_gate.weight" and row.shared_gate:
        return f"{inside}.{row.shared_gate}.weight", tensor
    raise ValueError(f"{block}: the {row.prefix} layout has no place for the tensor {name}")


def check_gates(model: Any) -> None:
    """Raise ValueError unless transformers, reading the model's configuration, would route as its gates do."""
    row, config = row_of(model), decoder_of(model).config
    if row is None:
        return
    for number, layer in enumerate(decoder_of(model).layers):
        block = moe_of(layer)
        for moe in block.parts if isinstance(block, IsolatedMoE) else [block] if block is not None else []:
            check_router("router", moe.router, row, config, row.gate_of(config, number))
