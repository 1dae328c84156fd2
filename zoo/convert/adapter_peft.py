"""LoRA in peft's layout (adapter_config.json, adapter_model.safetensors): read beside a model, and written.

A folder holds y = W x + scale * B A x, scale = alpha / r or alpha / sqrt(r), for linear layers (`target_modules`) and
for stacked experts (`target_parameters`, see `adapter_peft_experts`), and what else is trained (`adapter_peft_saved`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..moe import LoRALinear, LoRAOfExperts
from ..moe.adapted import features
from ..pretrained.staging import staged
from ..pretrained.tensorfile import read_all, read_header, write_file
from . import adapter_peft_saved
from .adapter_peft_experts import VERSION, Layout, layouts, matrices, parts
from .adapter_targets import _stacks, plain_name
from .adapting import adapt
from .dense_mlps import _is_linear
from .origin import files_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)*\.lora_(A|B)(?:\.default)?\.weight")
ONE_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)")
PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
# What changes more than weights by a product of two matrices.
UNKNOWN = ("use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "use_qalora")

# A linear layer ("" and 0) or a stack of experts, which of its parts, and which expert: A [r, D] and scale * B [O, r].
Pairs = dict[tuple[str, str, int], tuple[Tensor, Tensor]]
# Such a key, A, B, and the name by which patterns of options know the matrix.
Place = tuple[tuple[str, str, int], Tensor, Tensor, str]


def is_peft(folder: Path) -> bool:
    """Whether a folder has a LoRA, or another adapter, in peft's layout."""
    return (folder / CONFIG).is_file()


def base_name(folder: Path) -> str:
    """Where a folder says that the model it belongs to is; empty where it does not."""
    return str(_config(folder).get("base_model_name_or_path") or "")


def read(model: nn.Module, folder: Path) -> tuple[Pairs, dict[str, Tensor]]:
    """A folder's pairs by what of the model they belong to, and what was trained beside them by peft's names.

    Experts may be stacked as transformers has them, or have a pair for each, named as in published files.
    Raises ValueError naming the file for another kind of adapter, an option that changes more, and a name or shape that
    does not fit the model; FileNotFoundError where there are no weights.
    """
    config, path = _config(folder), folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    stored = read_header(path)
    tensors = {name: torch.empty(entry.shape) for name, entry in stored.items()}
    read_all(tensors, stored, path)
    found: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    saved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = KEY.fullmatch(name)
        if match is None and adapter_peft_saved.KEY.fullmatch(name):
            saved[name] = tensor
            continue
        if match is None or tensor.dim() != 2:
            raise ValueError(f"{path}: {name} is no matrix of a LoRA")
        # Parameters of one module have theirs inside one another.
        found[name.rpartition(f".lora_{match[2]}")[0], match[1]][match[2]] = tensor
    stacks, version = {name: stack for name, stack, _ in _stacks(model, "")}, str(config.get("peft_version") or "0")
    modules: dict[str, nn.Module] = {}
    for full, module in model.named_modules():
        modules.setdefault(plain_name(full), module)
    known = layouts(model) if any(name in stacks for _, name in found) else {}
    pairs: Pairs = {}
    for (_, name), sides in found.items():
        if set(sides) != {"A", "B"}:
            raise ValueError(f"{path}: {name} has lora_{next(iter(sides))} alone")
        what = f"{path}: A {list(sides['A'].shape)} and B {list(sides['B'].shape)} of {name}"
        places: Iterable[Place]
        if name in stacks:
            places = _in_stack(model, name, stacks[name], known.get(name), version, sides["A"], sides["B"], what)
        else:
            places = [_alone(modules, stacks, name, sides["A"], sides["B"], what, path)]
        for key, a, b, label in places:
            if key in pairs:
                raise ValueError(f"{path}: {name} has two LoRAs for one matrix")
            pairs[key] = a, _scale(config, label, a.shape[0]) * b
    return pairs, saved


def read_onto(model: nn.Module, folder: Path, share: bool = False) -> nn.Module:
    """A copy of a model with a folder's LoRA beside its weights, of kind LoRA in `zoo.adapt`.

    Raises as `read` and `adapter_peft_saved.read_onto`.
    """
    config, (pairs, saved) = _config(folder), read(model, folder)
    if not pairs:
        raise ValueError(f"{folder / WEIGHTS}: it has no LoRA")
    targets, ranks, alphas = dict[str, None](), set(), set()
    stacks = {name: stack for name, stack, _ in _stacks(model, "")}
    for (name, part, _), (a, _) in pairs.items():
        into = "gate_up_proj" if getattr(stacks.get(name), "gated", True) else "up_proj"
        targets[f"{name}.{'down_proj' if part == 'down' else into}" if part else name] = None
        ranks.add(a.shape[0])
        alphas.add(_scale(config, name, a.shape[0]) * a.shape[0])
    rank = max(ranks)
    alpha = alphas.pop() if len(ranks) == len(alphas) == 1 and 0 not in alphas else rank
    options: dict[str, Any] = {"dropout": config.get("lora_dropout") or None, "share": share}
    made = adapt(model, "LoRA", targets=list(targets), rank=rank, alpha=alpha, **options)
    with torch.no_grad():
        for module_name, module in made.named_modules():
            if isinstance(module, LoRALinear):
                _put(pairs, plain_name(module_name), "", module.lora)
            elif isinstance(module, LoRAOfExperts):
                for part, lora in module.lora.items():
                    _put(pairs, plain_name(module_name), part, lora)
        adapter_peft_saved.read_onto(made, saved, folder / WEIGHTS, bool(config.get("ensure_weight_tying")))
    return made


def _put(pairs: Pairs, name: str, part: str, lora: Any) -> None:
    """Fill a LoRA's experts; of a lower rank, rows and columns of zeros change nothing, nor does one without a pair."""
    for e in range(lora.num_experts):
        if (pair := pairs.get((name, part, e))) is not None:
            a, b = pair
            lora.a[e].copy_(F.pad(a, (0, 0, 0, lora.rank - a.shape[0])))
            lora.b[e].copy_(F.pad(b, (0, lora.rank - b.shape[1])) * (lora.rank / lora.alpha))


def _in_stack(
    model: nn.Module, name: str, stack: Any, layout: Layout | None, version: str, a: Tensor, b: Tensor, what: str
) -> Iterator[Place]:
    """Where the parts of stacked experts' A and B belong."""
    found = None if layout is None else parts(stack, layout, version, a, b)
    if found is None:
        raise ValueError(f"{what} are not those of {type(model).__name__}'s experts in transformers")
    for part, e, one, other in found:
        parameter = "down_proj" if part == "down" else "gate_up_proj" if stack.gated else "up_proj"
        yield (name, part, e), one, other, f"{name}.{parameter}"


def _alone(
    modules: Mapping[str, nn.Module], stacks: Mapping[str, Any], name: str, a: Tensor, b: Tensor, what: str, path: Path
) -> Place:
    """Where A and B of one matrix belong: a linear layer's, or an expert's by its published name."""
    key, sizes = (name, "", 0), None
    if match := ONE_EXPERT.fullmatch(name):
        around = f"{match[1].rpartition('.')[0]}.mlp" if f"{match[1]}.experts" not in stacks else match[1]
        key = f"{around}.experts", PARTS.get(match[3], ""), int(match[2])
        stack = stacks.get(key[0])
        if stack is not None and key[1] and key[2] < stack.num_experts:
            sizes = (stack.hidden_dim, stack.dim) if key[1] == "down" else (stack.dim, stack.hidden_dim)
    else:
        linear = modules.get(name)
        sizes = features(linear) if _is_linear(linear) else None
    if sizes is None:
        raise ValueError(f"{path}: {name} is no layer of {type(modules['']).__name__} that may have a LoRA")
    if (a.shape[1], b.shape[0]) != sizes or a.shape[0] != b.shape[1]:
        raise ValueError(f"{what}: expected [r, {sizes[0]}] and [{sizes[1]}, r]")
    return key, a, b, name


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise ValueError(f"{path}: expected peft_type LORA without biases")
    if not {"r", "lora_alpha"} <= set(config):
        raise ValueError(f"{path}: r or lora_alpha is missing")
    for name in UNKNOWN:
        if config.get(name):
            raise ValueError(f"{path}: {name}={config[name]!r} is not supported")
    return config


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What B A is multiplied by; alpha may differ by pattern, as the rank may, which the matrices tell."""
    patterns = config.get("alpha_pattern") or {}
    own = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = float(next(own, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@torch.no_grad()
def write(
    model: Any,
    folder: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    learns: Collection[str] = (),
    overwrite: bool = False,
) -> None:
    """Write the LoRA of a model from `zoo.adapt(model, "LoRA", ...)`, and its other parameters that learn.

    state has its tensors, in one process.

    All get the largest rank, padded with zeros. Of families with dense and sparse blocks peft (0.21) takes gate_proj,
    up_proj and down_proj of the dense ones for experts', and does not read LoRAs of them. Raises ValueError for
    adapters of another kind, and for experts that transformers holds in another layout, and as
    `adapter_peft_saved.written`.
    """
    kinds = [how["kind"] for how in model.adapted]
    if set(kinds) != {"LoRA"}:
        raise ValueError(f"save_pretrained: peft's layout is for LoRA, the model has {', '.join(kinds)}")
    saved = adapter_peft_saved.written(model, state, learns)
    linears, stacks, dropout = _linears(model, state), _experts(model, state), 0.0
    for module in model.modules():
        if isinstance(module, LoRALinear):
            dropout = max(dropout, module.lora.dropout)
    both = {**linears, **stacks}
    rank = max(a.shape[-2] for a, _ in both.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in both.items():
        a, b = F.pad(a, (0, 0, 0, rank - a.shape[-2])), F.pad(b, (0, rank - b.shape[-1]))
        if name in stacks:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
            owner, _, parameter = name.rpartition(".")
            # Two parameters of a module: the second one's wrapper stands around the first one's.
            inside = parameter != "down_proj" and f"{owner}.down_proj" in stacks
            name = f"{owner}.base_layer" if inside else owner
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    for parts_of in saved.values():
        tensors |= {f"base_model.model.{name}": tensor for name, tensor in parts_of.items()}
    causal = type(model).__name__.endswith("ForCausalLM")
    every = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    config = {
        "peft_type": "LORA",
        "peft_version": VERSION,
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": files_of(model) or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0 if stacks else dropout,  # peft has none inside experts
        "bias": "none",
        "fan_in_fan_out": any(type(m.base).__name__ == "Conv1D" for m in model.modules() if isinstance(m, LoRALinear)),
        "inference_mode": True,
        "target_modules": list(linears),
        "target_parameters": list(stacks) or None,
        "modules_to_save": list(saved) or None,
        "ensure_weight_tying": any(every.count(id(model.get_parameter(name))) > 1 for name in learns),
    }
    with staged(folder, overwrite) as staging:
        (staging / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        write_file(staging / WEIGHTS, sorted((name, tensor.contiguous()) for name, tensor in tensors.items()))


def _linears(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, D] and scaled B [O, r] of linear layers; LoRAs of parts of a fused one, one after another, are one."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            plain, lora = plain_name(name), module.lora
            a, b = state[f"{name}.lora.a"][0], lora.alpha / lora.rank * state[f"{name}.lora.b"][0]
            start, stop = module.columns or (0, features(module.base)[1])
            b = F.pad(b, (0, 0, start, features(module.base)[1] - stop))
            before = found.get(plain)
            found[plain] = (a, b) if before is None else (torch.cat([before[0], a]), torch.cat([before[1], b], dim=1))
    return found


def _experts(model: Any, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [E, r, I] and scaled B [E, O, r] of transformers' parameters of experts, by their names."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    inside = {name: module for name, module in model.named_modules() if isinstance(module, LoRAOfExperts)}
    known = layouts(model) if inside else {}
    for name, module in inside.items():
        if name not in known:
            raise ValueError(
                f"save_pretrained: peft's LoRAs are for transformers' experts, and {type(model).__name__} has none "
                f"called {name}; adapt other layers, or leave out peft"
            )
        pairs, each = {}, dict[str, Any](module.lora.items())
        for part, lora in each.items():
            a, b = (state[f"{name}.lora.{part}.{side}"] for side in "ab")
            pairs[part] = a, lora.alpha / lora.rank * b
        found |= {f"{name}.{parameter}": pair for parameter, pair in matrices(module, pairs, known[name]).items()}
    return found
