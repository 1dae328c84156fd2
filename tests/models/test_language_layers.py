"""Other experts, attention experts and mixture of depths in language models, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.models import count_parameters, dense_twin
from zoo.moe import Experts, MoH, NeuronExperts, SwitchHead, ZeroComputationExperts
from zoo.pretrained.language import FAMILIES

MOA = {"name": "MoA", "num_experts": 5, "router": {"name": "TopKRouter", "k": 2, "losses": {"switch": 0.01}}}
ATTENTION: dict[str, Any] = {
    "MoA": MOA,
    "MoH": {"name": "MoH", "num_shared_heads": 1, "k": 2},
    "SwitchHead": {"class_path": "zoo.moe.SwitchHead", "init_args": {"num_experts": 3}},
}
DEPTH = {"capacity": 0.5, "sampling": "predictor", "layers": "all"}
ZERO = {"experts": "ZeroComputationExperts", "router": {"name": "MoEPlusPlusRouter", "k": 2}}
every_attention = pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION.keys())
# What changes neither by later tokens nor by padding.
LAYERS: dict[str, dict[str, Any]] = {
    **{name: {"attention": spec} for name, spec in ATTENTION.items()},
    "depth": {"mixture_of_depths": DEPTH},
    "depth and MoH": {"mixture_of_depths": DEPTH, "attention": ATTENTION["MoH"]},
}
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())


def small(family: str = "mixtral", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 99, "initializer_range": 0.3}
    return zoo.create_model(f"language/{family}_tiny", **{**sizes, **options}).double()


def tokens(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 99, (batch, length))


@pytest.mark.parametrize("family", FAMILIES)
@every_layer
def test_every_family_takes_every_layer_and_trains_all_of_it(family: str, options: dict[str, Any]) -> None:
    model = small(family, **options).train()
    ids = tokens()
    with zoo.moe.record(model) as step:
        loss = model(ids, labels=ids).loss
    (loss + sum(step.losses().values())).backward()
    named = {n: p for n, p in model.named_parameters() if ".attention." in n or ".router." in n}
    assert named
    for name, parameter in named.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@every_attention
def test_attention_is_the_layers_own_with_the_models_positions(attention: dict[str, Any]) -> None:
    model = small(attention=attention).eval()
    decoder, seen = model.model.layers[1], {}
    hook = decoder.self_attn.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(x=kwargs["hidden_states"], y=out[0]), with_kwargs=True
    )
    model(tokens(), use_cache=False)
    hook.remove()
    positions = torch.arange(7)[None]
    rotary = model.model.rotary_emb(seen["x"], positions)
    layer = decoder.self_attn.attention
    expected = layer(seen["x"], rotary=rotary)
    assert layer.causal
    torch.testing.assert_close(seen["y"], expected)


@every_attention
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_cache_gives_what_the_whole_sequence_gives(attention: dict[str, Any], implementation: str) -> None:
    model = small(attention=attention, attn_implementation=implementation).eval()
    ids, mask = tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0  # padding on the left, as for generation
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    logits, cache = [first.logits], first.past_key_values
    for i in range(6, 9):
        step = model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache, use_cache=True)
        logits.append(step.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], whole[real])


@every_layer
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_neither_padding_nor_other_documents_are_seen(options: dict[str, Any], implementation: str) -> None:
    model = small(attn_implementation=implementation, **options).eval()
    # transformers' eager attention takes its softmax in float32, whatever the model's dtype.
    close = {"rtol": 1e-4, "atol": 1e-5} if implementation == "eager" else {"rtol": 1e-7, "atol": 1e-7}
    one, two = tokens(1, 4), tokens(1, 6)
    apart = torch.cat([model(one, use_cache=False).logits, model(two, use_cache=False).logits], dim=1)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    packed = model(torch.cat([one, two], dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, apart, **close)
    # Two such rows, of which depth chooses unequal numbers of tokens.
    rows = [torch.cat(pair, dim=1) for pair in ((one, two), (two, one))]
    positions = torch.cat([positions, torch.cat([torch.arange(6), torch.arange(4)])[None]])
    both = model(torch.cat(rows), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(both, torch.cat([apart, torch.cat([apart[:, 4:], apart[:, :4]], dim=1)]), **close)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    both = torch.cat([torch.cat([tokens(1, 2), one], 1), two])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(both, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(torch.cat([padded[:1, 2:], padded[1:]], dim=1), apart, **close)


@every_layer
def test_later_tokens_change_nothing_and_generation_goes_on_with_the_likeliest(options: dict[str, Any]) -> None:
    model = small(**options).eval()
    ids = tokens(1, 5)
    for _ in range(4):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    found = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, ids)


def test_depth_runs_the_layer_on_the_chosen_tokens_alone() -> None:
    model = small(mixture_of_depths={"capacity": 0.5, "sampling": "loss", "layers": [1]}).train()
    outer = model.model.layers[1]
    router, inner = outer.depth.router, outer.depth.block.layer
    seen: dict[str, Tensor] = {}
    hook = outer.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with zoo.moe.record(model) as step:
        model(tokens(2, 7), use_cache=False)
    hook.remove()
    x, y = seen["x"], seen["y"]
    scores = x @ router.weight[0]
    cross_entropy = 0.0
    for b in range(2):
        chosen = sorted(range(7), key=lambda i: -scores[b, i].item())[:4]
        chosen.sort()
        positions = torch.tensor(chosen)[None]
        rotary = model.model.rotary_emb(x, positions)
        hidden = torch.full((4, 4), -torch.inf, dtype=x.dtype).triu(1)[None, None]
        out = inner(x[b : b + 1, chosen], attention_mask=hidden, position_embeddings=rotary)[0]
        for i in range(7):
            expected = x[b, i]
            if i in chosen:
                nth = chosen.index(i)
                expected = expected + scores[b, i] * (out[nth] - x[b, i])
            torch.testing.assert_close(y[b, i], expected)
            odds = torch.sigmoid(scores[b, i])
            cross_entropy -= torch.log(odds if i in chosen else 1 - odds).item() / 14
    assert step.losses()["depth"].item() == pytest.approx(0.01 * cross_entropy)


@every_layer
def test_checkpointing_gives_the_same_gradients(options: dict[str, Any]) -> None:
    grads = []
    for recompute in (False, True):
        model = small(**options).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        ids = tokens()
        with zoo.moe.record(model) as step:
            loss = model(ids, labels=ids, use_cache=False).loss
        (loss + sum(step.losses().values())).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, msg=name)


def test_experts_of_other_kinds_take_the_place_of_mlps() -> None:
    model = small("olmoe", **ZERO, num_experts=8)
    assert all(type(layer.mlp.experts) is ZeroComputationExperts for layer in model.model.layers)
    assert model.model.layers[0].mlp.experts.mlp.num_experts == 4
    peer = {"name": "ProductKeyRouter", "k": 3, "heads": 2}
    model = small("olmoe", num_experts=36, experts="NeuronExperts", router=peer)
    experts = model.model.layers[0].mlp.experts
    assert (type(experts), experts.activation, experts.down_proj.shape) == (NeuronExperts, "gelu", (36, 64, 1))
    assert small(experts={"name": "Experts", "hidden_dim": 5}).model.layers[0].mlp.experts.hidden_dim == 5


def test_layers_says_which() -> None:
    model = small(
        num_hidden_layers=4,
        attention={**ATTENTION["MoH"], "layers": "every-2"},
        mixture_of_depths={**DEPTH, "layers": 3},
    )
    kinds = [type(m).__name__ for m in model.model.layers]
    assert kinds == ["MixtralDecoderLayer"] * 3 + ["DecoderDepth"]
    inner = [*model.model.layers[:3], model.model.layers[3].depth.block.layer]
    assert [isinstance(getattr(m.self_attn, "attention", None), MoH) for m in inner] == [False, True, False, True]


def test_active_parameters_leave_out_the_heads_not_chosen() -> None:
    plain = count_parameters(small(num_hidden_layers=1))
    for spec, unused in (
        (MOA, 3 * 2 * 16 * 64),
        (ATTENTION["MoH"], 1 * 2 * 16 * 64),
        (ATTENTION["SwitchHead"], 2 * 4 * 1 * 16 * 64),
    ):
        total, active = count_parameters(small(num_hidden_layers=1, attention=spec))
        assert (total - active) - (plain[0] - plain[1]) == unused
    with pytest.raises(ValueError, match=r"layers.0.mlp: ZeroComputationExperts are not all of one size"):
        count_parameters(small(**ZERO))


def test_the_dense_twin_has_none_of_it() -> None:
    twin = dense_twin(
        "language/mixtral_tiny", num_hidden_layers=1, attention=MOA, mixture_of_depths=DEPTH, experts="NeuronExperts"
    )
    assert not any(isinstance(m, (MoH, SwitchHead)) for m in twin.modules())
    with zoo.moe.record(twin) as step:
        twin(tokens())
    assert step.routings == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"attention": "MoHa"}, "unknown attention 'MoHa'; did you mean MoH"),
        ({"attention": {"name": "MoH", "k": 2}}, "MoH needs num_shared_heads"),
        (
            {"attention": {**ATTENTION["SwitchHead"], "layers": "last-1", "init_args": {"experts": 3}}},
            "mean num_experts, expert",
        ),
        ({"attention": {"name": "MoA", "router": "TopKRouter"}}, "MoA needs num_experts and router"),
        ({"attention": {**MOA, "layers": [4]}}, "no block 4 among 2 blocks"),
        ({"attention": {**MOA, "head_dim": 8}}, "rotary positions turn 16 dimensions, but heads have head_dim=8"),
        ({"experts": "NeuronExpert"}, "did you mean NeuronExperts"),
        (
            {"mixture_of_depths": {"capacity": 0.5, "sample": "loss"}},
            "unknown argument of DepthRouter 'sample'; did you mean sampl",
        ),
        ({**ZERO, "mixture_of_depths": DEPTH}, "MoEPlusPlusRouter hears the gate of the layer below"),
        ({"mixture_of_depths": 0.5}, "expected the arguments of DepthRouter"),
    ],
)
def test_a_mistake_is_named(options: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        small(**options)(tokens())


def test_what_cannot_be_says_so(tmp_path: Any) -> None:
    depth = small(mixture_of_depths=DEPTH)
    with pytest.raises(ValueError, match="use_cache=False"):
        depth(tokens(), use_cache=True)
    for options, named in (
        ({"mixture_of_depths": DEPTH}, "MixtureOfDepths"),
        ({"attention": MOA}, "MoA"),
        (ZERO, "ZeroComputationExperts"),
    ):
        with pytest.raises(TypeError, match=f"no published layout has a place for model.layers.0.*{named}"):
            zoo.save_pretrained(small(**options), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert isinstance(depth, nn.Module)


class Handing(Experts):
    """Hands on all that it is given, as subclasses often do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)


class Fixed(Experts):
    """Fixes the activation itself."""

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, **options: Any) -> None:
        super().__init__(num_experts, dim, hidden_dim, "relu", **options)


@pytest.mark.parametrize(("kind", "activation"), [(Handing, "gelu_tanh"), (Fixed, "relu")])
def test_what_a_model_knows_reaches_experts_that_hand_it_on(kind: Any, activation: str) -> None:
    model = zoo.create_model("vision/vmoe_tiny_test", experts=kind, backend="reference", expert_dropout=0.25)
    (experts,) = (module for module in model.modules() if isinstance(module, kind))
    assert (experts.activation, experts.backend, experts.dropout) == (activation, "reference", 0.25)
    assert experts.b_in is not None
