"""How a split model is brought back near its dense one: MoEBERT's distillation layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from ..moe.balance import consistency


def layerwise_distillation(
    hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], logits: Tensor, teacher_logits: Tensor
) -> Tensor:
    """MoEBERT's loss against its teacher (2204.07675, equation 6), to be added to the task's; 5 times it in the paper.

    The sum over layers, the embeddings first, of the mean squared difference of hidden states, of one shape a layer (as
    transformers gives them with output_hidden_states=True), and the mean over rows of logits [..., V] of
    [KL(p||q) + KL(q||p)] / 2, of single numbers [..., 1] the mean squared difference. The teacher gets no gradient.
    Raises ValueError for another number of layers.
    """
    if len(hidden) != len(teacher_hidden):
        counts = f"{len(hidden)} hidden states, but the teacher's are {len(teacher_hidden)}"
        raise ValueError(f"layerwise_distillation: {counts}")
    prediction = F.mse_loss if logits.shape[-1] == 1 else consistency
    loss = prediction(logits.float(), teacher_logits.detach().float())
    for ours, theirs in zip(hidden, teacher_hidden):
        loss = loss + F.mse_loss(ours, theirs.detach())
    return loss
