"""From sparse to dense: methods against loops in float64, and models against what they were."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from converted_cases import output
from torch import nn
from torch.nn import functional as F

import zoo
from zoo.moe import MLP, Experts, MoE
from zoo.moe.routers import DenseRouter, TopKRouter

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
DENSE = {
    "Llama": {**SIZES, **HEADS},
    "Mistral": {**SIZES, **HEADS},
    "Qwen3": {**SIZES, **HEADS, "head_dim": 8},
    "Phi3": {**SIZES, **HEADS},
    "GPT2": GPT2,
    "GPTJ": {**GPT2, "rotary_dim": 4},
    "Bert": {**SIZES, "num_attention_heads": 4},
    "OPT": {**OPT, "word_embed_proj_dim": 32},
    "T5": T5,
}
FAMILIES = {"mixtral": "Mistral", "qwen2_moe": "Qwen2", "qwen3_moe": "Qwen3", "deepseek_v3": "DeepseekV3"}
METHODS = ["average", "sum", "topk", "svd", "concatenate", {"expert": 2}]


def language(prefix: str, **fields) -> nn.Module:
    kind = {"GPT2": "GPT2LMHeadModel", "T5": "T5ForConditionalGeneration", "Bert": "BertForMaskedLM"}.get(
        prefix, f"{prefix}ForCausalLM"
    )
    config = getattr(transformers, f"{prefix}Config")(**{**DENSE[prefix], **fields})
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def vit(**options) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


class One(nn.Module):
    """A model that is one layer, with a number in its name as blocks have."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([moe])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](x)


def layer(activation: str = "swiglu", bias: bool = False, num_experts: int = 4, hidden: int = 12, **beside) -> One:
    experts = Experts(num_experts, 8, hidden, activation, bias)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return One(MoE(TopKRouter(8, num_experts, k=2, normalize=True), experts, **beside)).double()


def mlp(x, w_in, w_out, b_in, b_out, activation):
    """One MLP in float64, from its definition."""
    hidden = x @ w_in.T + b_in
    if activation == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.relu(hidden)
    return hidden @ w_out.T + b_out


def parts(experts: Experts):
    zero = torch.zeros((), dtype=torch.float64)
    for e in range(experts.num_experts):
        b_in = zero if experts.b_in is None else experts.b_in[e]
        yield experts.w_in[e], experts.w_out[e], b_in, zero if experts.b_out is None else experts.b_out[e]


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("swiglu", True), ("relu", True)])
@pytest.mark.parametrize("weights", [None, [0.1, 0.4, 0.0, 0.3]])
def test_average_sum_and_concatenation_are_what_they_say(activation, bias, weights):
    model, x = layer(activation, bias), torch.randn(5, 8, dtype=torch.float64)
    a = [1.0] * 4 if weights is None else weights
    each = list(parts(model.blocks[0].experts))
    total = [sum(w * part[i] for w, part in zip(a, each)) for i in range(4)]
    expected = {
        "sum": mlp(x, *total, activation),
        "average": mlp(x, *(t / sum(a) for t in total), activation),
        "concatenate": sum(w * mlp(x, *part, activation) for w, part in zip(a, each)),
    }
    for method, y in expected.items():
        dense = zoo.to_dense(model, method=method, weights=weights, scale=1.5)
        wanted = y * 1.5 if method == "concatenate" else None
        if wanted is None:
            w_in, w_out, b_in, b_out = (t / (sum(a) if method == "average" else 1) for t in total)
            wanted = mlp(x, w_in, 1.5 * w_out, b_in, 1.5 * b_out, activation)
        assert error(dense(x), wanted) < 1e-12
    assert isinstance(model.blocks[0], MoE)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_top_k_takes_of_every_expert_the_neurons_of_largest_norm(activation):
    model = layer(activation, bias=True, hidden=10)
    experts, shares = model.blocks[0].experts, [0.5, 0.0, 0.3, 0.2]
    dense = zoo.to_dense(model, method="topk", weights=shares).blocks[0]
    rows = {"swiglu": 2, "relu": 1}[activation]
    into, out, neurons = experts.w_in.detach(), experts.w_out.detach(), []
    for e, count in enumerate([5, 0, 3, 2]):
        squares = [[*into[e, i::10].flatten().tolist(), *out[e, :, i].tolist()] for i in range(10)]
        norms = [sum(value**2 for value in own) for own in squares]
        neurons += [(e, i) for i in sorted(sorted(range(10), key=lambda i: -norms[i])[:count])]
    up = torch.stack([experts.w_in[e, i + 10 * (rows - 1)] for e, i in neurons])
    down = torch.stack([experts.w_out[e, :, i] for e, i in neurons], dim=1)
    assert torch.equal(dense.up_proj.weight, up)
    assert torch.equal(dense.down_proj.weight, down)
    assert torch.equal(dense.up_proj.bias, torch.stack([experts.b_in[e, i + 10 * (rows - 1)] for e, i in neurons]))
    expected = sum(share * experts.b_out[e] for e, share in enumerate(shares))
    assert error(dense.down_proj.bias, expected) < 1e-12


def test_svd_adds_the_best_approximations_of_a_part_of_the_rank():
    model = layer("relu", bias=True, num_experts=3, hidden=12)
    experts = model.blocks[0].experts
    dense = zoo.to_dense(model, method="svd").blocks[0]
    for found, stack in ((dense.up_proj.weight, experts.w_in), (dense.down_proj.weight, experts.w_out)):
        expected = torch.zeros_like(stack[0])
        for weight, rank in zip(stack, (3, 3, 2)):  # 8 over 3 experts
            values, vectors = torch.linalg.eigh(weight.T @ weight)
            best = vectors[:, values.argsort(descending=True)[:rank]]
            expected = expected + weight @ best @ best.T
        assert error(found, expected) < 1e-9
    assert error(dense.down_proj.bias, experts.b_out.sum(0)) < 1e-12


def test_concatenation_of_a_dense_gates_experts_and_a_shared_one_is_exact():
    torch.manual_seed(0)
    model = layer("relu", bias=True, shared=MLP(8, 20, "relu", bias=False))
    router = DenseRouter(8, 4)
    with torch.no_grad():
        router.weight.zero_()  # all experts alike, each weighed by a quarter
    model.blocks[0].router = router.double()
    x = torch.randn(6, 8, dtype=torch.float64)
    dense = zoo.to_dense(model, method="concatenate", weights=[0.25] * 4)
    assert dense.blocks[0].up_proj.out_features == 4 * 12 + 20
    assert error(dense(x), model(x)) < 1e-6  # the gate computes in float32


def test_a_gate_on_the_shared_expert_is_refused_or_replaced_by_a_factor():
    model, x = layer("relu", shared=MLP(8, 20, "relu"), shared_gate=True), torch.randn(6, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shared expert of blocks\.0 has a gate of its own, .*shared=factor"):
        zoo.to_dense(model)
    alone = copy.deepcopy(model)
    alone.blocks[0].shared = alone.blocks[0].shared_gate = None
    beside = model.blocks[0].shared(x)
    assert error(zoo.to_dense(model, shared=0.5)(x), zoo.to_dense(alone)(x) + 0.5 * beside) < 1e-12
    assert error(zoo.to_dense(model, shared=0)(x), zoo.to_dense(alone)(x)) < 1e-12


def test_weights_and_scale_by_usage_are_the_mean_combine_weights():
    model = layer("relu").float()
    model.blocks[0].router = TopKRouter(8, 4, k=2)  # weights that do not sum to one
    batches = [torch.randn(n, 8) for n in (1, 7, 12)]
    tokens = torch.cat(batches)
    probs = (tokens @ model.blocks[0].router.weight.detach().T).softmax(-1)
    kept = torch.tensor([[p if p in sorted(row)[-2:] else 0.0 for p in row] for row in probs.tolist()])
    mean, model = kept.mean(0), model.train()
    options = {"calibrate": lambda m: (m(x).sum() for x in batches)}
    found = zoo.to_dense(model, method="concatenate", weights="usage", **options)
    expected = zoo.to_dense(model, method="concatenate", weights=mean.tolist())
    assert error(found(tokens), expected(tokens)) < 1e-5
    found = zoo.to_dense(model, scale="usage", **options)
    assert error(found(tokens), zoo.to_dense(model, scale=float(mean.sum()))(tokens)) < 1e-5
    used = int((kept > 0).sum(0).argmax())
    found = zoo.to_dense(model, method={"expert": "used"}, **options)
    assert torch.equal(found(tokens), zoo.to_dense(model, method={"expert": used})(tokens))
    assert all(module.training for module in model.modules())
    with pytest.raises(ValueError, match="give calibrate, a function that runs the model"):
        zoo.to_dense(model, weights="usage")
    with pytest.raises(ValueError, match=r"calibrate ran no batch through blocks\.0"):
        zoo.to_dense(model, weights="usage", calibrate=lambda m: [])


@pytest.mark.filterwarnings("ignore:upcycle. dropout of only some units")
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("layers", ["all", [1]])
def test_upcycled_and_back_is_bit_for_bit_the_dense_model(name, layers):
    dense, ids = language(name), torch.randint(3, 64, (2, 9))
    sparse = zoo.upcycle(dense, layers=layers, num_experts=3)
    back = zoo.to_dense(sparse)
    assert type(back) is type(dense)
    assert {n: t.shape for n, t in back.state_dict().items()} == {n: t.shape for n, t in dense.state_dict().items()}
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in back.state_dict().items())
    assert torch.equal(output(back, ids), output(dense, ids))
    assert not back.training
    part = zoo.to_dense(sparse, layers=[0])
    assert error(output(part, ids), output(dense, ids)) < 2e-6
    assert sum(isinstance(m, MoE) for m in part.modules()) == sum(isinstance(m, MoE) for m in sparse.modules()) - 1


@pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}])
def test_an_upcycled_vit_and_back_is_timms_own(arguments, tmp_path):
    dense, x = vit().to(**arguments), torch.randn(2, 3, 32, 32).to(**arguments)
    dense.blocks[0].mlp.requires_grad_(False)
    sparse = zoo.upcycle(dense.train(), layers="all", num_experts=3)
    back = zoo.to_dense(sparse)
    assert back.training
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in dense.parameters()]
    assert {p.dtype for p in back.parameters()} == {p.dtype for p in dense.parameters()}
    assert torch.equal(output(back.eval(), x), output(dense.eval(), x))
    zoo.save_pretrained(back, tmp_path / "dense")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval().to(**arguments)
    assert torch.equal(output(theirs, x), output(dense, x))
    part = zoo.to_dense(sparse.eval(), layers=[1])
    zoo.save_pretrained(part, tmp_path / "part")
    assert torch.equal(output(zoo.from_pretrained(tmp_path / "part"), x), output(part, x))


def test_a_vmoe_loses_its_experts_and_keeps_its_layout(tmp_path):
    model, x = zoo.create_model("vision/vmoe_tiny_test", moe_layers="every-2").eval(), torch.randn(2, 3, 32, 32)
    for layers, left in (("all", 0), ([0], 1)):
        for method in ("average", "concatenate"):
            dense = zoo.to_dense(model, layers, method)
            assert sum(isinstance(m, MoE) for m in dense.modules()) == left
            if method == "average":
                zoo.save_pretrained(dense, tmp_path / f"{left}")
                assert torch.equal(output(zoo.from_pretrained(tmp_path / f"{left}"), x), output(dense, x))
            else:
                with pytest.raises(ValueError, match="has other tensors"):
                    zoo.save_pretrained(dense, tmp_path / "wide")
    every = zoo.create_model("vision/vmoe_tiny_test", moe_layers=[0, 1, 2, 3]).eval()
    wide = zoo.to_dense(every, method="concatenate")
    zoo.save_pretrained(wide, tmp_path / "wide")
    assert torch.equal(output(zoo.from_pretrained(tmp_path / "wide"), x), output(wide, x))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_family_becomes_its_dense_relative(family, tmp_path):
    model = zoo.create_model(
        f"language/{family}_tiny", num_hidden_layers=2, hidden_size=64, initializer_range=0.2
    ).eval()
    ids, options = torch.randint(3, 64, (2, 9)), {}
    if family == "qwen2_moe":
        options = {"shared": 0.5}
    if family == "deepseek_v3":
        options = {"width": model.config.intermediate_size}
    dense = zoo.to_dense(model, **options)
    assert type(dense).__name__ == f"{FAMILIES[family]}ForCausalLM"
    # The same as the sparse model whose experts are all the average, their weights summing to `scale`.
    merged = copy.deepcopy(model)
    for moe in merged.modules():
        if isinstance(moe, MoE):
            moe.router = TopKRouter(64, moe.experts.num_experts, k=1, normalize=True)
            for parameter in moe.experts.parameters():
                parameter.data = parameter.data.mean(0, keepdim=True).expand_as(parameter).clone()
            if moe.shared_gate is not None:
                nn.init.zeros_(moe.shared_gate.weight)  # a sigmoid of one half
    assert error(output(dense, ids), output(merged, ids)) < 1e-4
    zoo.save_pretrained(dense, tmp_path / "dense")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert torch.equal(output(theirs, ids), output(dense, ids))
    assert torch.equal(output(zoo.from_pretrained(tmp_path / "dense"), ids), output(dense, ids))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_family_with_dense_layers_can_say_which(family, tmp_path):
    model = zoo.create_model(f"language/{family}_tiny", num_hidden_layers=3).eval()
    options = {"width": model.config.intermediate_size} if family == "deepseek_v3" else {}
    part, ids = zoo.to_dense(model, layers=[0], **options), torch.randint(3, 64, (2, 9))
    zoo.save_pretrained(part, tmp_path / "part")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "part").eval()
    assert error(output(theirs, ids), output(part, ids)) < 2e-5
    assert torch.equal(output(zoo.from_pretrained(tmp_path / "part"), ids), output(part, ids))


@pytest.mark.parametrize(
    ("name", "layers"), [("mixtral", [0]), ("olmoe", "all"), ("granitemoe", "all"), ("deepseek_v3", "all")]
)
def test_what_no_layout_expresses_runs_and_is_not_written(name, layers, tmp_path):
    model = zoo.create_model(f"language/{name}_tiny", num_hidden_layers=2).eval()
    dense = zoo.to_dense(model, layers)
    assert output(dense, torch.randint(3, 64, (1, 5))).isfinite().all()
    again = copy.deepcopy(dense)
    again.load_state_dict(dense.state_dict())
    with pytest.raises(ValueError, match=r"to_dense or prune (made|changed).*tensors differ"):
        zoo.save_pretrained(dense, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_without_memory(method):
    def build():
        return zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, dtype=torch.bfloat16)

    with torch.device("meta"):
        dense = zoo.to_dense(build(), method=method, calibrate=lambda m: 1 / 0)
    real = zoo.to_dense(build(), method=method)
    shapes = [{n: (t.shape, t.dtype) for n, t in m.state_dict().items()} for m in (dense, real)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in dense.parameters())


def test_a_dense_model_trains_compiled_and_under_checkpointing():
    sparse = zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, tie_word_embeddings=True)
    dense, ids = zoo.to_dense(sparse).train(), torch.randint(3, 64, (2, 9))
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    dense.gradient_checkpointing_enable()
    dense(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in dense.parameters())
    compiled = torch.compile(zoo.to_dense(sparse).eval(), backend="eager")
    assert error(output(compiled, ids), output(dense.eval(), ids)) < 1e-5
    assert torch.equal(zoo.to_dense(torch.compile(sparse, backend="eager")).lm_head.weight, sparse.lm_head.weight)


def test_what_is_no_sum_of_mlps_is_refused_by_name():
    with pytest.raises(ValueError, match="Sequential has no mixture of experts"):
        zoo.to_dense(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"method.*'avrage'.*average"):
        zoo.to_dense(layer(), method="avrage")
    with pytest.raises(ValueError, match=r"method is one of .*got \{\'expert\': \'first\'\}"):
        zoo.to_dense(layer(), method={"expert": "first"})
    with pytest.raises(ValueError, match=r"blocks\.0 has 4 experts, none with number 4"):
        zoo.to_dense(layer(), method={"expert": 4})
    with pytest.raises(ValueError, match=r"blocks\.0 has 4 experts, weights has 3 numbers"):
        zoo.to_dense(layer(), weights=[1, 2, 3])
    with pytest.raises(ValueError, match=r"must not be negative, nor all zero"):
        zoo.to_dense(layer(), weights=[0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"weights has no entry for blocks\.0; it has other"):
        zoo.to_dense(layer(), weights={"other": [1, 1, 1, 1]})
    with pytest.raises(ValueError, match=r"blocks\.0 has 12 neurons, more than width=10"):
        zoo.to_dense(layer(), width=10)
    with pytest.raises(ValueError, match="activation relu, the experts beside it swiglu"):
        zoo.to_dense(layer(shared=MLP(8, 20, "relu")))
    with pytest.raises(ValueError, match=r"blocks\.0 has a gate between experts"):
        zoo.to_dense(layer(shared=MLP(8, 20), mix_gate=True))
    neurons = zoo.create_model("language/mixtral_tiny", num_hidden_layers=1, experts="NeuronExperts")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has NeuronExperts; expected Experts"):
        zoo.to_dense(neurons)
    isolated = zoo.create_model("vision_language/ernie4_5_vl_tiny")
    with pytest.raises(ValueError, match=r"mlp\.parts\.0 is a IsolatedMoE; expected a MoE that stands alone"):
        zoo.to_dense(isolated)
    spread = layer()
    spread.blocks[0].experts.parallel = lambda *_: None
    for convert in (zoo.to_dense, lambda model: zoo.prune(model, experts=[[0]])):
        with pytest.raises(ValueError, match="One is spread over processes; expected a model in one process"):
            convert(spread)


def test_models_that_are_made_from_arguments_of_ours_are_not_written_as_what_they_are_not(tmp_path):
    limoe = zoo.to_dense(zoo.create_model("vision_language/limoe_tiny"))
    assert not any(isinstance(module, MoE) for module in limoe.modules())
    with pytest.raises(ValueError, match="limoe_tiny was changed by to_dense or prune"):
        zoo.save_pretrained(limoe, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.filterwarnings("ignore:upcycle. dropout of only some units")
def test_an_upcycled_llava_is_a_llava_again(tmp_path):
    sparse = zoo.create_model("vision_language/moe_llava_tiny").eval()
    dense = zoo.to_dense(sparse)
    zoo.save_pretrained(dense, tmp_path / "saved")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.state_dict().items())


def test_qwen3s_heads_are_as_wide_as_those_of_a_sparse_one_that_does_not_say(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(vocab_size=64, **sizes, **heads)).eval()
    theirs.save_pretrained(tmp_path / "sparse")
    dense, ids = zoo.to_dense(zoo.from_pretrained(tmp_path / "sparse")), torch.randint(64, (2, 9))
    assert type(dense) is transformers.Qwen3ForCausalLM
    zoo.save_pretrained(dense, tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert error(output(again, ids), output(dense, ids)) < 1e-5


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(odd):
    model = zoo.create_model("vision/vmoe_tiny_test", num_experts=3, capacity=4.0)
    with pytest.raises(ValueError, match="weights of experts must not be negative"):
        zoo.to_dense(model, weights=[odd, 1.0, 1.0])
