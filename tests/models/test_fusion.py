"""A fuser learns from frozen classifiers what they say together."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from zoo.models import FusionOfExperts


def vit(num_classes: int) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=3,
                             num_classes=num_classes, proj_drop_rate=0.5)  # fmt: skip


def test_it_is_a_small_network_on_all_outputs():
    models = [vit(3), vit(5)]
    fusion = FusionOfExperts(models, 4, hidden_dim=6).train()
    x = torch.randn(7, 3, 32, 32)
    each = torch.cat([model.eval()(x) for model in models], 1)
    rows = []
    for outputs in each.detach().double():
        hidden = torch.clamp(fusion.hidden.weight.double() @ outputs + fusion.hidden.bias.double(), min=0)
        rows.append(fusion.out.weight.double() @ hidden + fusion.out.bias.double())
    assert torch.allclose(fusion(x).double(), torch.stack(rows), rtol=1e-5, atol=1e-6)


def test_only_the_fuser_learns_that_each_model_knows_half():
    class Knows(nn.Module):
        """Tells classes of its own half of the numbers from one another, and is silent on the others."""

        def __init__(self, first: int) -> None:
            super().__init__()
            self.first, self.scale = first, nn.Parameter(torch.tensor(3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * torch.stack([x == self.first, x == self.first + 1], -1).float()

    torch.manual_seed(0)
    fusion = FusionOfExperts([Knows(0), Knows(2)], 4, widths=[2, 2]).train()
    before = copy.deepcopy(fusion.models.state_dict())
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(60):
        y = torch.randint(0, 4, (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(fusion(y), y).backward()
        optimizer.step()
    assert torch.equal(fusion(torch.arange(4)).argmax(-1), torch.arange(4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fusion.models.state_dict().items())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least one model"):
        FusionOfExperts([], 3)
    with pytest.raises(ValueError, match=r"expected the width of each of 1 models, got \[None\]"):
        FusionOfExperts([nn.Linear(2, 2)], 3)
    with pytest.raises(ValueError, match=r"expected the width of each of 1 models, got \[2, 2\]"):
        FusionOfExperts([nn.Linear(2, 2)], 3, widths=[2, 2])
    with pytest.raises(ValueError, match="num_outputs=0 and hidden_dim=256; expected at least 1"):
        FusionOfExperts([vit(3)], 0)
    with pytest.raises(ValueError, match=r"expected models that give \[3, 4\] numbers each, got \[3, 5\]"):
        FusionOfExperts([vit(3), vit(5)], 2, widths=[3, 4])(torch.randn(1, 3, 32, 32))
