"""Any gate in any model: the ways to name one, and what is filled in."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import zoo
from zoo.gates import layer_gates
from zoo.moe import Capacity, MoE, Router, Routing
from zoo.moe.routers import ExpertChoiceRouter, TopKRouter


class EveryOther(Router):
    """Sends tokens to expert 0 and 1 in turn; keeps what it was told."""

    def __init__(self, dim: int, num_experts: int, first: int = 0) -> None:
        super().__init__(dim, num_experts)
        self.first = first
        self.seen: list[dict] = []

    def forward(self, x: Tensor, **context) -> Routing:
        self.seen.append(context)
        tokens = x.reshape(-1, self.dim).shape[0]
        expert = (torch.arange(tokens)[:, None] + self.first) % 2
        return Routing.from_choices(expert, torch.ones(tokens, 1), self.num_experts)


def gates(router, **overrides) -> list:
    model = zoo.create_model("language/mixtral_tiny", num_hidden_layers=2, router=router, **overrides)
    tokens = torch.randint(0, 1024, (2, 8))
    model(tokens, labels=tokens).loss.backward()
    return [m.router for m in model.modules() if isinstance(m, MoE)]


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "TopKRouter", "k": 1, "jitter": 0.01},
        {"class_path": "zoo.moe.routers.TopKRouter", "init_args": {"k": 1, "jitter": 0.01}},
        {"class_path": "TopKRouter", "init_args": {"k": 1, "jitter": 0.01}},
        functools.partial(TopKRouter, k=1, jitter=0.01),
        lambda dim, num_experts: TopKRouter(dim, num_experts, k=1, jitter=0.01),
    ],
)
def test_a_gate_may_be_named_in_many_ways(spec):
    made = gates(spec)
    assert [(g.k, g.jitter, g.dim, g.num_experts) for g in made] == [(1, 0.01, 128, 8)] * 2
    assert made[0] is not made[1]


@pytest.mark.parametrize("spec", ["TopKRouter", TopKRouter, {"name": "TopKRouter"}, "zoo.moe.routers.TopKRouter"])
def test_the_number_of_choices_is_the_configurations_unless_given(spec):
    assert [g.k for g in gates(spec, num_experts_per_tok=3)] == [3, 3]


def test_a_gate_of_ones_own_works_by_its_class_path():
    made = gates({"class_path": f"{__name__}.EveryOther", "init_args": {"first": 1}})
    assert [type(g).__name__ for g in made] == ["EveryOther"] * 2
    assert made[0].first == 1
    assert made[0].seen[0]["token_ids"].shape == (2, 8)


def test_losses_and_capacity_reach_the_familys_own_gate():
    model = zoo.create_model(
        "language/qwen3_moe_tiny", num_hidden_layers=2, losses={"switch": 0.01, "z": 0.001}, capacity=1.0
    )
    tokens = torch.randint(0, 1024, (2, 64))
    with zoo.moe.record(model) as step:
        model(tokens)
    assert set(step.losses()) == {"switch", "z"}
    assert all(value > 0 for value in step.losses().values())
    router = model.model.layers[0].mlp.router
    assert (router.normalize, router.k, router.capacity) == (True, 4, Capacity(factor=1.0))


class Roomy(Capacity):
    """A capacity of one's own: a place more than asked."""

    def places(self, *args, **kwargs):
        return super().places(*args, **kwargs) + 1


@pytest.mark.parametrize(
    "capacity",
    [
        1.5,
        {"factor": 1.5},
        Capacity(factor=1.5),
        {"class_path": "zoo.moe.Capacity", "init_args": {"factor": 1.5}},
        {"class_path": "Capacity", "init_args": {"factor": 1.5}},
        {"class_path": f"{__name__}.Roomy", "init_args": {"factor": 1.5}},
    ],
)
def test_capacity_may_be_a_factor_arguments_an_object_or_a_class_path(capacity):
    expected = (Roomy if "Roomy" in str(capacity) else Capacity)(factor=1.5)
    assert gates(None, capacity=capacity)[0].capacity == expected
    assert gates({"name": "TopKRouter", "capacity": capacity})[0].capacity == expected
    assert TopKRouter(8, 4, capacity=capacity).capacity == expected
    assert ExpertChoiceRouter(8, 4, capacity=capacity).capacity == expected


def test_a_capacity_of_ones_own_is_saved_by_its_class_path(tmp_path):
    model = zoo.create_model("vision/vmoe_tiny_test", router={"name": "TopKRouter", "capacity": Roomy(2.0)})
    zoo.save_pretrained(model, tmp_path / "model")
    read = zoo.from_pretrained(tmp_path / "model")
    assert {m.router.capacity for m in read.modules() if isinstance(m, MoE)} == {Roomy(2.0)}
    assert isinstance(next(m.router.capacity for m in read.modules() if isinstance(m, MoE)), Roomy)


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        ({"class_path": "zoo.moe.Capacity", "factor": 1.5}, "factor beside class_path; arguments belong in init_args"),
        ({"class_path": "zoo.moe.Router"}, "class_path 'zoo.moe.Router' is no zoo.moe.Capacity"),
        ({"class_path": "nowhere.Capacity"}, "class_path 'nowhere.Capacity' is no zoo.moe.Capacity"),
        ({"class_path": None}, "class_path None is no zoo.moe.Capacity"),
        ({"facto": 1.5}, "Capacity: unknown argument 'facto'; known: factor, eval_factor"),
        ({"class_path": "Capacity", "init_args": {"facto": 1.5}}, "Capacity: unknown argument 'facto'; known: factor"),
    ],
)
def test_a_wrong_capacity_is_explained(capacity, message):
    for make in (
        lambda: gates(None, capacity=capacity),
        lambda: gates({"name": "TopKRouter", "capacity": capacity}),
        lambda: zoo.create_model("vision/vmoe_tiny_test", capacity=capacity),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_losses_are_handed_to_another_gate_as_well():
    assert gates("TopKRouter", losses={"z": 0.1})[0].losses.terms.keys() == {"z"}
    with pytest.raises(ValueError, match="unknown argument of EveryOther 'losses'"):
        gates(EveryOther, losses={"z": 0.1})


class WithOptions(TopKRouter):
    """Hands on all that it does not know, as subclasses often do."""

    def __init__(self, *args, sharp: float = 2.0, **options) -> None:
        super().__init__(*args, **options)
        self.sharp = sharp


class Decided(TopKRouter):
    """Fixes k itself."""

    def __init__(self, dim: int, num_experts: int, **options) -> None:
        super().__init__(dim, num_experts, k=3, **options)


def by_function(dim: int, num_experts: int, **options) -> Router:
    return TopKRouter(dim, num_experts, **options)


def ks(model) -> set[int]:
    return {module.router.k for module in model.modules() if isinstance(module, MoE)}


@pytest.mark.parametrize("router", [WithOptions, by_function, functools.partial(WithOptions, sharp=1.0)])
def test_options_that_a_class_hands_on_are_filled_in_too(router):
    olmoe = zoo.create_model(
        "language/olmoe_tiny", num_experts_per_tok=3, router=router, losses={"z": 0.1}, capacity=2.0
    )
    assert ks(olmoe) == {3}
    assert ks(zoo.create_model("language/olmoe_tiny", num_experts_per_tok=3, router=[router], losses={"z": 0.1})) == {3}
    for k in (1, 3):
        assert ks(zoo.create_model("vision/vmoe_tiny_test", router=router, k=k)) == {k}
    assert ks(zoo.create_model("vision/vmoe_tiny_test", router=functools.partial(router, k=4), k=3)) == {3}
    dense = zoo.create_model("language/mixtral_tiny", dense=True).eval()
    tokens = torch.randint(0, 1024, (2, 9))
    sparse = zoo.upcycle(dense, num_experts=4, k=3, router=router)
    assert ks(sparse) == {3}
    with torch.no_grad():  # its weights are normalised, and so copies give what the MLP does
        torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_class_that_fixes_an_option_is_left_alone_and_no_random_number_is_drawn_to_find_out():
    torch.manual_seed(0)
    model = zoo.create_model("language/olmoe_tiny", router=Decided)
    assert ks(model) == {3}
    torch.manual_seed(0)
    other = zoo.create_model("language/olmoe_tiny", router=functools.partial(TopKRouter, k=3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_what_is_wrong_with_a_module_of_ones_own_is_said(tmp_path, monkeypatch):
    (tmp_path / "own_gates_a.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "own_gates_b.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"router 'own_gates_a.Mine': No module named 'a_library_that_is_not_there'"):
        gates("own_gates_a.Mine")
    with pytest.raises(ValueError, match=r"router 'own_gates_b.Mine': module 'own_gates_b' has no attribute 'Mine'$"):
        gates({"class_path": "own_gates_b.Mine"})


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("TopRouter", ValueError, "unknown router 'TopRouter'; did you mean TopKRouter"),
        ({"class_path": "zoo.moe.routers.TopkRouter"}, ValueError, "did you mean TopKRouter"),
        ({"class_path": "zoo.moe.rooters.TopKRouter"}, ValueError, "did you mean zoo.moe.routers.TopKRouter"),
        ({"name": "TopKRouter", "jiter": 1.0}, ValueError, "argument of TopKRouter 'jiter'; did you mean jitter"),
        ({"class_path": "TopKRouter", "args": {}}, ValueError, "did you mean init_args"),
        ({"k": 1}, TypeError, "expected a class, a function, a name"),
        (3, TypeError, "got 3"),
        (lambda dim, num_experts: torch.nn.Linear(dim, num_experts), TypeError, "made a Linear"),
        ({"name": "TopKRouter", "k": 99}, ValueError, "k must be between 1 and"),
    ],
)
def test_a_wrong_gate_is_explained(spec, error, message):
    with pytest.raises(error, match=message):
        gates(spec)


def test_one_gate_cannot_serve_every_layer():
    with pytest.raises(TypeError, match="every layer needs its own"):
        gates(TopKRouter(128, 8))


def test_a_gate_that_does_not_say_how_many_experts_a_token_meets_cannot_be_counted():
    model = zoo.create_model("language/mixtral_tiny", router=EveryOther)
    with pytest.raises(ValueError, match=r"mlp: EveryOther has no fixed number"):
        zoo.models.count_parameters(model)


def test_a_list_gives_the_first_layers_gates_and_its_last_goes_on():
    specs = [{"name": "HashRouter", "vocab_size": 32}, {"name": "TopKRouter", "k": 3}]
    make = layer_gates(specs, 8, 4, k=2, losses={"z": 0.1})
    made = [make() for _ in range(4)]
    assert [type(gate).__name__ for gate in made] == ["HashRouter", "TopKRouter", "TopKRouter", "TopKRouter"]
    assert all(gate.k == 3 and list(gate.losses.terms) == ["z"] for gate in made[1:])
    assert len({id(gate) for gate in made}) == 4


def test_a_list_that_can_make_no_use_of_what_is_given_says_so():
    with pytest.raises(ValueError, match="losses: none of the gates"):
        layer_gates([{"name": "HashRouter", "vocab_size": 32}], 8, 4, losses={"z": 0.1})
    with pytest.raises(ValueError, match="at least one gate"):
        layer_gates([], 8, 4)
