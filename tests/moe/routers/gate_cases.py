"""The table of gates that `test_every_gate.py` goes through: one row a gate, or a gate with options that matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe import Capacity, Experts, MoE, NeuronExperts, Router, ZeroComputationExperts
from zoo.moe.routers import (
    AttentionRouter,
    AttributeRouter,
    BASERouter,
    ConditionalRouter,
    DenseRouter,
    DenseToSparseRouter,
    DomainRouter,
    DSelectKRouter,
    DynamicRouter,
    EMoERouter,
    ExpertChoiceRouter,
    Gemma4Router,
    GShardRouter,
    HashRouter,
    HierarchicalRouter,
    LLaMAMoERouter,
    LoryRouter,
    MEORouter,
    MoCLERouter,
    ModuleFormerRouter,
    MoEBERTRouter,
    MoEficationRouter,
    MoEPlusPlusRouter,
    MoLERouter,
    MoR1ERouter,
    MoTRouter,
    NullExpertRouter,
    OutputMaskingRouter,
    PanGuRouter,
    ProductKeyRouter,
    PrototypeRouter,
    RandomRouter,
    ReMoERouter,
    ScoredHashRouter,
    SentenceRouter,
    SinkhornRouter,
    SiRARouter,
    SkyworkRouter,
    SMEARRouter,
    SMoEDropoutRouter,
    SMoPRouter,
    SoftRouter,
    SparseMixerRouter,
    StableMoERouter,
    TaskMixtureRouter,
    TaskRouter,
    TokenRoundingRouter,
    TopKRouter,
    UniPELTRouter,
    XMoERouter,
)

BALANCE = {"switch": 0.01}
DIM, EXPERTS, HIDDEN = 6, 8, 5


def no_context(x: Tensor, cluster: Tensor) -> dict[str, Any]:
    """Most gates look at the tokens alone."""
    return {}


def make_experts(num_experts: int, dim: int, hidden_dim: int) -> nn.Module:
    """The experts of most gates."""
    return Experts(num_experts, dim, hidden_dim, "silu", bias=True)


@dataclass
class Gate:
    """One row: a gate, and what is particular about it.

    make(dim, num_experts) gives a new gate. context(x [B, S, D], cluster [B, S]) gives the keywords the gate needs, of
    which `cluster` (0..7) is what token ids, domains and tasks are made. active is how many experts' worth of
    parameters a token meets. smooth=False: its gradient is an estimate, so that finite differences do not give it.
    whole_sequences: one decision a sequence, so that in the training task all tokens of a sequence are of one cluster.
    chooses_otherwise_in_training: training balances what evaluation does not, so that experts meet tokens they were not
    trained on; the training task is judged by the training choice.
    cannot: why the gate does not learn the training task; then the test checks that it does not.
    """

    make: Callable[[int, int], Router]
    context: Callable[[Tensor, Tensor], dict[str, Any]] = no_context
    active: int = 1
    smooth: bool = True
    whole_sequences: bool = False
    chooses_otherwise_in_training: bool = False
    cannot: str = ""
    experts: Callable[[int, int, int], nn.Module] = field(default=make_experts)


# One row a gate, in the order of the alphabet; a row is all it takes.
GATES: dict[str, Gate] = {
    "SparseMixer (GRIN)": Gate(
        lambda d, e: SparseMixerRouter(d, e, threshold=0.1, losses=BALANCE), active=2, smooth=False
    ),
    "StableMoE": Gate(
        lambda d, e: StableMoERouter(d, e, vocab_size=8, switch_step=100, capacity=None),
        context=lambda x, cluster: {"token_ids": cluster},
    ),
    "top-any (DYNMoE)": Gate(
        lambda d, e: DynamicRouter(d, e),
        active=8,
        smooth=False,
        cannot="with its losses' weights it comes to meet all experts with equal weights: one dense layer as wide",
    ),
    "hierarchical (Shazeer)": Gate(lambda d, e: HierarchicalRouter(d, e, 1, num_groups=4), active=2),
    "expert output masking (NLLB)": Gate(lambda d, e: OutputMaskingRouter(d, e, capacity=None), active=2),
    # The last expert is the dense MLP beside: of nine, eight are chosen from.
    "conditional (NLLB)": Gate(
        lambda d, e: ConditionalRouter(d, e + 1, gate="TopKRouter", k=1, losses=BALANCE),
        active=2,
        experts=lambda e, d, h: make_experts(e + 1, d, h),
    ),
    "ModuleFormer": Gate(lambda d, e: ModuleFormerRouter(d, e, hidden_dim=32), active=2),
    "ModuleFormer, sampling": Gate(lambda d, e: ModuleFormerRouter(d, e, hidden_dim=32, sample=1), active=2),
    "attributes (Uni-Perceiver)": Gate(
        lambda d, e: AttributeRouter(d, e, 1, losses=BALANCE),
        context=lambda x, cluster: {"attributes": torch.eye(8)[cluster]},
    ),
    "sentence": Gate(lambda d, e: SentenceRouter(d, e), active=2, whole_sequences=True),
    "attention router (Yuan)": Gate(lambda d, e: AttentionRouter(d, e, losses=BALANCE), active=2),
    "MoE++": Gate(
        lambda d, e: MoEPlusPlusRouter(d, e + 4, losses=BALANCE),
        active=2,
        experts=lambda e, d, h: ZeroComputationExperts(e + 4, d, h, "silu", bias=True),
    ),
    "null experts (AdaMoE)": Gate(
        lambda d, e: NullExpertRouter(d, e, 3, num_null=4, losses={"null_load": 0.01}), active=2
    ),
    "ReMoE": Gate(
        lambda d, e: ReMoERouter(d, e, 2),
        active=2,
        cannot="lambda grows from 1e-8 until gates are sparse, over thousands of steps; in 150 it overshoots",
    ),
    "DSelect-k": Gate(lambda d, e: DSelectKRouter(d, e, 1, losses={"selector_entropy": 1e-3}), active=2),
    "DSelect-k, static": Gate(
        lambda d, e: DSelectKRouter(d, e, 2, static=True, losses={"selector_entropy": 0.1}),
        active=2,
        cannot="all tokens have the same experts, so that nothing can be special to a cluster",
    ),
    "BASE": Gate(lambda d, e: BASERouter(d, e), chooses_otherwise_in_training=True),
    "dense": Gate(lambda d, e: DenseRouter(d, e), active=8),
    "dense to sparse (EvoMoE)": Gate(lambda d, e: DenseToSparseRouter(d, e, decay_steps=80, hard_steps=100)),
    "domain (DEMix)": Gate(lambda d, e: DomainRouter(d, e), context=lambda x, cluster: {"domain": cluster}),
    # A heavier loss than the paper's 1e-3: it is what makes half of the experts enough after 150 steps.
    "DS-MoE": Gate(lambda d, e: DenseRouter(d, e, eval_k=4, losses={"mutual_information": 0.1}), active=8),
    "EMoE": Gate(lambda d, e: EMoERouter(d, e, 2), active=2),
    "expert choice, capped": Gate(
        lambda d, e: ExpertChoiceRouter(d, e, capacity=Capacity(2.0), max_experts=3), active=2
    ),
    "expert choice": Gate(lambda d, e: ExpertChoiceRouter(d, e, capacity=Capacity(2.0)), active=2),
    "GShard": Gate(lambda d, e: GShardRouter(d, e, capacity=None), active=2),
    "GShard, sampling": Gate(lambda d, e: GShardRouter(d, e, second="sampling", renormalize="after"), active=2),
    "hash": Gate(lambda d, e: HashRouter(d, e, table=range(8)), context=lambda x, cluster: {"token_ids": cluster}),
    "hash of bigrams": Gate(
        lambda d, e: HashRouter(d, e, feature="bigram"), context=lambda x, cluster: {"token_ids": cluster}
    ),
    "hash of the previous token": Gate(
        lambda d, e: HashRouter(d, e, table=range(8), feature="previous"),
        context=lambda x, cluster: {"token_ids": cluster},
    ),
    "Gemma 4": Gate(lambda d, e: Gemma4Router(d, e, losses=BALANCE), active=2),
    "hash, scored (DeepSeek-V4)": Gate(
        lambda d, e: ScoredHashRouter(d, e, table=[[c, (c + 3) % 8] for c in range(8)]),
        context=lambda x, cluster: {"token_ids": cluster},
        active=2,
    ),
    "hash, several (MultiHash)": Gate(
        lambda d, e: HashRouter(d, e, table=[[c // 2 for c in range(8)], [4 + c % 4 for c in range(8)]], hashes=2),
        context=lambda x, cluster: {"token_ids": cluster},
        active=2,
    ),
    "LLaMA-MoE": Gate(lambda d, e: LLaMAMoERouter(d, e, 2), active=2),
    "LLaMA-MoE, linear": Gate(lambda d, e: LLaMAMoERouter(d, e, 2, network="linear"), active=2),
    # The first segment's weights have no gradient, though they have an effect.
    "Lory": Gate(lambda d, e: LoryRouter(d, e, segment=4), whole_sequences=True, smooth=False),
    "MEO": Gate(lambda d, e: MEORouter(d, e), whole_sequences=True),
    "MoEBERT": Gate(lambda d, e: MoEBERTRouter(d, e, losses=BALANCE)),
    "MoEBERT, by sentence": Gate(
        lambda d, e: MoEBERTRouter(d, e, level="sentence", losses=BALANCE), whole_sequences=True
    ),
    "MoEfication": Gate(lambda d, e: MoEficationRouter(d, e, 2), active=2),
    # Eight experts compute one token for every two; tokens of one position are of one cluster here.
    "MoT": Gate(lambda d, e: MoTRouter(d, e, group_size=2), active=4),
    "MoT within a sequence": Gate(lambda d, e: MoTRouter(d, e, group_size=4, across="sequence"), whole_sequences=True),
    "PanGu": Gate(
        lambda d, e: PanGuRouter(d, e, vocab_size=8, num_domains=8),
        context=lambda x, cluster: {"token_ids": cluster, "domain": cluster},
    ),
    # Of 64 neurons a token meets 16, as many as an expert of the others has.
    "PEER": Gate(
        lambda d, e: ProductKeyRouter(d, 64, 8, heads=2, key_dim=8),
        experts=lambda e, d, h: NeuronExperts(64, d, "silu"),
    ),
    "PEER with batch norm": Gate(
        lambda d, e: ProductKeyRouter(d, 64, 8, heads=2, key_dim=8, query_norm="batch"),
        experts=lambda e, d, h: NeuronExperts(64, d, "silu"),
    ),
    "MoCLE": Gate(
        lambda d, e: MoCLERouter(d, e, num_clusters=8, temperature=0.5),
        context=lambda x, cluster: {"cluster": cluster},
        active=2,
    ),
    "MoLE": Gate(lambda d, e: MoLERouter(d, e, balance=0.01)),
    "MoLE, whole sequences": Gate(lambda d, e: MoLERouter(d, e, tokens=64, balance=0.01), whole_sequences=True),
    "MoR1E": Gate(
        lambda d, e: MoR1ERouter(d, e, token_scale=2.0, intuition_scale=2.0, losses=BALANCE),
        context=lambda x, cluster: {"intuition": torch.eye(8)[cluster]},
    ),
    "prototypes (M6-T)": Gate(lambda d, e: PrototypeRouter(d, e, 2, losses=BALANCE), active=2),
    "random (THOR)": Gate(
        lambda d, e: RandomRouter(d, e), cannot="experts are drawn at random, so that none becomes a specialist"
    ),
    "sinkhorn": Gate(lambda d, e: SinkhornRouter(d, e), chooses_otherwise_in_training=True),
    "SiRA": Gate(
        lambda d, e: SiRARouter(d, e, 2, expert_dropout=0.2, capacity=Capacity(2.0), losses=BALANCE), active=2
    ),
    "Skywork": Gate(lambda d, e: SkyworkRouter(d, e, 2), active=2),
    "SMEAR": Gate(lambda d, e: SMEARRouter(d, e, dropout=0.1), whole_sequences=True),
    "SMoE-Dropout": Gate(lambda d, e: SMoEDropoutRouter(d, e, steps=150, k_max=4), active=2),
    # No gradient goes through the width of the noise, though it has an effect.
    "SMoP": Gate(lambda d, e: SMoPRouter(d, e, losses=BALANCE), smooth=False),
    # Slots mix tokens: those of one cluster, or nothing is left of what a token needs.
    "soft": Gate(lambda d, e: SoftRouter(d, e, slots=4), whole_sequences=True),
    "task": Gate(
        lambda d, e: TaskRouter(d, e, num_tasks=8, losses=BALANCE),
        context=lambda x, cluster: {"task": cluster},
        active=2,
    ),
    "UniPELT": Gate(lambda d, e: UniPELTRouter(d, e), active=8, whole_sequences=True),
    "task mixture (MOELoRA)": Gate(
        lambda d, e: TaskMixtureRouter(d, e, num_tasks=8),
        context=lambda x, cluster: {"task": cluster},
        active=8,
    ),
    "token rounding (SonicMoE)": Gate(
        lambda d, e: TokenRoundingRouter(d, e, multiple=4, normalize=True, losses=BALANCE), active=2
    ),
    "token rounding, balanced": Gate(
        lambda d, e: TokenRoundingRouter(
            d, e, multiple=3, rounding="balanced", eval_rounding=True, score="sigmoid", normalize=True, losses=BALANCE
        ),
        active=2,
    ),
    "top-1": Gate(lambda d, e: TopKRouter(d, e, 1, losses=BALANCE)),
    "top-2": Gate(lambda d, e: TopKRouter(d, e, 2, normalize=True, losses=BALANCE), active=2),
    "top-2 with capacity": Gate(lambda d, e: TopKRouter(d, e, 2, capacity=Capacity(1.5), losses=BALANCE), active=2),
    "X-MoE": Gate(lambda d, e: XMoERouter(d, e, losses=BALANCE)),
    "X-MoE, Tutel's form": Gate(lambda d, e: XMoERouter(d, e, form="tutel", routing_dim=4, losses=BALANCE)),
    "X-MoE, torchscale's form": Gate(lambda d, e: XMoERouter(d, e, form="torchscale", routing_dim=4, losses=BALANCE)),
}


def layer(gate: Gate, dtype: torch.dtype = torch.float32, seed: int = 0, num_experts: int = EXPERTS) -> MoE:
    """A layer with this gate, its weights drawn anew so that none is zero."""
    torch.manual_seed(seed)
    moe = MoE(gate.make(DIM, num_experts), gate.experts(num_experts, DIM, HIDDEN)).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return moe


def tokens(batch: int = 3, length: int = 5, dim: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random tokens [B, S, D] and clusters [B, S] that say nothing."""
    return torch.randn(batch, length, dim, dtype=dtype), torch.randint(8, (batch, length))
