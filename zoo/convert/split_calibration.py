"""What is read of a dense model while it runs over some data: activations, and the importance of its neurons."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .arguments import Calibrate, losses_of
from .dense_mlps import DenseMLP

Key = TypeVar("Key", bound=Hashable)


@torch.no_grad()
def observe(model: nn.Module, linears: Mapping[Key, nn.Module], calibrate: Calibrate, tokens: int) -> dict[Key, Tensor]:
    """What each of some linear layers reads of the first `tokens` tokens, [T, width], while `calibrate` runs the model.

    The model is in eval mode. Raises ValueError naming a layer that was not run.
    """
    found: dict[Key, list[Tensor]] = {key: [] for key in linears}

    def keep(kept: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            room = tokens - sum(len(part) for part in kept)
            if room > 0:
                kept.append(args[0].detach().flatten(0, -2)[:room].clone())

        return hook

    handles = [linear.register_forward_pre_hook(keep(found[key])) for key, linear in linears.items()]
    try:
        with _evaluating(model):
            for _ in losses_of("split", calibrate, model):
                if all(sum(len(part) for part in kept) >= tokens for kept in found.values()):
                    break
    finally:
        for handle in handles:
            handle.remove()
    for key, kept in found.items():
        if not sum(len(part) for part in kept):
            name = next((n for n, module in model.named_modules() if module is linears[key]), str(key))
            raise ValueError(f"split: calibrate ran no token through {name}")
    return {key: torch.cat(kept) for key, kept in found.items()}


def importance(model: nn.Module, mlps: Sequence[DenseMLP], calibrate: Calibrate) -> dict[DenseMLP, Tensor]:
    """MoEBERT's score of each neuron (2204.07675, section 3.2), [F]: how much the loss would change without it.

    The sum over the losses that `calibrate` yields of |sum of w dL/dw over all weights into and out of the neuron|,
    biases not among them. The paper takes the absolute value for each sample: batches of one give just that. The model
    is in eval mode. Raises ValueError for a loss without gradient, and where calibrate yields none.
    """
    scores = {mlp: torch.zeros(mlp.sizes[1], device=mlp.down.weight.device) for mlp in mlps}
    parameters = [p for mlp in mlps for p in mlp.parameters]
    frozen = [p for p in parameters if not p.requires_grad]
    losses = 0
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad(), _evaluating(model):
            for loss in losses_of("split", calibrate, model):
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    what = "this one has none" if isinstance(loss, Tensor) else f"got {loss!r}"
                    raise ValueError(f"split: calibrate must yield losses with a gradient; {what}")
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                if all(grad is None for grad in found):
                    raise ValueError("split: calibrate must run the model it is given; none of its MLPs is in the loss")
                grads = {p: torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, found)}
                losses += 1
                for mlp in mlps:
                    scores[mlp] += _change(mlp, grads)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not losses:
        raise ValueError("split: calibrate yielded no loss")
    return scores


@torch.no_grad()
def _change(mlp: DenseMLP, grads: dict[nn.Parameter, Tensor]) -> Tensor:
    weights, slopes = mlp.weights(), mlp.weights(grads.__getitem__)
    into = (weights["w_in"].float() * slopes["w_in"].float()).sum(1).view(-1, mlp.sizes[1]).sum(0)
    return (into + (weights["w_out"].float() * slopes["w_out"].float()).sum(0)).abs()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode while the block runs, every module back in its own after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
