"""`generate` tells gates what the model is told: held against a loop that calls the model itself."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoo

SIZES = {"vocab_size": 64, "num_hidden_layers": 2}


def sparse():
    return zoo.create_model("language/mixtral_tiny", **SIZES, router="LabelRouter").eval(), "label"


def adapted():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "pad_token_id": 0}
    base = LlamaForCausalLM(LlamaConfig(**SIZES, **sizes)).eval()
    made = zoo.adapt(base, "MOELoRA", router={"num_tasks": 4})
    return made, "task"


def greedy(model, tokens, **context):
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, model(tokens, moe_context=context).logits[:, -1:].argmax(-1)], dim=1)
    return tokens


@pytest.mark.parametrize("make", [sparse, adapted])
def test_labels_are_told_with_every_token(make):
    model, label = make()
    with torch.no_grad():  # large enough that experts matter
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    tokens, labels = torch.randint(3, 64, (3, 6)), torch.tensor([2, 0, 3])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = greedy(model, tokens, **{label: labels})
    assert not torch.equal(expected, greedy(model, tokens, **{label: 1}))
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for cached in (True, False):
            found = same.generate(tokens, moe_context={label: labels}, use_cache=cached, **how)
            assert torch.equal(found, expected)
    assert torch.equal(model.generate(tokens, moe_context={label: 1}, **how), greedy(model, tokens, **{label: 1}))
    beams = model.generate(tokens, moe_context={label: labels}, num_beams=3, **how)
    for row, own in zip(beams, labels):  # each as if it were alone
        at = int((labels == own).nonzero())
        alone = model.generate(tokens[at : at + 1], moe_context={label: int(own)}, num_beams=3, **how)
        assert torch.equal(alone[0], row)
    copied = copy.deepcopy(model)
    assert copied._validate_model_kwargs.model is copied
    with pytest.raises(ValueError, match="not used by the model: \\['moe_contxt'\\]"):
        model.generate(tokens, moe_contxt={label: labels}, **how)


def lively(router, **fields):
    """A small model of this gate whose experts matter."""
    model = zoo.create_model("language/mixtral_tiny", **SIZES, router=router, **fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("feature", ["previous", "bigram"])
@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=["", "static"])
def test_hash_layers_hear_the_token_before_those_that_are_cached(feature, how):
    """As if nothing were cached, for prompts of unequal length, beams, and the guesses of a smaller model."""
    sizes = {"vocab_size": 64} if feature == "previous" else {}
    model = lively({"name": "HashRouter", "feature": feature, **sizes})
    long, short = torch.randint(3, 64, (1, 7)), torch.randint(3, 64, (1, 4))
    tokens = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **how}
    found = model.generate(tokens, attention_mask=(tokens > 0).long(), **how)
    assert torch.equal(found[:1], greedy(model, long))
    assert torch.equal(found[1:, 3:], greedy(model, short))
    if "cache_implementation" not in how:
        guess = copy.deepcopy(model)
        with torch.no_grad():
            guess.lm_head.weight.add_(0.1 * torch.randn_like(guess.lm_head.weight))
        assert torch.equal(model.generate(long, assistant_model=guess, **how), greedy(model, long))
        beams = model.generate(tokens, attention_mask=(tokens > 0).long(), num_beams=3, **how)
        for row, alone in zip(beams, (long, short)):
            expected = model.generate(alone, num_beams=3, use_cache=False, **how)[0]
            assert torch.equal(row[-len(expected) :], expected)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_of_a_prompt_has_no_part_in_what_a_gate_averages(cache):
    model = lively("SentenceRouter")
    short = torch.randint(3, 64, (1, 4))
    tokens = torch.cat([torch.randint(3, 64, (1, 9)), torch.cat([torch.zeros(1, 5, dtype=torch.long), short], dim=1)])
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    how.update(cache_implementation=cache, disable_compile=True)
    found = model.generate(tokens, attention_mask=(tokens > 0).long(), **how)
    assert torch.equal(found[1:, 5:], model.generate(short, **how))


def by_the_prompt(model, prompt, steps=5):
    """Greedy, with nothing cached; every layer's experts merged by the mean of what the prompt alone has before it."""
    tokens = prompt
    with torch.no_grad():
        for _ in range(steps):
            logits = model(tokens, use_cache=False, moe_context={"prompt": prompt.shape[1]}).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


def test_lory_decides_once_by_the_prompt():
    model = lively({"name": "LoryRouter", "segment": 4})
    long, short = torch.randint(3, 64, (1, 7)), torch.randint(3, 64, (1, 4))
    tokens = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    mask = (tokens > 0).long()
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    # The layer itself, by hand: a mean over the prompt, one merged expert for prompt and answer alike.
    moe = model.model.layers[0].mlp
    x = torch.randn(1, 9, 128)
    weight = (x[0, :7].mean(0) @ moe.router.weight.T).softmax(-1)
    w_in, w_out = (torch.einsum("e,eab->ab", weight, w) for w in (moe.experts.gate_up_proj, moe.experts.down_proj))
    gate, up = (x @ w_in.T).chunk(2, dim=-1)
    merged = (torch.nn.functional.silu(gate) * up) @ w_out.T
    torch.testing.assert_close(moe(x, prompt=7), merged, rtol=1e-4, atol=1e-4 * merged.abs().max().item())

    expected = [by_the_prompt(model, long)[0], by_the_prompt(model, short)[0]]
    for static in ({}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}):
        found = model.generate(tokens, attention_mask=mask, **how, **static)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1, 3:], expected[1])
    guess = copy.deepcopy(model)
    with torch.no_grad():
        guess.lm_head.weight.add_(0.1 * torch.randn_like(guess.lm_head.weight))
    assert torch.equal(model.generate(long, assistant_model=guess, **how)[0], expected[0])
    several = model.generate(tokens, attention_mask=mask, num_return_sequences=2, num_beams=2, **how)
    alone = model.generate(short, num_return_sequences=2, num_beams=2, use_cache=False, **how)
    assert torch.equal(several[2:, 3:], alone)
    assert torch.equal(model.generate(inputs_embeds=model.model.embed_tokens(long), **how)[0], expected[0][7:])
