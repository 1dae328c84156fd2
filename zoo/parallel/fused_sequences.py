"""Embeddings of single ids whose tables are updated in backward, on any device.

torchrec has fused collections of bags for every device, but of single ids for GPUs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec import EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.modules.fused_embedding_modules import EmbeddingFusedOptimizer

KINDS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


class FusedSequences(nn.Module):
    """A torchrec EmbeddingCollection whose tables learn in backward: the same interface and names of weights."""

    def __init__(
        self, tables: Sequence[EmbeddingConfig], optimizer: str, lr: float, eps: float, device: torch.device
    ) -> None:
        super().__init__()
        self._configs = list(tables)
        where = ComputeDevice.CPU if device.type == "cpu" else ComputeDevice.CUDA
        memory = EmbeddingLocation.HOST if device.type == "cpu" else EmbeddingLocation.DEVICE
        lookup = SplitTableBatchedEmbeddingBagsCodegen(
            [(t.num_embeddings, t.embedding_dim, memory, where) for t in tables],
            feature_table_map=[i for i, table in enumerate(tables) for _ in table.feature_names],
            pooling_mode=PoolingMode.NONE,
            optimizer=KINDS[optimizer],
            learning_rate=lr,
            eps=eps,
            device=device,
        )
        self._lookup = [lookup]  # in a list, so that its buffers are not in the state beside the tables they hold
        self.fused_optimizer = EmbeddingFusedOptimizer(tables, lookup)
        self.embeddings = nn.ModuleDict({table.name: nn.Module() for table in tables})
        for table, weight in zip(tables, lookup.split_embedding_weights()):
            self.embeddings[table.name].weight = nn.Parameter(weight, requires_grad=False)

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """Those of the tables."""
        return self._configs

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Embeddings by feature, [ids of all rows, width]."""
        names = [name for table in self._configs for name in table.feature_names]
        if ids.keys() != names:
            where = {key: i for i, key in enumerate(ids.keys())}
            ids = ids.permute([where[name] for name in names])
        embedded = self._lookup[0](ids.values(), ids.offsets())
        pieces = embedded.split(ids.length_per_key())
        lengths = ids.lengths().view(len(names), -1)
        return {name: JaggedTensor(pieces[i], lengths=lengths[i]) for i, name in enumerate(names)}
