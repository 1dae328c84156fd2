"""How much of the exchange of tokens with experts is waited for, with and without a shortcut, by closed form."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Machine, remote_processes, waited
from .plan_facts import Stack


@dataclass(frozen=True)
class Pair:
    """Two blocks on one process, both with attention and a dense MLP, one of them with experts beside it.

    T tokens in sequences of S, width D; attention is heads times their width, kv that of keys and values; dense F, of
    gated MLPs; experts E of hidden width, of which a token meets k. itemsize is bytes an element.
    """

    tokens: int
    sequence: int
    width: int
    attention: int
    kv: int
    dense: int
    experts: int
    hidden: int
    k: int
    itemsize: int = 2

    def seconds(self, processes: int, machine: Machine) -> dict[str, float]:
        """What each part of a forward takes with experts over so many processes, and tokens one way to them.

        Matrix products alone are counted, at `machine.flops * machine.busy`; causal attention looks at half of all
        pairs, routing is even.
        """
        projections = 2 * self.width * (2 * self.attention + 2 * self.kv)
        flops = {
            "attention": projections + 2 * self.sequence * self.attention,
            "dense": 6 * self.width * self.dense,
            "experts": 6 * self.width * self.hidden * self.k,
        }
        found = {name: self.tokens * each / (machine.flops * machine.busy) for name, each in flops.items()}
        rows = self.tokens * remote_processes(Stack(self.experts, (), self.k, 0), processes)
        return {**found, "exchange": rows * self.width * self.itemsize / machine.bandwidth(processes)}


def exposed(pair: Pair, processes: int, machine: Machine, shortcut: bool) -> dict[str, float]:
    """Seconds of a pair's "forward" and "backward" in which a process waits for tokens, results or their gradients.

    With t for one way, d for a dense MLP and a for attention, whose backward takes twice as long: `MoE` with the dense
    MLP as its shared expert waits max(0, t - d) for tokens and t for results, in backward t for the gradients of
    results and max(0, t - 2d) for those of tokens. With a shortcut (`ShortcutMoE`) results have max(0, t - a - d), and
    their gradients max(0, t - 2a - 2d). The bytes are the same.
    """
    s = pair.seconds(processes, machine)
    window = s["attention"] + s["dense"] if shortcut else 0.0
    forward, backward = waited(s["exchange"], s["dense"], window)
    return {"forward": forward, "backward": backward}
