"""Embedding tables that learn in the backward pass, on the rows used alone, and lie in pieces on several processes.

    tables = fuse_embeddings(model, "rowwise_adagrad", lr=0.01)
    rest = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)

torchrec and FBGEMM do the work. However the tables lie, a model and its optimizer load and give whole tables, so that a
checkpoint of four processes goes on with one. Both are collective then: every process asks for `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection

from ..nearest import unknown
from .fused_tables import FusedBags, FusedItems
from .sharded_tables import COLLECTIONS, by_table, shard, whole_sums, write_whole

Fused = Literal["rowwise_adagrad", "adagrad", "sgd"]
WIDTH = 4  # FBGEMM loads four numbers of a row at a time
Sharding = Literal["auto", "table_wise", "row_wise", "column_wise"]


def fuse_embeddings(
    model: nn.Module,
    optimizer: Fused = "rowwise_adagrad",
    lr: float = 0.01,
    eps: float = 1e-8,
    sharding: Sharding = "auto",
    device: torch.device | str = "cpu",
) -> TableOptimizer:
    """Replace a model's torchrec collections by ones whose tables are updated in backward; returns their optimizer.

    A row learns from the sum of its gradients in a batch, once, and a row that no id asks for is not touched. With a
    process group the tables are split over its processes as `sharding` says, start as process 0 has them, and learn
    from the mean over processes, as DistributedDataParallel's parameters do: "auto" asks torchrec's planner,
    "table_wise" spreads whole tables, "row_wise" splits the rows of each and "column_wise" the columns; where a table
    has too few of them it stays whole. DistributedDataParallel must not look at what lies so: see `fused_names`.

    Evaluate under `torch.no_grad()`: FBGEMM's lookups know no `torch.inference_mode()`.

    Args:
        model: any module with an EmbeddingBagCollection or EmbeddingCollection, not at its top; changed in place.
        optimizer: "rowwise_adagrad" (a step size a row, DLRM's), "adagrad" or "sgd".
        lr: learning rate.
        eps: added to the root of the sum of squares; "sgd" has none.
        sharding: for several processes.
        device: where the tables are to lie.

    Raises ValueError for an unknown optimizer or sharding, for a model without collections, for tables whose width is
    no multiple of 4, and for columns to be split under "rowwise_adagrad".
    """
    if optimizer not in get_args(Fused):
        raise unknown("optimizer of embeddings", optimizer, get_args(Fused))
    if sharding not in get_args(Sharding):
        raise unknown("sharding", sharding, get_args(Sharding))
    if sharding == "column_wise" and optimizer == "rowwise_adagrad":
        raise ValueError(
            "sharding 'column_wise' splits a row, and rowwise_adagrad has one step size for it: expected adagrad, sgd, "
            "or another sharding"
        )
    plain = {path: module for path, module in model.named_modules() if path and isinstance(module, COLLECTIONS)}
    if not plain:
        raise ValueError("fuse_embeddings: the model has no torchrec collection of embeddings below its top")
    for path, collection in plain.items():
        for table in _tables(collection):
            if table.embedding_dim % WIDTH:
                raise ValueError(
                    f"fuse_embeddings: expected tables a multiple of {WIDTH} wide, got {path}.{table.name} of "
                    f"{table.embedding_dim}"
                )
    where = torch.device(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        layout = shard(model, plain, optimizer, lr, eps, sharding, where)
    else:
        layout = _fuse(model, plain, optimizer, lr, eps, where)
    for collection in plain.values():
        collection.to("meta")
    return TableOptimizer(model, plain, layout, optimizer, lr)


def unfuse_embeddings(model: nn.Module, tables: TableOptimizer) -> None:
    """Put plain collections with whole tables back, on every process, for any optimizer to train; collective."""
    for path, plain in tables.plain.items():
        weights = {key: value.detach().clone() for key, value in model.get_submodule(path).state_dict().items()}
        plain.load_state_dict(weights, assign=True)
        plain.requires_grad_()
        _set(model, path, plain)


def fused_names(model: nn.Module) -> list[str]:
    """The names of the parameters and buffers of fused or sharded tables, by which others leave them alone."""
    found: list[str] = []
    for path, module in model.named_modules():
        if _is_fused(module):
            own = [*module.named_parameters(), *module.named_buffers()]
            found += dict.fromkeys(f"{path}.{name}" for name, _ in own)
    return found


class TableOptimizer(torch.optim.Optimizer):
    """The optimizer of tables that `fuse_embeddings` made: what it does is done in backward.

    `zero_grad` or `step` hands over the learning rate, so a schedule may move it. The state is that of whole tables,
    {path: {table: sums of squares}}, and `state_dict` is collective.
    """

    def __init__(
        self,
        model: nn.Module,
        plain: dict[str, nn.Module],
        layout: dict[str, dict[str, Any]],
        optimizer: str,
        lr: float,
    ) -> None:
        super().__init__([{"params": [torch.zeros(0)]}], {"lr": lr})
        self.plain = plain  # by path what fused collections were before, without memory
        self._layout, self._kind = layout, optimizer
        self._handed: float | None = None  # the learning rate that the tables know
        found: dict[str, Any] = {path: model.get_submodule(path) for path in layout}
        self._each = {path: module.fused_optimizer for path, module in found.items()}

    def step(self, closure: Any = None) -> Any:
        """Hand over the learning rate; the tables have moved already."""
        loss = None if closure is None else closure()
        self.zero_grad()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Hand over the learning rate for the backward that follows."""
        rate = self.param_groups[0]["lr"]
        if rate == self._handed:
            return
        for optimizer in self._each.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        self._handed = rate

    def _own(self) -> Iterator[tuple[str, str, Any, Any]]:
        """(path, table, how it lies, its sums or None) of all tables that have sums, in the same order everywhere."""
        if self._kind == "sgd":
            return
        for path, optimizer in self._each.items():
            states = by_table(optimizer.state_dict()["state"])
            for table, lies in self._layout[path].items():
                yield path, table, lies, next(iter(states.get(table, {}).values()), None)

    def state_dict(self) -> dict[str, Any]:
        """The sums of squares of whole tables, and the learning rate."""
        sums: dict[str, dict[str, Tensor]] = {path: {} for path in self._layout}
        for path, table, lies, own in self._own():
            sums[path][table] = whole_sums(lies, own, self._kind == "rowwise_adagrad")
        return {"sums": sums, "lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them up; raises ValueError for those of other tables or another optimizer, before any is taken."""
        pairs: list[tuple[Any, Tensor]] = []
        for path, table, lies, own in self._own():
            given = state_dict["sums"].get(path, {}).get(table)
            expected = list(lies.size())[: 1 if self._kind == "rowwise_adagrad" else 2]
            found = None if given is None else list(given.size())
            if found != expected:
                raise ValueError(f"sums of table {path}.{table}: expected {expected} of {self._kind}, found {found}")
            if own is not None:
                pairs.append((own, given))
        for own, given in pairs:
            write_whole(own, given)
        self.param_groups[0]["lr"] = state_dict["lr"]


def _fuse(
    model: nn.Module, plain: Mapping[str, Any], optimizer: str, lr: float, eps: float, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Replace the collections of a model on one process: {path: {table: its weights}}."""
    layout = {}
    for path, collection in plain.items():
        fused: Any
        if isinstance(collection, EmbeddingBagCollection):
            fused = FusedBags(_tables(collection), collection.is_weighted(), optimizer, lr, eps, device)
        else:
            fused = FusedItems(_tables(collection), optimizer, lr, eps, device)
        fused.load_state_dict(collection.state_dict())
        _set(model, path, fused)
        layout[path] = by_table(fused.state_dict())
    return layout


def _tables(collection: Any) -> Any:
    """What a collection's tables are like."""
    bags = isinstance(collection, EmbeddingBagCollection)
    return collection.embedding_bag_configs() if bags else collection.embedding_configs()


def _is_fused(module: Any) -> bool:
    return hasattr(module, "fused_optimizer")


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module  # a ModuleDict has no attributes to set
