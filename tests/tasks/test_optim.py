import math

import pytest
import torch

import zoo
from tasks.optim import Beside, learning_rate, parameter_groups


def names_of(model, group):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


@pytest.mark.parametrize("decay_router", [True, False])
def test_norms_biases_and_embeddings_do_not_decay(decay_router):
    model = zoo.create_model("language/qwen2_moe_tiny", num_hidden_layers=1)
    decayed, rest = parameter_groups(model, 0.1, decay_router)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    kept, exempt = names_of(model, decayed), names_of(model, rest)
    assert kept | exempt == {n for n, _ in model.named_parameters()}
    assert not kept & exempt
    assert {n for n in exempt if "norm" in n or "bias" in n or "embed" in n or "router" in n} == exempt
    assert {n for n in kept if "norm" in n or "bias" in n or "embed" in n} == set()
    assert ("model.layers.0.mlp.router.weight" in kept) == decay_router
    assert "model.layers.0.mlp.experts.gate_up_proj" in kept
    assert "lm_head.weight" in kept


def test_biases_of_stacked_experts_do_not_decay_though_they_are_matrices():
    experts = zoo.moe.Experts(4, 8, 16, bias=True)
    decayed, rest = parameter_groups(experts, 0.1)
    assert names_of(experts, rest) == {"gate_up_proj_bias", "down_proj_bias"}
    assert names_of(experts, decayed) == {"gate_up_proj", "down_proj"}


def test_a_head_tied_to_the_embedding_is_an_embedding_and_frozen_weights_are_left_out():
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=1, tie_word_embeddings=True)
    model.model.norm.weight.requires_grad_(False)
    decayed, rest = parameter_groups(model, 0.1)
    assert "model.embed_tokens.weight" in names_of(model, rest)
    together = [*decayed["params"], *rest["params"]]
    assert len({id(p) for p in together}) == len(together)
    assert id(model.model.norm.weight) not in {id(p) for p in together}


def test_cosine_in_closed_form():
    factor = learning_rate("cosine", warmup=10, total=110, floor=0.1)
    assert [factor(s) for s in range(3)] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.55)
    assert factor(35) == pytest.approx(0.1 + 0.9 * (0.5 + math.sqrt(0.5) / 2))
    assert factor(110) == factor(500) == pytest.approx(0.1)


def test_warmup_stable_decay_in_closed_form():
    factor = learning_rate("wsd", warmup=10, total=100, floor=0.0, decay=0.25)
    assert factor(10) == factor(50) == factor(75) == 1.0
    assert factor(80) == pytest.approx(0.8)
    assert factor(100) == pytest.approx(0.0)


def test_constant_needs_no_end_and_the_others_do():
    factor = learning_rate("constant", warmup=1, total=math.inf)
    assert [factor(s) for s in (0, 1, 10**9)] == [0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="must know its end"):
        learning_rate("cosine", 0, math.inf)
    with pytest.raises(ValueError, match="unknown schedule 'cosin'; did you mean cosine"):
        learning_rate("cosin", 0, 10)


def test_steps_of_the_optimizer_follow_the_schedule():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate("wsd", 1, 4, 0.0, 0.5))
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.0])


class InBackward(torch.optim.SGD):
    """Stands for a fused optimizer: what it has to do is done once the closure has run, at the rate set before."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.rate = lr

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        self.rate = self.param_groups[0]["lr"]

    def after_backward(self):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= self.rate * p.grad

    def step(self, closure=None):
        assert closure is None  # a closure runs once, and not for this one

    def state_dict(self):
        return {}  # as torchrec's, without groups

    def load_state_dict(self, state_dict):
        pass


def beside(steps, start=None):
    """Weights after training two tensors, one by AdamW and one in backward, under one schedule; and the states."""
    dense, table = (torch.nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0))
    fused = InBackward([table], lr=0.5)
    optimizer = Beside(torch.optim.AdamW([dense], lr=0.1), fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 2))
    if start:
        with torch.no_grad():
            dense.copy_(start[0])
            table.copy_(start[1])
        optimizer.load_state_dict(start[2])
        schedule.load_state_dict(start[3])
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = ((dense * table - 3) ** 2).sum()
        loss.backward()
        fused.after_backward()
        calls.append(loss.item())
        return loss

    for _ in range(steps):
        assert optimizer.step(closure).item() == calls[-1]
        schedule.step()
    assert len(calls) == steps
    return dense.detach().clone(), table.detach().clone(), optimizer.state_dict(), schedule.state_dict()


def test_an_optimizer_beside_another_follows_the_schedule_and_continues_exactly():
    straight, first = beside(5), beside(2)
    again = beside(3, start=first)
    assert torch.equal(again[0], straight[0])
    assert torch.equal(again[1], straight[1])
    assert straight[2]["rates"] == [0.5 / 7]

    dense, table = torch.ones(2), torch.full((2,), 2.0)  # one step by hand, at half of the rates
    table = table - 0.25 * 2 * (dense * table - 3) * dense
    found = beside(1)
    torch.testing.assert_close(found[1], table)
    torch.testing.assert_close(found[0], torch.full((2,), 1.0 * (1 - 0.05 * 0.01) + 0.05))  # Adam's first step


@pytest.mark.parametrize(
    ("said", "named"),
    [({"floor": -0.1}, "min_lr_ratio"), ({"decay": 1.5}, "decay_fraction"), ({"total": 0}, "schedule_steps")],
)
def test_numbers_that_make_no_schedule_are_named(said, named):
    with pytest.raises(ValueError, match=named):
        learning_rate(**{"schedule": "wsd", "warmup": 1, "total": 10, **said})
