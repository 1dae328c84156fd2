from __future__ import annotations

import math

import pytest
import torch

from zoo.moe.routers import XMoERouter


@pytest.mark.parametrize("form", ["paper", "tutel"])
def test_logits_are_scaled_cosines(form: str) -> None:
    router = XMoERouter(6, 8, routing_dim=3, init_temperature=0.25, form=form).double()
    x = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    projected = x @ router.projection.weight.T + (router.projection.bias if form == "tutel" else 0.0)
    scale = router.temperature.exp() if form == "tutel" else 1 / router.temperature
    rows = []
    for t in range(10):
        lengths = projected[t].norm() * router.weight.norm(dim=1)
        rows.append(scale * (router.weight @ projected[t]) / lengths)
    probs = torch.stack(rows).softmax(-1)
    assert math.isclose(float(scale.detach()), 4.0, rel_tol=1e-6)
    expected = probs * (probs == probs.amax(-1, keepdim=True))
    found = router(x).dense()
    torch.testing.assert_close(found, expected)
    inputs = [x, *router.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs)


def test_torchscale_s_form_is_its_gate() -> None:
    """The code of the authors: experts are given the length 1.5 before each use, then divided by their length."""
    router = XMoERouter(6, 8, routing_dim=5, form="torchscale").double()
    x = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    reset = router.weight.detach() * 1.5 / router.weight.detach().norm(dim=1, keepdim=True)
    cosine = (x @ router.projection.weight.T) @ (reset / reset.norm(dim=1, keepdim=True)).T
    probs = cosine.softmax(-1)
    found, expected = router(x).dense(), probs * (probs == probs.amax(-1, keepdim=True))
    torch.testing.assert_close(found, expected)
    inputs = [x, router.projection.weight]
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs)
    assert {name for name, _ in router.named_parameters()} == {"projection.weight", "weight"}


def test_the_length_of_a_token_does_not_matter() -> None:
    router, x = XMoERouter(6, 8).double(), torch.randn(10, 6, dtype=torch.float64)
    torch.testing.assert_close(router(x).dense(), router(x * 37).dense())


def test_the_scale_of_tutel_s_form_is_at_most_a_hundred() -> None:
    router, x = XMoERouter(6, 8, 8, form="tutel", score="sigmoid").double(), torch.randn(400, 6).double()
    router.temperature.data.fill_(50.0)
    assert router(x).dense().logit(eps=0).nan_to_num(posinf=0, neginf=0).abs().max() <= 100


def test_dimensions_and_beginning() -> None:
    router = XMoERouter(6, 8)
    assert router.projection.weight.shape == (4, 6)
    assert router.temperature.item() == pytest.approx(0.3)
    assert XMoERouter(6, 1).projection.weight.shape == (1, 6)
    weight = router.weight.detach()
    torch.testing.assert_close(weight.T @ weight, 0.32**2 * torch.eye(4), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="init_temperature must be positive, got 0"):
        XMoERouter(6, 8, init_temperature=0.0)
    with pytest.raises(ValueError, match="form must be one of paper, tutel, torchscale, got 'cosine'"):
        XMoERouter(6, 8, form="cosine")  # type: ignore[arg-type]
