"""What transformers' Trainer calls on its models, for ours: published names are written, and read again.

Its own `save_pretrained` would write our tensor names, and its `load_state_dict` of a checkpoint's tensors, which it
does not ask to be strict, would pass over the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import OffloadedExperts, QuantisedExperts
from ..moe.grown import joined_state
from .language import RELATIVES, TABLES, tensors_on_disk


class Save:
    """Stands in for transformers' own method; see `zoo.save_pretrained`.

    An object rather than a bound function: it survives pickling, and a copied model saves itself.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = True,
        **options: Any,
    ) -> None:
        """As `zoo.save_pretrained`, but like transformers' own it replaces the checkpoint that a folder has.

        state_dict: what to write instead of the model's own tensors, under the model's names. Raises TypeError for
        options of transformers that say more than its defaults, such as push_to_hub.
        """
        from .dispatch import save_pretrained

        for name, value in options.items():
            if value not in (None, {"safe_serialization": True, "save_peft_format": True}.get(name, False)):
                raise TypeError(f"save_pretrained: {name}={value!r} is not supported; see zoo.save_pretrained")
        if is_main_process:
            save_pretrained(
                self.model, save_directory, max_shard_size=max_shard_size, overwrite=overwrite, state_dict=state_dict
            )


def stand_in(model: Any) -> None:
    """Let a transformers model with our layers write published names, and read them from a state_dict."""
    model.save_pretrained = Save(model)
    model.register_load_state_dict_pre_hook(_take_published)


@torch.no_grad()
def _take_published(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Copy tensors under published names, of which a stacked one of ours has many, into the model.

    Raises ValueError for experts under names that are not the model's and not known here, or that are offloaded.
    """
    held: dict[str, Tensor] = {} if prefix else model.state_dict()
    foreign = [name for name in state if ".experts." in name and name not in held]
    if prefix or not foreign:
        return
    own = joined_state(model, held)
    foreign = [name for name in foreign if name not in own]
    config: Any = model.config
    family = TABLES.get(RELATIVES.get(config.model_type, config.model_type))
    few = [module for module in model.modules() if isinstance(module, QuantisedExperts)]
    if family is not None and all(experts.format == "float8" for experts in few):
        for name, tensor in own.items():
            for key, part in tensors_on_disk(model, family, state={name: tensor}):
                coded = part.dtype == torch.float8_e4m3fn  # numbers are none of its codes
                if key != name and key in state and not (coded and state[key].dtype != part.dtype):
                    part.copy_(state.pop(key))
                    state[name] = tensor
    if left := [name for name in foreign if name in state]:
        if any(isinstance(module, OffloadedExperts) for module in model.modules()):
            raise ValueError(f"load_state_dict: {left[0]} is experts'; those of this model are offloaded, and no state")
        raise ValueError(
            f"load_state_dict: {left[0]} and {len(left) - 1} more are named as {config.model_type} is published; read "
            "the checkpoint with zoo.from_pretrained"
        )
