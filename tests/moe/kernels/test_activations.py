import pytest
import torch
from torch.nn import functional as F

from zoo.moe.kernels import ACTIVATIONS, get_activation


def gpt_oss(gate, up):
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


BY_TORCH = {
    "swiglu": lambda g, u: F.silu(g) * u,
    "geglu": lambda g, u: F.gelu(g) * u,
    "geglu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "reglu": lambda g, u: F.relu(g) * u,
    "swiglu_clamped": gpt_oss,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # github.com/openai/CLIP, model.py
}


def halves(name, pre):
    return pre.chunk(2, dim=-1) if ACTIVATIONS[name].gated else (pre,)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_forward_and_gradient_are_those_of_torchs_own_functions(name, scale):
    act = get_activation(name)
    pre = (scale * torch.randn(37, 22, dtype=torch.float64)).requires_grad_()
    expected = BY_TORCH[name](*halves(name, pre))
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, pre, grad)
    torch.testing.assert_close(act.forward(pre.detach()), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(act.backward(pre.detach(), grad), expected_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forms_that_write_into_buffers_give_the_same(name):
    act = get_activation(name)
    pre = 4 * torch.randn(19, 14, dtype=torch.float64)
    hidden, grad = act.forward(pre), torch.randn_like(act.forward(pre))
    out, point, d_pre = torch.empty_like(hidden), torch.empty_like(hidden), torch.empty_like(pre)
    act.forward_out(pre, out)
    torch.testing.assert_close(out, hidden)
    out.zero_()
    act.forward_out(pre, out, point)
    torch.testing.assert_close(out, hidden)
    act.backward_out(pre, grad.clone(), point, d_pre)
    torch.testing.assert_close(d_pre, act.backward(pre, grad))


def test_an_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown activation 'swish'; known: swiglu, .*silu"):
        get_activation("swish")
