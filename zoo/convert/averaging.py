"""Fine-tuned copies of one model: opened one after the other, held against each other, and averaged.

Branch-Train-Merge (2208.03306) averages copies that were trained on one domain each; Branch-Train-Mix averages all of
them but the MLPs (`zoo.convert.mixing`).
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..moe import OffloadedExperts, QuantisedExperts
from ..pretrained import hub
from .origin import made_by

Source = nn.Module | str | os.PathLike[str]

# What says nothing about what a model computes, or that fine-tuning may change.
FREE_FIELDS = (
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
FREE_ARGUMENTS = ("drop", "device", "dtype", "pretrained")


@torch.no_grad()
def average(
    models: Source | Iterable[Source], *, others: Iterable[Source] = (), weights: Sequence[float] | None = None
) -> nn.Module:
    """The weighted mean of all tensors of several fine-tuned copies of one model (Branch-Train-Merge, 2208.03306).

    models: modules, folders or hub ids (read one after the other by `zoo.from_pretrained`, so that one model is in
    memory beside the result), or one of them and `others`. weights, one a model and equal if not given, are divided by
    their sum; the authors' are the posterior of the domains, `DomainEnsemble.estimate_prior`. Sums are in float32 at
    least. The result has the type, dtype, device and mode of the first model; integers, as counters, are the first's.

    Raises ValueError naming what differs: architecture, configuration, a tensor's name or shape, the vocabulary; and
    for quantised experts.
    """
    sources = listed("average", models, others)
    shares = shares_of("average", weights, len(sources))
    opened = branches("average", sources)
    first = next(opened)
    result = copy.deepcopy(first) if isinstance(sources[0], nn.Module) else first
    mean = RunningMean(tensors_of(result), shares[0])
    rest = iter(shares[1:])
    for model in opened:  # no zip, which would hold a model while the next one is read
        mean.add(tensors_of(model), next(rest))
        del model
    mean.write()
    made_by("average", result)
    return result


def listed(what: str, models: Source | Iterable[Source], others: Iterable[Source], least: int = 2) -> list[Source]:
    """All models in order; raises ValueError for fewer than `least`."""
    one = isinstance(models, (nn.Module, str, os.PathLike)) and not isinstance(models, nn.ModuleList)
    found: list[Source] = [*([models] if one else models), *others]  # type: ignore[misc]
    for source in found:
        if not isinstance(source, (nn.Module, str, os.PathLike)):
            raise TypeError(f"{what}: expected models, folders or hub ids, got a {type(source).__name__}")
    if len(found) < least:
        raise ValueError(f"{what}: expected at least {least} models, got {len(found)}")
    return found


def shares_of(what: str, weights: Sequence[float] | None, number: int) -> list[float]:
    """Weights that sum to one, equal ones if none are given; raises ValueError for what no mean can have."""
    weights = [1.0] * number if weights is None else [float(weight) for weight in weights]
    if len(weights) != number:
        raise ValueError(f"{what}: {len(weights)} weights for {number} models")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
        raise ValueError(f"{what}: weights must be at least 0, and one of them above, got {weights}")
    return [weight / sum(weights) for weight in weights]


def branches(what: str, sources: Sequence[Source]) -> Iterator[Any]:
    """Each model in turn, read where it is a folder; raises ValueError for one that is no copy of the first's kind.

    Only the model that was yielded last is held here.
    """
    from ..pretrained.dispatch import from_pretrained

    expected: _Kind | None = None
    device: torch.device | None = None
    for number, source in enumerate(sources):
        if isinstance(source, nn.Module):
            model: Any = getattr(source, "_orig_mod", source)  # torch.compile's wrapper
        else:
            gc.collect()  # models of transformers hold themselves: the one before would stay beside this one
            model = from_pretrained(source, **({} if device is None else {"device": device}))
        for name, module in model.named_modules():
            if isinstance(module, (OffloadedExperts, QuantisedExperts)):
                few = "quantised" if isinstance(module, QuantisedExperts) else "offloaded"
                raise ValueError(f"{what}: model {number} has {few} experts ({name}), of which there is no mean")
        kind = _Kind.of(model, source)
        if expected is None:
            expected, device = kind, next(model.parameters()).device
        else:
            kind.check(what, number, expected)
        yield model
        del model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, those that are tied once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class RunningMean:
    """The weighted mean of models' tensors, one model after the other: m += w / W (t - m), W the weights so far.

    It starts from `target`, which it changes: at once where that is float32 or wider, else when `write` is called.
    Equal tensors have exactly themselves as mean. Integers stay as they are.
    """

    def __init__(self, target: Mapping[str, Tensor], weight: float) -> None:
        self.total = weight
        self.target = {name: tensor.detach() for name, tensor in target.items() if tensor.is_floating_point()}
        # Of a wide tensor this is the tensor itself.
        self.mean = {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in self.target.items()}

    @torch.no_grad()
    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Count one more model, with tensors of the same names."""
        self.total += weight
        if not weight:
            return
        for name, mean in self.mean.items():
            mean.lerp_(tensors[name].detach().to(mean), weight / self.total)

    def write(self) -> None:
        """Give narrow tensors of the target their mean."""
        for name, tensor in self.target.items():
            if tensor is not self.mean[name]:
                tensor.copy_(self.mean[name])


@dataclass(frozen=True)
class _Kind:
    """What copies of one model have in common."""

    name: str
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    vocabulary: dict[str, int] | None

    @classmethod
    def of(cls, model: Any, source: Source) -> _Kind:
        settings: dict[str, Any] = {}
        if hasattr(model, "config") and hasattr(model.config, "to_dict"):
            settings = {n: v for n, v in model.config.to_dict().items() if n not in FREE_FIELDS}
        elif hasattr(model, "pretrained_cfg"):
            arguments = getattr(model, "_model_args", None) or {}
            settings = {n: v for n, v in arguments.items() if not any(word in n for word in FREE_ARGUMENTS)}
            settings["architecture"] = model.pretrained_cfg.get("architecture")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
        return cls(type(model).__name__, settings, shapes, None if isinstance(source, nn.Module) else _words(source))

    def check(self, what: str, number: int, first: _Kind) -> None:
        label = f"{what}: model {number} is no copy of model 0"
        if self.name != first.name:
            raise ValueError(f"{label}: {self.name}, expected {first.name}")
        for name in sorted(self.settings.keys() | first.settings.keys()):
            found, expected = self.settings.get(name), first.settings.get(name)
            if found != expected:
                raise ValueError(f"{label}: {name}={found!r}, expected {expected!r}")
        if other := sorted(n for n in self.shapes.keys() | first.shapes if self.shapes.get(n) != first.shapes.get(n)):
            found, expected = (kind.shapes.get(other[0], "no such tensor") for kind in (self, first))
            raise ValueError(f"{label}: {other[0]} {found}, expected {expected} ({len(other)} tensors differ)")
        if self.vocabulary is not None and first.vocabulary is not None and self.vocabulary != first.vocabulary:
            pairs = self.vocabulary.items() ^ first.vocabulary.items()
            token = min(str(token) for token, _ in pairs)
            raise ValueError(
                f"{label}: its tokenizer has another vocabulary; {token!r} is "
                f"{self.vocabulary.get(token, 'missing')}, expected {first.vocabulary.get(token, 'missing')}"
            )


def _words(source: str | os.PathLike[str]) -> dict[str, int] | None:
    """Ids of a folder's tokens where it has a tokenizer.json, else None."""
    path = hub.local_folder(source) / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    words = content.get("model", {}).get("vocab", {})
    if isinstance(words, list):  # a unigram model's, with scores
        words = {word: index for index, (word, _) in enumerate(words)}
    return {**words, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}
