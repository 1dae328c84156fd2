import pytest
import torch
from kernel_cases import make_case

from zoo.moe import Routing
from zoo.moe.kernels import ACTIVATIONS, get_activation, moe_mlp


def token_by_token(case):
    """The definition written over single tokens and single choices."""
    act = get_activation(case.activation)
    inputs = case.inputs
    y = torch.zeros_like(inputs["x"])
    for t in range(case.choice.shape[0]):
        for c in range(case.choice.shape[1]):
            e = case.choice[t, c]
            pre = inputs["w_in"][e] @ inputs["x"][t]
            if inputs["b_in"] is not None:
                pre = pre + inputs["b_in"][e]
            out = inputs["w_out"][e] @ act.forward(pre[None])[0]
            if inputs["b_out"] is not None:
                out = out + inputs["b_out"][e]
            y[t] += inputs["weight"][t, c] * out
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_weighted_sum_over_a_tokens_experts(activation, bias):
    case = make_case(11, 6, 5, 4, 2, activation, bias)
    torch.testing.assert_close(case.run("reference", torch.float64)["y"], token_by_token(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation, bias):
    case = make_case(7, 5, 3, 4, 2, activation, bias)
    names = [k for k, v in case.inputs.items() if v is not None]

    def run(*tensors):
        t = dict(zip(names, tensors))
        routing = Routing.from_choices(case.choice, t["weight"], 4)
        biases = {"b_in": t.get("b_in"), "b_out": t.get("b_out")}
        return moe_mlp(t["x"], t["w_in"], t["w_out"], routing, activation, "reference", **biases)

    assert torch.autograd.gradcheck(run, [case.inputs[k].requires_grad_() for k in names])
