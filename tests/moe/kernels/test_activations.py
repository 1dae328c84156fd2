import pytest
import torch
from torch.nn import functional as F

from zoo.moe.kernels import ACTIVATIONS, get_activation


def gpt_oss(gate, up, limit=7.0):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


BY_TORCH = {
    "swiglu": lambda g, u: F.silu(g) * u,
    "geglu": lambda g, u: F.gelu(g) * u,
    "geglu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "reglu": lambda g, u: F.relu(g) * u,
    "swiglu_clamped": gpt_oss,
    "swiglu:1.5": lambda g, u: F.silu(g.clamp(max=1.5)) * u.clamp(-1.5, 1.5),  # DeepSeek-V4, GLM-5
    "reglu:2": lambda g, u: F.relu(g.clamp(max=2.0)) * u.clamp(-2.0, 2.0),
    "swiglu_clamped:3": lambda g, u: gpt_oss(g, u, 3.0),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # github.com/openai/CLIP, model.py
}


def halves(name, pre):
    return pre.chunk(2, dim=-1) if get_activation(name).gated else (pre,)


def test_every_activation_is_among_them():
    assert ACTIVATIONS.keys() <= BY_TORCH.keys()


@pytest.mark.parametrize("name", BY_TORCH)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_forward_and_gradient_are_those_of_torchs_own_functions(name, scale):
    act = get_activation(name)
    pre = (scale * torch.randn(37, 22, dtype=torch.float64)).requires_grad_()
    expected = BY_TORCH[name](*halves(name, pre))
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, pre, grad)
    torch.testing.assert_close(act.forward(pre.detach()), expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(act.backward(pre.detach(), grad), expected_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BY_TORCH)
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


@pytest.mark.parametrize("name", ["swiglu:", "swiglu:x", "swiglu:0", "swiglu:-1", "swiglu:inf", "swiglu:nan", "relu:2"])
def test_a_limit_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=rf"activation '{name}': expected a gated one and a limit above 0"):
        get_activation(name)


def test_a_limit_of_an_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown activation 'swish:7'; known: swiglu,"):
        get_activation("swish:7")
