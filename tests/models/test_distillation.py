"""The distillation loss against its definition and the closed form of its gradient, in float64."""

import pytest
import torch

from zoo.distillation import distillation_loss, soft_loss


@pytest.mark.parametrize(("weight", "temperature"), [(0.25, 1.0), (0.0, 2.0), (1.0, 3.0), (0.6, 0.5)])
def test_loss_and_gradient_are_the_closed_form(weight, temperature):
    logits = torch.randn(3, 5, 11, requires_grad=True)
    teacher = torch.randn(3, 5, 11, requires_grad=True)
    labels = torch.randint(11, (3, 5))
    labels[0, :4] = -100
    real = labels >= 0
    z, t = logits.detach().double(), teacher.detach().double()
    target = torch.nn.functional.one_hot(labels.clamp(min=0), 11).double()
    p, q = z.softmax(-1), (t / temperature).softmax(-1)
    p_t = (z / temperature).softmax(-1)
    hard = -(target * p.log()).sum(-1)
    soft = -(q * p_t.log()).sum(-1) * temperature**2
    each = ((1 - weight) * hard + weight * soft) * real
    gradient = ((1 - weight) * (p - target) + weight * temperature * (p_t - q)) * real[..., None] / real.sum()

    loss = distillation_loss(logits, teacher, labels, weight, temperature)
    loss.backward()
    torch.testing.assert_close(loss.double(), each.sum() / real.sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-4, atol=1e-6)
    assert teacher.grad is None
    found = distillation_loss(logits, teacher, labels, weight, temperature, reduction="none")
    torch.testing.assert_close(found.double(), each, rtol=1e-5, atol=1e-6)


def test_by_default_it_is_switchs_mixture_of_a_quarter():
    logits, teacher, labels = torch.randn(7, 4), torch.randn(7, 4), torch.randint(4, (7,))
    mixed = 0.75 * torch.nn.functional.one_hot(labels, 4) + 0.25 * teacher.softmax(-1)
    expected = torch.nn.functional.cross_entropy(logits, mixed)
    torch.testing.assert_close(distillation_loss(logits, teacher, labels), expected)


def test_one_place_without_a_batch_is_a_batch_of_one():
    logits, teacher, label = torch.randn(4), torch.randn(4), torch.tensor(2)
    expected = -0.75 * logits.log_softmax(0)[2] - 0.25 * (teacher.softmax(0) * logits.log_softmax(0)).sum()
    torch.testing.assert_close(distillation_loss(logits, teacher, label), expected)


def test_nothing_to_learn_from_is_zero_and_bfloat16_is_computed_wider():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = distillation_loss(logits, torch.randn(2, 3), torch.full((2,), -100))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    narrow = torch.randn(4, 1000).bfloat16()
    assert soft_loss(narrow, narrow).dtype == torch.float32
    empty = soft_loss(torch.randn(0, 5), torch.randn(0, 5))
    assert empty.shape == (0,)


def test_what_does_not_belong_together_is_refused():
    logits, labels = torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)
    for arguments, message in (
        ((logits, torch.randn(2, 5, 3), labels), r"student's logits are \[2, 5, 4\], the teacher's \[2, 5, 3\]"),
        ((logits, logits, labels[:, :4]), r"labels \[2, 4\] are not one for each \[2, 5, 4\]"),
        ((logits, logits, labels, 1.5), "weight must be between 0 and 1, got 1.5"),
        ((logits, logits, labels, 0.5, 0.0), "temperature must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            distillation_loss(*arguments)
