"""What a model sees of a row: every feature's vector from its ids one by one, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from zoo.data.tables_batch import TableBatch, keyed, random_batch
from zoo.data.tables_schema import Bag, Categorical, Dense, Schema, Sequence, Target
from zoo.models.recommendation_inputs import ATTENTION_HIDDEN, ActivationUnit, FeatureEncoder
from zoo.models.recommendation_model import DenseInputs, SeparateInputs, inputs_of

FEATURES = {
    "item": Categorical("item", num_embeddings=9),
    "price": Dense("price"),
    "training": Categorical("training", num_embeddings=5, dim=3),  # what a module has an attribute of
    "sum": Bag("sum", num_embeddings=7),
    "mean.bag": Bag("mean.bag", num_embeddings=7, dim=2, pooling="mean"),
    "weighted": Bag("weighted", num_embeddings=6, weights="w", dim=3),
    "weighted_mean": Bag("weighted_mean", num_embeddings=8, weights="w", pooling="mean"),
    # Bags without weights that share a table with one that has them.
    "beside": Bag("beside", num_embeddings=8, table="weighted_mean"),
    "beside_mean": Bag("beside_mean", num_embeddings=8, table="weighted_mean", pooling="mean"),
    "rate": Dense("rate"),
    "words": Sequence("words", num_embeddings=11, dim=2),
    "words_sum": Sequence("words_sum", num_embeddings=7, table="sum", pooling="sum"),
    # Features that share a table with a history that attends, whatever they are.
    "history.1": Sequence("history.1", num_embeddings=9, table="item", pooling="attention", target="item"),
    "history_2": Sequence("history_2", num_embeddings=9, table="item", pooling="attention", target="item"),
    "other": Sequence("other", num_embeddings=9, table="item", pooling="mean"),
    "shares": Bag("shares", num_embeddings=9, table="item", weights="w"),
    "shares_mean": Bag("shares_mean", num_embeddings=9, table="item", weights="w", pooling="mean"),
    "tags": Bag("tags", num_embeddings=9, table="item", pooling="mean"),
    "narrow": Sequence("narrow", num_embeddings=4, dim=3, pooling="attention", target="training"),
}
NEEDS = {"beside": "weighted_mean", "beside_mean": "weighted_mean", "narrow": "training", "words_sum": "sum"}
TASKS = (Target("click"),)


@pytest.fixture(autouse=True)
def seed():
    print("seed", torch.seed())  # pytest shows it with a failure


def schema_of(name):
    if name == "all":
        return Schema(tuple(FEATURES.values()), TASKS, dim=4)
    table = getattr(FEATURES[name], "table", None)
    wanted = {name, NEEDS.get(name), table}
    if table == "item":
        wanted.add("history.1")
    return Schema(tuple(f for key, f in FEATURES.items() if key in wanted), TASKS, dim=4)


def attention(unit, key, query, closest):
    """PReLU MLP of [key, query, key - query, key * query]: Deep Interest Network, section 4.3."""
    first, slope, last = unit.layers[0], unit.layers[1].weight.double(), unit.layers[2]
    z = first.weight.double() @ torch.cat([key, query, key - query, key * query]) + first.bias.double()
    closest.append(z.abs().min().item())
    return last.weight.double()[0] @ torch.where(z > 0, z, slope * z) + last.bias.double()[0]


def by_loop(encoder, batch, closest):
    """x [B, out_dim] from the ids of every row; `closest` gets how near to its kink the PReLU comes."""
    schema, tables, parts = encoder.schema, encoder.tables(), (batch.ids, batch.weighted, batch.sequences)
    jagged = {name: part[name] for part in parts if part is not None for name in part.keys()}  # noqa: SIM118
    x = torch.zeros(len(batch), encoder.out_dim, dtype=torch.double, requires_grad=True).clone()
    for b in range(len(batch)):
        for i, f in enumerate(schema.of(Dense)):
            x[b, encoder.columns[f.name]] = batch.dense[b, i].double()
        for f in (f for f in schema.features if not isinstance(f, Dense)):

            def vectors(name, b=b):
                bounds = jagged[name].offsets().tolist()
                own = slice(bounds[b], bounds[b + 1])
                weights = jagged[name].weights_or_none()
                found = [tables[name][i].double() for i in jagged[name].values()[own].tolist()]
                return found, [1.0] * len(found) if weights is None else weights[own].tolist()

            found, weights = vectors(f.name)
            pooling = getattr(f, "pooling", "sum")
            if pooling == "attention":
                (query,) = vectors(f.target)[0]
                weights = [attention(encoder.unit(f.name), key, query, closest) for key in found]
            y = sum((w * e for w, e in zip(weights, found)), torch.zeros(f.dim or schema.dim))
            x[b, encoder.columns[f.name]] = y / (sum(weights) or 1) if pooling == "mean" else y
    return x


def close(found, expected, scale=0.01):
    """Within what float32 rounds, relative to the largest value, or to a larger scale."""
    assert found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max() <= 1e-5 * max(expected.abs().max().item(), scale)


@pytest.mark.parametrize(("rows", "most"), [(6, 4), (1, 3), (3, 0), (0, 2)])
@pytest.mark.parametrize("name", ["all", *FEATURES])
def test_every_feature_is_what_its_ids_say(name, rows, most):
    schema = schema_of(name)
    if all(isinstance(f, Dense) for f in schema.features):
        schema = Schema((*schema.features, FEATURES["sum"]), TASKS, dim=4)
    closest = [0.0]
    while min(closest) < 1e-5:  # nearer to the kink rounding decides the gradient
        encoder, batch, closest = FeatureEncoder(schema), random_batch(schema, rows, most=most), [1.0]
        for unit in encoder.attention.values():
            unit.layers[1].weight.data.uniform_(-0.5, 0.5)
        expected = by_loop(encoder, batch, closest)
    x = encoder(batch)
    assert x.dtype == torch.float32
    close(x, expected)
    if rows:
        upstream, inputs = torch.randn_like(x), list(encoder.parameters())
        mine = torch.autograd.grad(x, inputs, upstream, materialize_grads=True)
        theirs = torch.autograd.grad(expected, inputs, upstream.double(), materialize_grads=True)
        # The gradient of a bias is a sum of what may cancel.
        scale = max(0.01, *(slope.abs().max().item() for slope in theirs))
        for one, other in zip(mine, theirs):
            close(one, other, scale)


@pytest.mark.parametrize("name", ["weighted", "weighted_mean", "beside_mean", "shares", "shares_mean", "all"])
def test_a_float64_encoder_takes_the_same_weights(name):
    """To float32, in which torchrec sums bags."""
    schema = schema_of(name)
    encoder, batch = FeatureEncoder(schema).double(), random_batch(schema, 6, most=4)
    batch = replace(batch, dense=batch.dense.double())
    x, expected = encoder(batch), by_loop(encoder, batch, [])
    assert x.dtype == torch.float64
    close(x, expected)
    upstream, inputs = torch.randn_like(x), list(encoder.tables().values())
    mine = torch.autograd.grad(x, inputs, upstream, materialize_grads=True)
    theirs = torch.autograd.grad(expected, inputs, upstream, materialize_grads=True)
    for one, other in zip(mine, theirs):
        close(one, other)


def test_columns_part_the_vector_by_feature_with_dense_ones_last():
    encoder = FeatureEncoder(schema_of("all"))
    taken = [i for where in encoder.columns.values() for i in range(where.start, where.stop)]
    assert sorted(taken) == list(range(encoder.out_dim))
    widths = {name: where.stop - where.start for name, where in encoder.columns.items()}
    assert widths == {f.name: 1 if isinstance(f, Dense) else f.dim or 4 for f in FEATURES.values()}
    assert list(encoder.columns)[-2:] == ["price", "rate"]


def test_features_that_name_a_table_share_its_rows():
    encoder = FeatureEncoder(schema_of("all"))
    tables, own = encoder.tables(), {}
    for f in (f for f in FEATURES.values() if not isinstance(f, Dense)):
        name = f.table or f.name
        own.setdefault(name, tables[f.name])
        assert tables[f.name] is own[name]
        assert tables[f.name].shape == (f.num_embeddings, f.dim or 4)
    assert len({id(table) for table in own.values()}) == len(own)
    units = {name: encoder.unit(name) for name in ("history.1", "history_2", "narrow")}
    assert len(set(units.values())) == 3
    learnt = {id(p) for p in encoder.parameters()}
    assert learnt == {id(p) for p in [*own.values(), *(p for unit in units.values() for p in unit.parameters())]}


def test_tables_start_within_one_over_the_root_of_their_rows():
    encoder = FeatureEncoder(Schema((Categorical("a", num_embeddings=400, dim=16),), TASKS))
    (table,) = encoder.tables().values()
    assert 0.95 / math.sqrt(400) < table.abs().max() <= 1 / math.sqrt(400)
    assert table.mean().abs() < 6 / math.sqrt(400 * 3 * table.numel())


def test_weights_are_multiplied_and_a_mean_divides_by_their_sum():
    """By hand: ids 1 and 2 with weights 3 and 1, no id, and an id of weight 0."""
    schema = Schema((FEATURES["weighted"], FEATURES["weighted_mean"]), TASKS, dim=4)
    encoder = FeatureEncoder(schema)
    ids, lengths, weights = torch.tensor([1, 2, 5]), torch.tensor([2, 0, 1]), torch.tensor([3.0, 1.0, 0.0])
    weighted = keyed(["weighted", "weighted_mean"], [ids] * 2, [lengths] * 2, [weights] * 2)
    x = encoder(TableBatch(torch.arange(3), torch.zeros(3, 0), None, weighted, None, torch.zeros(3, 1)))
    tables = encoder.tables()
    expected = torch.zeros(3, 7)
    total = 3 * tables["weighted"][1] + tables["weighted"][2]
    expected[0, encoder.columns["weighted"]] = total
    expected[0, encoder.columns["weighted_mean"]] = (
        0.75 * tables["weighted_mean"][1] + 0.25 * tables["weighted_mean"][2]
    )
    close(x, expected)
    assert not x[1:].any()
    slopes = torch.autograd.grad(x.sum(), list(tables.values()))
    assert [slope.sum(1).tolist() for slope in slopes] == [[0, 9, 3, 0, 0, 0], [0, 3, 1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("width", [1, 3])
def test_the_activation_unit_is_that_of_the_paper(width):
    unit = ActivationUnit(width).double()
    key, query = (torch.randn(7, width, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert unit.layers[0].weight.shape == (ATTENTION_HIDDEN, 4 * width)
    found = unit(key, query)
    expected = torch.stack([attention(unit, k, q, []) for k, q in zip(key, query)]).unsqueeze(1)
    torch.testing.assert_close(found, expected)
    inputs = [key, query, *unit.parameters()]
    upstream = torch.randn_like(expected)
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, expected))):
        torch.testing.assert_close(mine, theirs)
    assert unit(key[:0], query[:0]).shape == (0, 1)


@pytest.mark.parametrize("domain", [None, "item", "training"])
def test_a_domain_is_the_id_of_its_feature(domain):
    schema = Schema(tuple(FEATURES.values()), TASKS, dim=4, domain=domain)
    batch, encoder = random_batch(schema, 20), FeatureEncoder(schema)
    found = encoder.domain(batch)
    if domain is None:
        assert found is None
    else:
        jagged = batch.ids[domain]
        assert jagged.lengths().tolist() == [1] * 20
        assert found.tolist() == jagged.values().tolist()
        assert SeparateInputs(schema).domain(batch).tolist() == found.tolist()


def test_without_sparse_features_rows_are_their_numbers():
    schema = Schema((Dense("a"), Dense("b")), TASKS)
    inputs, batch = inputs_of(schema), random_batch(schema, 5)
    assert isinstance(inputs, DenseInputs)
    assert torch.equal(inputs(batch), batch.dense)
    assert (inputs.out_dim, inputs.columns) == (2, {"a": slice(0, 1), "b": slice(1, 2)})
    assert inputs.domain(batch) is None


def test_separate_tasks_have_tables_of_their_own():
    schema = Schema((FEATURES["sum"], FEATURES["price"]), (Target("a"), Target("b")), dim=4)
    inputs, batch = SeparateInputs(schema), random_batch(schema, 6)
    x = inputs(batch)
    assert x.shape == (2, 6, inputs.out_dim)
    for own, each in zip(x, inputs.each):
        close(own, by_loop(each, batch, []))
    one, other = (next(each.parameters()) for each in inputs.each)
    assert one is not other
    slopes = torch.autograd.grad(x[0].square().sum(), (one, other), materialize_grads=True)
    assert not slopes[1].any()


@pytest.mark.parametrize(
    ("features", "told"),
    [
        ([Categorical("a")], "feature 'a': num_embeddings is open; expected a schema fitted to data"),
        (
            [Categorical("a", num_embeddings=5), Bag("b", num_embeddings=6, table="a")],
            r"feature 'b' wants table 'a' as \(6, 4\); other features as \(5, 4\)",
        ),
        (
            [Categorical("a", num_embeddings=5, dim=3), Sequence("b", num_embeddings=5, table="a")],
            r"feature 'b' wants table 'a' as \(5, 4\); other features as \(5, 3\)",
        ),
        (
            [Categorical("a.b", num_embeddings=5), Bag("a_b", num_embeddings=5)],
            "tables a.b, a_b: some have the same name once dots are underscores",
        ),
        (
            [
                Categorical("a", num_embeddings=5),
                Sequence("h.1", num_embeddings=5, table="a", pooling="attention", target="a"),
                Sequence("h_1", num_embeddings=5, table="a", pooling="attention", target="a"),
            ],
            "feature 'h_1': another with attention has the same name once dots are underscores",
        ),
    ],
    ids=["open", "rows", "width", "dots of tables", "dots of histories"],
)
def test_what_does_not_fit_is_named(features, told):
    with pytest.raises(ValueError, match=told):
        FeatureEncoder(Schema(tuple(features), TASKS, dim=4))
