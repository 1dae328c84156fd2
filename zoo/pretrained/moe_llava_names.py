"""What MoE-LLaVA's checkpoints call things: language models, vision towers, tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..moe import MoE
from ..moe.grown import joined_state
from .context import decoder_of

# The authors' model_type: transformers', its class prefix there, and the layers of an MLP.
GATED = ("gate_proj", "up_proj", "down_proj")
KINDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "moe_llava_phi": ("phi", "Phi", ("fc1", "fc2")),
    "moe_llava_stablelm": ("stablelm", "Stablelm", GATED),
    "moe_llava_qwen1_5": ("qwen2", "Qwen1_5", GATED),
    "moe_llava_llama": ("llama", "Llama", GATED),
    "moe_llava_mistral": ("mistral", "Mistral", GATED),
}
PUBLISHED = {text: kind for kind, (text, _, _) in KINDS.items()}
# StableLM's own code called these otherwise.
RENAMED = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
PREFIXES = {
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.image_spatial_proj.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.image_spatial_proj.2.",
    "model.vision_tower.": "model.image_tower.image_tower.vision_model.",
}
TOWER = PREFIXES["model.vision_tower."]


def tensors_on_disk(
    model: Any, gates: bool = True, state: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Name on disk and tensor, a view into the stacked weights, of all that a checkpoint of `model` holds."""
    names = KINDS[PUBLISHED[decoder_of(model).config.model_type]][2]
    blocks = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name, tensor in joined_state(model, state).items():
        if name in tied:
            continue
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None:
            stem = f"{_renamed(block)}.deepspeed_moe"
            yield from _block(stem, name.removeprefix(f"{block}."), tensor, names, gates)
        else:
            yield _renamed(name), tensor


def _renamed(name: str) -> str:
    ours = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES[ours] + name.removeprefix(ours) if ours else name


def _block(stem: str, name: str, tensor: Tensor, names: tuple[str, ...], gates: bool) -> Iterator[tuple[str, Tensor]]:
    *into, down = names
    if name == "router.weight":
        if gates:
            yield f"{stem}.gate.wg.weight", tensor
        return
    part, bias = name.removeprefix("experts."), name.endswith("_bias")
    where = {"gate_up_proj": into, "up_proj": into, "down_proj": [down]}.get(part.removesuffix("_bias"))
    if where is None:
        if gates:
            raise ValueError(f"{stem}: MoE-LLaVA's layout has no place for the tensor {name}")
        return
    for e, expert in enumerate(tensor):
        for projection, rows in zip(where, expert.chunk(len(where))):
            yield f"{stem}.experts.deepspeed_experts.{e}.{projection}.{'bias' if bias else 'weight'}", rows
