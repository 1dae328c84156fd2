"""MoE-LLaVA: checkpoints in the authors' layout, made here by hand from their names; upcycling, and training stages."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from seen import batch
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

import zoo
from zoo.models.image_text import configuration
from zoo.models.moe_llava import sparse, stage
from zoo.moe import MoE
from zoo.moe.routers import GShardRouter, TopKRouter
from zoo.pretrained.context import decoder_of
from zoo.pretrained.image_text import class_of
from zoo.pretrained.moe_llava_names import KINDS

E, LAYERS = 3, [0, 2]
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def dense(kind: str = "phi", **fields) -> nn.Module:
    text = {"model_type": kind, **fields}
    model = LlavaForConditionalGeneration._from_config(configuration("moe_llava_tiny", text_config=text)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2) if parameter.dim() > 1 else parameter.data.add_(
            torch.randn_like(parameter) / 10
        )
    return model


class Reference(nn.Module):
    """Two experts a token, weighed by g1 / (g1 + g2) and g2 / (g1 + g2), one expert at a time."""

    def __init__(self, wg: torch.Tensor, experts: list[nn.Module]) -> None:
        super().__init__()
        self.wg, self.experts = nn.Parameter(wg), nn.ModuleList(experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best, index = F.linear(x, self.wg).softmax(-1).topk(2, dim=-1)
        best = best / best.sum(-1, keepdim=True)
        weight = torch.zeros(*x.shape[:-1], len(self.experts)).scatter(-1, index, best)
        return sum(weight[..., e, None] * expert(x) for e, expert in enumerate(self.experts))


def published(folder, kind: str, tower_inside: bool = True, **moe) -> nn.Module:
    """Write a checkpoint as the authors' code does, and return a model that computes what theirs would."""
    import copy

    model, tensors = dense(KINDS[kind][0]), {}
    for i in LAYERS:
        layer = model.model.language_model.layers[i]
        experts = [copy.deepcopy(layer.mlp) for _ in range(E)]
        for expert in experts:
            for parameter in expert.parameters():
                parameter.data.add_(torch.randn_like(parameter) / 5)
        layer.mlp = Reference(torch.randn(E, 64) / 4, experts)
    for name, tensor in model.state_dict().items():
        name = re.sub(r"mlp\.experts\.(\d+)", r"mlp.deepspeed_moe.experts.deepspeed_experts.\1", name)
        name = name.replace("mlp.wg", "mlp.deepspeed_moe.gate.wg.weight")
        name = name.replace("model.language_model.", "model.")
        name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.image_spatial_proj.0")
        name = name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.image_spatial_proj.2")
        name = name.replace("model.vision_tower.", "model.image_tower.image_tower.vision_model.")
        tensors[name] = tensor.contiguous().clone()
    tower = {k: t for k, t in tensors.items() if "image_tower" in k}
    if not tower_inside:
        tensors = {k: t for k, t in tensors.items() if k not in tower}
        (folder / "tower").mkdir()
        stem = "model.image_tower.image_tower."
        save_file({k.removeprefix(stem): t for k, t in tower.items()}, folder / "tower" / "model.safetensors")
        (folder / "tower" / "config.json").write_text(json.dumps(model.config.vision_config.to_dict()))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config.to_dict()
    config = {
        **{key: value for key, value in text.items() if key not in ("architectures", "dtype")},
        "model_type": kind,
        "torch_dtype": "float32",
        "moe": {
            "moe_enable": True,
            "moe_mode": "sparse",
            "moe_layers_idx": LAYERS,
            "num_experts": [E, E],
            "ep_size": 1,
            "top_k_experts": 2,
            "capacity_factor": 1.5,
            "eval_capacity_factor": 2.0,
            "min_capacity": 0,
            "use_residual": False,
            "router_aux_loss_coef": 0.01,
            "train_modules": ["fc1", "fc2", "wg"],
            **moe,
        },
        "image_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_image_tower": "somebody/tiny-clip",
        "mm_video_tower": None,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "tokenizer_padding_side": "right",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tower-config").mkdir()
    (folder / "tower-config" / "config.json").write_text(json.dumps(model.config.vision_config.to_dict()))
    return model


def load(folder, **options):
    return zoo.from_pretrained(folder, vision_tower=str(folder / "tower-config"), image_token_id=250, **options)


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def moes(model: nn.Module) -> list[MoE]:
    return [m for m in model.modules() if isinstance(m, MoE)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_checkpoint_computes_what_the_authors_would(kind, tmp_path):
    torch.manual_seed(0)
    expected = published(tmp_path, kind)
    ours = load(tmp_path)
    assert isinstance(ours, LlavaForConditionalGeneration)
    assert [isinstance(layer.mlp, MoE) for layer in decoder_of(ours).layers] == [True, False, True, False]
    inputs = batch("llava", padding=2)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert error(ours(**inputs).logits[real], expected(**inputs).logits[real]) < 1e-5
    assert torch.equal(ours.generate(**inputs, **GENERATE), expected.generate(**inputs, **GENERATE))
    zoo.save_pretrained(ours, tmp_path / "saved", max_shard_size="100KB")
    before = load_file(tmp_path / "model.safetensors")
    after = {k: t for path in (tmp_path / "saved").glob("*.safetensors") for k, t in load_file(path).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "saved"))
    said = {"model_type", "image_projector_type", "mm_hidden_size", "mm_vision_select_layer", "torch_dtype"}
    assert all(first[key] == second[key] for key in said)
    drop = {"moe_mode", "train_modules"}
    assert {k: v for k, v in first["moe"].items() if k not in drop}.items() <= second["moe"].items()
    again = zoo.from_pretrained(tmp_path / "saved", image_token_id=250)  # what it says of the tower is enough
    torch.testing.assert_close(again(**inputs).logits, ours(**inputs).logits)


def test_the_gate_is_deepspeeds(tmp_path):
    published(tmp_path, "moe_llava_phi", min_capacity=4)
    routers = [moe.router for moe in moes(load(tmp_path))]
    assert all(isinstance(router, GShardRouter) and router.renormalize == "after" for router in routers)
    assert {
        (r.second, r.eval_second, r.capacity.factor, r.capacity.eval_factor, r.capacity.minimum) for r in routers
    } == {("sampling", "all", 1.5, 2.0, 4)}
    model = load(tmp_path).train()
    with zoo.moe.record(model) as step:
        model(**batch("llava"))
    # DeepSpeed's l_aux is E * sum of mean gate times share of first choices.
    total = 0
    for (routing,) in step.routings.values():
        share = F.one_hot(routing.probs.argmax(-1), E).float().mean(0)
        total = total + E * (routing.probs.mean(0) * share).sum()
    torch.testing.assert_close(step.losses()["gshard"], 0.01 * total)


def test_a_tower_that_is_not_inside_is_read_from_its_own_folder(tmp_path):
    expected, inputs = published(tmp_path, "moe_llava_stablelm", tower_inside=False), batch("llava")
    with pytest.raises(ValueError, match="the vision tower's weights are not in it; give the folder of somebody/"):
        load_without_tower(tmp_path)
    ours = zoo.from_pretrained(tmp_path, vision_tower=str(tmp_path / "tower"), image_token_id=250)
    assert error(ours(**inputs).logits, expected(**inputs).logits) < 1e-5


def load_without_tower(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = json.loads((folder / "tower" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return zoo.from_pretrained(folder, image_token_id=250)


def test_one_expert_a_token_and_another_gate(tmp_path):
    published(tmp_path, "moe_llava_llama", top_k_experts=1)
    model = load(tmp_path)
    assert {type(moe.router) for moe in moes(model)} == {TopKRouter}
    weight = load_file(tmp_path / "model.safetensors")["model.layers.2.mlp.deepspeed_moe.gate.wg.weight"]
    assert torch.equal(moes(model)[1].router.weight, weight)
    zoo.save_pretrained(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["moe"]["top_k_experts"] == 1
    other = load(tmp_path, router="ExpertChoiceRouter")
    assert other(**batch("llava")).logits.isfinite().all()
    with pytest.raises(ValueError, match="no place for ExpertChoiceRouter"):
        zoo.save_pretrained(other, tmp_path / "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "moe_llava_qwen"}, "Qwen's first language model, which transformers does not have"),
        ({"model_type": "moe_llava_ph"}, "'moe_llava_ph'; did you mean moe_llava_phi"),
        ({"image_projector_type": "linear"}, "image_projector_type='linear'; expected 'mlp2x_gelu'"),
        ({"moe": {}}, "names no layers under moe_layers_idx"),
        ({"moe": {"moe_layers_idx": [0], "use_residual": True}}, "use_residual=true"),
        ({"moe": {"moe_layers_idx": [0, 1], "num_experts": [2, 3]}}, r"numbers of experts \[2, 3\]"),
        ({"moe": {"moe_layers_idx": [0], "num_experts": 3, "top_k_experts": 3}}, "must be 1 or 2"),
        ({"moe": {"moe_layers_idx": LAYERS, "num_experts": [4, 4]}}, "missing; MoE-LLaVA with phi needs them"),
        ({"moe": {"moe_layers_idx": LAYERS, "num_experts": [2, 2]}}, "unknown to MoE-LLaVA with phi"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(changes, message, tmp_path):
    published(tmp_path, "moe_llava_phi")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_an_unknown_tower_is_named(tmp_path):
    published(tmp_path, "moe_llava_phi")
    with pytest.raises(ValueError, match="'somebody/tiny-clip' is none of openai/clip-vit-large-patch14-336"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["phi", "llama", "qwen2"])
def test_a_dense_llava_upcycled_computes_what_it_did(kind, tmp_path):
    torch.manual_seed(0)
    dense(kind).save_pretrained(tmp_path / "llava")
    model, inputs = zoo.from_pretrained(tmp_path / "llava"), batch("llava")
    expected = model(**inputs).logits
    made = sparse(model)
    assert [isinstance(layer.mlp, MoE) for layer in decoder_of(made).layers] == [True, False, True, False]
    assert not any(isinstance(m, MoE) for m in made.model.vision_tower.modules())
    assert {(m.router.k, m.router.num_experts) for m in moes(made)} == {(2, 4)}
    assert error(made(**inputs).logits, expected) < 1e-5
    plain = zoo.upcycle(model, layers=[0, 2], num_experts=4, k=2, losses={"switch": 0.01})
    assert error(plain(**inputs).logits, expected) < 1e-5
    with zoo.moe.record(plain.train()) as step:
        plain(**inputs)
    assert len(step.routings) == 2
    step.losses()["switch"].backward()
    assert all(m.router.weight.grad.abs().max() > 0 for m in moes(plain))
    made.save_pretrained(tmp_path / "moe")
    again = zoo.from_pretrained(tmp_path / "moe", image_token_id=250)
    assert error(again(**inputs).logits, expected) < 1e-5


def test_the_vision_tower_may_be_upcycled_too():
    siglip = {"vision_config": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"}
    model = LlavaForConditionalGeneration._from_config(configuration("moe_llava_tiny", **siglip))
    made, inputs = zoo.upcycle(model, layers="all", num_experts=2, within="model.vision_tower"), batch("llava")
    assert error(made(**inputs).logits, model(**inputs).logits) < 1e-5
    assert [isinstance(layer.mlp, MoE) for layer in made.model.vision_tower.encoder.layers] == [True, True]
    assert not any(isinstance(m, MoE) for m in decoder_of(made).modules())


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_stage_trains_exactly_its_parameters():
    model = dense()
    names = {name for name, _ in model.named_parameters()}
    projector = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert trained(stage(model, 1)) == projector
    tower = {name for name in names if name.startswith("model.vision_tower.")}
    assert tower
    assert trained(stage(model, 2)) == names - tower
    with pytest.raises(ValueError, match="stage 3 trains experts, and the model has none"):
        stage(model, 3)
    made = sparse(model)
    stem = "model.language_model.layers"
    experts = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    expected = {f"{stem}.{i}.mlp.experts.{part}" for i in (0, 2) for part in experts}
    expected |= {f"{stem}.{i}.mlp.router.weight" for i in (0, 2)}
    expected |= {f"{stem}.{i}.mlp.{fc}.{kind}" for i in (1, 3) for fc in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert trained(stage(made, 3)) == expected
    assert trained(stage(made, 1)) == projector
    with pytest.raises(ValueError, match="stages 1, 2 and 3, got 4"):
        stage(made, 4)
    with pytest.raises(ValueError, match="has no module called projector or connector"):
        stage(zoo.create_model("language/mixtral_tiny", num_hidden_layers=1), 1)


def test_a_step_of_stage_three_moves_nothing_else():
    torch.manual_seed(0)
    model = stage(sparse(dense()), 3).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = batch("llava")
    with zoo.moe.record(model) as step:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    (loss + sum(step.losses().values())).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained(model)


@pytest.mark.parametrize(
    ("mode", "layers"),
    [("sparse", [0, 2]), ("dense", [0, 1, 2, 3]), ("first_half", [0, 1]), ("second_half", [2, 3]), (None, [1])],
)
def test_the_modes_are_the_authors(mode, layers):
    options = {"moe_layers_idx": layers} if mode is None else {"moe_mode": mode}
    model = zoo.create_model("vision_language/moe_llava_tiny", moe={**options, "num_experts": 2})
    assert [i for i, layer in enumerate(decoder_of(model).layers) if isinstance(layer.mlp, MoE)] == layers


def test_a_wrong_option_is_named():
    with pytest.raises(ValueError, match="option of MoE-LLaVA 'num_expert'; did you mean num_experts"):
        sparse(dense(), num_expert=3)
    with pytest.raises(ValueError, match="moe_mode of MoE-LLaVA 'spars'; did you mean sparse"):
        sparse(dense(), moe_mode="spars")


def test_what_has_no_layout_is_not_saved(tmp_path):
    internvl = configuration("internvl_qwen3_moe_tiny", text_config={"model_type": "qwen3", "intermediate_size": 48})
    made = zoo.upcycle(class_of("internvl")._from_config(internvl), layers="all", num_experts=2)
    with pytest.raises(TypeError, match=r"an upcycled internvl with qwen3 has no published layout; expected a llava"):
        zoo.save_pretrained(made, tmp_path / "x")
    with pytest.raises(ValueError, match="no place for TopKRouter with k=2"):
        zoo.save_pretrained(zoo.upcycle(dense(), layers=[0], num_experts=2), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_lora_experts_stand_beside_frozen_mlps():
    torch.manual_seed(0)
    model, inputs = dense("llama"), batch("llava", padding=2)
    made = zoo.adapt(model, "LLaVA-MoLE", layers="every-2", num_experts=3, rank=4)
    torch.testing.assert_close(made(**inputs).logits, model(**inputs).logits)
    stem = "model.language_model.layers"
    parts = ("router.weight", "experts.a", "experts.b")
    assert trained(made) == {f"{stem}.{i}.mlp.{part}" for i in (1, 3) for part in parts}
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    losses = []
    for _ in range(6):
        with zoo.moe.record(made.train()) as step:
            loss = made(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        (loss + step.losses()["switch"]).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {name for name, p in made.named_parameters() if not torch.equal(p, before[name])} == trained(made)
    # A token that is not padding has one expert a layer.
    assert {len(r.token_index) for calls in step.routings.values() for r in calls} == {
        int(inputs["attention_mask"].sum())
    }
    total, active = zoo.models.count_parameters(made)
    assert total - active == 2 * 2 * (2 * 4 * 64)


@pytest.mark.parametrize("name", ["moe_llava_tiny", "aria_tiny", "llava_mixtral_tiny"])
@pytest.mark.parametrize("text_too", [False, True])
def test_experts_in_the_vision_tower_have_no_layout_and_are_not_saved(name, text_too, tmp_path):
    from zoo.pretrained.dispatch import check_savable

    llava = name.startswith("moe_llava")
    model = zoo.create_model(f"vision_language/{name}", **({"moe": False} if llava else {}))
    if text_too and llava:
        model = sparse(model)
    model = zoo.upcycle(model, layers="all", num_experts=2, within="model.vision_tower")
    for refuse in (check_savable, lambda m: zoo.save_pretrained(m, tmp_path / "a")):
        with pytest.raises(ValueError, match=r"(no place for experts in|has no way to say).*vision_tower"):
            refuse(model)
    assert not (tmp_path / "a").exists()
