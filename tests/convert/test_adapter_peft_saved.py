"""What peft trains whole beside a LoRA, against transformers' own models with these weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import zoo

D = 16
SIZES = {"vocab_size": 40, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "intermediate_size": 20, "num_local_experts": 3}
TOKENS = torch.randint(3, 40, (2, 7))
LORA = "model.layers.1.self_attn.q_proj"


def mixtral(**options):
    return MixtralForCausalLM(MixtralConfig(**SIZES, **options)).eval()


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_experts_per_tok=2)).eval()


def qwen2_moe():
    sizes = {
        **SIZES,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
    }
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)).eval()


def deepseek_v3():
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 8}
    sizes = {**SIZES, **heads, "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    sizes |= {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)).eval()


def write(model, folder, learnt, **said):
    """A folder of a LoRA and of parameters drawn anew, both of which the model gets too."""
    weights, tensors = model.state_dict(), {}
    a, b = torch.randn(2, D), torch.randn(len(weights[f"{LORA}.weight"]), 2) / 4
    tensors |= {f"{LORA}.lora_A.weight": a, f"{LORA}.lora_B.weight": b}
    weights[f"{LORA}.weight"].data += 3 / 2 * b @ a
    for name in learnt:
        tensors[name] = torch.randn_like(weights[name]) / 3
        weights[name].data.copy_(tensors[name])
    folder.mkdir()
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in learnt))
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", "modules_to_save": modules, **said}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    named = {f"base_model.model.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def same(found, expected):
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


GATES = [f"model.layers.{i}.mlp.gate.weight" for i in range(2)]
CASES = {
    "ends and gates": (mixtral, ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", *GATES]),
    "a gate with biases": (gpt_oss, ["model.layers.0.mlp.router.weight", "model.layers.0.mlp.router.bias"]),
    "a shared expert": (
        qwen2_moe,
        ["model.layers.1.mlp.shared_expert_gate.weight", "model.layers.1.mlp.shared_expert.up_proj.weight"],
    ),
    "a gate with a bias of the choice": (
        deepseek_v3,
        ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias"],
    ),
}
OURS = (("mlp.gate.", "mlp.router."), ("shared_expert.", "shared."), ("shared_expert_gate.", "shared_gate."))


@pytest.mark.parametrize("case", CASES)
def test_what_was_trained_whole_is_read_trained_on_and_written(case, tmp_path):
    make, learnt = CASES[case]
    theirs = make()
    theirs.save_pretrained(tmp_path / "base")
    base = zoo.from_pretrained(tmp_path / "base")
    before = logits(base)
    write(theirs, tmp_path / "lora", learnt)
    for adapted in (zoo.adapt(base, source=tmp_path / "lora"), zoo.from_pretrained(tmp_path / "lora", base=base)):
        same(logits(adapted), logits(theirs))
        assert torch.equal(logits(base), before)
        ours = {name for name, _ in theirs.named_parameters()}.intersection(learnt)
        for their, own in OURS:
            ours = {name.replace(their, own) for name in ours}
        learns = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert {name for name in learns if ".lora." not in name} == ours
    zoo.save_pretrained(adapted, tmp_path / "ours")
    assert torch.equal(logits(zoo.from_pretrained(tmp_path / "ours", base=base)), logits(adapted))
    zoo.save_pretrained(adapted, tmp_path / "peft", peft=True)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    weights = theirs.state_dict()
    assert {n for n in stored if ".lora_" not in n} == {f"base_model.model.{name}" for name in learnt}
    assert all(torch.equal(stored[f"base_model.model.{name}"], weights[name]) for name in learnt)
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert set(said["modules_to_save"]) == {name.rpartition(".")[0] for name in learnt}
    assert not said["ensure_weight_tying"]
    same(logits(zoo.adapt(base, source=tmp_path / "peft")), logits(adapted))


def test_tied_embeddings_stay_tied_or_are_refused(tmp_path):
    theirs = mixtral(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "base")
    base = zoo.from_pretrained(tmp_path / "base")
    write(theirs, tmp_path / "lora", ["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match=r"trained apart from what the model ties it to, .*lm_head.weight"):
        zoo.adapt(base, source=tmp_path / "lora")
    adapted = zoo.adapt(base, "LoRA", targets=["query"], unfreeze="model.embed_tokens")
    with torch.no_grad():
        adapted.get_input_embeddings().weight.normal_()
    zoo.save_pretrained(adapted, tmp_path / "peft", peft=True)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["ensure_weight_tying"]
    again = zoo.adapt(base, source=tmp_path / "peft")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    same(logits(again), logits(adapted))


def test_what_does_not_fit_is_named(tmp_path):
    theirs = mixtral()
    base = zoo.create_model("language/mixtral_tiny", vocab_size=48, hidden_size=D, num_hidden_layers=2)
    write(theirs, tmp_path / "lora", ["lm_head.weight"])
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \[40, 16\], expected \[48, 16\]; resize"):
        zoo.adapt(base, source=tmp_path / "lora")
    with pytest.raises(ValueError, match=r"has more than LoRAs, base_model\.model\.lm_head"):
        zoo.compose_adapters(base, [tmp_path / "lora", tmp_path / "lora"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    stored = load_file(file)
    stored["base_model.model.model.layers.0.mlp.head.weight"] = stored.pop("base_model.model.lm_head.weight")
    save_file(stored, file)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: .*mlp.head.weight is neither a matrix"):
        zoo.adapt(base, source=tmp_path / "lora")
