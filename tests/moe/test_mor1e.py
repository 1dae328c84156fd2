"""Intuition-MoR1E against its formula, a token, a row and a column at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from zoo.moe import AdaptedLinear, RankOneExperts, Routing, record
from zoo.moe.routers import DenseRouter, LabelRouter, MoR1ERouter, SMEARRouter

D, OUT, ROWS, J = 7, 5, 3, 4
E = ROWS * J


def experts(**options):
    made = RankOneExperts(E, D, ROWS, OUT, **options).double()
    nn.init.normal_(made.b)
    return made


def layer(**options):
    made = AdaptedLinear(nn.Linear(D, OUT).requires_grad_(False), MoR1ERouter(D, E, **options), experts()).double()
    for parameter in made.router.parameters():
        nn.init.normal_(parameter, 0.0, 0.5 if parameter.dim() else 0.01)
    return made


def one(made, token, i, j):
    """b_j (a_i . x)."""
    return sum(a * x for a, x in zip(made.a[i, 0], token, strict=True)) * made.b[j, :, 0]


def summed(made, x, weight):
    rows = []
    for t, token in enumerate(x):
        rows.append(sum(weight[t, e] * one(made, token, e // J, e % J) for e in range(E)))
    return torch.stack(rows)


def expected_weights(router, x, near):
    rows = []
    for token, s in zip(x, near, strict=True):
        powers = [torch.exp(w @ token) for w in router.weight]
        omega, chi = (1 / (1 + torch.exp(-100 * one)) for one in (router.omega, router.chi))
        rows.append(
            torch.stack([chi * (omega * 32 * p / sum(powers) + (1 - omega) * 4 * s_e) for p, s_e in zip(powers, s)])
        )
    return torch.stack(rows)


def same(found, expected, inputs):
    torch.testing.assert_close(found, expected)
    scale = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad((y * scale).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("tokens", [1, 9])
def test_any_row_goes_with_any_column(tokens):
    made, x = layer(), torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    near = torch.rand(tokens, E, dtype=torch.float64)
    weight = expected_weights(made.router, x, near)
    expected = made.base(x) + summed(made.lora, x, weight)
    same(made(x, intuition=near), expected, [x, *(p for p in made.parameters() if p.requires_grad)])


def test_intuition_may_be_of_all_or_of_sequences():
    made, x = layer(), torch.randn(2, 6, D, dtype=torch.float64)
    of_sequences = torch.rand(2, E, dtype=torch.float64)
    each = of_sequences[:, None].expand(2, 6, E)
    expected = made(x, intuition=each)
    torch.testing.assert_close(made(x, intuition=of_sequences), expected)
    torch.testing.assert_close(made(x.flatten(0, 1), intuition=of_sequences), expected.flatten(0, 1))
    torch.testing.assert_close(made(x[:1], intuition=of_sequences[0]), expected[:1])
    torch.testing.assert_close(made(x[:1], intuition=of_sequences[0].tolist()), expected[:1])


def test_masked_tokens_keep_the_layers_output_whatever_they_hold():
    made, x = layer(losses={"switch": 0.1}), torch.randn(2, 6, D, dtype=torch.float64)
    mask = torch.rand(2, 6) > 0.5
    near = torch.rand(2, E, dtype=torch.float64)
    outs = []
    for filler in (float("nan"), 3.0):
        made.zero_grad()
        with record(made) as step:
            out = made(x.where(mask[..., None], filler), intuition=near, mask=mask)
        (out[mask].sum() + sum(step.losses().values())).backward()
        assert all(p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)
        outs.append(out)
    assert torch.equal(outs[0][mask], outs[1][mask])
    torch.testing.assert_close(outs[1][~mask], made.base(torch.full((int((~mask).sum()), D), 3.0).double()))
    assert made(x[:0], intuition=near[0]).shape == (0, 6, OUT)


@pytest.mark.parametrize("gate", ["dense", "label", "one for all"])
def test_experts_serve_any_gate(gate):
    made, x = experts(), torch.randn(8, D, dtype=torch.float64)
    router = (DenseRouter(D, E) if gate == "dense" else LabelRouter(D, E)).double()
    label = torch.zeros(8, dtype=torch.long) if gate == "one for all" else torch.randint(E, (8,))
    decision = router(x, label=label)
    torch.testing.assert_close(decision.apply(x, made), summed(made, x, decision.dense()))


def test_experts_apart_and_merged():
    made, x = experts(), torch.randn(6, D, dtype=torch.float64)
    apart = made.apart(x)
    for t, token in enumerate(x):
        for e in range(E):
            torch.testing.assert_close(apart[t, e], one(made, token, e // J, e % J))
    weight = torch.randn(E, dtype=torch.float64)
    torch.testing.assert_close(x @ made.product(weight).T, summed(made, x, weight.expand(6, E)))
    offsets = torch.tensor([0, 1, 1, 4, *[6] * (E - 3)], dtype=torch.int32)
    routing = Routing(torch.arange(6), offsets, torch.ones(6), 6)
    found = made.each(x, offsets)
    for t, e in enumerate(routing.expert_index.tolist()):
        torch.testing.assert_close(found[t], one(made, x[t], e // J, e % J))


def test_a_model_hears_of_instructions_and_trains():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    made = zoo.adapt(base, "MoR1E", num_experts=6, rank=2).train()
    lora = made.model.layers[0].mlp.up_proj.lora
    assert (tuple(lora.a.shape), tuple(lora.b.shape)) == ((2, 1, 16), (3, 24, 1))
    tokens, near = torch.randint(40, (2, 6)), torch.rand(2, 6)  # as many tokens as experts
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, RankOneExperts):
                module.b.normal_()
    out = made(tokens, labels=tokens, moe_context={"intuition": near})
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in made.parameters() if p.requires_grad)
    swapped = made(tokens, moe_context={"intuition": near.flip(0)})
    assert not torch.allclose(swapped.logits, out.logits)
    with pytest.raises(ValueError, match="weighs 6 experts by the token"):
        zoo.merge_adapters(made)


def test_what_does_not_fit_is_named():
    made, x = layer(), torch.randn(2, 3, D).double()
    cases = [
        (lambda: RankOneExperts(7, D, 2), "7 experts are no pairs of 2 rows and columns"),
        (lambda: RankOneExperts(6, D, 0), "rows must be at least 1, got 0"),
        (lambda: made(x), r"MoR1ERouter needs intuition in the context"),
        (lambda: made(x, intuition=torch.rand(3, E)), r"intuition has shape \[3, 12\], expected \[12\] for all"),
        (lambda: made(x, intuition=torch.rand(2, 4)), r"intuition has shape \[2, 4\]"),
        (lambda: made(x, intuition=1.0), r"intuition has shape \[\]"),
        (
            lambda: AdaptedLinear(nn.Linear(D, OUT), SMEARRouter(D, E), experts())(x.float()),
            "experts are merged by their stacked weights",
        ),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()
