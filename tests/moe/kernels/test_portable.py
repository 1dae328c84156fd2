"""Models as graphs of torch's own operators: what they compute is what the models compute."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.export import Dim, export

import zoo
from zoo.moe import Capacity, Experts, MoE
from zoo.moe.kernels.portable import expert_of_rows, sort_stably
from zoo.moe.routers import TopKRouter


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


def upcycled() -> nn.Module:
    vit = timm.create_model("test_vit", num_classes=3, img_size=64)
    return zoo.upcycle(vit, layers="every-2", num_experts=4)


def language(family: str) -> nn.Module:
    return Logits(zoo.create_model(f"language/{family}_tiny", num_hidden_layers=2, hidden_size=32, vocab_size=64))


MODELS = {
    "V-MoE": lambda: timm.create_model("vmoe_tiny_test", num_classes=3, group_images=1),
    "Soft MoE": lambda: timm.create_model("soft_moe_tiny_test", num_classes=3),
    "ConvNeXt": lambda: timm.create_model("convnext_moe_tiny_test", num_classes=3, group_images=1),
    "upcycled": upcycled,
    "Mixtral": lambda: language("mixtral"),
    "DeepSeek-V3": lambda: language("deepseek_v3"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_has_no_operators_of_ours_and_takes_any_batch(name: str) -> None:
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)

    def inputs(batch: int) -> Tensor:
        if isinstance(model, Logits):
            return torch.randint(0, 64, (batch, 7))
        side = 64 if name == "upcycled" else model.default_cfg["input_size"][1]
        return torch.randn(batch, 3, side, side)

    any_batch = not isinstance(model, Logits)  # transformers' masks fix it
    with zoo.moe.portable():
        graph = export(model, (inputs(3),), dynamic_shapes=({0: Dim("batch")},) if any_batch else None)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [target for target in called if "zoo" in target or "stable" in target or "searchsorted" in target]
    x = inputs(5 if any_batch else 3)
    with torch.no_grad():
        expected = model(x)
        found = graph.module()(x)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0


@pytest.mark.parametrize("drop", ["choice", "position", "probability", "priority", "priority_sum"])
def test_places_go_to_the_same_choices(drop: str) -> None:
    layer = MoE(TopKRouter(8, 5, k=2, capacity=Capacity(0.7, drop=drop)), Experts(5, 8, 6))
    x = torch.randn(3, 11, 8)
    with zoo.moe.record(layer) as step, torch.no_grad():
        expected = layer(x)
        with zoo.moe.portable():
            found = layer(x)
    a, b = (decision.dense() for decision in step.routings[""])
    assert torch.equal(a, b)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_gradients_are_those_of_the_kernels() -> None:
    layer = MoE(TopKRouter(8, 5, k=2), Experts(5, 8, 6)).double()
    x = torch.randn(7, 8, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    with zoo.moe.portable():
        layer(x).square().sum().backward()
    for found, grad in zip((parameter.grad for parameter in layer.parameters()), expected):
        assert (found - grad).abs().max() <= 1e-10 * grad.abs().max()


def test_rows_are_of_their_expert() -> None:
    counts = torch.tensor([0, 3, 0, 0, 4, 1, 0])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    expected = torch.tensor([e for e, count in enumerate(counts.tolist()) for _ in range(count)])
    assert torch.equal(expert_of_rows(offsets, 8), expected)
    with zoo.moe.portable():
        assert torch.equal(expert_of_rows(offsets, 8), expected)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equal_whole_numbers_stay_in_order(dim: int, descending: bool) -> None:
    values = torch.randint(0, 4, (9, 17, 5), dtype=torch.uint8)
    expected = values.sort(dim=dim, descending=descending, stable=True)
    with zoo.moe.portable():
        found, order = sort_stably(values, dim, descending)
    assert torch.equal(found, expected.values)
    assert torch.equal(order, expected.indices)
