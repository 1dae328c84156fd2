"""Checkpoints written by transformers, read onto our layers and written back."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from conftest import FAMILIES, theirs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

import zoo
from zoo.moe import MoE
from zoo.pretrained.language import FAMILIES as TABLE


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def tensors(folder) -> dict[str, torch.Tensor]:
    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and a mask with padding on the left, as a tokenizer makes it for generation."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, :6] = mask[1, :1] = 0
    return torch.randint(0, 256, (3, 17), generator=generator), mask


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_generation_are_those_of_transformers(checkpoints, family):
    expected, ours = AutoModelForCausalLM.from_pretrained(checkpoints[family]), zoo.from_pretrained(checkpoints[family])
    assert isinstance(ours, TABLE[family].classes()[1])
    assert any(isinstance(m, MoE) for m in ours.modules())
    assert not any(hasattr(layer.mlp, "gate") for layer in ours.model.layers)
    tokens, mask = batch()
    for attention_mask in (None, mask):
        with torch.no_grad():
            a, b = ours(tokens, attention_mask=attention_mask), expected(tokens, attention_mask=attention_mask)
        assert error(a.logits, b.logits) < 1e-5
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = ours.generate(tokens, **options)
    assert torch.equal(generated, expected.generate(tokens, **options))
    assert torch.equal(generated, ours.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers(checkpoints, family):
    expected, ours = AutoModelForCausalLM.from_pretrained(checkpoints[family]), zoo.from_pretrained(checkpoints[family])
    tokens, mask = batch()
    # A token after padding is predicted from padding, which transformers lets through its experts in training too.
    labels = tokens.masked_fill((mask * mask.roll(1, 1)) == 0, -100)
    for model in (expected.train(), ours.train()):
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
    by_name = dict(expected.named_parameters())
    for name, parameter in ours.named_parameters():
        name = name.replace("mlp.router.weight", "mlp.gate.weight").replace(
            "mlp.shared_gate.", "mlp.shared_expert_gate."
        )
        name = name.replace("mlp.shared.", f"mlp.{TABLE[family].shared}.")
        assert error(parameter.grad, by_name[name].grad) < 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", ["300KB", "1GB"])
def test_saving_writes_the_same_tensors_that_were_read(checkpoints, family, size, tmp_path):
    source, folder = checkpoints[family], tmp_path / "saved"
    zoo.save_pretrained(zoo.from_pretrained(source), folder, max_shard_size=size)
    before, after = tensors(source), tensors(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((source / name).read_text())
    sharded = (folder / "model.safetensors.index.json").is_file()
    assert sharded == (size == "300KB")
    assert not sharded or all(path.stat().st_size < 320_000 for path in folder.glob("*.safetensors"))
    tokens, _ = batch()
    again, first = (AutoModelForCausalLM.from_pretrained(f)(tokens).logits for f in (folder, source))
    assert error(again, first) < 1e-5  # the same weights at other addresses may be added up in another order
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trained_here_is_read_by_plain_transformers(family, tmp_path):
    model = zoo.create_model(f"language/{family}_tiny", losses={"switch": 0.01}, capacity=2.0, num_hidden_layers=2)
    tokens = torch.randint(0, 1024, (2, 9))
    model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path / "saved")  # transformers' method, our layout
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = zoo.from_pretrained(tmp_path / "saved")
    assert error(plain(tokens).logits, loaded(tokens).logits) < 1e-5
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name


def test_gates_that_the_files_have_in_float32_stay_so(tmp_path):
    # As transformers 5.24 writes DeepSeek-V3 in bfloat16; the logits are those of the gates as they were trained.
    plain = theirs("deepseek_v3").to(torch.bfloat16)
    for name, parameter in plain.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data = torch.randn(parameter.shape) * 0.2
    for module in plain.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    plain.save_pretrained(tmp_path / "theirs")
    before = tensors(tmp_path / "theirs")
    assert {t.dtype for key, t in before.items() if key.endswith("gate.weight")} == {torch.float32}
    model = zoo.from_pretrained(tmp_path / "theirs")
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, _ in model.named_parameters() if name.endswith("router.weight")}
    x, moe = torch.randn(50, 64).bfloat16(), next(m for m in model.modules() if isinstance(m, MoE))
    logits = x.double() @ before["model.layers.1.mlp.gate.weight"].double().T
    assert error(moe.router._logits(x.float()).double(), logits) < 1e-6
    model.save_pretrained(tmp_path / "saved")
    after = tensors(tmp_path / "saved")
    assert all(torch.equal(after[key], t) and after[key].dtype == t.dtype for key, t in before.items())
    given = zoo.from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert {p.dtype for p in given.parameters()} == {torch.bfloat16}


def test_the_dtype_is_the_checkpoints_unless_given(tmp_path):
    theirs("deepseek_v3").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in zoo.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    for dtype in ("float32", torch.float32):
        model = zoo.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert model.config.dtype == torch.float32
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert error(model(batch()[0]).logits, expected(batch()[0]).logits) < 1e-5


def test_bfloat16_stays_bfloat16_bit_for_bit(tmp_path):
    theirs("qwen2_moe").to(torch.bfloat16).save_pretrained(tmp_path / "a")
    zoo.save_pretrained(zoo.from_pretrained(tmp_path / "a"), tmp_path / "b")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in before)


def test_tied_embeddings_are_stored_once(tmp_path):
    theirs("mixtral", tie_word_embeddings=True).save_pretrained(tmp_path / "a")
    model = zoo.from_pretrained(tmp_path / "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    zoo.save_pretrained(model, tmp_path / "b")
    assert tensors(tmp_path / "a").keys() == tensors(tmp_path / "b").keys()
    assert "lm_head.weight" not in tensors(tmp_path / "b")


def test_generation_settings_travel(checkpoints, tmp_path):
    shutil.copytree(checkpoints["olmoe"], tmp_path / "a")
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=[3, 4]).save_pretrained(tmp_path / "a")
    model = zoo.from_pretrained(tmp_path / "a")
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.3, [3, 4])
    zoo.save_pretrained(model, tmp_path / "b")
    assert GenerationConfig.from_pretrained(tmp_path / "b").eos_token_id == [3, 4]


def test_losses_and_capacity_may_be_set_for_training_on(checkpoints):
    model = zoo.from_pretrained(
        checkpoints["olmoe"], losses={"switch": 0.01}, capacity=1.0, backend="reference"
    ).train()
    with zoo.moe.record(model) as step:
        model(batch()[0])
    assert step.losses()["switch"] > 0
    assert model.model.layers[0].mlp.experts.backend == "reference"


def test_multi_token_prediction_layers_are_left_out_as_transformers_does(checkpoints, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(checkpoints["deepseek_v3"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.2.eh_proj.weight"] = "extra.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"model.layers.2.eh_proj.weight": torch.ones(2, 2)}, tmp_path / "extra.safetensors")
    model = zoo.from_pretrained(tmp_path)
    assert len(model.model.layers) == 2
    assert torch.equal(model(batch()[0]).logits, zoo.from_pretrained(checkpoints["deepseek_v3"])(batch()[0]).logits)


def test_a_copy_of_a_model_saves_itself(checkpoints, tmp_path):
    model = zoo.from_pretrained(checkpoints["mixtral"])
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.lm_head.weight)
    other.save_pretrained(tmp_path / "copy")
    assert not tensors(tmp_path / "copy")["lm_head.weight"].any()


def test_loading_on_the_meta_device_reads_no_weights(checkpoints):
    model = zoo.from_pretrained(checkpoints["mixtral"], device="meta")
    assert all(p.is_meta for p in model.parameters())


def test_a_compiled_model_is_saved_as_itself(checkpoints, tmp_path):
    zoo.save_pretrained(torch.compile(zoo.from_pretrained(checkpoints["mixtral"])), tmp_path / "saved")
    assert tensors(tmp_path / "saved").keys() == tensors(checkpoints["mixtral"]).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_gate_takes_over_the_weight_it_has_a_place_for(checkpoints, family):
    on_disk = tensors(checkpoints[family])
    gate = min(key for key in on_disk if key.endswith(".gate.weight"))
    other = {"name": "TopKRouter", "k": 1, "noise": "learned", "selection_bias": True, "losses": {"switch": 0.01}}
    ours = zoo.from_pretrained(checkpoints[family], router=other).train()
    layers = [m for m in ours.modules() if isinstance(m, MoE)]
    assert torch.equal(layers[0].router.weight, on_disk[gate])
    assert layers[0].router.noise_weight.eq(0).all()
    bias = on_disk.get(gate.replace("weight", "e_score_correction_bias"), torch.zeros(layers[0].router.num_experts))
    assert torch.equal(layers[0].router.selection_bias, bias)
    with zoo.moe.record(ours) as step:
        ours(batch()[0])
    assert all(call.asked == 1 for calls in step.routings.values() for call in calls)
    assert step.losses()["switch"] > 0
    with pytest.raises(ValueError, match="cannot be expressed"):
        zoo.save_pretrained(ours, "nowhere")


@pytest.mark.parametrize(
    ("family", "router", "message"),
    [
        ("mixtral", {"name": "AttentionRouter"}, "AttentionRouter cannot be expressed in the Mixtral layout"),
        ("mixtral", {"name": "SentenceRouter"}, "SentenceRouter cannot be expressed in the Mixtral layout"),
        ("mixtral", {"name": "GShardRouter", "second": "random"}, "GShardRouter cannot be expressed"),
        ("mixtral", {"name": "SkyworkRouter", "normalize": True}, "normalize_logits=1.0 cannot be expressed"),
        ("olmoe", {"name": "SparseMixerRouter"}, "SparseMixerRouter cannot be expressed in the Olmoe layout"),
    ],
)
def test_a_gate_that_would_be_read_as_another_is_not_written(family, router, message, checkpoints, tmp_path):
    ours = zoo.from_pretrained(checkpoints[family], router=router)
    with pytest.raises(ValueError, match=re.escape(message)):
        zoo.save_pretrained(ours, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "router", [{"name": "GShardRouter", "second": "all", "capacity": None}, {"name": "SiRARouter", "normalize": True}]
)
def test_a_gate_that_only_trains_in_another_way_is_written(router, checkpoints, tmp_path):
    ours = zoo.from_pretrained(checkpoints["mixtral"], router={"k": 2, **router}).eval()
    zoo.save_pretrained(ours, tmp_path / "saved")
    again = zoo.from_pretrained(tmp_path / "saved").eval()
    ids = batch()[0]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, ours(ids).logits)


def test_a_gate_of_another_kind_starts_fresh(checkpoints):
    expected = zoo.from_pretrained(checkpoints["mixtral"])
    ours = zoo.from_pretrained(checkpoints["mixtral"], router="ExpertChoiceRouter")
    for name, tensor in ours.state_dict().items():
        assert ".router." in name or torch.equal(tensor, expected.state_dict()[name])
    tokens, _ = batch()
    assert ours(tokens).logits.isfinite().all()
