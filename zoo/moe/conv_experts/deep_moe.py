"""DeepMoE: the channels of a network's convolutions as experts, which a shallow embedding of the image gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import autocast
from ..layer import Recorded
from ..routers.base import Router
from ..routing import Routing


class ChannelRouter(Router):
    """Gates of the channels of one convolution (DeepMoE, 1806.01531): g = ReLU(W e), e [B, D] embeddings of images.

    Images are its tokens, channels its experts; a channel is not computed for an image where its gate is zero. The loss
    "sparsity", `sparsity` times the L1 norm of g, mean over images, makes gates zero. Context: mask [B].
    """

    def __init__(self, dim: int, num_experts: int, *, sparsity: float = 1e-3) -> None:
        super().__init__(dim, num_experts)
        self.sparsity = sparsity
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw W uniformly within 1/sqrt(dim)."""
        self.weight.uniform_(-1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim))

    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> Routing:
        """Decide for embeddings x [B, D]."""
        if mask is None:
            return self.decide(self.gates(x))
        return self.decide(self.gates(x.where(mask[:, None].bool(), 0)), mask.bool())

    def gates(self, x: Tensor) -> Tensor:
        """g of embeddings x [B, D], [B, C], in float32 at least."""
        with autocast.off(x):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return F.linear(x, self.weight.to(x.dtype)).relu()

    def decide(self, gates: Tensor, mask: Tensor | None = None) -> Routing:
        """The gates [B, C] as a decision, with its loss."""
        images = max(gates.shape[0], 1) if mask is None else mask.sum().clamp(min=1)
        total = gates.detach().sum(-1, keepdim=True)
        losses = {"sparsity": self.sparsity * gates.sum() / images} if self.training else {}
        return Routing.from_matrix(gates, gates > 0, losses=losses, probs=gates.detach() / total.where(total > 0, 1))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.dim}, num_experts={self.num_experts}, sparsity={self.sparsity}"


class _Embedding:
    """The embedding of the images that are passing through a network: its convolutions read it here.

    Copies and saved states of a model leave it behind.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.value = None


class GatedConv2d(Recorded):
    """A convolution each of whose output channels counts by a gate (DeepMoE, 1806.01531): y_c = g_c (K_c * x + b_c).

    In evaluation the channels that no image of the batch has are not computed: with one image those of gate zero. In
    training all are, as what has gate zero has no gradient either. `conv` is the convolution as it was.
    """

    router: ChannelRouter

    def __init__(self, conv: nn.Conv2d, router: ChannelRouter, embedding: _Embedding) -> None:
        super().__init__()
        self.conv, self.router, self._embedding = conv, router, embedding

    def forward(self, x: Tensor) -> Tensor:
        """Apply to maps x [B, C', H, W]."""
        if self._embedding.value is None:
            raise RuntimeError("GatedConv2d: there is no embedding; call the DeepMoE around it, not the backbone")
        gates = self.router.gates(self._embedding.value)
        if self._recording:
            self._keep(self.router.decide(gates))
        gates = gates.to(x.dtype)[..., None, None]
        if self.training or self.conv.groups > 1 or torch.compiler.is_compiling():
            return self.conv(x) * gates
        used = (gates > 0).any(0).flatten().nonzero().flatten()
        if used.numel() in (0, self.conv.out_channels):
            return self.conv(x) * gates
        bias = None if self.conv.bias is None else self.conv.bias.index_select(0, used)
        y = self.conv._conv_forward(x, self.conv.weight.index_select(0, used), bias)
        y = y * gates.index_select(1, used)
        return y.new_zeros(len(y), self.conv.out_channels, *y.shape[2:]).index_copy(1, used, y)


class DeepMoE(nn.Module):
    """A convolutional network whose channels a shallow network gates for each image (1806.01531).

    e = M(x), the embedding of the images, from `embedding` (default `shallow_embedding`); every convolution of the
    backbone whose name matches one of `layers` becomes a `GatedConv2d` with gates ReLU(W_l e) of its own. All else of
    the backbone, weights included, stays as it is. The objective is
        L = L_task + sparsity * sum_l |g_l|_1 + embedding_weight * cross entropy(classifier(e), labels)
    with 0.001 and 1: what `record` collects, and `embedding_loss`. The paper then keeps the gates and tunes the rest:
    `freeze_gates`. The default layers are those that the paper gates in a ResNet as timm names them: both of a basic
    block, the first two of a bottleneck ("bottleneck-A"; "layer*.conv2" is its "bottleneck-B").

    Gates are on output channels, before batch norm, as in the only code there is, a third party's (RyanKim17920): the
    authors published none. The embedding's width, widths inside it and its initialisation are not in the paper.
    With activation checkpointing put it around the whole, or train one batch at a time: inside, a recomputation reads
    the embedding of the last batch that went forward.
    Raises ValueError when no convolution matches, naming those there are.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        embedding_dim: int = 128,
        embedding: nn.Module | None = None,
        layers: Sequence[str] = ("layer*.conv1", "layer*.conv2"),
        sparsity: float = 1e-3,
        embedding_weight: float = 1.0,
    ) -> None:
        super().__init__()
        convolutions = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d)}
        gated = [name for name in convolutions if any(fnmatchcase(name, pattern) for pattern in layers)]
        if not gated:
            raise ValueError(f"DeepMoE: no convolution matches {list(layers)}; there are: {', '.join(convolutions)}")
        channels = next(iter(convolutions.values())).in_channels
        self.backbone, self.embedding_weight = backbone, embedding_weight
        self.embedding = shallow_embedding(channels, embedding_dim) if embedding is None else embedding
        self.classifier = nn.Linear(embedding_dim, num_classes)
        self._passing = _Embedding()
        for name in gated:
            conv = convolutions[name]
            router = ChannelRouter(embedding_dim, conv.out_channels, sparsity=sparsity)
            backbone.set_submodule(name, GatedConv2d(conv, router, self._passing))

    def forward(self, x: Tensor) -> Tensor:
        """What the backbone makes of images x [B, C, H, W]."""
        self._passing.value = self.embedding(x)
        return self.backbone(x)

    def embedding_loss(self, labels: Tensor) -> Tensor:
        """Weighted cross entropy of the classes told from the last batch's embedding alone; labels [B]."""
        if self._passing.value is None:
            raise RuntimeError("DeepMoE: there is no embedding yet; embedding_loss comes after forward")
        return self.embedding_weight * F.cross_entropy(self.classifier(self._passing.value), labels)

    def freeze_gates(self) -> None:
        """Keep embedding and gates as they are, for the paper's second stage; no loss has a gradient to them then."""
        self.embedding.requires_grad_(False)
        self.classifier.requires_grad_(False)
        for module in self.backbone.modules():
            if isinstance(module, GatedConv2d):
                module.router.requires_grad_(False)


def shallow_embedding(in_channels: int, dim: int = 128, depth: int = 4) -> nn.Sequential:
    """DeepMoE's network from images to embeddings [B, dim]: convolutions 3 x 3 of stride 2, and the mean over places.

    Four of them in the paper for CIFAR, five for ImageNet; here widths double up to dim, with ReLU after each.
    """
    widths = [in_channels, *(max(dim >> (depth - i), 1) for i in range(1, depth)), dim]
    blocks: list[nn.Module] = []
    for before, after in pairwise(widths):
        blocks += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
