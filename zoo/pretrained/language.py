"""The language families whose published checkpoints we read and write: one small table each.

What a family says: which router its sparse block is, and what its tensors are called on disk. Everything else of the
model (attention, norms, cache, generation) stays transformers' own, under its own tensor names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..moe import Experts, MoE
from ..moe.grown import joined_state
from ..moe.routers import TopKRouter
from ..nearest import unknown
from .gate_probe import decides_alike

if TYPE_CHECKING:
    from .sparse_rows import SparseBlock


@dataclass(frozen=True)
class Family:
    """One row: transformers' class prefix, config fields of the sizes, names on disk, and the router's arguments."""

    prefix: str
    num_experts: str
    hidden: str
    router: Callable[[Any], dict[str, Any]]
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str | None = None
    shared_gate: str | None = None

    def classes(self) -> tuple[Any, Any]:
        """transformers' configuration and causal language model classes; ValueError where it is too old for them."""
        import transformers

        if not hasattr(transformers, f"{self.prefix}ForCausalLM"):
            raise ValueError(f"transformers {transformers.__version__} has no {self.prefix}; expected a newer one")
        return getattr(transformers, f"{self.prefix}Config"), getattr(transformers, f"{self.prefix}ForCausalLM")


def _softmax(config: Any) -> dict[str, Any]:
    return {"k": config.num_experts_per_tok, "normalize": config.norm_topk_prob, "normalize_eps": 0.0}


def _mixtral(config: Any) -> dict[str, Any]:
    # Softmax over the chosen logits is softmax over all, renormalised; transformers computes the latter.
    return {
        "k": config.num_experts_per_tok,
        "normalize": True,
        "normalize_eps": 0.0,
        "jitter": config.router_jitter_noise,
    }


def _deepseek_v3(config: Any) -> dict[str, Any]:
    # Groups that were not chosen are masked with -inf, as in the authors' code and in transformers 5.23; earlier ones
    # masked with 0, which with a negative bias picks experts outside the allowed groups.
    return {
        "k": config.num_experts_per_tok,
        "score": "sigmoid",
        "normalize": config.norm_topk_prob,
        "normalize_eps": 1e-20,
        "scale": config.routed_scaling_factor,
        "selection_bias": True,
        "num_groups": config.n_group,
        "group_topk": config.topk_group,
        "group_score": "top2_sum",
    }


def _deepseek_v2(config: Any) -> dict[str, Any]:
    grouped = config.topk_method == "group_limited_greedy"
    groups = {"num_groups": config.n_group, "group_topk": config.topk_group, "group_score": "max"}
    return {"k": config.num_experts_per_tok, "scale": config.routed_scaling_factor, **(groups if grouped else {})}


_DEEPSEEK: dict[str, Any] = {
    "num_experts": "n_routed_experts",
    "hidden": "moe_intermediate_size",
    "shared": "shared_experts",
}

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "Mixtral",
        num_experts="num_local_experts",
        hidden="intermediate_size",
        router=_mixtral,
        block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    ),
    "olmoe": Family("Olmoe", num_experts="num_experts", hidden="intermediate_size", router=_softmax),
    "qwen2_moe": Family(
        "Qwen2Moe",
        num_experts="num_experts",
        hidden="moe_intermediate_size",
        router=_softmax,
        shared="shared_expert",
        shared_gate="shared_expert_gate",
    ),
    "qwen3_moe": Family("Qwen3Moe", num_experts="num_experts", hidden="moe_intermediate_size", router=_softmax),
    "deepseek_v3": Family("DeepseekV3", **_DEEPSEEK, router=_deepseek_v3),
}


# Read and written as those above: blocks of the same kinds in other decoders.
READABLE: dict[str, Family] = {
    "flex_olmo": Family("FlexOlmo", num_experts="num_experts", hidden="intermediate_size", router=_softmax),
    "mellum": Family("Mellum", num_experts="num_experts", hidden="moe_intermediate_size", router=_softmax),
    "deepseek_v2": Family("DeepseekV2", **_DEEPSEEK, router=_deepseek_v2),
    **{
        model_type: Family(prefix, **_DEEPSEEK, router=_deepseek_v3)
        for model_type, prefix in {
            "deepseek_v32": "DeepseekV32",
            "dots1": "Dots1",
            "glm4_moe": "Glm4Moe",
            "glm4_moe_lite": "Glm4MoeLite",
            "glm_moe_dsa": "GlmMoeDsa",
            "solar_open": "SolarOpen",
        }.items()
    },
}

TABLES = FAMILIES | READABLE

# What a configuration may call a family besides: Kimi K2's is DeepSeek-V3's in other numbers.
ALSO = {"kimi_k2": "deepseek_v3"}

CODED = {"codes": "weight", "scales": "weight_scale_inv"}  # what is what of quantised experts on disk

# Dense families, and the layout in which they are written once upcycled; see `sparse_relatives`.
RELATIVES = {"mistral": "mixtral", "llama": "mixtral", "qwen3": "qwen3_moe"}


def check_router(
    name: str,
    router: Any,
    family: Family | SparseBlock,
    config: Any,
    gate: tuple[type[TopKRouter], dict[str, Any]] | None = None,
) -> None:
    """Raise ValueError unless transformers, reading `config`, would route as `router` does.

    gate: the class and arguments of the layer's, where the family has several. Capacity, losses, noise and jitter have
    no place in a checkpoint: they belong to training, and are not compared.
    """
    kind, arguments = gate or (TopKRouter, family.router(config))
    if not isinstance(router, kind):
        raise ValueError(f"{name}: {type(router).__name__} cannot be expressed in the {family.prefix} layout")
    with torch.device("meta"):
        published = kind(router.dim, router.num_experts, **arguments)
    if published.group_score == "top2_sum" and (per_group := router.num_experts // published.num_groups) < 2:
        raise ValueError(
            f"{name}: in the {family.prefix} layout transformers adds up the two best experts of each group, and here "
            f"a group has {per_group}; keep the state_dict, or make the model dense (zoo.to_dense)"
        )
    check_same(name, router, published, f"the {family.prefix} layout")


def check_same(name: str, router: TopKRouter, published: TopKRouter, layout: str) -> None:
    """Raise ValueError unless, in evaluation and without capacity, `router` decides as the gate that a layout means."""
    for (option, found), expected in zip(_decision(router).items(), _decision(published).values()):
        if found != expected:
            raise ValueError(
                f"{name}: {option}={found!r} cannot be expressed in {layout}; its configuration means {expected!r}"
            )
    if not decides_alike(router, published):
        raise ValueError(
            f"{name}: {type(router).__name__} cannot be expressed in {layout}, by which tokens meet other experts, or "
            "with other weights; keep the state_dict"
        )


def _decision(router: TopKRouter) -> dict[str, Any]:
    """The options that decide a token's experts and weights, in one form for the same meaning."""
    after = router.score == "softmax_topk"  # equals softmax over all experts, renormalised
    groups = (router.num_groups, router.group_topk, router.group_score) if router.num_groups > 1 else None
    return {
        "k": router.k,
        "score": "softmax" if after else router.score,
        "normalize": router.normalize or after,
        "normalize_logits": router.normalize_logits,
        "scale": router.scale,
        "selection_bias": router.selection_bias is not None,
        "groups": groups,
        "unit_weights": router.unit_weights,
        "level": getattr(router, "level", "token"),  # one decision a token, or a sentence
    }


def check_experts(name: str, experts: Any, family: Family, config: Any) -> None:
    """Raise ValueError unless transformers, reading `config`, would compute what the experts of a layer do."""
    layout = f"cannot be expressed in the {family.prefix} layout"
    if isinstance(experts, Experts):
        for method in ("forward", "compute", "compute_with"):
            if getattr(type(experts), method) is not getattr(Experts, method):
                raise ValueError(f"{name}: the {method} of {type(experts).__name__} {layout}; keep the state_dict")
        if experts.weigh_input:
            raise ValueError(f"{name}: weigh_input=True {layout}; keep the state_dict")
    for option, means in {"activation": activation_of(config), "hidden_dim": getattr(config, family.hidden)}.items():
        if (found := getattr(experts, option, means)) != means:
            raise ValueError(f"{name}: {option}={found!r} {layout}; its configuration means {means!r}")


ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "relu": "reglu"}


def activation_of(config: Any) -> str:
    """The kernels' name of the configuration's gated activation; raises ValueError for one they do not have."""
    if config.hidden_act not in ACTIVATIONS:
        raise unknown(f"expert activation (hidden_act of {config.model_type})", config.hidden_act, ACTIVATIONS)
    return ACTIVATIONS[config.hidden_act]


def tensors_on_disk(
    model: nn.Module, family: Family, gates: bool = True, state: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name on disk and tensor (a view into the stacked weights) of all that a published checkpoint of `model` holds.

    Reading copies files into these views, writing copies the views into files, so that the two cannot disagree.
    Where the gates are not the family's own (`gates=False`), only weights that fit theirs are among them. `state` is
    the model's own, or what it would be in one process.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name, tensor in joined_state(model, state).items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is None:
            if name not in tied:
                yield name, tensor
            continue
        stem = block.removesuffix("mlp") + family.block
        if name.startswith(f"{block}.router.") and not gates:
            router = blocks[block].router
            fits = {"weight": (router.num_experts, router.dim), "selection_bias": (router.num_experts,)}
            if tuple(tensor.shape) != fits.get(name.removeprefix(f"{block}.router.")):
                continue
        yield from _block_tensors(stem, name.removeprefix(f"{block}."), tensor, family)


def _block_tensors(stem: str, name: str, tensor: Tensor, family: Family) -> Iterator[tuple[str, Tensor]]:
    gate, up, down = family.projections
    weight, (plain, _, kind) = "weight", name.rpartition("_")
    if name.startswith("experts.") and kind in CODED:  # float8, as DeepSeek-V3 is published
        name, weight = plain, CODED[kind]
        tensor = tensor.view(torch.float8_e4m3fn) if kind == "codes" else tensor
    if name == "experts.gate_up_proj":
        for e, expert in enumerate(tensor):
            for projection, rows in zip((gate, up), expert.chunk(2)):
                yield f"{stem}.experts.{e}.{projection}.{weight}", rows
    elif name == "experts.down_proj":
        for e, expert in enumerate(tensor):
            yield f"{stem}.experts.{e}.{down}.{weight}", expert
    elif name == "router.weight":
        yield f"{stem}.gate.weight", tensor
    elif name == "router.selection_bias":
        yield f"{stem}.gate.e_score_correction_bias", tensor
    elif name == "shared_gate.weight" and family.shared_gate:
        yield f"{stem}.{family.shared_gate}.weight", tensor
    elif name.startswith("shared.") and family.shared:
        yield f"{stem}.{family.shared}.{name.removeprefix('shared.')}", tensor
    else:
        raise ValueError(f"{stem}: the {family.prefix} layout has no place for the tensor {name}")


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from its name ("bfloat16"), or as it is; raises ValueError for what is none."""
    if not isinstance(dtype, str):
        return dtype
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise unknown("dtype", dtype, ("float64", "float32", "bfloat16", "float16"))
    return found
