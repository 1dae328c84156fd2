"""Training adapters: what learns, what stays, and how."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted_models import GATES, LABELS, OWN, batch, language, stir, vision

import zoo
from tasks.optim import parameter_groups
from zoo.convert.adapting import adapter_state
from zoo.models.parameters import count_parameters
from zoo.moe import record


def objective(model, tokens, mask, kind=None):
    """The loss with those of the gates, as the training task adds them."""
    context = {"moe_context": LABELS} if kind in GATES else {}
    labels = tokens.where(mask.bool(), -100)
    with record(model) as step:
        loss = model(tokens, attention_mask=mask, labels=labels, **context).loss
        return loss + sum(step.losses().values())


@pytest.mark.parametrize("kind", [*OWN, "UniPELT"])
def test_experts_and_gates_learn_and_nothing_else_moves(kind):
    made, (tokens, mask) = zoo.adapt(language(num_hidden_layers=2), kind, router=GATES.get(kind)).train(), batch()
    stir(made, 0.02)
    before = copy.deepcopy(made.state_dict())
    own = adapter_state(made)
    optimizer = torch.optim.AdamW(parameter_groups(made, 0.1), lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = objective(made, tokens, mask, kind)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == (name in own)
    for name, tensor in made.state_dict().items():
        assert name in own or torch.equal(tensor, before[name])
    moved = {name for name in own if not torch.equal(made.state_dict()[name], before[name])}
    assert moved == set(own)


@pytest.mark.parametrize("kind", [*OWN, "UniPELT"])
def test_recomputation_changes_no_gradient(kind):
    plain, (tokens, mask) = (
        stir(zoo.adapt(language(num_hidden_layers=2), kind, router=GATES.get(kind))).train(),
        batch(),
    )
    twin = copy.deepcopy(plain)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for model in (plain, twin):
        torch.manual_seed(1)
        objective(model, tokens, mask, kind).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["MoLoRA", "MoELoRA", "MoV", "MixLoRA", "AdaMix"])
def test_float32_adapters_learn_under_bfloat16(kind):
    tokens, mask = batch()
    exact = stir(zoo.adapt(language(), kind), 0.1).train()
    expected = objective(exact, tokens, mask)
    for made in (copy.deepcopy(exact), zoo.adapt(language().bfloat16(), kind, dtype="float32").train()):
        torch.manual_seed(0)
        narrow = next(made.parameters()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=not narrow):
            loss = objective(made, tokens, mask)
        loss.backward()
        grads = [p.grad for p in made.parameters() if p.requires_grad]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
        if not narrow and kind != "AdaMix":
            torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("kind", "targets"), [("MoLA", ("query", "up")), ("MixLoRA", ("up",))])
def test_a_compiled_model_trains_as_the_plain_one(kind, targets):
    made = zoo.adapt(language(num_hidden_layers=1), kind, num_experts=3, targets=targets, losses={"switch": 0.1})
    plain, tokens = stir(made).train(), batch()[0]
    twin = copy.deepcopy(plain)
    twin.compile(backend="eager", fullgraph=True)
    found = []
    for model in (plain, twin):
        with record(model) as step:
            loss = model(tokens, labels=tokens).loss + sum(step.losses().values())
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-4, atol=1e-5)


def test_loramoes_balance_hears_what_kind_a_sample_is():
    losses = {"localized_balance": {"weight": 0.7, "delta": 0.2}}
    made, (tokens, mask) = zoo.adapt(language(), "LoRAMoE", num_experts=4, losses=losses, layers=[1]).train(), batch()
    kind = torch.tensor([1, 0])
    with record(made) as step:
        made(tokens, attention_mask=mask, moe_context={"sample_type": kind})
    expected = 0.0
    for (decision,) in step.routings.values():
        z = decision.dense().view(2, 7, 4).sum(1)  # padding has no weight
        own = torch.tensor([[1.2, 1.2, 0.8, 0.8], [0.8, 0.8, 1.2, 1.2]])
        z = z * own
        expected = expected + 0.7 * z.var() / (z.mean() ** 2 + 1e-10)
    torch.testing.assert_close(step.losses()["localized_balance"], expected)


def test_stacked_matrices_decay_and_vectors_and_biases_do_not():
    decays = {}
    for kind in ("MoLA", "MoV", "AdaMix", "MixLoRA"):
        made = zoo.adapt(language(), kind)
        names = {id(p): n for n, p in made.named_parameters()}
        for group in parameter_groups(made, 0.1):
            for parameter in group["params"]:
                leaf = ".".join(names[id(parameter)].split(".")[-2:])
                decays.setdefault(leaf.rpartition(".")[2] if "router" not in leaf else leaf, set()).add(
                    group["weight_decay"]
                )
    assert decays == {
        "a": {0.1},
        "b": {0.1},
        "router.weight": {0.1},
        "vectors": {0.0},
        "down": {0.1},
        "up": {0.1},
        "down_bias": {0.0},
        "up_bias": {0.0},
    }


def test_how_many_parameters_a_token_meets():
    base = language()
    whole = sum(p.numel() for p in base.parameters())
    made = zoo.adapt(base, "MoELoRA", num_experts=4, rank=3, layers=[0])  # top 2 beside queries and values
    a_token = sum(2 * 3 * (32 + out) + 4 * 32 for out in (32, 16))
    assert count_parameters(made) == (whole + sum(4 * 3 * (32 + out) + 4 * 32 for out in (32, 16)), whole + a_token)
    made = zoo.adapt(base, "MixLoRA", num_experts=4, rank=3, layers=[0])
    each = 3 * 3 * (32 + 48)
    assert count_parameters(made) == (whole + 4 * each + 4 * 32, whole + 2 * each + 4 * 32)
    made = zoo.adapt(base, "MoV", num_experts=5, layers=[0])
    assert count_parameters(made)[0] == count_parameters(made)[1] == whole + sum(5 * n + 5 * n for n in (16, 16, 48))


def test_a_vision_model_trains_with_checkpointing():
    model = vision(depth=2)
    made = zoo.adapt(model, "MixLoRA").train()
    made.set_grad_checkpointing(True)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(7, (8,))
    own = set(adapter_state(made))
    optimizer = torch.optim.AdamW(parameter_groups(made, 0.1), lr=0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with record(made) as step:
            loss = torch.nn.functional.cross_entropy(made(images), labels) + step.losses()["switch"]
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert {n for n, p in made.named_parameters() if p.grad is not None} == own
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["MoELoRA", "MixLoRA"])
def test_generation_with_a_cache_is_that_without(kind):
    made, (tokens, mask) = stir(zoo.adapt(language(), kind), 0.1), batch()
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(made.generate(tokens, **options), made.generate(tokens, use_cache=False, **options))
