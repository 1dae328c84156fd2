"""The activations of `zoo.moe.kernels.activations` as device functions, in float32 registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import CLAMP_ALPHA, get_activation

# The function that acts on the gate (or the only input), by name of the activation without its limit.
FORMS = {
    "swiglu": "silu",
    "geglu": "gelu",
    "geglu_tanh": "gelu_tanh",
    "reglu": "relu",
    "swiglu_clamped": "sharp_silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "silu": "silu",
    "quick_gelu": "sharp_silu",
}

# In the interpreter a constant must stand to the right of a tensor.
ALPHA = tl.constexpr(CLAMP_ALPHA)
SQRT_HALF = tl.constexpr(0.7071067811865476)
TWO_SQRT_2_PI = tl.constexpr(1.5957691216057308)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


def constants(activation: str) -> dict[str, object]:
    """The compile-time arguments that choose an activation in a kernel."""
    act = get_activation(activation)
    return {
        "FORM": FORMS[activation.partition(":")[0]],
        "GATED": act.gated,
        "LIMIT": act.limit or 0.0,  # 0 for none
        "SHIFTED": act.shifted,
    }


@triton.jit
def value_and_slope(x: tl.tensor, FORM: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """f(x) and f'(x); what a caller does not use is never computed.

    1 - sigmoid(x) is sigmoid(-x): the difference would have no correct digits left where sigmoid(x) is nearly 1.
    """
    if FORM == "silu":
        s = tl.sigmoid(x)
        value = x * s
        slope = s * (1 + x * tl.sigmoid(-x))
    elif FORM == "sharp_silu":
        s = tl.sigmoid(x * ALPHA)
        value = x * s
        slope = s * (1 + x * ALPHA * tl.sigmoid(-x * ALPHA))
    elif FORM == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * SQRT_HALF))
        value = x * cdf
        slope = cdf + x * tl.exp(-0.5 * x * x) * INV_SQRT_2PI
    elif FORM == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        z = (x + 0.044715 * x * x * x) * TWO_SQRT_2_PI
        s = tl.sigmoid(z)
        value = x * s
        slope = s * (1 + x * tl.sigmoid(-z) * TWO_SQRT_2_PI * (1 + 0.134145 * x * x))
    elif FORM == "relu":
        # Written so that NaN stays NaN.
        value = tl.where(x <= 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(FORM == "relu2")
        r = tl.where(x <= 0, 0.0, x)
        value = r * r
        slope = 2 * r
    return value, slope


@triton.jit
def clamp_pair(
    gate: tl.tensor, up: tl.tensor, LIMIT: tl.constexpr, SHIFTED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A gate and its factor as they meet: clamped where LIMIT is not 0. Written so that NaN stays NaN."""
    if LIMIT > 0:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if SHIFTED:
        up = up + 1
    return gate, up


@triton.jit
def hidden_units(
    gate: tl.tensor,
    up: tl.tensor,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFTED: tl.constexpr,
) -> tl.tensor:
    """Hidden units of pre-activations; `up` is ignored by plain activations."""
    if GATED:
        gate, up = clamp_pair(gate, up, LIMIT, SHIFTED)
        value, _ = value_and_slope(gate, FORM)
        hidden = value * up
    else:
        hidden, _ = value_and_slope(gate, FORM)
    return hidden


@triton.jit
def hidden_grads(
    gate: tl.tensor,
    up: tl.tensor,
    grad: tl.tensor,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFTED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Gradients of gate and up, given that of the hidden units; the second is meaningless for plain ones."""
    if GATED:
        gate_c, up_c = clamp_pair(gate, up, LIMIT, SHIFTED)
        value, slope = value_and_slope(gate_c, FORM)
        d_gate = grad * up_c * slope
        d_up = grad * value
        if LIMIT > 0:
            d_gate = tl.where(gate > LIMIT, 0.0, d_gate)
            d_up = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, d_up)
    else:
        _, slope = value_and_slope(gate, FORM)
        d_gate = grad * slope
        d_up = d_gate
    return d_gate, d_up
