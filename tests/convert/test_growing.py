"""Growing by experts: what is there already keeps what it computes, and stays frozen whatever the optimizer does."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import transformers
from torch import nn

import zoo
from zoo.convert import output_regularization
from zoo.models import count_parameters
from zoo.moe import Experts, GrownExperts, MoE, Routing
from zoo.moe.grown import joined_state
from zoo.moe.routers import TopKRouter

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 256, "initializer_range": 0.2}


def family(name: str, **options) -> nn.Module:
    model = zoo.create_model(f"language/{name}_tiny", **{**SIZES, **options}).eval()
    for module in model.modules():
        if getattr(module, "selection_bias", None) is not None:
            module.selection_bias.normal_(std=0.3)
    return model


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(x)
    return getattr(found, "logits", found)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def moes(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def ids(high: int = 200) -> torch.Tensor:
    return torch.randint(3, high, (2, 9))


def stir(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe"]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_grown_family_is_saved_and_read_by_transformers(name, frozen, tmp_path):
    model = family(name)
    before, x = copy.deepcopy(model.state_dict()), ids()
    old = moes(model)[0].experts.num_experts
    grown = stir(zoo.grow(model, num_new=old // 2, init="random", freeze_old=frozen))
    assert {moe.experts.num_experts for moe in moes(grown)} == {old + old // 2}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {moe.experts.num_experts for moe in moes(model)} == {old}
    zoo.save_pretrained(grown, tmp_path / "grown")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown").eval()
    assert error(output(theirs, x), output(grown, x)) < 1e-4
    assert error(output(zoo.from_pretrained(tmp_path / "grown"), x), output(grown, x)) < 1e-5


def test_upcycled_and_timm_models_grow_and_are_saved(tmp_path):
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    llama = zoo.upcycle(transformers.LlamaForCausalLM(config).eval(), layers="all", num_experts=3, noise=0.5)
    x, images = ids(64), torch.randn(2, 3, 32, 32)
    grown = stir(zoo.grow(llama, num_new=2))
    zoo.save_pretrained(grown, tmp_path / "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    assert error(output(theirs, x), output(grown, x)) < 2e-5
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=4, num_heads=3, num_classes=7)
    pyramid = zoo.upcycle(vit.eval(), num_experts=[2, 4])
    vmoe = zoo.create_model("vision/vmoe_tiny_test", num_classes=3).eval()
    swin = zoo.create_model("vision/swin_moe_tiny_test", num_classes=3).eval()
    for number, model in enumerate((pyramid, vmoe, swin)):
        numbers = [moe.experts.num_experts + 3 for moe in moes(model)]
        grown = stir(zoo.grow(model, num_new=3, noise=0.1))
        assert [moe.experts.num_experts for moe in moes(grown)] == numbers
        zoo.save_pretrained(grown, tmp_path / str(number))
        again = zoo.from_pretrained(tmp_path / str(number))
        assert error(output(again, images), output(grown, images)) < 1e-5


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "ernie4_5_vl", "llava_mixtral", "limoe"])
def test_language_models_inside_others_grow_and_are_saved(name, tmp_path):
    grown = stir(zoo.grow(zoo.create_model(f"vision_language/{name}_tiny"), num_new=2))
    zoo.save_pretrained(grown, tmp_path / "grown")
    again = zoo.from_pretrained(tmp_path / "grown")
    found, expected = again.state_dict(), joined_state(grown)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adam"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_old_experts_and_rows_stay_bit_for_bit_under_weight_decay_and_momentum(name, optimizer):
    model = family(name)
    grown = zoo.grow(model, num_new=4, noise=0.1).train()
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    steps = getattr(torch.optim, optimizer)(grown.parameters(), lr=0.05, weight_decay=0.3, **options)
    start = copy.deepcopy(grown.state_dict())
    for _ in range(3):
        steps.zero_grad()
        x = ids()
        grown(input_ids=x, labels=x).loss.backward()
        steps.step()
    for before, after in zip(moes(model), moes(grown)):
        is_new = torch.tensor(after.experts.is_new)
        assert int(is_new.sum()) == 4
        for key, old in before.state_dict().items():
            now = joined_state(after)[key]
            if key in ("router.weight", "router.bias") or key.startswith("experts."):
                assert torch.equal(now[~is_new], old), key
    changed = [k for k, v in grown.state_dict().items() if not torch.equal(v, start[k])]
    assert any("experts.new.down_proj" in key for key in changed)
    assert any("router.new_weight" in key for key in changed)
    assert not any("old" in key or "frozen" in key for key in changed)
    assert any("self_attn" in key for key in changed)
    held = {id(p) for p in steps.state}
    assert not held & {id(p) for moe in moes(grown) for p in moe.experts.old.parameters()}


@pytest.mark.parametrize("frozen", [True, False])
def test_copies_leave_the_output_where_one_expert_is_chosen_with_weight_one(frozen):
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=4, num_heads=3, num_classes=7)
    sparse = zoo.upcycle(dense.eval(), num_experts=4, k=1, noise=0.5, router_std=0.5)
    x = torch.randn(2, 3, 32, 32)
    grown = zoo.grow(sparse, num_new=6, freeze_old=frozen)
    assert error(output(grown, x), output(sparse, x)) < 1e-6
    model, tokens = family("deepseek_v3", num_experts_per_tok=1, n_group=1, topk_group=1, norm_topk_prob=True), ids()
    assert error(output(zoo.grow(model, num_new=3, freeze_old=frozen), tokens), output(model, tokens)) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_tokens_whose_choice_stays_keep_their_output(groups, tokens):
    router = TopKRouter(8, 4, k=2, score="sigmoid", num_groups=groups, group_topk=groups, selection_bias=True)
    layer = nn.ModuleDict({"moe": MoE(router, Experts(4, 8, 16, "gelu", True))})
    router.selection_bias.normal_(std=0.1)
    grown = zoo.grow(layer, num_new=2, init="random")["moe"]
    x = torch.randn(tokens, 8)
    is_new = torch.tensor(grown.experts.is_new)
    assert is_new.tolist() == ([False] * 4 + [True] * 2 if groups == 1 else [False, False, True] * 2)
    with torch.no_grad():
        chosen = grown.router(x).dense() != 0
        same = ~chosen[:, is_new].any(-1)
        found, expected = grown(x), layer["moe"](x)
    assert tokens < 2 or 0 < same.sum() < tokens
    assert torch.allclose(found[same], expected[same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_new", [(False, False, True), (True, False, True, False, False), (False, True)])
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_grown_experts_compute_what_one_stack_does(is_new, tokens):
    number = len(is_new)
    old, new = (Experts(sum(n == kind for n in is_new), 6, 10, "gelu", True).double() for kind in (False, True))
    grown = GrownExperts(old, new, is_new)
    plain, x = grown.whole(), torch.randn(tokens, 6, dtype=torch.float64)
    for met in ("all", "one", "none of the new"):
        chosen = torch.rand(tokens, number) < 0.5
        if met == "one":
            chosen = torch.zeros(tokens, number, dtype=torch.bool)
            chosen[:, -1] = True
        if met == "none of the new":
            chosen[:, torch.tensor(is_new)] = False
        routing = Routing.from_matrix(torch.rand(tokens, number, dtype=torch.float64), chosen)
        assert torch.allclose(grown(x, routing), plain(x, routing), rtol=1e-9, atol=1e-12)
    assert plain.state_dict().keys() == joined_state(grown).keys()
    assert all(torch.equal(t, joined_state(grown)[n]) for n, t in plain.state_dict().items())
    other = GrownExperts(copy.deepcopy(old).requires_grad_(), copy.deepcopy(new), is_new)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(plain.state_dict())
    assert all(torch.equal(t, grown.state_dict()[n]) for n, t in other.state_dict().items())
    other.load_state_dict(grown.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for new"):
        other.load_state_dict({n: torch.cat([t, t[:1]]) for n, t in plain.state_dict().items()})


def test_a_grown_model_grows_again_and_freezes_what_it_had():
    model = family("mixtral")
    first = stir(zoo.grow(model, num_new=2, noise=0.1))
    second = zoo.grow(first, num_new=3, noise=0.1)
    for before, after in zip(moes(first), moes(second)):
        old = before.experts.num_experts
        assert (old, after.experts.num_experts, after.experts.new.num_experts) == (10, 13, 3)
        assert after.router.weight.shape == (13, 64)
        assert torch.equal(after.router.weight[:old], before.router.weight)
        for key, value in joined_state(before.experts).items():
            assert torch.equal(joined_state(after.experts)[key][:old], value)
    thawed = zoo.grow(first, num_new=1, freeze_old=False)
    assert all(type(moe.experts) is Experts and moe.experts.down_proj.requires_grad for moe in moes(thawed))
    assert all(isinstance(moe.router.weight, nn.Parameter) and moe.router.weight.requires_grad for moe in moes(thawed))


def test_it_trains_compiled_copied_in_bfloat16_and_under_checkpointing():
    grown = zoo.grow(family("mixtral", dtype="bfloat16"), num_new=2).train()
    assert {p.dtype for p in grown.parameters()} == {torch.bfloat16}
    x = ids()
    again = copy.deepcopy(grown)
    again.load_state_dict(grown.state_dict())
    assert torch.equal(again(x).logits, grown(x).logits)
    assert torch.equal(pickle.loads(pickle.dumps(grown))(x).logits, grown(x).logits)
    again.load_state_dict(family("mixtral", dtype="bfloat16", num_local_experts=10).state_dict())
    assert not torch.equal(again(x).logits, grown(x).logits)
    again.load_state_dict(joined_state(grown))
    assert torch.equal(again(x).logits, grown(x).logits)
    again.gradient_checkpointing_enable()
    again(input_ids=x, labels=x).loss.backward()
    expected = {n: p.grad for n, p in again.named_parameters()}
    grown(input_ids=x, labels=x).loss.backward()
    for name, parameter in grown.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None) == (not parameter.requires_grad)
    layer = moes(zoo.grow(family("mixtral"), num_new=2))[0]
    tokens = torch.randn(5, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    assert torch.allclose(compiled(tokens), layer(tokens), rtol=1e-5, atol=1e-6)


def test_sizes_device_and_seed():
    with torch.device("meta"):
        model = zoo.create_model("language/deepseek_v3_tiny", **SIZES)
    grown = zoo.grow(model, num_new=8, init="random")
    assert all(p.is_meta for p in grown.parameters())
    assert count_parameters(grown)[0] == count_parameters(zoo.grow(model, num_new=8, freeze_old=False))[0]
    assert grown.config.n_routed_experts == model.config.n_routed_experts + 8
    model = family("mixtral")
    first, second = (torch.manual_seed(5) and zoo.grow(model, num_new=2, init="random") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    new = moes(first)[0].experts.new.down_proj
    assert float(new.detach().std()) == pytest.approx(float(moes(model)[0].experts.down_proj.detach().std()), rel=0.05)
    assert first.num_experts == 10


def test_what_cannot_grow_is_refused_by_name():
    with pytest.raises(ValueError, match="num_new must be at least 1, got 0"):
        zoo.grow(family("mixtral"), num_new=0)
    with pytest.raises(ValueError, match="init must be 'copy' or 'random', got 'zero'"):
        zoo.grow(family("mixtral"), num_new=1, init="zero")
    with pytest.raises(ValueError, match="Linear has no MoE layers"):
        zoo.grow(nn.Linear(2, 2), num_new=1)
    groups = moes(family("deepseek_v3"))[0].router.num_groups
    with pytest.raises(ValueError, match=f"num_new={groups + 1} does not divide into the {groups} groups"):
        zoo.grow(family("deepseek_v3"), num_new=groups + 1)
    with pytest.raises(ValueError, match=r"mlp has ZeroComputationExperts; expected Experts"):
        zoo.grow(family("mixtral", experts="ZeroComputationExperts"), num_new=1)
    for router in ("XMoERouter", "SoftRouter", "PrototypeRouter"):
        spec = {"name": router, **({"slots": 1} if router == "SoftRouter" else {})}
        with pytest.raises(ValueError, match=f"mlp.router, {router}, has more than a row an expert"):
            zoo.grow(family("mixtral", router=spec), num_new=2)


def test_output_regularization_is_the_divergence_from_the_old_model():
    old, new = torch.randn(3, 4, 7, dtype=torch.float64), torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    p, q = old.softmax(-1), new.detach().softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    assert torch.allclose(output_regularization(new, old), each.mean(), rtol=1e-10)
    mask = torch.rand(3, 4) < 0.5
    mask[0, 0] = True
    assert torch.allclose(output_regularization(new, old, mask), each[mask].mean(), rtol=1e-10)
    assert float(output_regularization(new, old, torch.zeros(3, 4, dtype=torch.bool)).detach()) == 0.0
    assert float(output_regularization(old, old)) == pytest.approx(0.0, abs=1e-12)
    output_regularization(new, old.requires_grad_()).backward()
    assert torch.allclose(new.grad, (q - p) / 12, rtol=1e-8, atol=1e-12)
    assert old.grad is None


def test_copies_in_pieces_grow_by_whole_copies_or_are_not_written(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=7)
    model, images = zoo.upcycle(vit.eval(), layers="all", num_experts=4, granularity=2), torch.randn(2, 3, 32, 32)
    grown = stir(zoo.grow(model, num_new=2))
    zoo.save_pretrained(grown, tmp_path / "saved")
    assert error(output(zoo.from_pretrained(tmp_path / "saved"), images), output(grown, images)) < 1e-6
    with pytest.raises(ValueError, match="has other tensors"):
        zoo.save_pretrained(zoo.grow(model, num_new=1), tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    "how", [lambda model: zoo.prune(model, experts=[[0, 4]]), zoo.to_dense], ids=["prune", "dense"]
)
def test_what_needs_one_stack_says_how_to_get_one_and_then_works(how, tmp_path):
    grown = zoo.grow(zoo.create_model("vision/vmoe_tiny_test"), num_new=1)
    with pytest.raises(ValueError, match=r"blocks\.3\.mlp has GrownExperts; .* zoo\.from_pretrained reads it as one"):
        how(grown)
    zoo.save_pretrained(grown, tmp_path / "grown")
    assert not any(isinstance(m, GrownExperts) for m in how(zoo.from_pretrained(tmp_path / "grown")).modules())
