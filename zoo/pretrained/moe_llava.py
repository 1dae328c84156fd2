"""MoE-LLaVA's published layout (github.com/PKU-YuanGroup/MoE-LLaVA) as transformers' Llava on our layers, and back.

config.json is the language model's with mm_* and "moe" beside its fields; an expert is DeepSpeed's, `deepspeed_moe`.
The vision tower is named by its repository; its weights may be among the others, under `model.image_tower`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..convert.upcycling import upcycle
from ..moe import MoE
from ..moe.routers import GShardRouter, TopKRouter
from ..nearest import unknown
from ..parallel import Mesh
from ..parallel.parts import as_written, is_spread, whole_state
from . import adopt, hub, sharded, shards
from . import folder as files
from .context import decoder_of
from .language import resolve_dtype
from .moe_llava_names import KINDS, PUBLISHED, RENAMED, TOWER, TOWERS, tensors_on_disk
from .peek import peek
from .quantised import plain
from .staging import staged

UNREAD = re.compile(r".*(\.rotary_emb\..*|\.position_ids)")


def is_moe_llava(folder: Path) -> bool:
    """Whether config.json in a folder is one of the authors'."""
    return str(peek(folder).get("model_type", "")).startswith("moe_llava")


def from_pretrained(
    folder: Path,
    *,
    vision_tower: str | None = None,
    image_token_id: int | None = None,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str | None = None,
    backend: str = "auto",
    router: Any = None,
    losses: Mapping[str, Any] | None = None,
    capacity: Any = None,
    attn_implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """A published MoE-LLaVA as transformers' LlavaForConditionalGeneration on our layers, in eval mode.

    The authors put images where a token of id -200 stands; here an id of the vocabulary stands for each of an image's
    tokens, the last one by default: Phi, StableLM and Qwen have no token there. vision_tower is a folder or repository
    with the tower's config.json, and its weights where the checkpoint has none. router, losses and capacity take the
    place of the checkpoint's own: its top-k of DeepSpeed with GShard's loss. With `mesh` the model is read in parts, as
    `zoo.pretrained.folder.from_pretrained` does, and has its own gates.

    Raises ValueError for a language model that transformers does not have, a projector other than mlp2x_gelu, residual
    experts, and for tensors as `zoo.pretrained.folder.from_pretrained`.
    """
    raw = files._read_json(folder / files.CONFIG)
    entries = files.entries_of(folder, raw)
    tower = None if vision_tower is None else hub.local_folder(vision_tower)
    config = plain(_config(raw, folder, tower, image_token_id))
    if dtype == "auto":
        dtype = config.dtype or files.stored_dtype(entries)
    from transformers import LlavaForConditionalGeneration

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    files.check_router(router, mesh)
    with torch.device("meta" if mesh is not None else device or torch.get_default_device()):
        dense = LlavaForConditionalGeneration._from_config(config, dtype=resolve_dtype(dtype), **options)
        model: Any = _sparse(dense, raw["moe"], folder, backend, router, losses, capacity)
    if mesh is not None or not next(model.parameters()).is_meta:
        if not any(key.startswith(TOWER) for key in entries):
            entries |= _tower_entries(tower, raw, folder)
        targets = _targets(model, entries, folder, own_gates=router is None)
        if mesh is not None:
            sharded.spread_and_fill(model, targets, entries, mesh, device)
        else:
            with torch.no_grad():
                for key, target in targets.items():
                    entries[key].read_into(target)
    files.read_generation(model, folder)
    return model.eval()


def _config(raw: Mapping[str, Any], folder: Path, tower: Path | None, image_token_id: int | None) -> Any:
    from transformers import AutoConfig, LlavaConfig

    where = folder / files.CONFIG
    kind = str(raw["model_type"])
    if kind == "moe_llava_qwen":
        raise ValueError(f"{where}: {kind} has Qwen's first language model, which transformers does not have")
    if kind not in KINDS:
        raise unknown(f"MoE-LLaVA family in {where}", kind, KINDS)
    projector = raw.get("image_projector_type", raw.get("mm_projector_type"))
    if projector != "mlp2x_gelu":
        raise ValueError(f"{where}: image_projector_type={projector!r}; expected 'mlp2x_gelu'")
    if not isinstance(raw.get("moe"), dict) or not raw["moe"].get("moe_layers_idx"):
        raise ValueError(f'{where}: "moe" names no layers under moe_layers_idx; a dense stage has no experts to read')
    if raw["moe"].get("use_residual"):
        raise ValueError(f"{where}: use_residual=true (an MLP beside the experts) is not supported")
    own = {"model_type", "architectures", "auto_map", "transformers_version", "moe", "vision_config"}
    fields = {RENAMED.get(name, name): value for name, value in raw.items() if name not in own}
    fields = {name: value for name, value in fields.items() if not re.match(r"mm_|image_|video_|tune_|use_mm", name)}
    text = AutoConfig.for_model(KINDS[kind][0], **fields)
    token = raw.get("image_token_index", text.vocab_size - 1) if image_token_id is None else image_token_id
    return LlavaConfig(
        text_config=text,
        vision_config=_vision_config(raw, where, tower),
        image_token_index=token,
        projector_hidden_act="gelu",
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if raw.get("mm_vision_select_feature") == "cls_patch" else "default",
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=raw.get("torch_dtype", raw.get("dtype")),
    )


def _vision_config(raw: Mapping[str, Any], where: Path, tower: Path | None) -> dict[str, Any]:
    if tower is not None:
        config = files._read_json(tower / files.CONFIG)
        if "vision_config" not in config:
            return config
        kind = f"{config['model_type']}_vision_model"
        return {"model_type": kind, **config["vision_config"]}
    if isinstance(raw.get("vision_config"), dict):
        return raw["vision_config"]
    name = str(raw.get("mm_image_tower"))
    if name not in TOWERS:
        raise ValueError(
            f"{where}: mm_image_tower={name!r} is none of {', '.join(TOWERS)}; give its folder as vision_tower"
        )
    return TOWERS[name]


def _sparse(
    dense: Any, moe: Mapping[str, Any], folder: Path, backend: str, router: Any, losses: Any, capacity: Any
) -> Any:
    counts = moe["num_experts"]
    number = counts[0] if isinstance(counts, list) else counts
    if isinstance(counts, list) and set(counts) != {number}:
        raise ValueError(
            f"{folder / files.CONFIG}: layers with different numbers of experts {counts} are not supported"
        )
    k = moe.get("top_k_experts", 2)
    given = adopt.gate_arguments(losses, capacity)
    spec = router or {**deepspeed_gate(k, moe), **given}
    own = given if router else {}
    return upcycle(dense, moe["moe_layers_idx"], number, spec, k=k, backend=backend, **own)


def deepspeed_gate(k: int, moe: Mapping[str, Any]) -> dict[str, Any]:
    """The gate of DeepSpeed's MoE layer for k = 1 or 2, for the authors' table "moe".

    For two: softmax, the second expert drawn by Gumbel noise in training and the likeliest in evaluation (where
    DeepSpeed draws too), weights divided by the sum of what capacity leaves, and GShard's loss. For one: the softmax's
    own weight, and places given to random tokens. Raises ValueError for more.
    """
    capacity = {
        "factor": float(moe.get("capacity_factor", 1.0)),
        "eval_factor": float(moe.get("eval_capacity_factor", 1.0)),
        "minimum": int(moe.get("min_capacity", 4)),
    }
    losses = {"gshard": float(moe.get("router_aux_loss_coef", 0.01))}
    if k == 2:
        rule = {"second": "sampling", "eval_second": "all", "renormalize": "after"}
        return {"name": "GShardRouter", **rule, "capacity": capacity, "losses": losses}
    if k == 1:
        return {
            "name": "TopKRouter",
            "k": 1,
            "normalize": False,
            "capacity": {**capacity, "drop": "random"},
            "losses": losses,
        }
    raise ValueError(f"MoE-LLaVA: top_k_experts must be 1 or 2, as DeepSpeed has gates for, got {k}")


def _tower_entries(tower: Path | None, raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The tower's own tensors, under the names they would have among the others."""
    if tower is None:
        raise ValueError(
            f"{folder}: the vision tower's weights are not in it; give the folder of {raw.get('mm_image_tower')} "
            "as vision_tower"
        )
    found = {key.removeprefix("vision_model."): entry for key, entry in files._entries(tower).items()}
    return {f"{TOWER}{key}": entry for key, entry in found.items() if not re.match(r"text_|logit_|visual_", key)}


def _targets(model: Any, entries: dict[str, Any], folder: Path, own_gates: bool) -> dict[str, Tensor]:
    """What each tensor of the files fills, a view into the model; all is checked, and nothing read."""
    targets = dict(tensors_on_disk(model, own_gates))
    label = model.config.text_config.model_type
    if missing := [key for key in targets if key not in entries]:
        raise ValueError(f"{folder}: {files._some(missing)} missing; MoE-LLaVA with {label} needs them")
    gates = re.compile(r".*\.gate\.wg\.weight" if not own_gates else r"(?!)")
    surplus = [k for k in entries if k not in targets and not UNREAD.fullmatch(k) and not gates.fullmatch(k)]
    if surplus:
        raise ValueError(f"{folder}: {files._some(surplus)} unknown to MoE-LLaVA with {label} as {files.CONFIG} says")
    for key, target in targets.items():
        entries[key].check(target)
    return targets


def check(model: Any) -> tuple[list[int], list[MoE]]:
    """Which layers of an upcycled LLaVA have experts, and these; raises TypeError and ValueError as `save`."""
    config, text = model.config, model.config.get_text_config()
    if config.model_type != "llava" or text.model_type not in PUBLISHED:
        raise TypeError(
            f"save_pretrained: an upcycled {config.model_type} with {text.model_type} has no published layout; "
            f"expected a llava with {', '.join(PUBLISHED)}, which MoE-LLaVA's has"
        )
    layers = [i for i, layer in enumerate(decoder_of(model).layers) if isinstance(layer.mlp, MoE)]
    moes = [decoder_of(model).layers[i].mlp for i in layers]
    own = {id(moe) for moe in moes}
    if elsewhere := [name for name, m in model.named_modules() if isinstance(m, MoE) and id(m) not in own]:
        raise ValueError(f"save_pretrained: MoE-LLaVA's layout has no place for experts in {elsewhere[0]}")
    if other := {moe.experts.hidden_dim for moe in moes} - {text.intermediate_size}:
        raise ValueError(
            f"save_pretrained: MoE-LLaVA's layout means experts as wide as the dense MLPs, {text.intermediate_size}; "
            f"found {', '.join(map(str, sorted(other)))}"
        )
    _said(moes)
    return layers, moes


def save(model: Any, folder: Any, *, max_shard_size: int | str = "5GB", overwrite: bool = False) -> None:
    """Write an upcycled LLaVA in the authors' layout, its vision tower's configuration beside their fields.

    A model in parts is put together by all its processes, which call this together, and written by the first.
    Raises TypeError for a model that is none, ValueError for gates and layers that the layout cannot express, and
    FileExistsError for a folder that is not empty.
    """
    config, text = model.config, model.config.get_text_config()
    layers, moes = check(model)
    kind = PUBLISHED[text.model_type]
    raw = {name: value for name, value in text.to_dict().items() if name not in ("model_type", "architectures")}
    raw |= {
        "architectures": [f"EvalMoELLaVA{KINDS[kind][1]}ForCausalLM"],
        "model_type": kind,
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "moe": {"moe_enable": True, "moe_mode": "custom", "moe_layers_idx": layers, "ep_size": 1, **_said(moes)},
        "image_projector_type": "mlp2x_gelu",
        "image_token_index": config.image_token_index,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_image_tower": next((n for n, c in TOWERS.items() if _is(config.vision_config, c)), None),
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
        "vision_config": config.vision_config.to_dict(),
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    limit = shards.bytes_of(max_shard_size)
    whole = whole_state(model) if is_spread(model) else None
    if whole is not None and torch.distributed.get_rank():
        return
    tensors = list(tensors_on_disk(model, state=whole))
    with staged(folder, overwrite) as staging:
        (staging / files.CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(staging)
        shards.write_weights(tensors, sum(p.numel() for p in model.parameters()), staging, limit)


def _is(config: Any, tower: Mapping[str, Any]) -> bool:
    return all(getattr(config, name, None) == value for name, value in tower.items())


def _said(moes: list[MoE]) -> dict[str, Any]:
    """The authors' table "moe" for gates like these; raises ValueError where it cannot say them."""
    router: Any = as_written(moes[0].router)
    k = router.k if isinstance(router, TopKRouter) else None
    two = type(router) is GShardRouter and router.renormalize == "after"
    one = type(router) is TopKRouter and k == 1 and not router.normalize
    same = {
        (type(as_written(m.router)), getattr(m.router, "k", None), getattr(m.router, "capacity", None)) for m in moes
    }
    plain = two or one
    if plain:
        options = (router.bias, router.scale, router.score, router.normalize_logits, router.selection_bias)
        plain = options == (None, 1.0, "softmax", None, None) and router.num_groups == 1
    if not plain or len(same) > 1:
        raise ValueError(
            f"save_pretrained: MoE-LLaVA's layout means DeepSpeed's gate of one or two experts in every sparse layer "
            f"(zoo.pretrained.moe_llava.deepspeed_gate), and has no place for {type(router).__name__} with k={k}"
        )
    capacity = router.capacity
    terms = router.losses.terms
    return {
        "num_experts": [m.router.num_experts for m in moes],
        "top_k_experts": k,
        "capacity_factor": capacity.factor if capacity else 1e9,
        "eval_capacity_factor": (capacity.eval_factor or capacity.factor) if capacity else 1e9,
        "min_capacity": capacity.minimum if capacity else 0,
        "use_residual": False,
        "router_aux_loss_coef": terms["gshard"].weight if "gshard" in terms else 0.0,
        "train_modules": [],
    }
