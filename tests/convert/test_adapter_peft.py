"""LoRA in peft's layout, against weights that are merged by its formula into transformers' own models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import zoo
from zoo.moe import LoRAOfExperts

E, D, F = 3, 16, 20
SIZES = {"vocab_size": 40, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = "model.layers.{}.mlp.experts"


def eager(model):
    model.set_experts_implementation("eager")  # others have no float64
    return model.double().eval()


def mixtral_of(hidden):
    return eager(MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=hidden, num_local_experts=E)))


@pytest.fixture
def mixtral():
    return mixtral_of(F)


def gpt_oss(hidden):
    """Experts as [E, in, out], gate and up in turns; random biases."""
    config = GptOssConfig(**SIZES, intermediate_size=hidden, num_local_experts=E, head_dim=8, num_experts_per_tok=2)
    model = eager(GptOssForCausalLM(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return model


@pytest.fixture
def tokens():
    return torch.randint(3, 40, (2, 7))


def base_of(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    return zoo.from_pretrained(tmp_path / "base", dtype=torch.float64)


def write(folder, tensors, **config):
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{name}": t.clone() for name, t in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def pair(rank, inputs, outputs, number=1):
    """A [E r, I] and B [O, r E], as peft holds them."""
    a, b = torch.randn(number * rank, inputs), torch.randn(outputs, rank * number)
    return a.double() / inputs**0.5, b.double() / rank**0.5


def of_expert(a, b, e, number):
    """A_e [r, I] and B_e [O, r]: rows of expert after expert, columns with the experts innermost."""
    rank = a.shape[0] // number
    return a[e * rank : (e + 1) * rank], b[:, [r * number + e for r in range(rank)]]


def same(found, expected):
    with torch.no_grad():
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # files hold float32


def single(tensors):
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.mark.parametrize("rslora", [False, True])
def test_linear_layers_with_ranks_and_alphas_of_their_own(rslora, mixtral, tokens, tmp_path):
    base = base_of(mixtral, tmp_path)
    tensors, weights = {}, dict(mixtral.named_parameters())
    for i in range(2):
        for name, rank, alpha in (("q_proj", 2, 3.0), ("v_proj", 4, 5.0)):
            path = f"model.layers.{i}.self_attn.{name}"
            weight = weights[f"{path}.weight"]
            a, b = pair(rank, weight.shape[1], weight.shape[0])
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            weight.data += alpha / (rank**0.5 if rslora else rank) * b.float().double() @ a.float().double()
    options = {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 5}, "use_rslora": rslora}
    folder = write(tmp_path / "lora", single(tensors), **options, base_model_name_or_path=str(tmp_path / "base"))
    with torch.no_grad():
        same(zoo.from_pretrained(folder, dtype=torch.float64)(tokens).logits, mixtral(tokens).logits)
        adapted = zoo.adapt(base, source=folder)
        same(adapted(tokens).logits, mixtral(tokens).logits)
    zoo.save_pretrained(adapted, tmp_path / "ours")
    with torch.no_grad():
        again = zoo.from_pretrained(tmp_path / "ours", base=base)
        assert torch.equal(again(tokens).logits, adapted(tokens).logits)


def with_stacks(model, folder, hidden, swapped, transposed, **config):
    """A folder with LoRAs of all experts, which the model's own weights get; swapped has A for what goes out."""
    tensors, weights = {}, dict(model.named_parameters())
    for i in range(2):
        path = EXPERTS.format(i)
        for name, parameter, size in (
            (f"{path}.base_layer", "gate_up_proj", (D, 2 * hidden)),
            (path, "down_proj", (hidden, D)),
        ):
            a, b = (side.float() for side in pair(2, *(size[::-1] if swapped else size), E))
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            for e in range(E):
                mine = of_expert(a.double(), b.double(), e, E)
                delta = 3 / 2 * mine[1] @ mine[0]
                weights[f"{path}.{parameter}"].data[e] += delta.T if swapped != transposed else delta
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return write(folder, tensors, target_parameters=targets, **config)


@pytest.mark.parametrize("older", [False, True], ids=["last goes in", "middle goes in"])
@pytest.mark.parametrize("hidden", [F, D // 2, D])
def test_stacked_experts(older, hidden, tokens, tmp_path):
    """A second parameter's matrices stand around the first one's; before peft 0.19 they were the other way round.

    Of widths D / 2 and D one of the two is square.
    """
    mixtral = mixtral_of(hidden)
    base, version = base_of(mixtral, tmp_path), {} if older else {"peft_version": "0.21.2"}
    folder = with_stacks(mixtral, tmp_path / "lora", hidden, older, False, **version)
    adapted = zoo.from_pretrained(folder, base=base)
    assert any(isinstance(module, LoRAOfExperts) for module in adapted.modules())
    with torch.no_grad():
        same(adapted(tokens).logits, mixtral(tokens).logits)


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2"])
@pytest.mark.parametrize("hidden", [F, D])
def test_experts_that_transformers_holds_transposed_and_in_turns(hidden, version, tokens, tmp_path):
    model = gpt_oss(hidden)
    base = base_of(model, tmp_path)
    folder = with_stacks(model, tmp_path / "lora", hidden, False, True, peft_version=version)
    adapted = zoo.from_pretrained(folder, base=base)
    with torch.no_grad():
        same(adapted(tokens).logits, model(tokens).logits)
    zoo.save_pretrained(adapted, tmp_path / "again", peft=True)
    fresh = eager(GptOssForCausalLM.from_pretrained(tmp_path / "base"))
    with torch.no_grad():
        same(merged(fresh, tmp_path / "again", transposed=True)(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("where", ["block_sparse_moe", "mlp"])
def test_a_pair_for_some_experts_by_their_published_names(where, mixtral, tokens, tmp_path):
    base = base_of(mixtral, tmp_path)
    tensors, weights = {}, dict(mixtral.named_parameters())
    rows = {"w1": slice(0, F), "w3": slice(F, 2 * F)}
    for name, e in (("w1", 0), ("w3", 0), ("w2", 0), ("w3", 2)):
        a, b = pair(2, F if name == "w2" else D, D if name == "w2" else F)
        a, b = a.float(), b.float()
        path = f"model.layers.1.{where}.experts.{e}.{name}"
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        delta = 3 / 2 * b.double() @ a.double()
        if name == "w2":
            weights[EXPERTS.format(1) + ".down_proj"].data[e] += delta
        else:
            weights[EXPERTS.format(1) + ".gate_up_proj"].data[e, rows[name]] += delta
    adapted = zoo.from_pretrained(write(tmp_path / "lora", tensors), base=base)
    with torch.no_grad():
        same(adapted(tokens).logits, mixtral(tokens).logits)
    learns = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert learns
    assert all(".layers.1." in name and ".lora." in name for name in learns)


def trained(model, *targets, **options):
    adapted = zoo.adapt(model, "LoRA", targets=list(targets), alpha=5, **options)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora." in name:
                parameter.normal_(0, 0.3)
    return adapted


def merged(model, folder, transposed=False):
    """transformers' model with what a folder in peft's layout adds to its weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        n.removeprefix("base_model.model."): t for n, t in load_file(folder / "adapter_model.safetensors").items()
    }
    scale, weights, used = config["lora_alpha"] / config["r"], dict(model.named_parameters()), 0
    for name in config["target_modules"]:
        a, b = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        delta = scale * b @ a
        weights[f"{name}.weight"].data += delta.T if config["fan_in_fan_out"] else delta
        used += 2
    for target in config["target_parameters"] or ():
        owner, _, parameter = target.rpartition(".")
        around = parameter == "gate_up_proj" and f"{owner}.down_proj" in config["target_parameters"]
        path = f"{owner}.base_layer" if around else owner
        a, b = (tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
        for e in range(E):
            mine = of_expert(a, b, e, E)
            delta = scale * mine[1] @ mine[0]
            weights[target].data[e] += delta.T if transposed else delta
        used += 2
    assert used == len(tensors)
    return model


@pytest.mark.parametrize(
    "targets", [("query", "value"), ("gate", "up", "down"), ("up",), ("down", "output")], ids=lambda t: "+".join(t)
)
def test_what_is_written_adds_what_the_adapted_model_has(targets, mixtral, tokens, tmp_path):
    adapted = trained(base_of(mixtral, tmp_path), *targets, rank=3)
    zoo.save_pretrained(adapted, tmp_path / "lora", peft=True)
    with torch.no_grad():
        same(adapted(tokens).logits, merged(mixtral, tmp_path / "lora")(tokens).logits)
        again = zoo.from_pretrained(tmp_path / "lora", dtype=torch.float64)
        same(again(tokens).logits, adapted(tokens).logits)


def test_parts_of_fused_layers_and_several_loras_are_written_as_one(tokens, tmp_path):
    sizes = {"vocab_size": 40, "n_embd": D, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0)).double().eval()
    once = trained(base_of(model, tmp_path), "query", "value", rank=2)
    twice = zoo.adapt(once, "LoRA", targets=["value", "output"], rank=3, alpha=7)
    with torch.no_grad():
        for name, parameter in twice.named_parameters():
            if name.endswith("lora.b"):
                parameter.normal_(0, 0.3)
    zoo.save_pretrained(twice, tmp_path / "lora", peft=True)
    with torch.no_grad():
        same(twice(tokens).logits, merged(model, tmp_path / "lora")(tokens).logits)


def test_what_peft_cannot_hold_is_refused(mixtral, tmp_path):
    base = base_of(mixtral, tmp_path)
    for adapted, told in (
        (zoo.adapt(base, "MoLoRA", num_experts=2), "peft's layout is for LoRA, the model has MoLoRA"),
        (zoo.adapt(base, "LoRA", unfreeze=[EXPERTS.format(0)]), "no place for what else is trained, as .*experts.down"),
        (base, "peft's layout is for LoRA, MixtralForCausalLM has no adapters"),
    ):
        with pytest.raises(ValueError, match=told):
            zoo.save_pretrained(adapted, tmp_path / "out", peft=True)
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit_are_named(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=F))
    path = "model.layers.0.self_attn.q_proj"
    a, b = torch.randn(2, D), torch.randn(D, 2)
    good = {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    cases = [
        ({}, {"use_dora": True}, "use_dora=True is not supported"),
        ({}, {"peft_type": "IA3"}, "expected peft_type LORA without biases"),
        ({}, {"bias": "all"}, "expected peft_type LORA without biases"),
        ({f"{path}.lora_B.weight": None}, {}, "q_proj has lora_A alone"),
        ({f"{path}.lora_B.weight": torch.randn(D + 1, 2)}, {}, rf"expected \[r, {D}\] and \[{D}, r\]"),
        (
            {"model.layers.0.mlp.router.lora_A.weight": a, "model.layers.0.mlp.router.lora_B.weight": b},
            {},
            "is no layer",
        ),
        (
            {"model.layers.0.mlp.experts.0.w1.lora_A.weight": a, "model.layers.0.mlp.experts.0.w1.lora_B.weight": b},
            {},
            "no",
        ),
        ({f"{path}.lora_embedding_A": b}, {}, "is no matrix of a LoRA"),
    ]
    for number, (change, config, told) in enumerate(cases):
        tensors = {name: t for name, t in {**good, **change}.items() if t is not None}
        folder = write(tmp_path / str(number), tensors, **config)
        with pytest.raises(ValueError, match=told) as raised:
            zoo.adapt(model, source=folder)
        assert str(folder) in str(raised.value)
    folder = write(tmp_path / "it", good)
    with pytest.raises(
        ValueError, match=r"adapter_config.json: the model that adapters stand beside was read from nowhere"
    ):
        zoo.from_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: no such file"):
        zoo.adapt(model, source=folder)
