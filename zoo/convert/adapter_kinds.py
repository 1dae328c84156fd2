"""The published mixtures of parameter-efficient experts, as settings of the layers in `zoo.moe`.

Two names differ by one letter: MoELoRA (2402.12851) chooses experts for each token and contrasts what they compute;
MOELoRA (2310.18339) mixes all by the task. A third, MoE-LoRA, is a common noun.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..nearest import unknown
from .adapter_targets import PARTS

ATTENTION, MLP = PARTS[:4], PARTS[4:]
Level = Literal["linear", "pairs", "outputs", "vectors", "mlp", "beside", "adapter", "one", "prompts", "unipelt"]
# Which arguments of `adapt` a level has no use for.
UNUSED: dict[str, Sequence[str]] = {
    "linear": ("shared",),
    "pairs": ("alpha", "contrastive", "shared"),
    "outputs": ("shared",),
    "vectors": ("rank", "alpha", "contrastive", "dropout", "shared"),
    "mlp": ("contrastive", "shared"),
    "beside": ("targets", "contrastive", "shared"),
    "adapter": ("targets", "alpha", "router", "losses", "contrastive", "dropout"),
    "prompts": ("targets", "alpha", "contrastive", "dropout", "shared"),
    "one": ("num_experts", "router", "losses", "contrastive", "shared"),
    "unipelt": ("targets", "num_experts", "alpha", "losses", "contrastive", "shared"),
}


@dataclass(frozen=True)
class Kind:
    """What a paper takes by default.

    level: experts stand beside linear layers ("linear"), as pairs of `rank` rows and of columns ("pairs") or with a
    gate that reads what they make of a token ("outputs"), scale them ("vectors"), share an MLP ("mlp"), stand beside it
    ("beside"), follow it ("adapter"), come before the tokens ("prompts"), or there is one beside a linear layer and no
    gate ("one"), or UniPELT's three ("unipelt"). router names the gate and its options; init_std and router_std are
    deviations of what is normally distributed at first; `needs` are options of the gate that only a caller knows;
    frozen experts are not trained; `hears` is what a caller tells the gate of each sample, if no label.
    """

    level: Level
    targets: Sequence[str]
    num_experts: int | Sequence[int] = 8
    rank: int = 8
    alpha: float = 16.0
    router: Mapping[str, Any] = field(default_factory=dict)
    losses: Mapping[str, Any] | None = None
    contrastive: float | None = None
    init_std: float | None = None
    router_std: float | None = None
    needs: Sequence[str] = ()
    frozen: bool = False
    hears: str | None = None


_TOP_2 = {"name": "TopKRouter", "k": 2, "normalize": True}

# Numbers are those of the authors' configurations where there is code; of MoELoRA, SiRA, MoCLE and Omni-SMoLA, and of
# MOELoRA's and MoLA's losses, they are not checked.
KINDS: dict[str, Kind] = {
    # One LoRA, the yardstick (2106.09685).
    "LoRA": Kind("one", ("query", "value"), 1),
    # configs/molora.gin: all projections of a block; gate and A from N(0, 0.02^2).
    "MoLoRA": Kind("linear", PARTS, 10, 4, 16.0, {"name": "DenseRouter"}, init_std=0.02, router_std=0.02),
    # run_loramoe.sh; its balance loss has weight 0 there: losses={"localized_balance": {"weight": .., "delta": ..}}.
    "LoRAMoE": Kind("linear", MLP, 8, 4, 32.0, {"name": "DenseRouter"}),
    "MoELoRA": Kind("linear", ("query", "value"), 8, 4, 16.0, _TOP_2, {"switch": 0.01}, contrastive=0.01),
    # The form that did best in the paper, its inverted triangle: few experts in low layers, many in high ones.
    "MoLA": Kind("linear", PARTS, (2, 4, 6, 8), 8, 16.0, _TOP_2, {"switch": 0.01}),
    # The limit is one of training: outside it what a token gets does not depend on the other tokens.
    "SiRA": Kind(
        "linear",
        ATTENTION,
        16,
        4,
        16.0,
        {"name": "SiRARouter", "k": 4, "expert_dropout": 0.5, "capacity": {"factor": 1.0, "eval_factor": math.inf}},
        {"switch": 0.01},
    ),
    # rank is an expert's; the authors' is that of all experts together, and so is the r of their alpha / r.
    "MOELoRA": Kind(
        "linear",
        ("query", "key", "value", "output"),
        8,
        2,
        16.0,
        {"name": "TaskMixtureRouter", "task_dim": 64},
        init_std=0.01,
        needs=("num_tasks",),
    ),
    "MoCLE": Kind(
        "linear", ("query", "value"), 5, 8, 16.0, {"name": "MoCLERouter", "temperature": 0.05}, needs=("num_clusters",)
    ),
    # One of the paper's three sets: for text, for what is seen, and for both. No code is known.
    "Omni-SMoLA": Kind("linear", PARTS, 16, 4, 4.0, {"name": "SoftRouter", "slots": 1}),
    # trex_train.sh: 32 clusters, 4 rows and 8 columns; rank is how many rows. All linear layers of a block.
    "MoR1E": Kind("pairs", PARTS, 32, 4, router={"name": "MoR1ERouter"}, hears="intuition"),
    # configs/mov.gin: keys, values and the hidden units of MLPs.
    "MoV": Kind("vectors", ("key", "value", "down"), 30, router={"name": "DenseRouter"}, router_std=0.02),
    "MixLoRA": Kind("mlp", MLP, 8, 8, 16.0, _TOP_2, {"switch": 0.01}, router_std=0.02),
    "LLaVA-MoLE": Kind("beside", (), 3, 32, 64.0, {"name": "TopKRouter", "k": 1, "normalize": True}, {"switch": 0.01}),
    "AdaMix": Kind("adapter", (), 4, 16),
    # README: four prompts of five tokens; rank is how many.
    "SMoP": Kind("prompts", (), 4, 5, router={"name": "SMoPRouter", "k": 1}),
    # run_glue.py; an adapter is a 16th as wide as its layer.
    "UniPELT": Kind("unipelt", (), 1, 8, router={"name": "UniPELTRouter"}),
    # Trained LoRAs, which stay as they are, and a gate from N(0, 1) for each linear layer.
    "MeteoRA": Kind("linear", (), 1, router=_TOP_2, router_std=1.0, frozen=True),
    "MoLE": Kind("outputs", (), 1, router={"name": "MoLERouter"}, frozen=True),
}


def kind_of(name: str) -> Kind:
    """A row of the table; raises ValueError naming the nearest for another name."""
    if name in KINDS:
        return KINDS[name]
    if name.lower() in ("moelora", "moe-lora"):
        raise ValueError(f"adapt: kind {name!r} is MoELoRA (a gate that chooses) or MOELoRA (by task); say which")
    raise unknown("kind of adapt", name, KINDS)


def experts_in(num_experts: int | Sequence[int], place: int, depth: int) -> int:
    """How many experts block `place` of `depth` has: one number for all, or several for equal stretches of blocks."""
    if isinstance(num_experts, int):
        return num_experts
    if not num_experts:
        raise ValueError("adapt: num_experts is an empty list, expected a number or several")
    return num_experts[place * len(num_experts) // depth]


def is_own(router: Any) -> bool:
    """Whether what a caller says of the gate leaves it the kind's own."""
    return router is None or (isinstance(router, Mapping) and not {"name", "class_path"} & set(router))


def gate_of(kind: Kind, name: str, router: Any, num_experts: int) -> Any:
    """The description of a gate: the kind's own, what a mapping without a name changes in it, or another one.

    Raises ValueError where an option is missing that only a caller knows.
    """
    if is_own(router):
        router = {**kind.router, **(router or {})}
        if missing := [option for option in kind.needs if option not in router]:
            raise ValueError(f"adapt: {name} needs {missing[0]}: give router={{{missing[0]!r}: ...}}")
        if "k" in router:  # two of one, in a layer that has but one expert, are one
            router["k"] = min(router["k"], num_experts)
    return router
