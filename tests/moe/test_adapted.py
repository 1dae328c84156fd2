"""Mixtures of parameter-efficient experts, against loops over tokens and experts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zoo.moe import (
    MLP,
    AdaMix,
    AdaptedLinear,
    Capacity,
    LoRAExperts,
    LoRALinear,
    MixLoRAExperts,
    MoE,
    PromptMixture,
    ScaledLinear,
    expert_losses,
    lora,
    record,
)
from zoo.moe.routers import (
    DenseRouter,
    LabelRouter,
    MoCLERouter,
    SiRARouter,
    SMEARRouter,
    SMoPRouter,
    TaskMixtureRouter,
    TaskRouter,
    TopKRouter,
)

D, OUT, E, R = 7, 10, 5, 3
GATES = {
    "dense": lambda: DenseRouter(D, E),
    "one of five": lambda: TopKRouter(D, E, 1),
    "two of five": lambda: TopKRouter(D, E, 2, normalize=True),
    "two of five with capacity": lambda: TopKRouter(D, E, 2, capacity=Capacity(1.0)),
    "label": lambda: LabelRouter(D, E),
    "task": lambda: TaskMixtureRouter(D, E, num_tasks=4),
    "cluster": lambda: MoCLERouter(D, E, num_clusters=4, temperature=0.7),
    "all to one": lambda: TaskRouter(D, E, 1, num_tasks=4),
}


def same(found, expected, inputs):
    """Values, and the gradients of a random function of them."""
    torch.testing.assert_close(found, expected)
    scale = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * scale).sum(), inputs, retain_graph=True) for y in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def linear(inputs=D, outputs=OUT):
    return nn.Linear(inputs, outputs).double().requires_grad_(False)


def adapted(make, columns=None, **options):
    base = linear()
    out = OUT if columns is None else columns[1] - columns[0]
    made = AdaptedLinear(base, make(), LoRAExperts(E, D, R, alpha=5.0, out_dim=out), columns, **options).double()
    nn.init.normal_(made.lora.b)
    return made


def labels(x):
    return {name: torch.randint(4, x.shape[:-1]) for name in ("label", "task", "cluster")}


def summed(made, x, weight):
    """sum_e weight_e alpha / r B_e A_e x, a token and an expert at a time."""
    a, b = made.lora.a, made.lora.b
    rows = []
    for t, token in enumerate(x):
        row = x.new_zeros(b.shape[1])
        for e in range(E):
            row = row + weight[t, e] * 5.0 / R * (b[e] @ (a[e] @ token))
        rows.append(row)
    return torch.stack(rows) if rows else x @ a[0].T @ b[0].T


@pytest.mark.parametrize("one_product", [0, 10**6])
@pytest.mark.parametrize("tokens", [0, 1, 13])
@pytest.mark.parametrize("gate", GATES)
def test_a_linear_layer_gets_its_experts_products(gate, tokens, one_product, monkeypatch):
    monkeypatch.setattr(lora, "ONE_PRODUCT", one_product)
    made, x = adapted(GATES[gate]), torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    context = labels(x)
    with record(made) as step:
        found = made(x, **context)
    (decision,) = step.routings[""]
    expected = F.linear(x, made.base.weight, made.base.bias) + summed(made, x, decision.dense())
    gate = [p for p in made.router.parameters() if tokens and decision.weight.requires_grad]
    same(found, expected, [x, made.lora.a, made.lora.b, *gate])


@pytest.mark.parametrize("one_product", [0, 10**6])
def test_a_masked_token_keeps_the_layers_output_whatever_it_holds(one_product, monkeypatch):
    monkeypatch.setattr(lora, "ONE_PRODUCT", one_product)
    made, x = adapted(GATES["dense"]), torch.randn(2, 6, D, dtype=torch.float64)
    mask = torch.rand(2, 6) > 0.5
    x[~mask] = float("nan")
    y = made(x, mask=mask)
    expected = adapted_values(made, x[mask])
    torch.testing.assert_close(y[mask], expected)
    y[mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)
    x[~mask] = 3.0
    torch.testing.assert_close(made(x, mask=mask)[~mask], made.base(x[~mask]))


def adapted_values(made, x):
    return made.base(x) + summed(made, x, (x @ made.router.weight.T).softmax(-1))


def test_columns_alone_change():
    made, x = adapted(GATES["dense"], columns=(4, 9)), torch.randn(3, 2, D, dtype=torch.float64)
    more = summed(made, x.flatten(0, 1), (x.flatten(0, 1) @ made.router.weight.T).softmax(-1)).view(3, 2, 5)
    expected = made.base(x).clone()
    expected[..., 4:9] += more
    torch.testing.assert_close(made(x), expected)


def test_a_merging_gate_makes_one_map_a_sequence():
    made, x = adapted(lambda: SMEARRouter(D, E)).eval(), torch.randn(3, 4, D, dtype=torch.float64)
    with record(made) as step:
        found = made(x)
    weight = step.routings[""][0].weight
    a, b = (torch.einsum("ge,e...->g...", weight, p) for p in (made.lora.a, made.lora.b))
    torch.testing.assert_close(found, made.base(x) + 5.0 / R * torch.einsum("gor,grd,gsd->gso", b, a, x))


def test_one_lora_is_its_product():
    base, x = linear(), torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    made = LoRALinear(base, LoRAExperts(1, D, R, 5.0, OUT)).double()
    assert torch.equal(made(x), base(x))
    nn.init.normal_(made.lora.b)
    a, b = made.lora.a, made.lora.b
    same(made(x), base(x) + 5.0 / R * x @ a[0].T @ b[0].T, [x, a, b])
    merged = base.weight + made.lora.product(torch.ones(1))
    torch.testing.assert_close(made(x), F.linear(x, merged, base.bias))


@pytest.mark.parametrize("make", [lambda: DenseRouter(D, E), lambda: TopKRouter(D, E, 2)])
def test_fresh_experts_change_nothing(make):
    base, x = nn.Linear(D, OUT), torch.randn(4, 9, D)
    assert torch.equal(AdaptedLinear(base, make(), LoRAExperts(E, D, R, out_dim=OUT))(x), base(x))
    for scale, columns in (("input", None), ("output", (2, 2 + D))):
        assert torch.equal(ScaledLinear(base, make(), scale, columns)(x), base(x))


@pytest.mark.parametrize("tokens", [0, 1, 8])
@pytest.mark.parametrize("scale", ["input", "output"])
def test_vectors_scale_what_the_gate_reads(tokens, scale):
    base, x = linear(), torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    width = D if scale == "input" else OUT
    made = ScaledLinear(base, DenseRouter(width, E), scale).double()
    nn.init.normal_(made.vectors)
    y = x if scale == "input" else F.linear(x, base.weight, base.bias)
    p = (y @ made.router.weight.T).softmax(-1)
    y = y * sum(p[:, e : e + 1] * made.vectors[e] for e in range(E))
    expected = F.linear(y, base.weight, base.bias) if scale == "input" else y
    same(made(x), expected, [x, made.vectors, made.router.weight])


class Swiglu(nn.Module):
    def __init__(self, dim, hidden, fused=False):
        super().__init__()
        if fused:
            self.fc1 = nn.Linear(dim, 2 * hidden)
        else:
            self.gate, self.fc1 = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("form", ["gated", "fused", "fused, gate last", "plain"])
def test_mixlora_is_an_mlp_with_changed_weights_for_each_expert(form, tokens):
    hidden, targets = 6, ("fc1", "fc2") if form == "plain" else None
    mlp = Swiglu(D, hidden, fused="fused" in form).double().requires_grad_(False)
    layout = ("gate" if form == "gated" else None, "fc1", "fc2")
    activation = "silu" if form == "plain" else "swiglu"
    experts = MixLoRAExperts(mlp, layout, activation, E, R, 5.0, gate_last="last" in form, targets=targets)
    moe = MoE(TopKRouter(D, E, 2, normalize=True), experts).double()
    for part in experts.lora.values():
        nn.init.normal_(part.b)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    with record(moe) as step:
        found = moe(x)
    weight = step.routings[""][0].dense()

    def layer(name, e, rows):
        part = experts.lora[name]
        own = getattr(mlp, name)
        return F.linear(rows, own.weight + 5.0 / R * part.b[e] @ part.a[e], own.bias)

    expected = torch.zeros_like(x)
    for e in range(E):
        up = layer("fc1", e, x)
        if form == "gated":
            inner = F.silu(layer("gate", e, x)) * up
        elif form == "plain":
            inner = F.silu(up)
        else:
            gate, value = up.chunk(2, dim=-1)[:: -1 if "last" in form else 1]
            inner = F.silu(gate) * value
        expected = expected + weight[:, e : e + 1] * layer("fc2", e, inner)
    inputs = [x, moe.router.weight, *experts.lora.parameters()]
    if tokens:
        same(found, expected, inputs)
    else:
        assert found.shape == x.shape


def test_mixlora_clamps_both_sides_where_its_activation_does():
    """gpt-oss's: min(g, 7) sigmoid(1.702 min(g, 7)) (clamp(u, -7, 7) + 1), in layers apart."""
    mlp = MLP(D, 6, "swiglu_clamped", bias=True).double().requires_grad_(False)
    experts = MixLoRAExperts(mlp, ("gate_proj", "up_proj", "down_proj"), "swiglu_clamped", E, R, 5.0)
    moe = MoE(TopKRouter(D, E, 2, normalize=True), experts).double()
    for part in experts.lora.values():
        nn.init.normal_(part.b)
    x = (20 * torch.randn(9, D, dtype=torch.float64)).requires_grad_()
    with record(moe) as step:
        found = moe(x)
    weight, expected = step.routings[""][0].dense(), torch.zeros_like(x)
    for e in range(E):
        layers = {}
        for name, part in experts.lora.items():
            own = getattr(mlp, name)
            layers[name] = own.weight + 5.0 / R * part.b[e] @ part.a[e], own.bias
        gate, up = (F.linear(x, *layers[name]) for name in ("gate_proj", "up_proj"))
        assert (gate > 7).any()
        assert (up.abs() > 7).any()
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        expected = expected + weight[:, e : e + 1] * F.linear(inner, *layers["down_proj"])
    same(found, expected, [x, moe.router.weight, *experts.lora.parameters()])


def test_mixlora_adds_to_the_named_layers_alone():
    mlp = Swiglu(D, 6)
    experts = MixLoRAExperts(mlp, ("gate", "fc1", "fc2"), "swiglu", E, R, targets=("gate",))
    assert set(experts.lora) == {"gate"}
    with pytest.raises(ValueError, match="MixLoRAExperts: no layer 'up'; the MLP has gate, fc1, fc2"):
        MixLoRAExperts(mlp, ("gate", "fc1", "fc2"), "swiglu", E, R, targets=("up",))


@pytest.mark.parametrize("shared", [None, "up", "down"])
def test_adamix_draws_each_half_and_means_them_in_evaluation(shared):
    base, x = linear(OUT, D), torch.randn(4, OUT, dtype=torch.float64, requires_grad=True)
    made = AdaMix(base, 3, D, R, shared).double()
    assert all(torch.equal(part, part[:1].expand_as(part)) for part in (made.down, made.down_bias))
    assert torch.equal(made(x), base(x))
    for parameter in (made.down, made.down_bias, made.up, made.up_bias):
        nn.init.normal_(parameter)
    h = base(x)

    def through(down, down_bias, up, up_bias):
        return h + F.gelu(h @ down.T + down_bias) @ up.T + up_bias

    parts = made.down, made.down_bias, made.up, made.up_bias
    downs, ups = made.down.shape[0], made.up.shape[0]
    every = {
        (i, j): through(made.down[i], made.down_bias[i], made.up[j], made.up_bias[j])
        for i in range(downs)
        for j in range(ups)
    }
    met = set()
    for _ in range(200):
        y = made(x)
        (pair,) = [pair for pair, value in every.items() if torch.allclose(y, value)]
        met.add(pair)
    assert met == set(every)  # of nine pairs one is missed in 200 draws with probability 5e-10
    same(y, every[pair], [x, *parts])
    same(made.eval()(x), through(*(p.mean(0) for p in parts)), [x, *parts])
    one = made.merged()
    assert one.down.shape[0] == one.up.shape[0] == 1
    torch.testing.assert_close(one.train()(x), made(x))


def test_sira_drops_probabilities_before_the_choice():
    router = SiRARouter(D, E, 2, expert_dropout=0.4, losses={"switch": 1.0}).double()
    x = torch.randn(500, D, dtype=torch.float64)
    p = (x @ router.weight.T).softmax(-1)
    torch.manual_seed(3)
    decision = router(x)
    torch.manual_seed(3)
    kept = F.dropout(p, 0.4)
    chosen = torch.zeros_like(p).scatter(1, kept.topk(2).indices, 1.0)
    torch.testing.assert_close(decision.dense(), kept * chosen)
    torch.testing.assert_close(decision.losses["switch"], E * (chosen.mean(0) / 2 * p.mean(0)).sum())
    chosen = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0)
    torch.testing.assert_close(router.eval()(x).dense(), p * chosen)


def test_mocle_weighs_a_clusters_expert_against_the_universal_one():
    router = MoCLERouter(D, E, num_clusters=4, temperature=0.5).double()
    x, cluster = torch.randn(3, 4, D, dtype=torch.float64), torch.tensor([2, 0, 3])
    p = ((router.cluster_embedding @ router.weight.T) / 0.5).softmax(-1)
    expected = torch.zeros(3, 4, E, dtype=torch.float64)
    for b, c in enumerate(cluster):
        expected[b, :, p[c].argmax()] = p[c].max()
        expected[b, :, E - 1] = 1 - p[c].max()
    torch.testing.assert_close(router(x, cluster=cluster).dense(), expected.flatten(0, 1))
    with pytest.raises(ValueError, match="MoCLERouter needs cluster in the context"):
        router(x)


def test_a_tasks_weights_are_those_of_its_embedding():
    router = TaskMixtureRouter(D, E, num_tasks=4, task_dim=3).double()
    task = torch.tensor([1, 3])
    expected = (router.task_embedding @ router.weight.T).softmax(-1)[task].repeat_interleave(5, 0)
    torch.testing.assert_close(router(torch.randn(2, 5, D), task=task).dense(), expected)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (1, 1), (3, 4)])
def test_prompts_are_for_any_number_of_sequences_and_tokens(batch, length):
    made, x = (
        PromptMixture(SMoPRouter(D, E, losses={"switch": 0.1}), 2),
        torch.randn(batch, length, D, requires_grad=True),
    )
    with record(made) as step:
        found = made(x, torch.zeros(batch, length, dtype=torch.bool))
    (found.square().sum() + sum(step.losses().values())).backward()
    assert found.shape == (batch, 2, D)
    assert all(p.grad.isfinite().all() for p in made.parameters())
    assert not x.grad.any()  # all of it is masked


def pairs(outputs, expert, temperature):
    """The contrast, a pair at a time."""
    z = [o / o.norm() for o in outputs]
    terms = []
    for i in range(len(z)):
        rest = [math.e ** (z[i] @ z[n] / temperature) for n in range(len(z)) if expert[n] != expert[i]]
        for j in range(len(z)):
            if j != i and expert[j] == expert[i] and rest:
                own = math.e ** (z[i] @ z[j] / temperature)
                terms.append(-torch.log(own / (own + sum(rest))))
    return sum(terms) / len(terms) if terms else outputs.sum() * 0


@pytest.mark.parametrize("expert", [[0, 0, 1, 2, 2, 2], [0, 1, 2], [1, 1, 1], [4], []])
def test_contrast_pulls_an_experts_outputs_together(expert):
    outputs = torch.randn(len(expert), OUT, dtype=torch.float64, requires_grad=True)
    found = expert_losses.contrast(outputs, torch.tensor(expert, dtype=torch.int64), 0.3)
    same(found, pairs(outputs, expert, 0.3), [outputs])


@pytest.mark.parametrize("samples", [1000, 7, 1])
def test_the_contrast_is_recorded_with_the_gates_losses(samples):
    made = adapted(
        lambda: TopKRouter(D, E, 2, normalize=True, losses={"switch": 0.01}),
        contrastive={"weight": 0.5, "temperature": 0.3, "samples": samples},
    )
    x = torch.randn(12, D, dtype=torch.float64)
    with record(made) as step:
        made(x)
    decision, losses = step.routings[""][0], step.losses()
    assert set(losses) == {"switch", "contrastive"}
    taken = range(0, 24, math.ceil(24 / samples))
    expert, token = decision.expert_index, decision.token_index
    a, b = made.lora.a, made.lora.b
    outputs = torch.stack([5.0 / R * b[expert[i]] @ a[expert[i]] @ x[token[i]] for i in taken])
    same(losses["contrastive"], 0.5 * pairs(outputs, [int(expert[i]) for i in taken], 0.3), [a, b])
    with record(made.eval()) as step:
        made(x)
    assert not step.losses()


def test_adapters_keep_their_own_precision():
    base = linear().bfloat16()
    made = AdaptedLinear(base, DenseRouter(D, E), LoRAExperts(E, D, R, out_dim=OUT))
    nn.init.normal_(made.lora.b)
    x = torch.randn(6, D, dtype=torch.bfloat16)
    y = made(x)
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert made.lora.a.grad.dtype == torch.float32
    twin = copy.deepcopy(made).float()
    torch.testing.assert_close(y.float(), twin(x.float()), rtol=0.02, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = twin(x.float())
    torch.testing.assert_close(rounded.float(), twin(x.float()), rtol=0.05, atol=0.1)


def test_dropout_is_one_for_all_experts_of_a_token():
    made = adapted(GATES["dense"])
    made.lora.dropout = 0.5
    x = torch.randn(20, D, dtype=torch.float64)
    torch.manual_seed(0)
    found = made(x)
    torch.manual_seed(0)
    weight = (x @ made.router.weight.T).softmax(-1)
    torch.testing.assert_close(found, made.base(x) + summed(made, F.dropout(x, 0.5), weight))
    torch.testing.assert_close(made.eval()(x), made.base(x) + summed(made, x, weight))


def test_what_does_not_fit_is_named():
    base = nn.Linear(D, OUT)
    cases = [
        (lambda: AdaptedLinear(base, DenseRouter(D, E), LoRAExperts(E, D, R)), "the layer leads from 7 to 10, but the"),
        (lambda: AdaptedLinear(base, DenseRouter(D, 2), LoRAExperts(E, D, R, out_dim=OUT)), "the router routes 2 exp"),
        (lambda: AdaptedLinear(base, DenseRouter(D, E), LoRAExperts(E, D, R, out_dim=4), (8, 12)), "columns (8, 12)"),
        (lambda: ScaledLinear(base, DenseRouter(D, E)), "ScaledLinear: the router routes 5 experts of width 7"),
        (lambda: ScaledLinear(base, DenseRouter(D, E), "both"), "scale must be 'input' or 'output', got 'both'"),
        (lambda: LoRALinear(base, LoRAExperts(2, D, R, out_dim=OUT)), "LoRALinear: expected one expert, got 2"),
        (lambda: AdaMix(base, 0, D), "AdaMix: num_experts must be at least 1, got 0"),
        (lambda: AdaMix(base, 2, D, shared="both"), "AdaMix: shared must be None, 'up' or 'down'"),
        (lambda: SiRARouter(D, E, expert_dropout=1.0), "expert_dropout must be at least 0 and below 1, got 1.0"),
        (lambda: MoCLERouter(D, 1, num_clusters=2), "MoCLERouter: expected two experts or more"),
        (lambda: TaskMixtureRouter(D, E, num_tasks=0), "num_tasks=0"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError) as caught:
            make()
        assert message in str(caught.value)
    made = AdaptedLinear(base, DenseRouter(D, E), LoRAExperts(E, D, R, out_dim=OUT))
    with pytest.raises(ValueError, match="AdaptedLinear: expected a mask"):
        made(torch.ones(2, 3, D), mask=torch.ones(2, 4, dtype=torch.bool))
