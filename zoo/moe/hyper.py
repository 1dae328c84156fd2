"""HyperMoE (2402.12656): beside the chosen experts, a small one that a network makes of those not chosen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .experts import Experts
from .kernels.linear import grouped_linear
from .routing import Routing


class HyperNetwork(nn.Module):
    """Weights of a bottleneck MLP [D -> r -> D] from a description [.., input_dim]: linear, ReLU, a linear map each.

    The maps start within 1e-3 sqrt(3 / (hidden_dim * n)), n being the width that the weights they make read (r for
    those up, D for those down, 1 for biases), their own biases at zero, so that what is made starts near zero.
    """

    def __init__(self, dim: int, adapter_dim: int = 64, input_dim: int = 138, hidden_dim: int = 64) -> None:
        super().__init__()
        self.dim, self.adapter_dim = dim, adapter_dim
        self.hidden = nn.Linear(input_dim, hidden_dim)
        self.weight_down = nn.Linear(hidden_dim, adapter_dim * dim)
        self.bias_down = nn.Linear(hidden_dim, adapter_dim)
        self.weight_up = nn.Linear(hidden_dim, dim * adapter_dim)
        self.bias_up = nn.Linear(hidden_dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights."""
        self.hidden.reset_parameters()
        width = self.hidden.out_features
        reads = {self.weight_down: self.dim, self.weight_up: self.adapter_dim, self.bias_down: 1, self.bias_up: 1}
        for linear, read in reads.items():
            bound = 1e-3 * math.sqrt(3 / (width * read))
            linear.weight.uniform_(-bound, bound)
            linear.bias.zero_()

    def forward(self, description: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights down [U, r, D] and up [U, D, r] and their biases [U, r] and [U, D], for descriptions [U, input]."""
        h = self.hidden(description).relu()
        down = self.weight_down(h).unflatten(-1, (self.adapter_dim, self.dim))
        up = self.weight_up(h).unflatten(-1, (self.dim, self.adapter_dim))
        return down, self.bias_down(h), up, self.bias_up(h)


class HyperExperts(nn.Module):
    """E MLPs, and what a network makes of the ones that a token does not meet (HyperMoE, 2402.12656).

    y = sum_e g_e f_e(x) + W_up relu(W_down x + b_down) + b_up, the latter made by a `HyperNetwork` of [p(s); l]: s is
    the sum of the embeddings of the experts that the token was not sent to, p a linear layer to process_dim, ReLU and
    one to input_dim, l an embedding of the layer. Sizes and starts are those of the authors' code; which experts those
    are is told there before capacity drops any, here after. The `hypernetwork` is one for all layers there, and where a
    model takes these experts by name; one of its own is made if none is given.

    What is made is the same for all tokens with the same experts, and made once for each such set: as many as there
    are, E with one expert a token, up to one a token with many.

    Parameters: those of `Experts` below `mlp`; embedding [E, embedding_dim], first, second (p), layer [layer_dim], and
    those of the hypernetwork. Raises ValueError for a hypernetwork of other sizes.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        activation: str = "swiglu",
        *,
        adapter_dim: int = 64,
        embedding_dim: int = 128,
        process_dim: int = 128,
        input_dim: int = 128,
        layer_dim: int = 10,
        hypernetwork: HyperNetwork | None = None,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_experts, self.dim = num_experts, dim
        self.mlp = Experts(num_experts, dim, hidden_dim, activation, bias, backend)
        self.embedding = nn.Parameter(torch.empty(num_experts, embedding_dim))
        self.first, self.second = nn.Linear(embedding_dim, process_dim), nn.Linear(process_dim, input_dim)
        self.layer = nn.Parameter(torch.empty(layer_dim))
        self.hypernetwork = hypernetwork or HyperNetwork(dim, adapter_dim, input_dim + layer_dim)
        sizes = self.hypernetwork.dim, self.hypernetwork.hidden.in_features
        if sizes != (dim, input_dim + layer_dim):
            raise ValueError(
                f"HyperExperts: the hypernetwork has sizes {sizes}, expected {(dim, input_dim + layer_dim)}"
            )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw MLPs and linear layers as they are, embeddings from N(0, 1); the hypernetwork stays."""
        self.mlp.reset_parameters()
        self.embedding.normal_()
        self.layer.normal_()
        for linear in (self.first, self.second):
            linear.reset_parameters()

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of what each token's experts make of tokens x [T, D], and what is made of the others: [T, D]."""
        y = self.mlp(x, routing)
        if not x.shape[0]:
            return y
        met = torch.zeros(x.shape[0], self.num_experts, dtype=torch.bool, device=x.device)
        met[routing.token_index, routing.expert_index] = True
        sets, group, counts = torch.unique(met, dim=0, return_inverse=True, return_counts=True)
        others = (~sets).to(self.embedding.dtype) @ self.embedding
        described = self.second(self.first(others).relu())
        layer = self.layer.expand(len(sets), -1).to(described.dtype)
        down, b_down, up, b_up = self.hypernetwork(torch.cat([described, layer], -1))
        order = group.argsort(stable=True)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        hidden = grouped_linear(x.index_select(0, order), down, offsets)
        hidden = (hidden + b_down.index_select(0, group[order]).to(hidden.dtype)).relu()
        out = grouped_linear(hidden, up, offsets)
        out = out + b_up.index_select(0, group[order]).to(out.dtype)
        return y.index_add(0, order, out.to(y.dtype))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        return f"{self.num_experts}, dim={self.dim}, adapter_dim={self.hypernetwork.adapter_dim}"
