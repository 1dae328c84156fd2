"""What a trained model's experts do: functions of a model and batches, in the manner of OpenMoE (2402.01739).

A model here is any module with MoE layers, and run(batch) whatever computes it on a batch; decisions are read by
`zoo.moe.record`, in evaluation mode and without gradients. Results are by layer name.
"""

from .agreement import overlap, routing_over_training, share_agreement
from .conditional import chance_std, decision_std, drop_by_position, expert_counts, explained, shares, top_keys
from .document import analyse
from .experts import co_activation, expert_similarity
from .walk import decisions

__all__ = [
    "analyse",
    "chance_std",
    "co_activation",
    "decision_std",
    "decisions",
    "drop_by_position",
    "expert_counts",
    "expert_similarity",
    "explained",
    "overlap",
    "routing_over_training",
    "share_agreement",
    "shares",
    "top_keys",
]
