"""What peft trains whole beside a LoRA, its `modules_to_save`: embeddings, heads, norms and gates, read and written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..moe.layer import Recorded
from ..pretrained.language import RELATIVES, TABLES, tensors_on_disk
from ..pretrained.sparse_blocks import row_of, tensors_of_transformers
from .adapter_targets import plain_name

KEY = re.compile(r"base_model\.model\.(?!.*lora_)(.+?)(?:\.(?:modules_to_save|base_layer|default))*\.(\w+)")


def read_onto(made: nn.Module, tensors: Mapping[str, Tensor], path: Path, tied: bool) -> None:
    """Give an adapted model the parameters that a file has, by peft's names, as ones that it trains, of its own.

    tied: a parameter that is another one too stays so. Raises ValueError naming file and tensor for what is none of
    the model's, another shape, and a tied parameter where peft has two.
    """
    known: dict[str, Tensor] = {}
    many: dict[int, list[str]] = {}
    both = (made.named_parameters(remove_duplicate=False), made.named_buffers(remove_duplicate=False))
    for full, tensor in (pair for found in both for pair in found):
        owner, _, end = full.rpartition(".")
        name = f"{plain_name(owner)}.{end}"
        known[name] = tensor
        many.setdefault(id(tensor), []).append(name)
    ours = {theirs: own for own, theirs in _in_blocks(made).items()} if tensors else {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        assert match is not None
        name = f"{match[1]}.{match[2]}"
        place = known.get(ours.get(name.replace(".block_sparse_moe.", ".mlp."), name))
        if place is None:
            raise ValueError(f"{path}: {key} is neither a matrix of a LoRA nor a tensor of {type(made).__name__}")
        if place.shape != tensor.shape:
            raise ValueError(
                f"{path}: {key} has shape {list(tensor.shape)}, expected {list(place.shape)}; resize the model's "
                "embeddings first where it learnt new tokens"
            )
        if len(names := many[id(place)]) > 1 and not tied:
            raise ValueError(f"{path}: {key} was trained apart from what the model ties it to, {', '.join(names)}")
        place.data = tensor.to(place)  # not the memory of the model it was adapted from
        if isinstance(place, nn.Parameter):
            place.requires_grad_()


def written(model: Any, state: Mapping[str, Tensor], learns: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of parameters that are trained beside a LoRA, by name, of each module, as transformers calls it.

    Raises ValueError naming a parameter whose module is not trained whole, or is no module of transformers' model.
    """
    found: dict[str, dict[str, Tensor]] = {}
    learns = set(learns)
    theirs = _in_blocks(model) if learns else {}
    within = [f"{name}." for name, module in model.named_modules() if isinstance(module, Recorded)]
    for name in sorted(learns):
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        placed = theirs if any(name.startswith(block) for block in within) else {name: name}
        whole = {f"{owner}.{end}" for end, _ in module.named_parameters()} <= learns
        if name not in placed or not whole or plain_name(owner) != owner:
            raise ValueError(f"save_pretrained: peft's layout has no place for what else is trained, as {name}")
        called = placed[name].rpartition(".")[0]
        each = {f"{owner}.{end}" for end in module.state_dict()}
        found[called] = {theirs.get(n, n): state[n] for n in each if n in theirs or n in learns}
    return found


def _in_blocks(model: Any) -> dict[str, str]:
    """transformers' name of every tensor in a sparse block that is no expert's, gates and what runs beside them."""
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, Recorded)]
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    family = TABLES.get(RELATIVES.get(model_type, model_type))
    if family is None and (not model_type or row_of(model) is None):
        return {}
    found: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        block = next((block for block in blocks if name.startswith(block)), None)
        if block is None or ".experts." in name:
            continue
        try:
            if family is None:
                ((called, _),) = tensors_of_transformers(model, {name: tensor})
            else:
                ((called, _),) = tensors_on_disk(model, family, state={name: tensor})
                called = called.replace(f".{family.block}.", ".mlp.")
        except ValueError:  # what has no place in the layout, as of a gate of another kind
            continue
        found[name] = called
    return found
