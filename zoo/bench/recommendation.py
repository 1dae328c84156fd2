"""`zoo bench recommendation`: training steps of an MMoE at DeepCTR-Torch's shape, beside rivals and the bare products.

A click-through model of 26 categorical features and 13 numbers, 8 experts of 128-64 units, two tasks with linear gates
and towers of 32, batches of 1024 rows in memory. A step is forward, loss, backward and update. The rivals train all
their parameters with Adam, as they do by default, and plain PyTorch once more with sparse gradients of its table, for
SparseAdam; ours trains tables with row-wise Adagrad in the backward pass, on the rows used alone, and the rest with
Adam; once more with products in bfloat16 and weights in float32 (autocast, as `--trainer.precision bf16-mixed` does).
"dense" is the matrix products of forward and backward and nothing else.

Two contestants train on rows of a table in memory, shuffled and put into batches: ours by `zoo.data.Loader`, and
DeepCTR-Torch by its `fit`, which is how it is used.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any

from .turns import Contestant, compare, device_of, file_to_write, machine, measure_steps, show

FIELDS, NUMBERS, TASKS = 26, 13, 2
STEPS = 10  # a turn


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status."""
    args = _parse(argv)
    device = device_of(args.device)
    field = contestants(args, device)
    rows = compare(field, measure_steps(field, args.repeats, STEPS, device))
    for row in rows:
        if "ms" in row:
            row["rows_per_second"] = 1e3 * args.batch / row["ms"]
    show(
        f"MMoE, {args.batch} rows of {FIELDS} ids and {NUMBERS} numbers, {args.experts} experts: one training step",
        rows,
    )
    ours = next(row for row in rows if row["name"] == OURS)
    ratios = {row["name"]: row["ms"] / ours["ms"] for row in rows if "ms" in row and row["name"] != OURS}
    print(f"\n  {OURS}: {ours['rows_per_second']:,.0f} rows/s; as fast as")
    for name, ratio in ratios.items():
        print(f"    {name:<26}{ratio:>6.2f} times")
    if args.json:
        facts = {name: getattr(args, name) for name in ("batch", "experts", "rows", "dim")}
        args.json.write_text(
            json.dumps({"machine": machine(device), **facts, "rows": rows, "ratios": ratios}, indent=1) + "\n"
        )
        print(f"\nwritten to {args.json}")
    return 0


OURS = "zoo"


def contestants(args: argparse.Namespace, device: str) -> list[Contestant]:
    """Everyone who can run here, on one random batch, and who cannot, with the reason."""
    import torch

    ids = torch.randint(args.rows, (args.batch, FIELDS), device=device)
    numbers = torch.rand(args.batch, NUMBERS, device=device)
    labels = torch.randint(2, (args.batch, TASKS), device=device).float()
    step, from_rows = _ours(args, device, ids, numbers, labels)
    found = [
        Contestant("dense", "limit", _products(args, device), []),
        Contestant(OURS, "zoo", step, []),
        Contestant(f"{OURS}, from rows", "zoo", from_rows, [], steps=STEPS),
        Contestant(f"{OURS}, bfloat16", "zoo", _ours(args, device, ids, numbers, labels, bfloat16=True)[0], []),
    ]
    for name, ways in {"batched": (True, False), "a loop": (False, False), "sparse gradients": (True, True)}.items():
        plain = _plain(args, device, ids, numbers, labels, *ways)
        found.append(Contestant(f"plain torch, {name}", "plain", plain, []))
    rivals: dict[str, tuple[str, Callable[..., Callable[[], Any]], int]] = {
        "DeepCTR-Torch": ("deepctr_torch", _deepctr, 1),
        "DeepCTR-Torch, its fit": ("deepctr_torch", _deepctr_fit, STEPS),
        "torch-rechub": ("torch_rechub", _rechub, 1),
    }
    for name, (package, make, steps) in rivals.items():
        if find_spec(package):
            found.append(Contestant(name, "rival", make(args, device, ids, numbers, labels), [], steps=steps))
        else:
            found.append(Contestant(name, "rival", _never, [], refuses=f"{package} is not installed"))
    return found


def _never() -> Any:
    raise RuntimeError("a contestant that refuses does not run")


def _products(args: argparse.Namespace, device: str) -> Callable[[], Any]:
    """The products of forward and backward: experts, gates and towers."""
    import torch

    width, (wide, narrow), tower = FIELDS * args.dim + NUMBERS, args.widths, 32
    count = args.experts
    first = (1, args.batch, width, count * wide)
    rest = [(count, args.batch, wide, narrow), (1, args.batch, width, TASKS * count)]
    rest += [(TASKS, args.batch, narrow, tower), (TASKS, args.batch, tower, 1)]
    shapes = [
        (torch.randn(g, m, k, device=device), torch.randn(g, k, n, device=device)) for g, m, k, n in (first, *rest)
    ]
    grads = [torch.randn(a.shape[0], a.shape[1], b.shape[2], device=device) for a, b in shapes]
    outs = [(torch.empty_like(g), torch.empty_like(a), torch.empty_like(b)) for (a, b), g in zip(shapes, grads)]

    def run() -> Any:
        with torch.no_grad():
            for (a, b), g, (y, da, db) in zip(shapes, grads, outs):
                torch.bmm(a, b, out=y)
                torch.bmm(g, b.mT, out=da)
                torch.bmm(a.mT, g, out=db)
        return y

    return run


def _ours(
    args: argparse.Namespace, device: str, ids: Any, numbers: Any, labels: Any, bfloat16: bool = False
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A step on the batch, and STEPS of them on the batches of an epoch of rows, as `zoo.data.Loader` makes them."""
    import torch

    import zoo
    from zoo.data import Loader
    from zoo.data.tables_rows import Rows
    from zoo.data.tables_schema import Categorical, Dense, Schema, Target
    from zoo.parallel.embeddings import fuse_embeddings

    features = [Categorical(f"c{i}", num_embeddings=args.rows, ids="index") for i in range(FIELDS)]
    dense = [Dense(f"i{i}") for i in range(NUMBERS)]
    schema = Schema((*features, *dense), tuple(Target(f"t{i}") for i in range(TASKS)), dim=args.dim)
    model: Any = zoo.create_model(
        "recommendation/mmoe", schema=schema, num_experts=args.experts, expert_dims=list(args.widths), tower_dims=[32]
    ).to(device)
    tables = fuse_embeddings(model, "rowwise_adagrad", lr=0.01, device=device)
    rest = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    many = (torch.cat([part.cpu()] * STEPS).numpy() for part in (numbers, ids.int(), labels))
    numbers_, ids_, labels_ = many
    rows = Rows(schema, torch.arange(len(ids_)).numpy(), numbers_, ids_, {}, labels_)
    batch = rows.batch(range(args.batch)).to(device)
    loader = Loader(rows, args.batch, shuffle=True)

    def step(batch: Any = batch) -> Any:
        rest.zero_grad()
        tables.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
            outputs = model(batch)
        loss = sum(model.task_losses(outputs, batch).values())
        loss.backward()
        rest.step()
        tables.step()
        return loss

    def epoch() -> Any:
        for batch in loader:
            loss = step(batch.to(device))
        return loss

    return step, epoch


def _plain(
    args: argparse.Namespace, device: str, ids: Any, numbers: Any, labels: Any, batched: bool, sparse: bool = False
) -> Callable[[], Any]:
    """An MMoE as one would write it in torch: one table with an offset a field, experts batched or in a loop."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    width, (wide, narrow), count = FIELDS * args.dim + NUMBERS, args.widths, args.experts
    offsets = torch.arange(FIELDS, device=device) * args.rows
    table = nn.Embedding(FIELDS * args.rows, args.dim, sparse=sparse)
    first = nn.Linear(width, count * wide)
    second = nn.ParameterList([torch.randn(count, wide, narrow) / wide**0.5, torch.zeros(count, 1, narrow)])
    loop = [nn.Sequential(nn.Linear(width, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU()) for _ in range(count)]
    gates = nn.ModuleList(nn.Linear(width, count, bias=False) for _ in range(TASKS))
    towers = nn.ModuleList(nn.Sequential(nn.Linear(narrow, 32), nn.ReLU(), nn.Linear(32, 1)) for _ in range(TASKS))
    experts = nn.ModuleList(loop)
    everything = nn.ModuleList([table, gates, towers, *([first, second] if batched else [experts])]).to(device)
    rest = [p for p in everything.parameters() if not (sparse and p is table.weight)]
    optimizers: list[Any] = [torch.optim.Adam(rest, lr=1e-3)]
    optimizers += [torch.optim.SparseAdam(table.parameters(), lr=1e-3)] if sparse else []

    def mixed(x: Any) -> Any:
        if batched:
            hidden = first(x).relu().view(len(x), count, wide).transpose(0, 1)
            return torch.baddbmm(second[1], hidden, second[0]).relu().transpose(0, 1)
        return torch.stack([expert(x) for expert in experts], 1)

    def run() -> Any:
        everything.zero_grad()
        x = torch.cat([table(ids + offsets).flatten(1), numbers], 1)
        outputs, loss = mixed(x), torch.zeros((), device=device)
        for task, (gate, tower) in enumerate(zip(gates, towers)):
            y = tower((gate(x).softmax(-1).unsqueeze(1) @ outputs).squeeze(1))[:, 0]
            loss = loss + F.binary_cross_entropy_with_logits(y, labels[:, task])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss

    return run


def _deepctr_model(args: argparse.Namespace, device: str) -> Any:
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models.multitask import MMOE

    features = [SparseFeat(f"c{i}", args.rows, embedding_dim=args.dim) for i in range(FIELDS)]
    model = MMOE(
        features + [DenseFeat(f"i{i}", 1) for i in range(NUMBERS)],
        num_experts=args.experts,
        expert_dnn_hidden_units=tuple(args.widths),
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=(32,),
        task_types=("binary",) * TASKS,
        task_names=tuple(f"t{i}" for i in range(TASKS)),
        device=device,
    )
    model.compile("adam", "binary_crossentropy")
    return model


def _deepctr_fit(args: argparse.Namespace, device: str, ids: Any, numbers: Any, labels: Any) -> Callable[[], Any]:
    """Its `fit`, for STEPS batches."""
    import torch

    model = _deepctr_model(args, device)
    many = [torch.cat([part.cpu()] * STEPS).numpy() for part in (ids.float(), numbers, labels)]
    x = {f"c{i}": many[0][:, i] for i in range(FIELDS)} | {f"i{i}": many[1][:, i] for i in range(NUMBERS)}

    def run() -> Any:
        with redirect_stdout(io.StringIO()):
            history = model.fit(dict(x), many[2], batch_size=args.batch, verbose=0)
        return torch.tensor(history.history["loss"][-1])

    return run


def _deepctr(args: argparse.Namespace, device: str, ids: Any, numbers: Any, labels: Any) -> Callable[[], Any]:
    """The step that its `fit` makes of a batch, without what `fit` does around it."""
    import torch

    model = _deepctr_model(args, device).train()
    x = torch.cat([ids.float(), numbers], 1)

    def run() -> Any:
        predicted = model(x).squeeze()
        model.optim.zero_grad()
        loss: Any = sum(model.loss_func(predicted[:, i], labels[:, i], reduction="sum") for i in range(TASKS))
        (loss + model.get_regularization_loss() + model.aux_loss).backward()
        model.optim.step()
        return loss

    return run


def _rechub(args: argparse.Namespace, device: str, ids: Any, numbers: Any, labels: Any) -> Callable[[], Any]:
    """The step that its trainer makes of a batch."""
    import torch
    from torch.nn import functional as F
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE

    features = [SparseFeature(f"c{i}", args.rows, embed_dim=args.dim) for i in range(FIELDS)]
    features += [DenseFeature(f"i{i}") for i in range(NUMBERS)]
    expert, tower = {"dims": list(args.widths)}, {"dims": [32]}
    model = MMOE(features, ["classification"] * TASKS, args.experts, expert, [tower] * TASKS).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = {f"c{i}": ids[:, i] for i in range(FIELDS)} | {f"i{i}": numbers[:, i] for i in range(NUMBERS)}

    def run() -> Any:
        predicted = model(x)
        loss: Any = sum(F.binary_cross_entropy(predicted[:, i], labels[:, i]) for i in range(TASKS)) / TASKS
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return run


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zoo bench recommendation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=1024, help="rows (default 1024)")
    parser.add_argument("--rows", type=int, default=1000, help="rows of each embedding table (default 1000)")
    parser.add_argument("--dim", type=int, default=8, help="width of embeddings, a multiple of 4 (default 8)")
    parser.add_argument("--experts", type=int, default=8, help="experts (default 8)")
    parser.add_argument("--widths", type=int, nargs=2, default=[128, 64], help="of an expert's layers (default 128 64)")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--repeats", type=int, default=9, help=f"turns of {STEPS} steps each (default 9)")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args(argv)
    for name in ("batch", "rows", "dim", "experts", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    if min(args.widths) < 1:
        parser.error(f"--widths {args.widths[0]} {args.widths[1]}: expected at least 1 each")
    if args.dim % 4:
        parser.error(f"--dim {args.dim}: expected a multiple of 4, as tables that learn in backward are")
    return args
