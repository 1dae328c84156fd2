"""Dense to sparse by cutting: the dense model's function in pieces, whichever way they are cut."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import transformers
from converted_cases import LANGUAGE, VISION, error, experts_of, language, losses_of, output, owners, shaken, vit
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.convert import set_k
from zoo.moe import MoE
from zoo.moe.schedule import advance


@pytest.mark.filterwarnings("ignore:split. dropout of only some units")
@pytest.mark.parametrize("method", ["random", "cluster", "coactivation", "importance"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_all_experts_together_are_the_dense_language_model(name, method):
    dense, ids = shaken(language(name)), torch.randint(3, 64, (2, 9))
    expected = output(dense, ids)
    sparse = zoo.split(dense, num_experts=6, k=6, method=method, calibrate=losses_of(ids))
    assert {moe.experts.hidden_dim for moe in experts_of(sparse)} == {8}
    assert error(output(sparse, ids), expected) < 5e-6
    assert torch.equal(output(dense, ids), expected)
    assert not experts_of(dense)


@pytest.mark.parametrize("name", VISION)
def test_all_experts_together_are_the_dense_timm_model(name):
    options = VISION[name]
    dense = shaken(timm.create_model(name, num_classes=7, **options).eval())
    x = torch.randn(2, 3, options.get("img_size", 48), options.get("img_size", 48))
    sparse = zoo.split(dense, layers="every-2", num_experts=4, k=4)
    assert error(output(sparse, x), output(dense, x)) < 5e-6


def masked(mlp: nn.Module, layout: tuple[str, ...], x: Tensor, kept: Tensor) -> Tensor:
    """The dense MLP in float64 with only the hidden units that kept [T, F] says."""
    linears = [getattr(mlp, name).double() for name in layout]
    hidden = F.silu(linears[0](x)) * linears[1](x) if len(layout) == 3 else F.gelu(linears[0](x))
    return linears[-1](hidden * kept)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("method", ["random", "cluster"])
def test_chosen_experts_are_the_dense_mlp_with_the_other_units_at_zero(gated, method):
    dense = shaken(language("llama") if gated else vit(depth=2))
    sparse = zoo.split(dense, num_experts=6, k=2, method=method)
    moe = experts_of(sparse)[1]
    mlp = copy.deepcopy(dense.model.layers[1].mlp if gated else dense.blocks[1].mlp)
    rows = (mlp.gate_proj if gated else mlp.fc1).weight.detach()
    owner = owners(moe.experts.w_in[:, : moe.experts.hidden_dim], rows)
    assert owner.bincount().tolist() == [len(rows) // 6] * 6  # every unit in one expert, and as many in each
    x = torch.randn(31, rows.shape[1])
    keys = torch.stack([rows[owner == e].double().mean(0) for e in range(6)])
    chosen = torch.zeros(31, 6, dtype=torch.bool).scatter(1, (x.double() @ keys.T).topk(2).indices, True)
    layout = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
    expected = masked(mlp, layout, x.double(), chosen[:, owner])
    with torch.no_grad():
        assert error(moe(x).double(), expected.detach()) < 5e-6
        for tokens in (0, 1):
            assert (
                error(moe(x[:tokens]).double(), expected[:tokens].detach()) < 5e-6 if tokens else not moe(x[:0]).numel()
            )


def test_set_k_keeps_biases_whole():
    dense, x = shaken(vit(depth=2)), torch.randn(2, 3, 32, 32)
    sparse = zoo.split(dense, num_experts=8, router={"name": "EMoERouter", "k": 3})
    other = zoo.split(zoo.split(dense, layers=[0], num_experts=8, k=3), layers=[1], num_experts=8, k=3)
    for model in (sparse, other):
        set_k(model, 8)
        assert error(output(model, x), output(dense, x)) < 5e-6
    assert [how["router"]["k"] for how in sparse.split_how] == [8]
    with pytest.raises(
        ValueError, match=r"set_k: expected token choice that can choose 9 experts, blocks\.0\.mlp has a"
    ):
        set_k(sparse, 9)


def test_llama_moe_weighs_experts_by_the_softmax_of_the_chosen_and_rescales():
    dense = shaken(language("llama"))
    sparse = zoo.split(dense, layers=[0], num_experts=6, k=2, method="random", router="LLaMAMoERouter").eval()
    moe, mlp = experts_of(sparse)[0], copy.deepcopy(dense.model.layers[0].mlp)
    owner = owners(moe.experts.w_in[:, :8], mlp.gate_proj.weight.detach())
    x = torch.randn(13, 32)
    logits = (moe.router.out.double() @ torch.tanh(moe.router.weight.double() @ x.double().T)).T
    best, index = logits.topk(2)
    weight = torch.zeros(13, 6, dtype=torch.float64).scatter(1, index, best.softmax(-1))
    layout = ("gate_proj", "up_proj", "down_proj")
    expected = masked(mlp, layout, x.double(), 6 / 2 * weight[:, owner])
    assert error(moe(x).detach().double(), expected.detach()) < 5e-6


def test_moebert_has_the_most_important_units_in_every_expert():
    dense, ids = shaken(language("nemotron")), torch.randint(3, 64, (2, 9))
    hashed = {"name": "HashRouter", "vocab_size": 64}
    options = {"method": "importance", "shared": 6, "expert_dim": 10, "k": 1, "calibrate": losses_of(ids)}
    sparse = zoo.split(dense, num_experts=4, router=hashed, **options)
    importance = brute_importance(dense, ids)
    for moe, layer, scores in zip(experts_of(sparse), dense.model.layers, importance):
        order = scores.argsort(descending=True).tolist()
        for e in range(4):
            rows = [int((layer.mlp.up_proj.weight == row).all(1).nonzero()) for row in moe.experts.up_proj[e]]
            assert set(rows[:6]) == set(order[:6])
            assert set(rows[6:]) == set(order[6:][e::4][:4])
        x, tokens = torch.randn(3, 5, 32), torch.randint(64, (3, 5))
        y = moe(x, token_ids=tokens)
        for b, s in ((0, 0), (2, 4)):
            e = int(moe.router.table[tokens[b, s]])
            units = [*order[:6], *order[6:][e::4][:4]]
            hidden = F.relu(layer.mlp.up_proj.weight[units].double() @ x[b, s].double()).square()
            expected = layer.mlp.down_proj.weight[:, units].double() @ hidden
            assert error(y[b, s].detach().double(), expected.detach()) < 5e-6


def brute_importance(dense: nn.Module, ids: Tensor) -> list[Tensor]:
    """|sum of w dL/dw| of each unit, by multiplying all of its weights with 1 + t and differentiating by t."""
    found = []
    for layer in dense.model.layers:
        mlp = layer.mlp
        t = torch.zeros(48, requires_grad=True)
        weights = {"up_proj.weight": mlp.up_proj.weight * (1 + t)[:, None]}
        weights["down_proj.weight"] = mlp.down_proj.weight * (1 + t)
        forward = type(mlp).forward

        def scaled(x, mlp=mlp, weights=weights):
            hidden = mlp.act_fn(F.linear(x, weights["up_proj.weight"]))
            return F.linear(hidden, weights["down_proj.weight"])

        mlp.forward = scaled
        total = torch.zeros(48)
        for loss in losses_of(ids)(dense):
            total += torch.autograd.grad(loss, t, retain_graph=True)[0].abs()
        del mlp.forward
        assert type(mlp).forward is forward
        found.append(total)
    return found


def test_frozen_weights_have_importance_and_stay_frozen():
    dense, ids = shaken(language("nemotron")), torch.randint(3, 64, (1, 7))
    torch.manual_seed(0)
    expected = zoo.split(dense, num_experts=4, method="importance", calibrate=losses_of(ids))
    dense.requires_grad_(False).train()
    dense.model.layers[0].mlp.eval()
    torch.manual_seed(0)
    found = zoo.split(dense, num_experts=4, method="importance", calibrate=losses_of(ids))
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), expected.state_dict().values()))
    assert not any(p.requires_grad for p in dense.parameters())
    assert dense.training
    assert [moe.training for moe in experts_of(found)] == [False, True, True]
    assert not experts_of(found)[0].experts.down_proj.requires_grad


def test_the_seed_decides():
    dense, ids = language("llama"), torch.randint(3, 64, (1, 7))
    for method in ("random", "cluster", "coactivation"):
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            sparse = zoo.split(dense, num_experts=6, method=method, calibrate=losses_of(ids))
            found.append(experts_of(sparse)[0].experts.down_proj)
        assert torch.equal(found[0], found[1])
        assert method != "random" or not torch.equal(found[0], found[2])


def test_emoes_keys_follow_the_experts_as_they_train():
    sparse = zoo.split(language("llama"), num_experts=6, k=3).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=10.0)
    before = [moe.router.weight.clone() for moe in experts_of(sparse)]
    sparse(ids := torch.randint(3, 64, (2, 9)), labels=ids).loss.backward()
    optimizer.step()
    advance(sparse)
    for moe, old in zip(experts_of(sparse), before):
        keys = moe.experts.gate_up_proj.detach()[:, :8].double().mean(1)
        assert error(moe.router.weight.detach().double(), keys) < 1e-6
        assert not torch.allclose(moe.router.weight, old, rtol=1e-3)


def test_a_split_decoder_generates_pickles_compiles_and_trains_under_checkpointing():
    dense = language("llama")
    sparse = zoo.split(dense, num_experts=6, k=6)
    ids = torch.randint(3, 64, (2, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(sparse.generate(ids, **options), dense.generate(ids, **options))
    again = copy.deepcopy(pickle.loads(pickle.dumps(sparse)))
    assert torch.equal(output(again, ids), output(sparse, ids))
    fresh = zoo.split(language("llama"), num_experts=6, k=6, method="random")
    fresh.load_state_dict(sparse.state_dict())
    assert torch.equal(output(fresh, ids), output(sparse, ids))
    compiled = torch.compile(experts_of(sparse)[0], backend="aot_eager")
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        assert error(compiled(x), experts_of(sparse)[0](x)) < 1e-6
    sparse.train().gradient_checkpointing_enable()
    sparse(ids, labels=ids).loss.backward()
    assert all(moe.experts.down_proj.grad.abs().sum() > 0 for moe in experts_of(sparse))


@pytest.mark.parametrize("method", ["random", "cluster", "coactivation", "importance"])
def test_a_model_on_the_meta_device_needs_no_data_and_takes_no_memory(method):
    with torch.device("meta"):
        dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2))
    sparse = zoo.split(dense, method=method, router="MoEficationRouter")
    assert all(parameter.is_meta for parameter in sparse.parameters())
    assert experts_of(sparse)[0].experts.down_proj.shape == (16, 4096, 688)


def test_low_precision_and_frozen_weights_carry_over():
    dense = vit(depth=2).to(torch.bfloat16).train()
    dense.blocks[0].mlp.requires_grad_(False)
    x = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    calibrate = lambda model: (model(x).float().square().mean() for _ in range(2))  # noqa: E731
    sparse = zoo.split(
        dense, num_experts=4, k=4, router="MoEficationRouter", method="coactivation", calibrate=calibrate
    )
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    assert [moe.experts.up_proj.requires_grad for moe in experts_of(sparse)] == [False, True]
    assert sparse.training
    assert error(output(sparse.eval(), x).float(), output(dense.eval(), x).float()) < 0.05
    sparse.train()(x).float().square().mean().backward()


def test_other_layers_may_be_split_or_upcycled_before():
    dense, x = shaken(vit(depth=4)), torch.randn(1, 3, 32, 32)
    sparse = zoo.upcycle(zoo.split(dense, layers=[0], num_experts=4, k=4), layers=[1], num_experts=2)
    sparse = zoo.split(sparse, layers=[3], num_experts=8, k=8, method="random")
    assert [how["num_experts"] for how in sparse.split_how] == [4, 8]
    assert error(output(sparse, x), output(dense, x)) < 5e-6
    with pytest.raises(ValueError, match=r"split: blocks\.0\.mlp is a mixture of experts already"):
        zoo.split(sparse)


IDS = torch.arange(3, 12)[None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 5}, "layers.0.mlp has 48 hidden units, which num_experts=5 do not cut"),
        ({"num_experts": 0}, "num_experts=0 and tokens=4096 must be at least 1"),
        ({"method": "metis"}, "method must be one of random, cluster, coactivation, importance, got 'metis'"),
        ({"shared": 4}, "shared and expert_dim are for method=\"importance\", got 'cluster'"),
        ({"method": "importance", "shared": 48, "calibrate": losses_of(IDS)}, "shared=48 must be fewer"),
        ({"method": "importance", "shared": 3}, "45 hidden units besides the shared=3, which num_experts=4 do not"),
        (
            {"method": "importance", "shared": 8, "expert_dim": 19},
            "expert_dim=19 must be above shared=8 and at most 18",
        ),
        ({"method": "importance"}, 'method="importance" needs calibrate, a function that runs the model'),
        ({"router": "MoEficationRouter"}, "MoEficationRouter needs calibrate"),
        (
            {"method": "coactivation", "calibrate": lambda m: iter(())},
            r"ran no token through model.layers.0.mlp.down_pr",
        ),
        ({"method": "importance", "calibrate": lambda m: iter(())}, "calibrate yielded no loss"),
        ({"method": "importance", "calibrate": lambda m: iter([torch.ones(())])}, "losses with a gradient"),
        ({"k": 5}, "k must be between 1 and num_experts=4, got 5"),
        ({"router": "EMoeRouter"}, "EMoERouter"),
        ({"within": "model.vision"}, "no blocks with an MLP of known linear layers under 'model.vision'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        zoo.split(language("llama"), **{"num_experts": 4, **options})


def test_what_cannot_be_cut_is_named():
    with pytest.raises(ValueError, match=r"^blocks.0.mlp has the activation Mish"):
        zoo.split(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, act_layer="mish"))
    with pytest.raises(ValueError, match=r"^split: ResNet has no blocks with an MLP"):
        zoo.split(timm.create_model("resnet10t"))


def test_dropout_is_treated_as_in_upcycling():
    with pytest.warns(
        UserWarning, match=r"^split: dropout of only some units inside the MLPs \(0.1\) is left out"
    ) as told:
        zoo.split(language("gpt2 (transposed)"), num_experts=4)
    assert told[0].filename == __file__
    assert experts_of(zoo.split(vit(proj_drop_rate=0.25, depth=1), num_experts=4))[0].experts.dropout == 0.25


def test_any_gate_may_be_named():
    ids = torch.randint(3, 64, (2, 9))
    routers = ("TopKRouter", "MoEBERTRouter", "DenseRouter", {"name": "SMoEDropoutRouter", "steps": 10})
    for router in routers:
        sparse = zoo.split(language("llama"), num_experts=4, k=2, router=router).train()
        sparse(ids, labels=ids).loss.backward()
        assert isinstance(experts_of(sparse)[0], MoE)
        assert output(sparse.eval(), ids).isfinite().all()
