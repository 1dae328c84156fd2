"""Labels of texts reach the gates of a language model."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.models.parameters import count_parameters


def test_a_domain_given_with_the_batch_picks_the_expert() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_local_experts": 4, "intermediate_size": 16}
    model = zoo.create_model("language/mixtral_tiny", router="DomainRouter", **sizes)
    tokens, domain = torch.randint(256, (3, 5)), torch.tensor([2, 0, 3])
    with zoo.moe.record(model) as step:
        model(tokens, moe_context={"domain": domain})
    with pytest.raises(ValueError, match=r'a transformers model as model\(..., moe_context=\{"domain": ...\}\)'):
        model(tokens)
    for calls in step.routings.values():
        assert [routing.dense().argmax(-1).view(3, 5)[:, 0].tolist() for routing in calls] == [[2, 0, 3]]
    total, active = count_parameters(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert active == total - experts * 3 // 4  # a token meets one expert of four


def test_padding_is_left_out_of_what_a_merging_gate_averages_in_evaluation_too() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_local_experts": 4, "intermediate_size": 16}
    torch.manual_seed(0)
    model = zoo.create_model("language/mixtral_tiny", router="MEORouter", **sizes).eval()
    model.model.layers[0].mlp.router.weight.data.normal_()
    tokens = torch.randint(256, (1, 6))
    padded = torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    with torch.no_grad():
        alone, beside = model(tokens).logits, model(padded, attention_mask=mask).logits[:, :6]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-5)
