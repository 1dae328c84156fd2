"""transformers' sparse blocks as our layers, in place, and their tensors under transformers' names again.

Where `adopt` builds a language model and fills it from files of its own reading, here transformers has made the whole
model, fresh or from a folder, and only its sparse blocks change: weights in our layout stay the very tensors they are.
One row a language model; everything else, vision towers and projectors too, stays transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import Experts, IsolatedMoE, MoE, Router
from ..moe.routers import TopKRouter
from .context import decoder_of, moe_of
from .language import FAMILIES, _deepseek_v2, _deepseek_v3, activation_of, check_router

PLACES = ("mlp", "feed_forward")


@dataclass(frozen=True)
class SparseBlock:
    """One row: the gate of a language model's sparse block, and where the block keeps what.

    `transposed` where its experts are [E, D, 2F] and [E, F, D]; `parts` where it has blocks of its own for text and for
    what was seen; `weigh_input` as in `Experts`; `activation` where the configuration's is not that of the experts.
    """

    prefix: str
    router: Callable[[Any], dict[str, Any]]
    gate: str = "gate"
    bias: str = "e_score_correction_bias"
    shared: str | None = None
    shared_gate: str | None = None
    transposed: bool = False
    parts: tuple[str, ...] = ()
    weigh_input: bool = False
    activation: str | None = None


def _qwen3_vl_moe(config: Any) -> dict[str, Any]:
    return {"k": config.num_experts_per_tok, "normalize": True, "normalize_eps": 0.0}


def _aria(config: Any) -> dict[str, Any]:
    return {"k": config.moe_topk, "score": "softmax_topk"}


def _llama4(config: Any) -> dict[str, Any]:
    return {"k": config.num_experts_per_tok, "score": "sigmoid"}


def _ernie(config: Any) -> dict[str, Any]:
    # The sum of the chosen is divided by, but at least moe_norm_min = 1e-12: the same where any is chosen in earnest.
    return {"k": config.moe_k, "normalize": True, "normalize_eps": 1e-20, "selection_bias": True}


# By the model_type of the language model's configuration.
BLOCKS: dict[str, SparseBlock] = {
    **{
        name: SparseBlock(row.prefix, row.router, shared=row.shared, shared_gate=row.shared_gate)
        for name, row in FAMILIES.items()
    },
    "qwen3_vl_moe_text": SparseBlock("Qwen3VLMoe", _qwen3_vl_moe),
    "qwen3_5_moe_text": SparseBlock(
        "Qwen3_5Moe", _qwen3_vl_moe, shared="shared_expert", shared_gate="shared_expert_gate"
    ),
    "glm4v_moe_text": SparseBlock("Glm4vMoe", _deepseek_v3, shared="shared_experts"),
    "aria_text": SparseBlock(
        "Aria", _aria, gate="router", shared="shared_experts", transposed=True, activation="swiglu"
    ),
    "llama4_text": SparseBlock(
        "Llama4", _llama4, gate="router", shared="shared_expert", transposed=True, weigh_input=True
    ),
    "ernie4_5_vl_moe_text": SparseBlock(
        "Ernie4_5_VLMoe",
        _ernie,
        bias="moe_statics.e_score_correction_bias",
        shared="shared_experts",
        parts=("text_moe", "vision_moe"),
    ),
    "deepseek_ocr2_text": SparseBlock("DeepseekOcr2", _deepseek_v2, shared="shared_experts"),
    "unlimited_ocr_text": SparseBlock("UnlimitedOcr", _deepseek_v2, shared="shared_experts"),
}


def row_of(model: Any) -> SparseBlock | None:
    """The row of a transformers model's language model, None for one without."""
    return BLOCKS.get(decoder_of(model).config.model_type)


@torch.no_grad()
def adopt_blocks(
    model: Any,
    make: Callable[[int, int], Callable[[], Router]] | None = None,
    router_args: dict[str, Any] | None = None,
    backend: str = "auto",
) -> list[str]:
    """Replace every sparse block of the model's language model by ours, in place; returns the names of the new ones.

    make gives, for a width and a number of experts, what makes one gate; by default the family's own is made, with
    router_args on top. Gates take over the block's weight and selection bias where they have a place for it.
    """
    decoder = decoder_of(model)
    row = row_of(model)
    if row is None:
        return []
    config, found = decoder.config, []
    names = {module: name for name, module in model.named_modules()}
    for layer in decoder.layers:
        for place in PLACES:
            block = getattr(layer, place, None)
            if block is None or not (hasattr(block, "experts") or (row.parts and hasattr(block, row.parts[0]))):
                continue
            setattr(layer, place, _ours(block, row, config, make, router_args or {}, backend))
            layer.is_moe_layer = False  # Llama 4's layer expects two results where it is
            found.append(f"{names[layer]}.{place}")
    return found


def _ours(
    block: Any, row: SparseBlock, config: Any, make: Any, router_args: dict[str, Any], backend: str
) -> MoE | IsolatedMoE:
    shared = getattr(block, row.shared, None) if row.shared else None
    if row.parts:
        parts = [_moe(getattr(block, part), row, config, make, router_args, backend) for part in row.parts]
        return IsolatedMoE(parts, shared).train(block.training)
    return _moe(block, row, config, make, router_args, backend, shared).train(block.training)


def _moe(
    block: Any,
    row: SparseBlock,
    config: Any,
    make: Any,
    router_args: dict[str, Any],
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
    gate = getattr(block, row.gate)
    with torch.device("meta"):
        activation = row.activation or activation_of(config)
        experts = Experts(num_experts, dim, hidden, activation, backend=backend, weigh_input=row.weigh_input)
    for name in ("gate_up_proj", "down_proj"):
        theirs = getattr(block.experts, name)
        if row.transposed:
            theirs = nn.Parameter(theirs.transpose(1, 2).contiguous(), theirs.requires_grad)
        setattr(experts, name, theirs)
    with torch.device(gate.weight.device):
        factory = make(dim, num_experts) if make else None
        router = factory() if factory else TopKRouter(dim, num_experts, **{**row.router(config), **router_args})
    for parameter in router.parameters():
        parameter.data = parameter.data.to(gate.weight.dtype)
    _take_over(router, gate, row)
    moe = MoE(router, experts, shared=shared, shared_gate=row.shared_gate is not None)
    if row.shared_gate and moe.shared_gate is not None:
        moe.shared_gate = getattr(block, row.shared_gate)
    return moe


def _take_over(router: Router, gate: Any, row: SparseBlock) -> None:
    weight = getattr(router, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.shape == gate.weight.shape:
        router.weight = gate.weight
    bias, target = _submodule_tensor(gate, row.bias), getattr(router, "selection_bias", None)
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
    for name, tensor in (model.state_dict() if state is None else state).items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is None:
            yield name, tensor
        else:
            yield _theirs(block, name.removeprefix(f"{block}."), tensor, row)


def _theirs(block: str, name: str, tensor: Tensor, row: SparseBlock) -> tuple[str, Tensor]:
    inside = block
    if name.startswith("parts."):
        _, number, name = name.split(".", 2)
        inside = f"{block}.{row.parts[int(number)]}"
    if name in ("experts.gate_up_proj", "experts.down_proj"):
        return f"{inside}.{name}", tensor.transpose(1, 2).contiguous() if row.transposed else tensor
    if name == "router.weight":
        return f"{inside}.{row.gate}.weight", tensor
    if name == "router.selection_bias":
        # ERNIE keeps a row for each group of experts, of which there is one.
        return f"{inside}.{row.gate}.{row.bias}", tensor[None] if row.parts else tensor
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
    for layer in decoder_of(model).layers:
        block = moe_of(layer)
        for moe in block.parts if isinstance(block, IsolatedMoE) else [block] if block is not None else []:
            check_router("router", moe.router, row, config)
