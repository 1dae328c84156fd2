"""Soft prompts of which a gate chooses (SMoP): in front of the tokens, and nowhere in what comes out."""

from __future__ import annotations

import copy

import pytest
import torch
from adapted_models import batch, language, stir, vision
from torch.nn import functional as F

import zoo
from zoo.convert.adapting import adapter_state
from zoo.moe import PromptMixture, record
from zoo.moe.routers import SMoPRouter

NAMES = ("llama", "gpt2 (transposed, fused)")


def adapted(name="llama", **options):
    return stir(zoo.adapt(language(name), "SMoP", num_experts=3, rank=4, **options))


def by_hand(base, prompts, tokens, mask):
    """The base model's logits of prompts and tokens, those of the tokens."""
    x = base.get_input_embeddings()(tokens)
    rows = []
    for b in range(len(tokens)):
        mean = x[b][mask[b].bool()].mean(0)
        p = (prompts.router.weight @ mean).softmax(0)
        rows.append(torch.cat([p.max() * prompts.prompts[p.argmax()], x[b]]))
    longer = torch.cat([torch.ones(len(tokens), prompts.length, dtype=mask.dtype), mask], dim=1)
    return base(inputs_embeds=torch.stack(rows), attention_mask=longer).logits[:, prompts.length :]


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_gets_the_likeliest_prompt_times_its_probability(name):
    made, base, (tokens, mask) = adapted(name), language(name), batch()
    base.load_state_dict({n: t for n, t in made.state_dict().items() if "soft_prompts" not in n})
    prompts = next(m for m in made.modules() if isinstance(m, PromptMixture))
    with record(made) as step:
        out = made(tokens, attention_mask=mask, labels=tokens.where(mask.bool(), -100))
    expected = by_hand(base, prompts, tokens, mask)
    real = mask.bool()
    torch.testing.assert_close(out.logits[real], expected[real], rtol=1e-4, atol=1e-4)
    targets = tokens.where(mask.bool(), -100)[:, 1:]
    loss = F.cross_entropy(expected[:, :-1].transpose(1, 2), targets)
    torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-4)
    ((decision,),) = step.routings.values()
    assert decision.num_tokens == 2
    out.loss.backward()
    assert {n for n, p in made.named_parameters() if p.grad is not None} == set(adapter_state(made))
    grads = torch.autograd.grad(loss, [prompts.prompts, prompts.router.weight])
    torch.testing.assert_close(prompts.prompts.grad, grads[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(prompts.router.weight.grad, grads[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_generation_with_a_cache_is_that_without(name):
    made, (tokens, mask) = adapted(name), batch()
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    base = made.generate(tokens[1:], max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    # Without a cache the prompt would be chosen anew by what was generated: hold it to one.
    next(m for m in made.modules() if isinstance(m, PromptMixture)).router.weight.data.zero_()
    found = [made.generate(tokens, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*found)
    assert base.shape == (1, 13)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_go_with_other_adapters_and_into_a_folder(name, tmp_path):
    base, (tokens, mask) = language(name), batch()
    made = stir(zoo.adapt(zoo.adapt(base, "MoELoRA"), "SMoP"), 0.1)
    other = zoo.adapt(zoo.adapt(base, "SMoP"), "MoELoRA")
    other.load_state_dict(made.state_dict())
    with record(made) as step:
        expected = made(tokens, attention_mask=mask).logits
    experts = [calls[0] for name, calls in step.routings.items() if "soft_prompts" not in name]
    assert experts
    for decision in experts:  # prompts are tokens to them, and padding is none
        assert decision.num_tokens == 2 * (7 + 5)
        assert decision.token_index.unique().numel() == 2 * 5 + int(mask.sum())
    real = mask.bool()
    torch.testing.assert_close(other(tokens, attention_mask=mask).logits[real], expected[real])
    zoo.save_pretrained(made, tmp_path / "adapters")
    again = zoo.from_pretrained(tmp_path / "adapters", base=base)
    torch.testing.assert_close(again(tokens, attention_mask=mask).logits[real], expected[real])
    twin = copy.deepcopy(made).train()
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (made.train(), twin):
        torch.manual_seed(0)
        with record(model) as step:
            (model(tokens, attention_mask=mask, labels=tokens).loss + sum(step.losses().values())).backward()
    for ours, theirs in zip(made.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_noise_is_relative_and_without_gradient():
    router, x = SMoPRouter(6, 4).double(), torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(router.weight @ router.weight.T, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.manual_seed(2)
    found = router(x)
    torch.manual_seed(2)
    logits = x @ router.weight.T
    p = (logits + logits.detach() * torch.randn_like(logits)).softmax(-1)
    expected = p.where(p == p.amax(-1, keepdim=True), 0)
    torch.testing.assert_close(found.dense(), expected)
    scale = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((y * scale).sum(), router.weight)[0] for y in (found.dense(), expected))
    torch.testing.assert_close(ours, theirs)
    p = logits.softmax(-1)
    torch.testing.assert_close(router.eval()(x).dense(), p.where(p == p.amax(-1, keepdim=True), 0))


def test_what_cannot_have_prompts_is_named():
    cases = [
        (lambda: zoo.adapt(vision(), "SMoP"), "soft prompts need a language model of one stack, got VisionTransformer"),
        (lambda: zoo.adapt(language("t5 (two stacks)"), "SMoP"), "of one stack, got T5ForConditionalGeneration"),
        (lambda: zoo.adapt(adapted(), "SMoP"), "the model has soft prompts already"),
        (lambda: zoo.adapt(language(), "SMoP", num_experts=[2, 3]), "SMoP has one number of prompts"),
        (lambda: zoo.merge_adapters(adapted()), "are prompts, which are no weights"),
        (lambda: PromptMixture(SMoPRouter(4, 2), 0), "length must be at least 1, got 0"),
        (lambda: SMoPRouter(4, 2, noise="fixed"), "its noise is its own, perturb"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError) as caught:
            make()
        assert message in str(caught.value)
