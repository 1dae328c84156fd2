"""Time waited for tokens on their way to experts and back, with and without a shortcut (ScMoE), by closed form.

python scripts/bench_shortcut.py --processes 8 64

For a pair of layers with the sizes of known models, each with attention and a dense MLP, one with experts: forward and
backward in milliseconds (see `zoo.parallel.overlap`). "waited" is what the exchange adds to the pair's computation,
"of the pair" its share of the pair's time. Nothing is measured: speeds are what --flops and so on say, of an H100 and
its links by default, and nothing else is on the links.
"""

import argparse

from tasks.numbers import amount, count
from zoo.models.language import MODELS, configuration
from zoo.parallel.overlap import Pair, exposed
from zoo.parallel.plan import Machine

NAMES = ("olmoe_1b_7b", "qwen3_30b_a3b", "mixtral_8x7b", "mixtral_8x22b")


def pair_of(name: str, tokens: int, sequence: int) -> Pair:
    """A pair of layers with the sizes of the model called `name`."""
    c = configuration(name)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return Pair(
        tokens=tokens,
        sequence=sequence,
        width=c.hidden_size,
        attention=c.num_attention_heads * head,
        kv=c.num_key_value_heads * head,
        dense=c.intermediate_size,
        experts=getattr(c, "num_local_experts", None) or c.num_experts,
        hidden=getattr(c, "moe_intermediate_size", None) or c.intermediate_size,
        k=c.num_experts_per_tok,
    )


def main() -> None:
    machine = Machine()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes", type=count, nargs="+", default=[8, 64], help="that share experts, 8 64 by default"
    )
    parser.add_argument("--models", nargs="+", default=NAMES, choices=[n for n in MODELS if "deepseek" not in n])
    parser.add_argument("--tokens", type=count, default=8192, help="of a process, 8192 by default")
    parser.add_argument("--sequence", type=count, default=4096, help="4096 by default")
    for name, unit in (("flops", "operations a second"), ("busy", "share of them reached")):
        parser.add_argument(f"--{name}", type=amount, default=getattr(machine, name), help=unit)
    for name in ("within", "between"):
        parser.add_argument(f"--{name}", type=amount, default=getattr(machine, name), help="bytes a second, by node")
    args = parser.parse_args()
    machine = Machine(flops=args.flops, busy=args.busy, within=args.within, between=args.between)
    print(f"{'model':15}{'processes':>10}{'compute':>9}{'exchange':>10}{'MoE waits':>11}{'of the pair':>13}", end="")
    print(f"{'shortcut waits':>16}{'of the pair':>13}")
    for name in args.models:
        pair = pair_of(name, args.tokens, args.sequence)
        for processes in (n for n in args.processes if n <= pair.experts):
            s = pair.seconds(processes, machine)
            compute = 3 * (2 * s["attention"] + 2 * s["dense"] + s["experts"])
            plain, short = (sum(exposed(pair, processes, machine, shortcut).values()) for shortcut in (False, True))
            print(f"{name:15}{processes:>10}{1e3 * compute:>9.2f}{4e3 * s['exchange']:>10.2f}", end="")
            print(f"{1e3 * plain:>11.2f}{plain / (compute + plain):>13.0%}", end="")
            print(f"{1e3 * short:>16.2f}{short / (compute + short):>13.0%}")


if __name__ == "__main__":
    main()
