"""Layer drop and block drop: similarities from their definition, and what is left."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.convert.trimming import blocks_of, layer_similarity
from zoo.moe import MoE


def language(name: str = "mixtral", **fields) -> nn.Module:
    torch.manual_seed(len(name))
    return zoo.create_model(
        f"language/{name}_tiny", **{"num_hidden_layers": 4, "initializer_range": 0.1, **fields}
    ).eval()


def vit() -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
    dense = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return zoo.upcycle(dense, layers=[1, 2, 3], num_experts=3, noise=0.3)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x) if x.is_floating_point() else model(x).logits


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def streams(model: nn.Module, batches: list[torch.Tensor]):
    """Hidden states before and after every block, and around every MoE, by running the blocks one by one."""
    blocks, sparse = [], []
    with torch.no_grad():
        for x in batches:
            if not x.is_floating_point():
                states, middles = of_decoder(model, x)
                blocks += states
                sparse += [(middle, after, True) for middle, (_, after) in zip(middles, states)]
                continue
            h = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
            for block in model.blocks:
                middle = h + block.attn(block.norm1(h))
                after = middle + block.mlp(block.norm2(middle))
                sparse.append((middle, after, isinstance(block.mlp, MoE)))
                blocks.append((h, after))
                h = after
    return blocks, sparse


def of_decoder(model: nn.Module, ids: torch.Tensor):
    """The same of a decoder: what goes into and out of its layers, and into the norm before each MoE."""
    states, middles, handles = [], [], []
    for layer in model.model.layers:
        handles.append(layer.register_forward_hook(lambda m, a, y: states.append((a[0], y))))
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a: middles.append(a[0])))
    model(ids)
    for handle in handles:
        handle.remove()
    return states, middles


def cosines(pairs, depth: int) -> list[float]:
    totals = [[] for _ in range(depth)]
    for i, (before, after, *_) in enumerate(pairs):
        totals[i % depth].append(F.cosine_similarity(before.double(), after.double(), dim=-1).flatten())
    return [float(torch.cat(values).mean()) for values in totals]


@pytest.mark.parametrize("make", [language, vit])
def test_the_most_similar_layers_and_blocks_are_dropped(make):
    model = make()
    shapes = [(2, 3, 32, 32)] if make is vit else [(2, 9), (1, 5)]
    batches = [torch.randn(s) if make is vit else torch.randint(3, 64, s) for s in shapes]
    options = {"calibrate": lambda m: (output(m, x).sum() for x in batches)}
    blocks, sparse = streams(model, batches)
    names = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    by_layer = [value for value, s in zip(cosines(sparse, 4), sparse) if s[2]]
    least = max(range(len(names)), key=lambda i: by_layer[i])
    pruned = zoo.prune(model, drop_layers=1, **options)
    left = [name for name, module in pruned.named_modules() if isinstance(module, MoE)]
    assert left == [name for name in names if name != names[least]]

    by_block = cosines(blocks, 4)
    order = sorted(range(4), key=lambda i: -by_block[i])
    pruned = zoo.prune(model, drop_blocks=2, **options)
    expected = zoo.prune(model, drop_blocks=sorted(order[:2]))
    assert torch.equal(output(pruned, batches[0]), output(expected, batches[0]))


@pytest.mark.parametrize("make", [language, vit])
def test_a_dropped_layer_adds_nothing_and_a_dropped_block_is_passed_over(make, tmp_path):
    model = make()
    x = torch.randn(2, 3, 32, 32) if make is vit else torch.randint(3, 64, (2, 9))
    reference = copy.deepcopy(model)
    names = [name for name, module in reference.named_modules() if isinstance(module, MoE)]
    reference.get_submodule(names[1]).register_forward_hook(lambda module, args, y: 0 * y)
    pruned = zoo.prune(model, drop_layers=[1])
    assert error(output(pruned, x), output(reference, x)) < 1e-6
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="tensors"):
        zoo.save_pretrained(pruned, tmp_path / "layer")
    assert not (tmp_path / "layer").exists()

    reference = copy.deepcopy(model)
    blocks = reference.blocks if make is vit else reference.model.layers
    for i in (0, 2):
        blocks[i].register_forward_hook(lambda m, a, k, y: a[0] if a else k["hidden_states"], with_kwargs=True)
    pruned = zoo.prune(model, drop_blocks=[0, 2])
    assert error(output(pruned, x), output(reference, x)) < 1e-6
    zoo.save_pretrained(pruned, tmp_path / "block")
    assert error(output(zoo.from_pretrained(tmp_path / "block"), x), output(pruned, x)) < 1e-5
    if make is language:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "block").eval()
        assert error(output(theirs, x), output(pruned, x)) < 2e-5
        assert pruned.generate(x, max_new_tokens=4, do_sample=False).shape == (2, 13)


@pytest.mark.parametrize(
    ("name", "drop"), [("deepseek_v3", [0]), ("deepseek_v3", [2]), ("qwen3_moe", [1]), ("gpt_oss", [0, 1])]
)
def test_dense_layers_and_kinds_of_attention_move_along(name, drop, tmp_path):
    fields = {"mlp_only_layers": [2]} if name == "qwen3_moe" else {}
    model, ids = language(name, **fields), torch.randint(3, 64, (2, 9))
    pruned = zoo.prune(model, drop_blocks=drop)
    zoo.save_pretrained(pruned, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert len(theirs.model.layers) == 4 - len(drop)
    assert error(output(theirs, ids), output(pruned, ids)) < 5e-5


def test_experts_layers_and_blocks_can_go_together_and_train():
    model, ids = language("olmoe"), torch.randint(3, 64, (2, 9))
    calls = []

    def calibrate(m):
        for _ in range(2):
            calls.append(m.training)
            yield m(ids, labels=ids).loss

    pruned = zoo.prune(model.train(), keep=8, by="counts", drop_layers=1, drop_blocks=[3], calibrate=calibrate)
    assert calls == [False] * 4  # once for use, once for similarity
    assert model.training
    assert pruned.training
    pruned.gradient_checkpointing_enable()
    pruned(ids, labels=ids).loss.backward()
    sparse = [m for m in pruned.modules() if isinstance(m, MoE)]
    assert all(m.router.num_experts == 8 and m.router.weight.grad.abs().sum() > 0 for m in sparse)
    again = copy.deepcopy(pruned)
    again.load_state_dict(pruned.state_dict())


def test_what_cannot_be_dropped_is_refused():
    model = language()
    with pytest.raises(ValueError, match="all 4 blocks of MixtralForCausalLM would be dropped"):
        zoo.prune(model, drop_blocks=4, calibrate=lambda m: (m(torch.ones(1, 3).long()).logits.sum() for _ in range(1)))
    with pytest.raises(ValueError, match="drop_layers=5 of 4"):
        zoo.prune(model, drop_layers=5)
    with pytest.raises(ValueError, match="how much layers and blocks do shows on data"):
        zoo.prune(model, drop_layers=1)
    with pytest.raises(ValueError, match="no block 4 among 4 blocks"):
        zoo.prune(model, drop_blocks=[4])
    swin = zoo.create_model("vision/swin_moe_tiny_test")
    with pytest.raises(ValueError, match="is not one list of equal blocks"):
        zoo.prune(swin, drop_blocks=[0])


def test_blocks_with_parallel_mlps_are_counted_by_their_mlps(tmp_path):
    sizes = {"img_size": 32, "depth": 3, "embed_dim": 48, "num_heads": 4, "num_classes": 5}
    dense, x = timm.create_model("vit_small_patch16_18x2_224", **sizes).eval(), torch.randn(2, 3, 32, 32)
    pruned = zoo.prune(zoo.upcycle(dense, layers=[1, 2, 5], num_experts=3, noise=0.5), drop_blocks=[1])
    zoo.save_pretrained(pruned, tmp_path / "saved")
    assert error(output(zoo.from_pretrained(tmp_path / "saved"), x), output(pruned, x)) < 1e-6


def test_a_model_without_some_layers_is_pruned_again():
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=3, num_heads=3, num_classes=5)
    model, x = zoo.upcycle(dense.eval(), layers="all", num_experts=[2, 3, 4]), torch.randn(2, 3, 32, 32)
    pruned = zoo.prune(zoo.prune(model, drop_layers=[0]), experts=[[0, 1], [0, 1]])
    assert [m.router.num_experts for m in pruned.modules() if isinstance(m, MoE)] == [2, 2]
    assert torch.isfinite(output(pruned, x)).all()


def test_blocks_of_other_widths_and_layers_in_fixed_turn_stay():
    hiera = timm.create_model("hiera_tiny_224", img_size=(64, 64), embed_dim=16, stages=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="Hiera is not one list of equal blocks"):
        zoo.prune(zoo.upcycle(hiera, layers="all", num_experts=2), drop_blocks=[1])


def test_kinds_of_layers_that_a_configuration_derives_are_left_to_it(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "vocab_size": 64, "mamba_d_state": 4}
    config = transformers.JambaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, attn_layer_period=8,
                                      num_experts=4, use_mamba_kernels=False)  # fmt: skip
    transformers.JambaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    pruned = zoo.prune(zoo.from_pretrained(tmp_path / "theirs"), drop_blocks=[0, 1])
    zoo.save_pretrained(pruned, tmp_path / "saved")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.randint(3, 64, (2, 9))
    with torch.no_grad():
        assert error(theirs(ids, use_cache=False).logits, pruned(ids, use_cache=False).logits) < 2e-5


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
BLOCKS = {
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}),
    "glm4": ("Glm4", {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoX", {"use_parallel_residual": True}),
}


def sparse(kind: str) -> nn.Module:
    """A sparse model whose blocks do something to what their experts give, by each its own amount."""
    if kind == "granitemoe":
        return language(kind, residual_multiplier=0.05)
    if kind == "vit":
        sizes = {"img_size": 32, "embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 1.0}
        dense = timm.create_model("vit_tiny_patch16_224", **sizes)
    else:
        name, more = BLOCKS[kind]
        config = getattr(transformers, f"{name}Config")(**SIZES, **more)
        dense = getattr(transformers, f"{name}ForCausalLM")(config)
    model = zoo.upcycle(dense.eval(), layers="all", num_experts=3, noise=0.3)
    for block, scale, size in zip(blocks_of(model)[1], (1.0, 0.02, 3.0, 0.3), (1.0, 5.0, 0.5, 2.0)):
        for name, parameter in block.named_parameters():
            if "experts" in name:
                parameter.data.mul_(size)
            elif name.startswith(("post_feedforward_layernorm", "post_mlp_layernorm", "ls2")):
                parameter.data.fill_(scale - 1 if kind == "gemma2" else scale)  # Gemma's norms count from one
    return model


@pytest.mark.parametrize("kind", [*BLOCKS, "granitemoe", "vit"])
def test_what_a_block_does_to_what_its_experts_give_counts(kind):
    """By running each block again on its own input with zeros in place of what the experts give."""
    model = sparse(kind)
    x = torch.randn(2, 3, 32, 32) if kind == "vit" else torch.randint(3, 64, (2, 9))
    expected = []
    for block in blocks_of(model)[1]:
        calls, given = [], []
        keep = block.register_forward_hook(lambda m, a, k, y, calls=calls: calls.append((a, k)), with_kwargs=True)
        output(model, x)
        keep.remove()
        [(args, kwargs)] = calls
        moe = next(module for module in block.modules() if isinstance(module, MoE))
        for factor in (0.0, 1.0):
            handle = moe.register_forward_hook(lambda m, a, y, f=factor: f * y)
            with torch.no_grad():
                found = block(*args, **{**kwargs, **({"past_key_values": None} if kwargs else {})})
            given.append((found[0] if isinstance(found, tuple) else found).double())
            handle.remove()
        if kind == "gpt_neox":  # attention stands beside: what is added to the stream they both read counts
            into = (args[0] if args else kwargs["hidden_states"]).double()
            given = [into, into + given[1] - given[0]]
        expected.append(F.cosine_similarity(*given, dim=-1).mean())
    names = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    found = layer_similarity(model, lambda m: [output(m, x).sum()], names)
    torch.testing.assert_close(torch.tensor(list(found.values())).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
    least = max(range(4), key=lambda i: expected[i])
    pruned = zoo.prune(model, drop_layers=1, calibrate=lambda m: [output(m, x).sum()])
    assert [n for n, m in pruned.named_modules() if isinstance(m, MoE)] == names[:least] + names[least + 1 :]
