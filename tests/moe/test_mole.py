"""MoLE's gate and layer, against the paper's equations one token and one LoRA at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo.moe import ComposedLinear, LoRAExperts, record
from zoo.moe.routers import MoLERouter, TopKRouter

D, OUT, E, R, L = 7, 5, 3, 2, 6


def layer(columns=None, **options):
    width = OUT if columns is None else columns[1] - columns[0]
    base = nn.Linear(D, OUT).double().requires_grad_(False)
    lora = LoRAExperts(E, D, R, alpha=3.0, out_dim=width)
    nn.init.normal_(lora.b)
    made = ComposedLinear(base, MoLERouter(E * width, E, **options), lora, columns).double()
    nn.init.constant_(made.router.log_temperature, 0.4)
    return made


def each(made, token):
    """What every LoRA makes of a token."""
    return [3.0 / R * (b @ (a @ token)) for a, b in zip(made.lora.a, made.lora.b, strict=True)]


def normalised(values):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / torch.sqrt(variance + 1e-5) for v in values]


def weights(logits, temperature):
    powers = [torch.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def by_token(made, x):
    """Equations 9 to 13 where a sequence is one token; also its gate values."""
    rows, gates = [], []
    for token in x:
        outputs = each(made, token)
        flat = normalised([value for out in outputs for value in out])
        logits = [sum(v * w for v, w in zip(flat, e, strict=True)) for e in made.router.weight]
        gates.append(weights(logits, made.router.log_temperature.exp()))
        rows.append(made.base(token) + sum(g * out for g, out in zip(gates[-1], outputs, strict=True)))
    return torch.stack(rows), gates


def by_sequence(made, sequence, mask):
    """The same where a sequence is flattened; masked tokens keep the layer's output."""
    outputs = [each(made, token) for token in sequence]
    places = [place for place in range(len(sequence)) if mask[place]]
    flat = normalised([value for place in places for out in outputs[place] for value in out])
    logits = []
    for e in made.router.weight:
        of_places = [w for place in places for w in e[place]]
        logits.append(sum(v * w for v, w in zip(flat, of_places, strict=True)))
    gate = weights(logits, made.router.log_temperature.exp())
    rows = [made.base(token) for token in sequence]
    for place in places:
        rows[place] = rows[place] + sum(g * out for g, out in zip(gate, outputs[place], strict=True))
    return torch.stack(rows)


def same(found, expected, inputs):
    torch.testing.assert_close(found, expected)
    scale = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * scale).sum(), inputs, allow_unused=True) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tokens", [1, 11])
def test_each_token_is_weighed_by_what_the_loras_make_of_it(tokens):
    made, x = layer(), torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    same(made(x), by_token(made, x)[0], [x, *(p for p in made.parameters() if p.requires_grad)])


@pytest.mark.parametrize("length", [1, 4, L])
def test_sequences_are_flattened_with_the_padding_left_out(length):
    made = layer(tokens=L)
    x = torch.randn(3, length, D, dtype=torch.float64)
    mask = torch.rand(3, length) > 0.4
    mask[:, -1] = True
    clean = x.clone().requires_grad_()
    expected = torch.stack([by_sequence(made, s, m) for s, m in zip(clean, mask, strict=True)])
    given = x.where(mask[..., None], float("inf")).requires_grad_()
    found = made(given, mask=mask)
    parameters = [p for p in made.parameters() if p.requires_grad]
    same(found[mask], expected[mask], parameters)
    whole = made(clean)  # and none where there is none
    torch.testing.assert_close(whole[0], by_sequence(made, clean[0], [True] * length))


def test_no_tokens_and_some_outputs_alone():
    assert layer()(torch.zeros(0, D, dtype=torch.float64)).shape == (0, OUT)
    assert layer(tokens=L)(torch.zeros(2, 0, D, dtype=torch.float64)).shape == (2, 0, OUT)
    made, x = layer((1, 4)), torch.randn(4, D, dtype=torch.float64)
    apart = made(x) - made.base(x)
    assert not apart[:, [0, 4]].any()
    assert apart[:, 1:4].all()


def test_one_lora_always_has_weight_one():
    router = MoLERouter(OUT, 1)
    assert torch.equal(router(torch.randn(6, OUT)).dense(), torch.ones(6, 1))


def test_the_loss_is_of_all_gates_together():
    model = nn.ModuleList([layer(balance=0.7) for _ in range(2)])
    xs = [torch.randn(n, D, dtype=torch.float64) for n in (9, 4)]
    with record(model) as step:
        for made, x in zip(model, xs, strict=True):
            made(x)
    shares = []
    for made, x in zip(model, xs, strict=True):
        gates = by_token(made, x)[1]
        shares.append([sum(gate[e] for gate in gates) / len(gates) for e in range(E)])
    expected = -0.7 * sum(torch.log(sum(share[e] for share in shares) / 2) for e in range(E))
    found = step.losses()
    assert found.keys() == {"gating_balance"}
    parameters = [p for made in model for p in made.router.parameters()]
    same(found["gating_balance"], expected, parameters)
    model.eval()
    assert not step.losses()
    model.train()
    with record(model) as step:
        model[0](xs[0], mask=torch.zeros(9, dtype=torch.bool))
    assert step.losses()["gating_balance"] == 0  # nobody was there
    with record(model) as step:
        pass
    assert not step.losses()


def test_the_loss_is_least_where_gates_are_even_on_average():
    model = nn.ModuleList([layer(balance=1.0) for _ in range(E)])
    with torch.no_grad():
        for made in model:
            made.router.weight.zero_()
    with record(model) as step:
        for made in model:
            made(torch.randn(5, D, dtype=torch.float64))
    torch.testing.assert_close(step.losses()["gating_balance"], torch.tensor(E * math.log(E), dtype=torch.float64))


def test_what_does_not_fit_is_named():
    cases = [
        (lambda: MoLERouter(6, 2, tokens=0), "tokens must be at least 1, got 0"),
        (lambda: MoLERouter(6, 2, tokens=3)(torch.randn(4, 6)), r"expected \[B, S, D\], got \[4, 6\]"),
        (lambda: MoLERouter(6, 2, tokens=3)(torch.randn(1, 4, 6)), "sequences of 4 tokens, but e is made for tokens=3"),
        (
            lambda: ComposedLinear(nn.Linear(D, OUT), TopKRouter(D, E), LoRAExperts(E, D, R, out_dim=OUT)),
            f"the router routes {E} experts of width {D}, but there are {E} of width {E * OUT}",
        ),
        (lambda: layer()(torch.randn(2, 3, D).double(), mask=torch.ones(3, 2)), r"expected a mask \[2, 3\]"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
