"""Training steps of a whole model, OLMoE-1B-7B by default: our core, our kernels in transformers, and transformers.

PYTHONPATH=. python scripts/bench_olmoe.py --json olmoe.json

All contestants are one set of random weights with one optimizer, AdamW (fused on a GPU), and take turns on random
tokens: forward, loss, backward, update. MFU counts per token 6 operations an active parameter, embeddings apart, and
12 * layers * width * sequence for attention (2204.02311, appendix B), against --peak-tflops. Where the model is too
large for the device, --layers cuts it; `--model language/olmoe_tiny --batch 1 --sequence 64` tries it on a CPU.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zoo
from tasks.cli import run_script
from tasks.folders import check_writable
from zoo.bench.turns import Contestant, compare, machine, measure_steps
from zoo.models import count_parameters
from zoo.models.language import MODELS, configuration

# Dense bfloat16 operations a second by the vendor's data sheet, by compute capability.
PEAK_TFLOPS = {(8, 0): 312.0, (9, 0): 989.0}
# Losses of the same weights may differ by this share: rounding, and choices that rounding turns.
CLOSE = 1e-2


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    olmoe = [f"language/{name}" for name, (family, _) in MODELS.items() if family == "olmoe"]
    parser.add_argument("--model", default="language/olmoe_1b_7b", choices=olmoe, help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step (default %(default)s)")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens a sequence (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each that count (default %(default)s)")
    parser.add_argument("--rival", action="append", help="transformers' experts: grouped_mm (default), eager, ...")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--peak-tflops", type=float, help="default: the data sheet's on A100, H100, H200; else none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args()
    for name in ("layers", "batch", "sequence", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: expected at least 1")
    if args.sequence < 2:
        parser.error("--sequence: expected at least 2 tokens, of which the first foretells the second, got 1")
    if args.json:
        check_writable("--json", args.json.parent)
    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    if args.device.partition(":")[0] not in ("cpu", "cuda") or (args.device != "cpu" and not cuda):
        parser.error(f"--device: expected cpu{' or cuda' if cuda else ', as there is no GPU'}, got {args.device}")
    return args


def theirs(args: argparse.Namespace) -> Any:
    """transformers' model with random weights."""
    from transformers import OlmoeForCausalLM

    config = configuration(args.model.removeprefix("language/"), **overrides(args))
    with torch.device(args.device):
        return OlmoeForCausalLM._from_config(config, dtype=getattr(torch, args.dtype)).train()


def overrides(args: argparse.Namespace) -> dict[str, int]:
    return {} if args.layers is None else {"num_hidden_layers": args.layers}


def ours(args: argparse.Namespace, model: Any) -> Any:
    """The same model on our core, with the very parameters of transformers' one."""
    with torch.device("meta"):
        core: Any = zoo.create_model(args.model, dtype=args.dtype, **overrides(args))
    for name, _ in list(core.named_parameters()):
        parent, _, last = name.rpartition(".")
        source = model.get_parameter(name.replace(".mlp.router.", ".mlp.gate."))
        setattr(core.get_submodule(parent), last, source)
    core.model.rotary_emb = model.model.rotary_emb
    return core.train()


def field_of(args: argparse.Namespace, model: Any, core: Any, ids: torch.Tensor) -> list[Contestant]:
    """Everyone, a training step each; who fails or has another loss says so."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=args.device.startswith("cuda"))

    def loss_of(network: nn.Module, implementation: str | None) -> torch.Tensor:
        if implementation is not None:
            model.set_experts_implementation(implementation)
        loss: torch.Tensor = network(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def contestant(name: str, group: str, network: nn.Module, implementation: str | None) -> Contestant:
        def run() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(network, implementation)
            loss.backward()
            optimizer.step()
            return loss.detach()

        one = Contestant(name, group, run, [])
        try:
            with torch.no_grad():
                losses[name] = float(loss_of(network, implementation))
        except Exception as error:
            one.refuses = f"it failed with {type(error).__name__}: {str(error)[:200]}"
            return one
        first = next(iter(losses.values()))
        if not abs(losses[name] - first) <= CLOSE * abs(first):
            one.refuses = f"its loss is {losses[name]:.4f}, not {first:.4f}"
        return one

    losses: dict[str, float] = {}
    field = [
        contestant("zoo core", "zoo", core, None),
        contestant("zoo in transformers", "zoo", model, "zoo"),
        *(contestant(f"transformers {n}", "transformers", model, n) for n in args.rival or ("grouped_mm",)),
    ]
    for one in field:
        if one.refuses is None:
            try:
                one.run()  # memory for gradients and for the optimizer
            except Exception as error:
                one.refuses = f"its step failed with {type(error).__name__}: {str(error)[:200]}"
                optimizer.zero_grad(set_to_none=True)
    return field


def operations(args: argparse.Namespace, core: Any) -> float:
    """Floating-point operations a token, forward and backward."""
    active = count_parameters(core)[1] - core.get_input_embeddings().weight.numel()
    config = core.config
    return 6 * active + 12 * config.num_hidden_layers * config.hidden_size * args.sequence


def main() -> None:
    args = options()
    torch.manual_seed(0)
    model = theirs(args)
    core = ours(args, model)
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.sequence), device=args.device)
    field = field_of(args, model, core, ids)
    rows = compare(field, measure_steps(field, args.repeats, 1, args.device))
    total, active = count_parameters(core)
    peak = args.peak_tflops
    if peak is None and args.device.startswith("cuda"):
        peak = PEAK_TFLOPS.get(torch.cuda.get_device_capability())
    per_token, tokens = operations(args, core), args.batch * args.sequence
    print(f"{args.model}, {model.config.num_hidden_layers} layers, {total / 1e9:.2f} billion parameters, ", end="")
    print(f"{active / 1e9:.2f} active; {args.batch} x {args.sequence} tokens a step, {args.dtype}")
    print(f"  {'':24}{'ms a step':>12}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'against rival':>15}")
    for row in rows:
        if row["refuses"]:
            print(f"  {row['name']:24}  left out: {row['refuses']}")
            continue
        row["tokens_per_second"] = tokens / row["ms"] * 1e3
        row["tflops"] = row["tokens_per_second"] * per_token / 1e12
        row["mfu"] = row["tflops"] / peak if peak else None
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.3f}"
        rival = "-" if row["against_best_rival"] is None else f"{row['against_best_rival']:.2f}"
        print(f"  {row['name']:24}{row['ms']:>12.1f}{row['tokens_per_second']:>12.0f}{row['tflops']:>10.3g}", end="")
        print(f"{mfu:>8}{rival:>15}")
    if args.json:
        sizes = {"parameters": total, "active": active, "operations_per_token": per_token, "peak_tflops": peak}
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        written = {"machine": machine(args.device), "settings": settings, **sizes, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(written, indent=1) + "\n")
        print(f"written to {args.json}")


if __name__ == "__main__":
    run_script(main)
