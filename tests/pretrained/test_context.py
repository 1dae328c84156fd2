"""What routers learn of a batch: padding and token ids, through checkpointing, compilation and generation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import FAMILIES, theirs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import zoo
from zoo.moe import MoE, Router, Routing


class Spy(Router):
    """Sends every token to expert 0 and keeps what it was told."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.seen: list[dict] = []

    def forward(self, x: Tensor, **context) -> Routing:
        self.seen.append(context)
        tokens = x.reshape(-1, self.dim).shape[0]
        return Routing.from_choices(torch.zeros(tokens, 1, dtype=torch.long), torch.ones(tokens, 1), self.num_experts)


def small(family: str = "mixtral", **overrides) -> nn.Module:
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 256, "initializer_range": 0.2}
    return zoo.create_model(f"language/{family}_tiny", **{**sizes, **overrides})


def moes(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def padded(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[1, 6:] = 0
    return torch.randint(0, 256, (3, 9), generator=generator), mask


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_neither_routed_nor_counted(family):
    model = small(family, losses={"switch": 1.0})
    tokens, mask = padded()
    with zoo.moe.record(model) as step:
        model(tokens, attention_mask=mask)
    k = model.config.num_experts_per_tok
    for calls in step.routings.values():
        assert [len(r.token_index) for r in calls] == [k * int(mask.sum())]
        assert set(calls[0].token_index.tolist()) == set(mask.reshape(-1).nonzero().squeeze(1).tolist())
    # What stands at the padding has no say in the losses.
    with zoo.moe.record(model) as other:
        model(torch.where(mask.bool(), tokens, (tokens + 1) % 256), attention_mask=mask)
    torch.testing.assert_close(other.losses(), step.losses())


def test_a_call_without_a_mask_does_not_see_the_last_ones():
    model = small()
    tokens, mask = padded()
    model(tokens, attention_mask=mask)
    assert all(m._moe_link.value is None for m in moes(model))
    with zoo.moe.record(model) as step:
        model(tokens)
    assert {len(r.token_index) for calls in step.routings.values() for r in calls} == {2 * 27}


def test_routers_see_mask_and_token_ids_of_the_tokens_at_hand():
    model = small(router=Spy).eval()
    tokens, mask = padded()
    spies = [m.router for m in moes(model)]
    model(tokens, attention_mask=mask)
    model(inputs_embeds=model.get_input_embeddings()(tokens), attention_mask=mask)
    model.model(tokens)
    for spy in spies:
        first, second, third = spy.seen
        assert torch.equal(first["mask"], mask.bool())
        assert torch.equal(first["token_ids"], tokens)
        assert torch.equal(second["mask"], mask.bool())
        assert "token_ids" not in second
        assert "mask" not in third
    spies[0].seen.clear()
    mask[1] = 1
    model.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [tuple(c["token_ids"].shape) for c in spies[0].seen] == [(3, 9), (3, 1), (3, 1)]
    assert all("mask" not in c for c in spies[0].seen[1:])  # the new tokens are all real


def gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    model.zero_grad()
    total = 0
    for tokens, mask in batches:
        with zoo.moe.record(model) as step:
            loss = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100), use_cache=False).loss
        total = total + loss + sum(step.losses().values())
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_checkpointing_recomputes_each_batch_with_its_own_mask(family):
    model = small(family, losses={"switch": 1.0}, capacity=1.0).train()
    one, two = padded(1), padded(2)
    two[1][2, :7] = 0
    plain = gradients(model, [one, two])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model, [one, two])
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], msg=name)
    assert all(m._moe_link.value is None for m in moes(model))


def test_a_compiled_model_gives_the_same_gradients():
    model = small(num_hidden_layers=1, losses={"switch": 1.0}).train()
    tokens, mask = padded()
    plain = gradients(model, [(tokens, mask)])
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    compiled = gradients(model, [(tokens, mask)])
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], msg=name)
    assert moes(model)[0]._moe_link.value is None


def test_a_compiled_model_without_a_mask_is_one_graph():
    model = small(num_hidden_layers=2)
    tokens = padded()[0]
    expected = model(tokens, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected)


def test_gates_of_moe_plus_plus_hear_the_layer_below() -> None:
    gate = {"name": "MoEPlusPlusRouter", "zero": 0}
    model = zoo.create_model("language/mixtral_tiny", router=gate, num_hidden_layers=3).train()
    routers, inputs = [layer.mlp.router for layer in model.model.layers], []
    hooks = [r.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())) for r in routers]
    batch = padded()
    plain = gradients(model, [batch])
    with zoo.moe.record(model) as step:
        inputs.clear()
        model(batch[0])
    for hook in hooks:
        hook.remove()
    below = None
    for router, x, (routing,) in zip(routers, inputs, step.routings.values()):
        logits = (x.reshape(-1, x.shape[-1]) @ router.hidden_weight.T).tanh() @ router.weight.T
        if below is not None:
            logits = logits + below @ router.residual_weight.T
        torch.testing.assert_close(routing.probs, logits.softmax(-1))
        below = logits
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients(model, [batch])
    heard = [bool(plain[f"model.layers.{i}.mlp.router.residual_weight"].any()) for i in range(3)]
    assert heard == [False, True, True]
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], msg=name)


def test_a_copy_has_hooks_of_its_own():
    model = small(router=Spy)
    tokens, mask = padded()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert moes(other)[0]._moe_link is not moes(model)[0]._moe_link
        other(tokens, attention_mask=mask)
        assert torch.equal(moes(other)[0].router.seen[-1]["mask"], mask.bool())
    assert moes(model)[0].router.seen == []


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "deepseek_v3"])
def test_transformers_own_auxiliary_loss_is_transformers(family, checkpointed, tmp_path):
    theirs(family).save_pretrained(tmp_path)
    expected, ours = AutoModelForCausalLM.from_pretrained(tmp_path), zoo.from_pretrained(tmp_path)
    if checkpointed:
        for model in (expected, ours):
            model.train().gradient_checkpointing_enable()
    tokens, mask = padded()
    real = mask.bool() & mask.roll(1, 1).bool()  # what padding predicts, or is predicted at, is no one's concern
    labels = tokens.masked_fill(~real, -100)
    a, b = (m(tokens, attention_mask=mask, labels=labels, output_router_logits=True) for m in (ours, expected))
    torch.testing.assert_close(a.aux_loss, b.aux_loss)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-5)
    assert len(a.router_logits) == len(b.router_logits) == 2
    a.aux_loss.backward()
    b.aux_loss.backward()
    mine, other = moes(ours)[0].router.weight.grad, expected.model.layers[0].mlp.gate.weight.grad
    assert (mine - other).abs().max() < 1e-4 * other.abs().max()
    ours.config.output_router_logits = True
    assert ours(tokens).aux_loss > 0


def test_router_logits_of_a_gate_without_logits_are_refused():
    model = small(router=Spy)
    with pytest.raises(ValueError, match="Spy has no logits"):
        model(padded()[0], output_router_logits=True)


def test_expert_choice_warns_once_that_the_model_is_causal() -> None:
    import warnings

    model = zoo.create_model("language/mixtral_tiny", router="ExpertChoiceRouter", num_hidden_layers=1)
    ids = torch.randint(0, 1024, (2, 8))
    with pytest.warns(UserWarning, match="generation will not match training"):
        model(input_ids=ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=ids)
