"""A frozen model whose predictions another one learns from, beside the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from zoo.nearest import unknown

KEYS = ("pretrained", "network", "overrides", "weight", "temperature")


class Teacher:
    """What the key `teacher` of a task describes; no module, so that no checkpoint, optimizer or export has it.

    {"pretrained": a folder or hub repository, or "network": a name of `zoo models`; "overrides": keywords of
    `zoo.from_pretrained` or `zoo.create_model`; "weight": 0.25, its share of the loss; "temperature": 1.0}.

    Raises ValueError for other keys, both or neither of the models, and numbers that are none of these.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        for key in spec:
            if key not in KEYS:
                raise unknown("key of teacher", key, KEYS)
        if bool(spec.get("pretrained")) == bool(spec.get("network")):
            raise ValueError('teacher: give either "pretrained", a folder, or "network", the name of a model')
        self.spec = dict(spec)
        self.weight, self.temperature = float(spec.get("weight", 0.25)), float(spec.get("temperature", 1.0))
        if not 0 <= self.weight <= 1 or not self.temperature > 0:
            raise ValueError(
                f"teacher: expected weight between 0 and 1 and temperature above 0, got {self.weight} and "
                f"{self.temperature}"
            )
        self.model: Any = None

    def build(self, **defaults: Any) -> nn.Module:
        """The model, frozen and in evaluation mode; defaults are keywords that overrides do not name."""
        options = {**defaults, **(self.spec.get("overrides") or {})}
        if source := self.spec.get("pretrained"):
            model = zoo.from_pretrained(source, **options)
        else:
            model = zoo.create_model(self.spec["network"], **options)
        return model.requires_grad_(False).eval()

    def logits(self, run: Callable[[Any], Tensor], like: Tensor) -> Tensor:
        """What `run` gives of the model, on the device of `like`, without gradients."""
        self.model.to(like.device).eval()
        with torch.no_grad():
            return run(self.model).detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        # A copied task, as callbacks make, has the same teacher: it never changes.
        return self
