"""A recommendation model: inputs, what tasks share, towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.tables_schema import Dense, Schema
from ..moe.expert_stack import ExpertStack
from ..moe.layer import Recorded
from .recommendation_towers import Towers, predictions, task_counts, task_losses

if TYPE_CHECKING:
    from ..data.tables_batch import TableBatch


class RecommendationModel(nn.Module):
    """From a `zoo.data.tables_batch.TableBatch` to an output a task, in float32.

    `inputs` makes vectors of rows, `sharing` what each task sees of them (see `zoo.models.recommendation_sharing`),
    `towers` the outputs: a logit [B] of a binary task, a number [B] of a regression, logits [B, C - 1] of y > c of an
    ordinal one. With `esmm` the tasks that are given others train on all rows (1804.07931).
    """

    def __init__(
        self, schema: Schema, inputs: nn.Module, sharing: nn.Module, towers: Towers, esmm: bool = False
    ) -> None:
        super().__init__()
        self.schema, self.esmm = schema, esmm
        self.inputs, self.sharing, self.towers = inputs, sharing, towers
        if esmm and not any(task.given for task in schema.tasks):
            raise ValueError("esmm: expected a task that is `given` another, such as a conversion given a click")

    def forward(self, batch: TableBatch) -> dict[str, Tensor]:
        """Outputs by task."""
        domain = self.inputs.domain(batch)  # type: ignore[operator]
        outputs = self.towers(self.sharing(self.inputs(batch), domain), domain)
        return {name: out.float() if out.dtype == torch.bfloat16 else out for name, out in outputs.items()}

    def predictions(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What outputs predict: see `zoo.models.recommendation_towers.predictions`."""
        return predictions(self.schema.tasks, outputs)

    def task_losses(self, outputs: Mapping[str, Tensor], batch: TableBatch) -> dict[str, Tensor]:
        """Losses by task: see `zoo.models.recommendation_towers.task_losses`."""
        return task_losses(self.schema.tasks, outputs, batch.labels, batch.weight, self.esmm)

    def task_counts(self, batch: TableBatch) -> Tensor:
        """How many rows each task's loss is the mean over, [K]: see `zoo.models.recommendation_towers.task_counts`."""
        return task_counts(self.schema.tasks, batch.labels, batch.weight, self.esmm)

    def task_gates(self) -> dict[str, Recorded]:
        """The gate of each task that has one; it decides which experts the task's tower sees."""
        own: list[Recorded] = self.sharing.task_gates()  # type: ignore[operator]
        return dict(zip((task.name for task in self.schema.tasks), own))

    def domain_gates(self) -> dict[str, list[Recorded]]:
        """The gates of each task that has any, by domain; a single one where all domains have the same."""
        own = getattr(self.sharing, "domain_gates", None)
        gates: list[list[Recorded]] = own() if own else [[gate] for gate in self.task_gates().values()]
        return dict(zip((task.name for task in self.schema.tasks), gates))

    def shared_parameters(self) -> list[nn.Parameter]:
        """The last layer of what tasks share: of the experts, or of a shared bottom; empty where nothing is shared."""
        experts: ExpertStack | None = self.sharing.last_experts()  # type: ignore[operator]
        return [] if experts is None else [experts.weights[-1], experts.biases[-1]]


class DenseInputs(nn.Module):
    """The numbers of a batch as they are, for a schema without sparse features."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.out_dim = len(schema.features)
        self.columns = {f.name: slice(i, i + 1) for i, f in enumerate(schema.features)}

    def forward(self, batch: TableBatch) -> Tensor:
        """x [B, D]."""
        return batch.dense

    def domain(self, batch: TableBatch) -> None:
        """None: a domain is a sparse feature."""


class SeparateInputs(nn.Module):
    """Inputs of its own for every task, so that tasks share nothing."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.each = nn.ModuleList(inputs_of(schema) for _ in schema.tasks)
        first: Any = self.each[0]
        self.out_dim: int = first.out_dim

    def forward(self, batch: TableBatch) -> Tensor:
        """x [K, B, D]."""
        return torch.stack([inputs(batch) for inputs in self.each])

    def domain(self, batch: TableBatch) -> Tensor | None:
        """As any task's inputs have it."""
        return self.each[0].domain(batch)  # type: ignore[operator]


def inputs_of(schema: Schema) -> nn.Module:
    """What makes vectors of rows; torchrec is imported only where there are sparse features."""
    if all(isinstance(f, Dense) for f in schema.features):
        return DenseInputs(schema)
    with torch.device("cpu"):  # torchrec computes while it is imported, which "meta" does not allow
        from .recommendation_inputs import FeatureEncoder

    return FeatureEncoder(schema)
