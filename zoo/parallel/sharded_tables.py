"""Tables of torchrec's collections in pieces on several processes, and the whole ones made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import ShardingEnv
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.shard import shard_modules
from torchrec.distributed.sharding_plan import column_wise, construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingPlan

from .fused_tables import KINDS

COLLECTIONS = EmbeddingBagCollection | EmbeddingCollection
_FUSED = "fused"  # torchrec's compute kernel that updates in backward
_LANES = 4  # FBGEMM's tables have a multiple of so many columns


def shard(
    model: nn.Module,
    plain: Mapping[str, Any],
    optimizer: str,
    lr: float,
    eps: float,
    sharding: str,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Replace the collections of a model by sharded ones with the tables of process 0: {path: {table: its pieces}}."""
    fused = {"optimizer": KINDS[optimizer], "learning_rate": lr, "eps": eps}
    sharders: list[Any] = [EmbeddingBagCollectionSharder(fused), EmbeddingCollectionSharder(fused)]
    whole = {
        path: {key: value.detach() for key, value in module.state_dict().items()} for path, module in plain.items()
    }
    if sharding == "auto":
        plan = _planned(model, plain, sharders, optimizer, device)
    else:
        plan = ShardingPlan({path: _plan(module, sharding, device) for path, module in plain.items()})
    shard_modules(model, ShardingEnv.from_process_group(dist.group.WORLD), device, plan, sharders)
    layout = {}
    for path, tables in whole.items():
        collection: Any = model.get_submodule(path)
        pieces = collection.state_dict()
        for key, table in tables.items():
            sent = table.to(device)
            dist.broadcast(sent, src=0)
            write_whole(pieces[key], sent)
        collection.register_state_dict_post_hook(_give_whole)
        layout[path] = by_table(pieces)
    return layout


def by_table(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a state has, by table: torchrec's keys end in "name.weight", with or without a path before that."""
    return {key.split(".")[-2]: value for key, value in found.items()}


def _planned(
    model: nn.Module, plain: Mapping[str, Any], sharders: list[Any], optimizer: str, device: torch.device
) -> ShardingPlan:
    """What torchrec's planner says, of what keeps to the optimizer: not to split rows that have one step size."""
    kinds = [ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE]
    if optimizer != "rowwise_adagrad":
        kinds.append(ShardingType.COLUMN_WISE)
    limits = ParameterConstraints(sharding_types=[k.value for k in kinds], compute_kernels=[_FUSED])
    names = {config.name for module in plain.values() for config in _configs(module)}
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device=device.type),
        constraints=dict.fromkeys(names, limits),
    )
    return planner.collective_plan(model, sharders, dist.group.WORLD)


def _plan(collection: Any, sharding: str, device: torch.device) -> Any:
    """Every table in one way, or whole where it has too few rows or columns for it.

    Whole tables and columns go, those of the largest table first, where the fewest numbers are.
    """
    world = dist.get_world_size()
    numbers = [0] * world
    ways: dict[str, Any] = {}
    for config in sorted(_configs(collection), key=lambda c: -c.num_embeddings * c.embedding_dim):
        rows, columns = config.num_embeddings, config.embedding_dim
        # FBGEMM reads wrong memory where a process has no row: rows are cut in blocks, and the last may be empty.
        if sharding == "row_wise" and (world - 1) * -(-rows // world) < rows:
            ways[config.name] = row_wise(compute_kernel=_FUSED)
            continue
        pieces = 1
        if sharding == "column_wise":
            pieces = max((n for n in range(1, world + 1) if columns % (n * _LANES) == 0), default=1)
        ranks = sorted(sorted(range(world), key=lambda r: numbers[r])[:pieces])
        for rank in ranks:
            numbers[rank] += rows * columns // pieces
        way = column_wise(ranks, compute_kernel=_FUSED) if pieces > 1 else table_wise(ranks[0], compute_kernel=_FUSED)
        ways[config.name] = way
    return construct_module_sharding_plan(collection, ways, local_size=world, world_size=world, device_type=device.type)


def _configs(collection: Any) -> list[Any]:
    bags = isinstance(collection, EmbeddingBagCollection)
    return collection.embedding_bag_configs() if bags else collection.embedding_configs()


def _give_whole(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key, value in state.items():
        if key.startswith(prefix):
            state[key] = whole_tensor(value)


def whole_tensor(tensor: Any) -> Tensor:
    """The whole of a tensor that may lie in pieces on several processes, on every one's CPU; collective then."""
    if not isinstance(tensor, ShardedTensor):
        return tensor
    return _gathered(tensor, tensor.local_shards(), rowwise=False)


def whole_sums(table: Any, sums: Any | None, rowwise: bool) -> Tensor:
    """The whole of what an optimizer keeps for a table: a number for each of its rows, or for each of its weights.

    `sums` may be None on a process without a piece of the table. Collective where the table lies in pieces.
    """
    if not isinstance(table, ShardedTensor):
        assert isinstance(sums, Tensor)
        return sums
    return _gathered(table, sums.local_shards() if isinstance(sums, ShardedTensor) else [], rowwise)


def _gathered(table: ShardedTensor, own: list[Any], rowwise: bool) -> Tensor:
    """Every piece, sent by the process that has it; the pieces are cut as those of the table are."""
    kept = slice(0, 1 if rowwise else 2)
    whole = torch.empty(table.size()[kept], dtype=table.dtype)
    mine = {tuple(shard.metadata.shard_offsets): shard.tensor.detach() for shard in own}
    piece: Any
    for piece in table.metadata().shards_metadata:
        sizes, key = piece.shard_sizes[kept], tuple(piece.shard_offsets[kept])
        if 0 in sizes:
            continue
        if piece.placement.rank() == dist.get_rank():
            sent = mine[key].reshape(sizes).contiguous()
        else:
            sent = torch.empty(sizes, dtype=table.dtype, device=piece.placement.device())
        dist.broadcast(sent, src=piece.placement.rank())
        _cut(whole, piece, kept).copy_(sent)
    return whole


def write_whole(tensor: Any, whole: Tensor) -> None:
    """Write a whole tensor into one of its size that may lie in pieces; no process waits for another."""
    with torch.no_grad():
        if not isinstance(tensor, ShardedTensor):
            tensor.copy_(whole)
            return
        kept = slice(0, whole.ndim)
        for own in tensor.local_shards():
            own.tensor.copy_(_cut(whole, own.metadata, kept).reshape(own.tensor.shape))


def _cut(whole: Tensor, piece: Any, kept: slice) -> Tensor:
    """The part of a whole tensor that a piece of it holds."""
    places = zip(piece.shard_offsets[kept], piece.shard_sizes[kept])
    return whole[tuple(slice(start, start + size) for start, size in places)]
