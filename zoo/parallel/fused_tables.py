"""Embedding collections of one process whose tables are updated in backward, on any device.

torchrec's own fused collections give these too, but of single ids only on GPUs, and of bags more slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.modules.fused_embedding_modules import EmbeddingFusedOptimizer

from ..data.tables_batch import in_order

KINDS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}
_POOLING = {PoolingType.SUM: PoolingMode.SUM, PoolingType.MEAN: PoolingMode.MEAN}


class FusedTables(nn.Module):
    """What fused collections share: FBGEMM's lookup in all tables, and its weights under torchrec's names.

    The weights are frozen parameters, so that no other optimizer takes them; `fused_optimizer` is theirs.
    """

    def __init__(
        self,
        where: str,
        tables: Sequence[Any],
        pooling: PoolingMode,
        optimizer: str,
        lr: float,
        eps: float,
        device: torch.device,
    ) -> None:
        super().__init__()
        cpu = device.type == "cpu"
        memory = EmbeddingLocation.HOST if cpu else EmbeddingLocation.DEVICE
        compute = ComputeDevice.CPU if cpu else ComputeDevice.CUDA
        lookup = SplitTableBatchedEmbeddingBagsCodegen(
            [(t.num_embeddings, t.embedding_dim, memory, compute) for t in tables],
            feature_table_map=[i for i, table in enumerate(tables) for _ in table.feature_names],
            pooling_mode=pooling,
            optimizer=KINDS[optimizer],
            learning_rate=lr,
            eps=eps,
            device=device,
        )
        self._lookup = [lookup]  # in a list, so that its flat buffers are not in the state beside the tables
        self.fused_optimizer = EmbeddingFusedOptimizer(tables, lookup)
        self.features = [name for table in tables for name in table.feature_names]
        weights = nn.ModuleDict({table.name: nn.Module() for table in tables})
        for table, weight in zip(tables, lookup.split_embedding_weights()):
            weights[table.name].weight = nn.Parameter(weight, requires_grad=False)
        self.add_module(where, weights)

    def look_up(self, ids: KeyedJaggedTensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Of ids whose keys are `features`: [B, widths of all] pooled, or [ids of all, width]."""
        return self._lookup[0](ids.values(), ids.offsets(), per_sample_weights=weights)


class FusedBags(FusedTables):
    """A torchrec EmbeddingBagCollection whose tables learn in backward. Raises ValueError for poolings that differ."""

    def __init__(self, tables: Sequence[EmbeddingBagConfig], is_weighted: bool, *options: Any) -> None:
        kinds = {table.pooling for table in tables}
        if len(kinds) > 1:
            raise ValueError(
                f"expected one pooling for all tables of a collection, got {sorted(k.name for k in kinds)}"
            )
        super().__init__("embedding_bags", tables, _POOLING[kinds.pop()], *options)
        self._is_weighted = is_weighted
        self._widths = [table.embedding_dim for table in tables for _ in table.feature_names]

    def forward(self, ids: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings by feature, [B, widths of all]."""
        ids = in_order(ids, self.features)
        pooled = self.look_up(ids, ids.weights() if self._is_weighted else None)
        return KeyedTensor(self.features, self._widths, pooled)


class FusedItems(FusedTables):
    """A torchrec EmbeddingCollection whose tables learn in backward."""

    def __init__(self, tables: Sequence[EmbeddingConfig], *options: Any) -> None:
        super().__init__("embeddings", tables, PoolingMode.NONE, *options)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Embeddings by feature, [ids of all rows, width]."""
        ids = in_order(ids, self.features)
        pieces = self.look_up(ids).split(ids.length_per_key())
        lengths = ids.lengths().view(len(self.features), -1)
        return {name: JaggedTensor(pieces[i], lengths=lengths[i]) for i, name in enumerate(self.features)}
