"""Experts, layers and blocks left out: against the original with these masked, and against loops in float64."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.moe import Experts, MoE
from zoo.moe.routers import TopKRouter

GATES = [
    {"normalize": True},
    {"normalize": False, "bias": True},
    {"score": "softmax_topk"},
    {"score": "sigmoid", "normalize": True, "selection_bias": True, "scale": 2.5},
]


class One(nn.Module):
    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([moe])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def layer(num_experts: int = 6, k: int = 2, **gate) -> One:
    router = TopKRouter(8, num_experts, k=k, **gate)
    for name in ("bias", "selection_bias"):
        if getattr(router, name) is not None:
            nn.init.normal_(getattr(router, name))
    return One(MoE(router, Experts(num_experts, 8, 12, "relu"))).double().eval()


def masked(moe: MoE, kept: list[int], x: torch.Tensor) -> torch.Tensor:
    """What the layer gives of x [T, D] where only some of its experts exist, from the definition, token by token."""
    router, experts = moe.router, moe.experts
    k, y = min(router.k, len(kept)), torch.zeros_like(x)
    for t, token in enumerate(x):
        logits = {e: float(router.weight[e] @ token) for e in kept}
        if router.bias is not None:
            logits = {e: value + float(router.bias[e]) for e, value in logits.items()}
        total = sum(torch.tensor(v, dtype=torch.float64).exp() for v in logits.values())
        scores = {
            e: float(
                torch.tensor(v).double().sigmoid()
                if router.score == "sigmoid"
                else torch.tensor(v).double().exp() / total
            )
            for e, v in logits.items()
        }
        bias = {e: 0.0 if router.selection_bias is None else float(router.selection_bias[e]) for e in kept}
        best = sorted(kept, key=lambda e: -(scores[e] + bias[e]))[:k]
        summed = sum(scores[e] for e in best) if router.normalize or router.score == "softmax_topk" else 1.0
        for e in best:
            out = experts.w_out[e] @ F.relu(experts.w_in[e] @ token)
            y[t] += router.scale * scores[e] / summed * out
    return y


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x) if x.is_floating_point() else model(x).logits


def mask_gates(model: nn.Module, kept: dict[str, list[int]]) -> nn.Module:
    """A copy of a model whose gates see minus infinity for all other experts."""
    model = copy.deepcopy(model)
    for name, own in kept.items():
        router = model.get_submodule(name).router
        others = [e for e in range(router.num_experts) if e not in own]
        plain = router._logits
        router._logits = lambda x, *, plain=plain, others=others, **c: plain(x, **c).index_fill(
            -1, torch.tensor(others, dtype=torch.int64), -torch.inf
        )
        if router.selection_bias is not None:
            router.selection_bias[others] = -torch.inf
    return model


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("kept", [[1, 2, 5], [0, 3], [4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.filterwarnings("ignore:prune. blocks.0 keeps 1 of 6 experts")
def test_a_pruned_layer_is_the_layer_with_its_other_experts_masked(gate, kept):
    model, x = layer(**gate), torch.randn(9, 8, dtype=torch.float64)
    pruned = zoo.prune(model, experts=[kept])
    with torch.no_grad():
        assert error(pruned(x), masked(model.blocks[0], kept, x)) < 1e-6
        assert pruned(x[:0]).shape == (0, 8)
    assert model.blocks[0].experts.num_experts == 6
    assert len(pruned.blocks[0].experts.down_proj) == len(kept)
    pruned.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in pruned.parameters())


def test_the_experts_of_highest_score_stay():
    model = layer(k=2, normalize=True).float()
    model.blocks[0].router.weight.data[:2] -= 100 * torch.eye(8)[:2]  # met by few
    batches = [torch.randn(n, 8) for n in (3, 1, 20)]
    probs = (torch.cat(batches) @ model.blocks[0].router.weight.detach().T).softmax(-1)
    best = probs.topk(2)
    weights = best.values / best.values.sum(-1, keepdim=True)
    expected = {
        "probs": probs.sum(0),
        "weight": torch.zeros(6).index_add(0, best.indices.flatten(), weights.flatten()),
        "counts": torch.zeros(6).index_add(0, best.indices.flatten(), torch.ones(48)),
    }
    for by, scores in expected.items():
        pruned = zoo.prune(model, keep=3, by=by, calibrate=lambda m: (m(x).sum() for x in batches))
        chosen = sorted(sorted(range(6), key=lambda e: -float(scores[e]))[:3])  # of equal ones the first
        assert torch.equal(pruned.blocks[0].experts.w_in, model.blocks[0].experts.w_in[chosen])
        again = zoo.prune(model, keep=[3], scores=[scores.tolist()])
        assert torch.equal(again.blocks[0].router.weight, pruned.blocks[0].router.weight)
    # Without any use the first ones stay.
    unused = zoo.prune(model, keep=2, scores={"blocks.0": [0.0] * 6})
    assert torch.equal(unused.blocks[0].experts.w_in, model.blocks[0].experts.w_in[:2])


@pytest.mark.filterwarnings("ignore:prune. model.layers...mlp keeps 1 of 4 experts")
def test_scores_over_the_whole_model_keep_more_where_more_is_used(tmp_path):
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=3, num_local_experts=4).eval()
    scores = [[9.0, 8.0, 7.0, 6.0], [0.1, 0.3, 0.2, 0.0], [5.0, 0.0, 5.0, 0.0]]
    pruned = zoo.prune(model, keep=2, scope="model", scores=scores)
    names = [f"model.layers.{i}.mlp" for i in range(3)]
    kept = dict(zip(names, [[0, 1, 2, 3], [1], [0]]))
    assert [pruned.get_submodule(n).router.num_experts for n in names] == [4, 1, 1]
    ids = torch.randint(3, 64, (2, 9))
    expected = mask_gates(model, kept)
    for name in names[1:]:
        expected.get_submodule(name).router.k = 1
    assert error(output(pruned, ids), output(expected, ids)) < 1e-5
    with pytest.raises(ValueError, match="mixtral that to_dense or prune made"):
        zoo.save_pretrained(pruned, tmp_path / "uneven")
    assert not (tmp_path / "uneven").exists()


FAMILIES = {
    "mixtral": {"num_local_experts": 6},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "deepseek_v3": {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "num_experts_per_tok": 2},
    "granitemoe": {},
    "gpt_oss": {},
    "ernie4_5_moe": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_family_equals_its_masked_gates_and_is_published(family, tmp_path):
    model = zoo.create_model(f"language/{family}_tiny", num_hidden_layers=2, **FAMILIES[family]).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    for name in names:
        bias = model.get_submodule(name).router.selection_bias
        if bias is not None:
            bias.normal_(std=0.1)
    number = model.get_submodule(names[0]).router.num_experts
    kept = {name: [0, 2, 4, 5] if number < 10 else [1, 2, 4, 7, 8, 9, 11, 12] for name in names}
    pruned, ids = zoo.prune(model, experts=kept), torch.randint(3, 64, (2, 9))
    assert error(output(pruned, ids), output(mask_gates(model, kept), ids)) < 2e-5
    zoo.save_pretrained(pruned, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert error(output(theirs, ids), output(pruned, ids)) < 5e-5
    again = zoo.from_pretrained(tmp_path / "saved")
    assert error(output(again, ids), output(pruned, ids)) < 1e-5
    assert pruned.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


def test_a_switch_transformer_and_a_model_from_images_to_text_are_pruned_too(tmp_path):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2}
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "num_heads": 4}
    config = transformers.SwitchTransformersConfig(**sizes, **sparse)
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path / "switch")
    switch, ids = zoo.from_pretrained(tmp_path / "switch"), torch.randint(3, 64, (2, 9))
    pruned = zoo.prune(switch, experts=[[0, 2], [1, 3]])
    zoo.save_pretrained(pruned, tmp_path / "pruned")
    theirs = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "pruned").eval()
    with torch.no_grad():
        found, expected = (m(ids, decoder_input_ids=ids).logits for m in (theirs, pruned))
    assert error(found, expected) < 2e-5
    with pytest.raises(ValueError, match="switch_transformers has no way to say"):
        zoo.save_pretrained(zoo.prune(switch, experts=[[0, 2], [1, 2, 3]]), tmp_path / "uneven")

    model = zoo.create_model("vision_language/qwen3_vl_moe_tiny").eval()
    layers = sum(isinstance(module, MoE) for module in model.modules())
    pruned = zoo.prune(model, keep=2, scores=[[0, 2, 1, 3, 0, 0, 0, 0]] * layers)
    zoo.save_pretrained(pruned, tmp_path / "images")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "images").eval()
    assert theirs.config.text_config.num_experts == 2
    assert error(output(theirs, ids), output(pruned, ids)) < 2e-5


def test_fewer_experts_than_a_token_meets_lower_k_with_a_warning(tmp_path):
    model, ids = zoo.create_model("language/mixtral_tiny", num_hidden_layers=2).eval(), torch.randint(3, 64, (2, 9))
    with pytest.warns(UserWarning, match="so that k goes from 2 to 1") as told:
        pruned = zoo.prune(model, experts=[[3], [6]])
    assert [str(w.message) for w in told] == [
        f"prune: model.layers.{i}.mlp keeps 1 of 8 experts, so that k goes from 2 to 1" for i in range(2)
    ]
    zoo.save_pretrained(pruned, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert theirs.config.num_experts_per_tok == theirs.config.num_local_experts == 1
    assert error(output(theirs, ids), output(pruned, ids)) < 2e-5
    dense = zoo.to_dense(pruned)
    assert type(dense).__name__ == "MistralForCausalLM"
    assert error(output(dense, ids), output(pruned, ids)) < 1e-5


def test_groups_of_experts_keep_as_many_each():
    options = {"n_group": 2, "topk_group": 1, "n_routed_experts": 8, "num_experts_per_tok": 2}
    model = zoo.create_model("language/deepseek_v3_tiny", num_hidden_layers=2, **options).eval()
    pruned = zoo.prune(model, keep=4, scores=[[1, 2, 3, 4, 50, 60, 70, 80]])
    (moe,) = [m for m in pruned.modules() if isinstance(m, MoE)]
    (old,) = [m for m in model.modules() if isinstance(m, MoE)]
    assert torch.equal(moe.router.weight, old.router.weight[[2, 3, 6, 7]])
    with pytest.raises(ValueError, match="2 groups, which keep=3 experts do not fill"):
        zoo.prune(model, keep=3, scores=[[1] * 8])
    with pytest.raises(ValueError, match=r"equally many must be kept; got \[3, 1\]"):
        zoo.prune(model, experts=[[0, 1, 2, 4]])


@pytest.mark.filterwarnings("ignore:prune. .* keeps . of 8 experts")
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "deepseek_v2"])
@pytest.mark.parametrize(("groups", "best", "k"), [(2, 1, 2), (4, 2, 2), (4, 4, 3), (8, 3, 3)])
def test_one_expert_in_each_group_is_a_choice_without_groups(family, groups, best, k, tmp_path):
    options = {"n_group": groups, "topk_group": best, "n_routed_experts": 8, "num_experts_per_tok": k}
    model = zoo.create_model(f"language/{family}_tiny", num_hidden_layers=2, **options).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    for name in names:
        if (bias := model.get_submodule(name).router.selection_bias) is not None:
            bias.normal_(std=0.1)
    kept = {name: [g * (8 // groups) for g in range(groups)] for name in names}
    expected = mask_gates(model, kept)  # whose groups have one expert that can be chosen
    for name in names:
        moe = expected.get_submodule(name)
        moe.router.k, moe.router.group_score = min(k, best), "max"
    scores = [[float(e in kept[name]) for e in range(8)] for name in names]
    pruned, ids = zoo.prune(model, keep=groups, scores=scores), torch.randint(3, 64, (2, 9))
    assert error(output(pruned, ids), output(expected, ids)) < 2e-5
    zoo.save_pretrained(pruned, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert error(output(theirs, ids), output(pruned, ids)) < 5e-5
    assert error(output(zoo.from_pretrained(tmp_path / "saved"), ids), output(pruned, ids)) < 1e-5


@pytest.mark.filterwarnings("ignore:prune. .* keeps . of .* experts")
@pytest.mark.parametrize("name", ["language/deepseek_v3", "language/glm4_moe", "vision_language/glm4v_moe"])
def test_one_expert_has_no_place_where_transformers_takes_the_two_best(name, tmp_path):
    options = {"n_group": 1, "topk_group": 1} if name.startswith("language") else {}
    model = zoo.create_model(f"{name}_tiny", **options).eval()
    scores = [list(range(m.router.num_experts)) for m in model.modules() if isinstance(m, MoE)]
    pruned, ids = zoo.prune(model, keep=1, scores=scores), torch.randint(3, 64, (2, 9))
    with pytest.raises(ValueError, match=r"two best experts of each group, and here a group has 1"):
        zoo.save_pretrained(pruned, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert torch.isfinite(output(pruned, ids)).all()
    two = zoo.prune(model, keep=2, scores=scores)
    zoo.save_pretrained(two, tmp_path / "two")
    assert error(output(zoo.from_pretrained(tmp_path / "two"), ids), output(two, ids)) < 1e-5


@pytest.mark.parametrize(
    "name", ["vmoe_tiny_test", "swin_moe_tiny_test", "convnext_moe_tiny_test", "vit_tiny_patch16_224"]
)
@pytest.mark.filterwarnings("ignore:prune. .* keeps 1 of . experts")
def test_any_vision_model_with_experts_is_pruned_to_one_and_to_none(name, tmp_path):
    sizes = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32, "moe_layers": "every-2", "num_experts": 4}
    model = zoo.create_model(f"vision/{name}", num_classes=5, **(sizes if "vit" in name else {})).eval()
    side = 64 if "convnext" in name else 32
    x = torch.randn(2, 3, side, side)
    one = zoo.prune(model, keep=1, by="weight", calibrate=lambda m: [m(x).sum()])
    weighed = zoo.to_dense(model, weights="usage", calibrate=lambda m: [m(x).sum()])
    for number, made in enumerate((one, zoo.to_dense(one), weighed)):
        zoo.save_pretrained(made, tmp_path / f"{number}")
        assert torch.equal(output(zoo.from_pretrained(tmp_path / f"{number}"), x), output(made, x))


@pytest.mark.parametrize("kind", ["upcycled", "vmoe"])
def test_a_pruned_vision_model_is_stored(kind, tmp_path):
    if kind == "vmoe":
        model = zoo.create_model("vision/vmoe_tiny_test", moe_layers="every-2", capacity=4.0).eval()
    else:
        dense = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=4, num_heads=3, num_classes=7
        )
        model = zoo.upcycle(dense.eval(), layers="every-2", num_experts=4, noise=0.5, router_std=1.0)
    x, names = torch.randn(2, 3, 32, 32), ["blocks.1.mlp", "blocks.3.mlp"]
    for kept in ([[0, 2, 3], [0, 1, 3]], [[0, 2, 3], [1, 3]]):
        pruned = zoo.prune(model, experts=kept)
        assert error(output(pruned, x), output(mask_gates(model, dict(zip(names, kept))), x)) < 1e-5
        if kind == "vmoe" and len(kept[0]) != len(kept[1]):
            with pytest.raises(ValueError, match="has other tensors"):
                zoo.save_pretrained(pruned, tmp_path / "uneven")
            continue
        folder = tmp_path / f"{len(kept[1])}"
        zoo.save_pretrained(pruned, folder)
        assert error(output(zoo.from_pretrained(folder), x), output(pruned, x)) < 1e-6


def test_pruning_works_without_memory_and_keeps_dtype_mode_and_frozen_weights():
    with torch.device("meta"):
        model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=3, dtype=torch.bfloat16)
        pruned = zoo.prune(model, keep=4, drop_blocks=1, calibrate=lambda m: 1 / 0)
    assert [m.experts.down_proj.shape[0] for m in pruned.modules() if isinstance(m, MoE)] == [4, 4]
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in pruned.parameters())
    model = layer().train()
    model.blocks[0].experts.down_proj.requires_grad_(False)
    pruned = copy.deepcopy(zoo.prune(model, experts=[[0, 1]]))
    assert pruned.blocks[0].training
    assert not pruned.blocks[0].experts.down_proj.requires_grad
    assert pruned.blocks[0].router.weight.requires_grad


def test_what_cannot_be_pruned_is_refused_by_name():
    model = layer()
    for arguments, message in (
        ({}, "nothing to do"),
        ({"keep": 2, "experts": [[0]]}, "keep and experts exclude each other"),
        ({"keep": 7, "scores": [[1] * 6]}, r"blocks\.0 has 6 experts, keep=7"),
        ({"keep": 0, "scores": [[1] * 6]}, r"blocks\.0 has 6 experts, keep=0"),
        ({"keep": 2}, "give calibrate"),
        ({"keep": 2, "by": "use", "scores": [[1] * 6]}, "by is 'probs', 'weight' or 'counts', got 'use'"),
        ({"keep": 2, "scores": [[1] * 5]}, r"scores of blocks\.0: expected \[6\], one an expert, got \[5\]"),
        ({"experts": [[0, 6]]}, r"blocks\.0: expected some of the experts 0 to 5"),
        ({"experts": {"blocks.1": [0]}}, r"blocks\.1 is none of the chosen layers blocks\.0"),
        ({"experts": [[]]}, "expected some of the experts 0 to 5"),
        ({"keep": [1, 2], "scores": [[1] * 6]}, "keep has 2 numbers, for 1 layers"),
        ({"drop_blocks": 1}, "One is not one list of equal blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            zoo.prune(model, **arguments)
    for router, message in (
        ("XMoERouter", r"experts of a XMoERouter cannot be dropped, its projection"),
        ({"name": "HashRouter", "vocab_size": 1024}, "experts of a HashRouter cannot be dropped"),
        ("PrototypeRouter", "experts of a PrototypeRouter cannot be dropped"),
    ):
        other = zoo.create_model("language/mixtral_tiny", num_hidden_layers=1, router=router)
        with pytest.raises(ValueError, match=message):
            zoo.prune(other, experts=[[0, 1]])


@pytest.mark.filterwarnings("ignore:prune. .* keeps 1 of . experts")
def test_transformers_own_balance_loss_knows_how_many_experts_are_left():
    model = zoo.create_model("language/mixtral_tiny", vocab_size=64, num_hidden_layers=2).eval()
    number, ids = model.config.num_local_experts, torch.randint(64, (2, 9))
    for keep in (number - 1, 1):
        pruned = zoo.prune(model, experts=[range(keep)] * 2)
        with torch.no_grad():
            out = pruned(ids, output_router_logits=True)
        probs = torch.cat([logits.double() for logits in out.router_logits]).softmax(-1)
        k = min(pruned.config.num_experts_per_tok, keep)
        chosen = torch.zeros_like(probs).scatter(1, probs.topk(k).indices, 1.0)
        expected = keep * (chosen.mean(0) * probs.mean(0)).sum()
        assert float(out.aux_loss) == pytest.approx(float(expected), rel=1e-5)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"scores of blocks\.0 must be numbers"):
        zoo.prune(layer(), keep=2, scores=[[1, 2, float("nan"), 4, 5, 6]])


@pytest.mark.parametrize("made", [lambda model: zoo.quantise(model, "int8"), lambda model: zoo.offload(model, 2)])
def test_experts_that_are_no_stacks_are_refused_before_data_are_looked_at(made):
    def never(model):
        raise AssertionError("looked at data")

    model = made(zoo.create_model("language/mixtral_tiny"))
    with pytest.raises(
        ValueError, match=r"prune: model\.layers\.0\.mlp has \w+Experts; expected Experts, stacked MLPs"
    ):
        zoo.prune(model, keep=2, calibrate=never)
    with pytest.raises(ValueError, match="expected Experts, stacked MLPs"):
        zoo.prune(model, experts={"model.layers.0.mlp": [0, 1]})
