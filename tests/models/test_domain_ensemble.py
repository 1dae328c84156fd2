"""Models of domains, mixed by the posterior of each domain given the text so far."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from zoo.models import DomainEnsemble

SIZES = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, **HEADS, initializer_range=0.6)
    return transformers.LlamaForCausalLM(config).double().eval()


def by_hand(models, ids, prior, evidence="text", top_k=None):
    """Log-probabilities of every next token of one text, and the weights, in plain numbers."""
    each = [model(input_ids=ids[None]).logits[0].detach().softmax(-1).tolist() for model in models]
    logs, posteriors = [], []
    belief = list(prior)
    for s in range(len(ids)):
        if s:
            old = prior if evidence == "token" else belief
            belief = [b * each[j][s - 1][int(ids[s])] for j, b in enumerate(old)]
            belief = [b / sum(belief) for b in belief]
        used = belief
        if top_k is not None:
            best = sorted(range(len(models)), key=lambda j: -belief[j])[:top_k]
            used = [b if j in best else 0.0 for j, b in enumerate(belief)]
            used = [u / sum(used) for u in used]
        posteriors.append(used)
        logs.append([math.log(sum(u * each[j][s][v] for j, u in enumerate(used))) for v in range(11)])
    return torch.tensor(logs, dtype=torch.float64), torch.tensor(posteriors, dtype=torch.float64)


@pytest.mark.parametrize("evidence", ["text", "token"])
@pytest.mark.parametrize("prior", [None, [0.7, 0.1, 0.2], [0.0, 1.0, 3.0]])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_it_is_bayes_rule_token_by_token(evidence, prior, top_k):
    models = [llama() for _ in range(3)]
    ensemble = DomainEnsemble(models, prior, top_k, evidence)
    ids = torch.randint(3, 11, (2, 7))
    with torch.no_grad():
        found = ensemble(ids, labels=ids)
    shares = [1 / 3] * 3 if prior is None else [p / sum(prior) for p in prior]
    nll = []
    for i in range(2):
        logs, posterior = by_hand(models, ids[i], shares, evidence, top_k)
        assert torch.allclose(found.logits[i], logs, rtol=1e-9, atol=1e-11)
        assert torch.allclose(found.posterior[i], posterior, rtol=1e-9, atol=1e-12)
        nll += [-float(logs[s - 1, ids[i, s]]) for s in range(1, 7)]
    assert float(found.loss) == pytest.approx(sum(nll) / len(nll), rel=1e-9)
    assert torch.allclose(found.logits.exp().sum(-1), torch.ones(2, 7, dtype=torch.float64))


@pytest.mark.parametrize("evidence", ["text", "token"])
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1), (3, 2), (1, 4)])
def test_pieces_with_a_cache_are_the_whole_text(evidence, cuts):
    ensemble = DomainEnsemble([llama(), llama()], [0.3, 0.7], evidence=evidence)
    ids, past, found = torch.randint(3, 11, (3, 5)), None, []
    with torch.no_grad():
        whole = ensemble(ids)
        for piece in ids.split(cuts, dim=1):
            out = ensemble(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            found.append(out)
    assert torch.allclose(torch.cat([o.logits for o in found], 1), whole.logits, rtol=1e-8, atol=1e-9)
    assert torch.allclose(torch.cat([o.posterior for o in found], 1), whole.posterior, rtol=1e-8, atol=1e-9)


def test_padding_before_a_text_says_nothing():
    ensemble = DomainEnsemble([llama(), llama()])
    ids = torch.randint(3, 11, (1, 4))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        alone, found = ensemble(ids), ensemble(padded, attention_mask=mask)
    assert torch.allclose(found.posterior[:, 3:], alone.posterior, rtol=1e-6)
    assert torch.allclose(found.logits[:, 3:], alone.logits, rtol=1e-6)


def test_generation_takes_the_likeliest_token_and_ends_with_each_text():
    ensemble = DomainEnsemble([llama(), llama()], top_k=1)
    prompts = torch.randint(3, 11, (3, 4))
    ids = prompts
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, ensemble(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    found = ensemble.generate(prompts, max_new_tokens=6)
    assert torch.equal(found, ids)
    end = int(ids[0, 5])
    ended = ensemble.generate(prompts, max_new_tokens=6, eos_token_id=end, pad_token_id=0)
    for row, whole in zip(ended.tolist(), ids.tolist()):
        stop = next((s for s in range(4, 10) if whole[s] == end), 9)
        assert row == [*whole[: stop + 1], *[0] * (len(row) - stop - 1)]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=32,
                                     initializer_range=0.8, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double().eval()


def recurrent() -> nn.Module:
    """A model with a state that its outputs do not give, and without a mask."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.cell, self.head = nn.Embedding(11, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 11)
            for parameter in self.parameters():
                nn.init.normal_(parameter)

        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=self.head(self.cell(self.table(input_ids))[0]))

    return Recurrent().double().eval()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_texts_behind_padding_go_on_as_they_do_alone(make):
    """Also where positions are learnt one by one: padding must not count."""
    ensemble = DomainEnsemble([make(), make()], [0.4, 0.6])
    ids, lengths = torch.randint(3, 11, (3, 6)), (2, 5, 6)
    mask = torch.stack([torch.arange(6) >= 6 - n for n in lengths]).long()
    found = ensemble.generate(ids, mask, max_new_tokens=7)
    for row, text, n in zip(found, ids, lengths):
        alone = text[None, 6 - n :]
        with torch.no_grad():
            for _ in range(7):
                alone = torch.cat([alone, ensemble(alone).logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(row[6:], alone[0, n:])


@pytest.mark.parametrize("makes", [[recurrent], [recurrent, recurrent], [llama, recurrent]])
def test_models_without_a_cache_read_the_whole_text(makes):
    ensemble = DomainEnsemble([make() for make in makes])
    ids = torch.randint(3, 11, (3, 4))
    found, past = ensemble.generate(ids, max_new_tokens=8), ensemble(ids, use_cache=True).past_key_values
    assert past is None
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, ensemble(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_any_of_several_tokens_ends_a_text():
    ensemble = DomainEnsemble([llama(), llama()])
    prompts = torch.randint(3, 11, (4, 3))
    whole = ensemble.generate(prompts, max_new_tokens=8)
    ends = [int(whole[0, 5]), int(whole[1, 4])]
    for pad in (None, 0):
        ended = ensemble.generate(prompts, max_new_tokens=8, eos_token_id=ends, pad_token_id=pad)
        for row, free in zip(ended.tolist(), whole.tolist()):
            stop = next((s for s in range(3, 11) if free[s] in ends), 10)
            assert row == [*free[: stop + 1], *[ends[0] if pad is None else pad] * (len(row) - stop - 1)]


def test_generation_draws_among_the_likeliest():
    ensemble = DomainEnsemble([llama(), llama()])
    prompt = torch.randint(3, 11, (1, 4)).expand(400, -1)
    with torch.no_grad():
        probs = ensemble(prompt[:1]).logits[0, -1].exp()
    order = probs.argsort(descending=True)
    drawn = ensemble.generate(prompt, max_new_tokens=1, do_sample=True, top_k=3)[:, -1]
    assert set(drawn.tolist()) <= set(order[:3].tolist())
    few = int((probs[order].cumsum(0) < 0.5).sum()) + 1
    drawn = ensemble.generate(prompt, max_new_tokens=1, do_sample=True, top_p=0.5)[:, -1]
    assert set(drawn.tolist()) == set(order[:few].tolist()) or few > 1
    assert set(drawn.tolist()) <= set(order[:few].tolist())


def test_the_prior_is_a_running_mean_of_the_posterior_after_each_batch():
    models = [llama(), llama()]
    ensemble = DomainEnsemble(models, [0.9, 0.1])
    batches = [torch.randint(3, 11, (2, 5)) for _ in range(3)]
    prior = [0.9, 0.1]
    mean = None
    for ids in batches:
        last = torch.stack([by_hand(models, text, prior)[1][-1] for text in ids]).mean(0)
        mean = last if mean is None else 0.7 * mean + 0.3 * last
        prior = mean.tolist()
    few = DomainEnsemble(models, [0.9, 0.1], top_k=1)  # all domains count, whatever is mixed later
    for each in (ensemble, few):
        assert torch.allclose(each.estimate_prior(batches), mean, rtol=1e-8)
        assert torch.allclose(each.prior, mean, rtol=1e-8)
    assert few.top_k == 1
    with pytest.raises(ValueError, match="at least one batch"):
        ensemble.estimate_prior([])


def test_one_model_is_itself_and_any_module_will_do():
    class Constant(nn.Module):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.arange(5.0).expand(*input_ids.shape, 5))

    found = DomainEnsemble([Constant()])(torch.randint(0, 5, (2, 3)))
    assert torch.allclose(found.logits, torch.arange(5.0).log_softmax(-1).expand(2, 3, 5))


def test_domains_learn_from_the_mixture_and_the_state_goes_round():
    ensemble = DomainEnsemble([llama(), llama()], [0.2, 0.8], top_k=1)
    ids = torch.randint(3, 11, (2, 6))
    ensemble(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ensemble.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in ensemble.parameters())
    other = DomainEnsemble([llama(), llama()], top_k=1)
    other.load_state_dict(ensemble.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids).logits, ensemble(ids).logits)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least one model"):
        DomainEnsemble([])
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "vocab_size": 12}, **HEADS))
    with pytest.raises(ValueError, match=r"vocabularies have different sizes, \[11, 12\]"):
        DomainEnsemble([llama(), other])
    for prior in ([1.0], [0.0, 0.0], [1.0, -1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="a prior has a share of at least 0 for each of 2 models"):
            DomainEnsemble([llama(), llama()], prior)
    with pytest.raises(ValueError, match="top_k must be between 1 and 1, got 2"):
        DomainEnsemble([llama()], top_k=2)
    with pytest.raises(ValueError, match="evidence must be 'text' or 'token', got 'all'"):
        DomainEnsemble([llama()], evidence="all")
    prompt, half = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [1, 1, 0]])
    for ids, mask in ((prompt, half), (prompt[:, :0], None)):
        with pytest.raises(ValueError, match="a prompt has a token at least, and padding stands before it"):
            DomainEnsemble([llama()]).generate(ids, mask)
    for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError, match=r"temperature above 0 and top_p above 0 and at most 1, got"):
            DomainEnsemble([llama()]).generate(prompt, do_sample=True, **wrong)
