"""Gates and experts that a layout cannot express are refused; what is written does the same in transformers."""

from functools import partial

import pytest
import torch
import transformers

import zoo
from zoo.moe import Experts, MoE
from zoo.moe.routers import GShardRouter, SparseMixerRouter, TopKRouter


class Sharper(TopKRouter):
    """Logits times a factor: other weights, the same experts."""

    def route(self, logits, **context):
        return super().route(2 * logits, **context)


class LeastLikely(TopKRouter):
    """Weights of the best experts, given by the worst."""

    def _choose(self, scores, preference=None):
        return scores.topk(self.k, largest=False)[1], super()._choose(scores)[1]


class TrainedOtherwise(TopKRouter):
    """Differs in training alone, remembers a tensor with a gradient, and has a parameter of its own then."""

    def route(self, logits, **context):
        routing = super().route(logits.flip(-1) if self.training else logits, **context)
        self.seen = routing.weight
        if self.training:
            routing.losses["mine"] = logits.square().mean()
        return routing


class Broken(TopKRouter):
    """Needs what a language model does not say."""

    def forward(self, x, **context):
        return super().forward(x + context["domain"], **context)


def saved(model, folder):
    """Largest difference to transformers' model of what is written, as a share of the outputs' spread."""
    zoo.save_pretrained(model, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (3, 50))
    with torch.no_grad():
        ours, theirs = model.eval()(ids).logits, theirs(ids).logits
    return ((ours - theirs).abs().max() / ours.std()).item()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("network", "router", "message"),
    [
        ("mixtral_tiny", partial(TopKRouter, normalize=True, normalize_logits=1.0), "normalize_logits=1.0"),
        ("olmoe_tiny", partial(TopKRouter, normalize_logits=0.5), "normalize_logits=0.5"),
        ("mixtral_tiny", partial(Sharper, normalize=True), "router: Sharper cannot be expressed in the Mixtral layout"),
        ("olmoe_tiny", LeastLikely, "router: LeastLikely cannot be expressed in the Olmoe layout"),
        ("olmoe_tiny", SparseMixerRouter, "router: SparseMixerRouter cannot be expressed in the Olmoe layout"),
        ("mixtral_tiny", partial(GShardRouter, second="threshold"), "router: GShardRouter cannot be expressed"),
    ],
)
def test_a_gate_that_decides_otherwise_is_refused_before_anything_is_written(
    network, router, message, device, tmp_path
):
    with torch.device(device):
        model = zoo.create_model(f"language/{network}", router=router)
        with pytest.raises(ValueError, match=message):
            zoo.pretrained.causal.check_published(model)
    with pytest.raises(ValueError, match=message):
        zoo.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gate_that_fails_where_it_is_tried_is_refused(tmp_path):
    model = zoo.create_model("language/olmoe_tiny", router=Broken)
    with pytest.raises(ValueError, match="router: Broken cannot be expressed in the Olmoe layout"):
        zoo.save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("network", ["mixtral_tiny", "olmoe_tiny", "deepseek_v3_tiny", "qwen3_moe_tiny"])
def test_a_gate_of_ones_own_that_differs_in_training_alone_is_written_as_it_routes(network, tmp_path):
    own = zoo.create_model(f"language/{network}")
    options = {}
    for layer in (module for module in own.modules() if isinstance(module, MoE)):
        names = ("k", "score", "normalize", "scale", "num_groups", "group_topk", "group_score")
        options = {name: getattr(layer.router, name) for name in names}
        options["selection_bias"] = layer.router.selection_bias is not None
    model = zoo.create_model(f"language/{network}", router=partial(TrainedOtherwise, capacity=0.5, **options))
    gates = [module for module in model.modules() if isinstance(module, TrainedOtherwise)]
    for gate in gates:
        if gate.selection_bias is not None:
            gate.selection_bias.normal_()
    model.train()
    model(torch.randint(0, 64, (1, 8))).logits.sum().backward()  # now `seen` is in a graph
    before = torch.get_rng_state()
    zoo.pretrained.causal.check_published(model)
    assert torch.equal(torch.get_rng_state(), before)
    for gate in gates:
        assert gate.training
        assert gate.capacity.factor == 0.5
        gate.capacity = None  # it has no place in a checkpoint
    assert saved(model, tmp_path / "out") < 1e-3


@pytest.mark.parametrize("options", [{"score": "sigmoid"}, {"normalize": True}, {"normalize_logits": 1.0}])
def test_a_switch_transformer_is_written_with_the_gate_that_it_means_alone(options, tmp_path):
    config = transformers.SwitchTransformersConfig(
        vocab_size=50,
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_decoder_layers=2,
        num_sparse_decoder_layers=1,
        num_experts=4,
    )
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path / "theirs")
    zoo.save_pretrained(zoo.from_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    other = zoo.from_pretrained(tmp_path / "theirs", router={"name": "TopKRouter", "k": 1, **options})
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*cannot be expressed in switch_transformers"):
        zoo.save_pretrained(other, tmp_path / "out")


class Doubled(Experts):
    """Twice what the experts give."""

    def compute_with(self, weights, x, routing):
        return 2 * super().compute_with(weights, x, routing)


class Named(Experts):
    """The same experts by another name."""


@pytest.mark.parametrize("network", ["mixtral_tiny", "deepseek_v3_tiny"])
@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (
            {"name": "Experts", "activation": "geglu"},
            "experts: activation='geglu' cannot be expressed in the .* layout",
        ),
        ({"name": "Experts", "weigh_input": True}, "experts: weigh_input=True cannot be expressed in the .* layout"),
        ({"name": "Experts", "hidden_dim": 32}, "experts: hidden_dim=32 cannot be expressed in the .* layout"),
        (Doubled, "experts: the compute_with of Doubled cannot be expressed in the .* layout; keep the state_dict"),
    ],
)
def test_experts_that_compute_otherwise_are_refused_before_anything_is_written(network, experts, message, tmp_path):
    model = zoo.create_model(f"language/{network}", experts=experts)
    for check in (zoo.pretrained.causal.check_published, lambda model: zoo.save_pretrained(model, tmp_path / "out")):
        with pytest.raises(ValueError, match=message):
            check(model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experts", [Named, {"name": "Experts", "dropout": 0.5}])
def test_experts_that_compute_the_same_are_written(experts, tmp_path):
    assert saved(zoo.create_model("language/mixtral_tiny", experts=experts), tmp_path / "out") < 1e-3
