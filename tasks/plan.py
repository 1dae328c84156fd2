"""`zoo plan`: what training a configuration takes on so many GPUs, and which mesh to choose."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.cli import checked_config
from tasks.numbers import amount, count

INTERCONNECTS = {  # bytes a second of a GPU, within a node and between nodes
    "nvlink-infiniband": (450e9, 50e9),
    "nvlink-ethernet": (450e9, 12.5e9),
    "pcie-ethernet": (32e9, 3e9),
}

# Arguments of tasks that decide what is built.
WHICH, GATE = ("network", "pretrained", "upcycle"), ("overrides", "router", "losses")
VISION = {"upcycle", "num_classes", "image_size", "channels", "capacity"}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zoo plan", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file of `zoo language` or `zoo vision`")
    parser.add_argument("--gpus", type=count, required=True, help="processes in all")
    parser.add_argument("--gpu-memory", type=amount, default=141, help="GB of each (141)")
    parser.add_argument("--gpu-tflops", type=amount, default=989, help="bfloat16 peak of each (989)")
    parser.add_argument("--gpus-per-node", type=count, default=8, help="8 by default")
    parser.add_argument("--interconnect", choices=list(INTERCONNECTS), default="nvlink-infiniband")
    for name in ("replicate", "shard", "expert", "tensor"):
        parser.add_argument(f"--{name}", type=count, help="a size of the mesh; without any all meshes are compared")
    parser.add_argument("--top", type=count, default=8, help="meshes to show (8)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Print the plan; returns the exit status, 2 for a mistake in the arguments."""
    args = _parse(argv)
    try:
        facts, work = read(Path(args.config))
        shown = "\n".join(lines(args, facts, work))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(shown)
    return 0


def read(config: Path) -> tuple[Any, Any]:
    """The model that a configuration describes, without memory, and the work of a step."""
    import torch

    from tasks import conversions
    from zoo.models import count_parameters
    from zoo.parallel.plan import Facts, Work

    content = checked_config(str(config))
    model, data, trainer = (content.get(section) or {} for section in ("model", "data", "trainer"))
    if not isinstance(model, dict) or not {*WHICH} & {name for name in model if model[name]}:
        raise ValueError(
            f"{config}: a plan needs model.network, the name of a model, model.pretrained or model.upcycle"
        )
    sizes = {}
    for section, settings, name in (
        ("data", data, "batch_size"),
        ("data", data, "sequence_length"),
        ("trainer", trainer, "accumulate_grad_batches"),
    ):
        if not isinstance(settings, dict):
            raise ValueError(f"{config}: expected {section} to be a section with options, got {settings!r}")
        size = sizes[name] = settings.get(name)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{config}: {section}.{name}: expected a whole number of at least 1, got {size!r}")
    if str(model.get("network")).startswith(("recommendation/", "vision_language/")):  # whose tokens data does not say
        raise ValueError(f"{config}: expected a model of language or vision, got {model['network']}")
    with torch.device("meta"):
        network = conversions.converted(_task(model, data).build(), conversions.parse(model.get("convert") or []))
    patches = getattr(getattr(network, "patch_embed", None), "num_patches", None)
    if len({stage["reduction"] for stage in getattr(network, "feature_info", None) or []}) > 1:
        raise ValueError(f"{config}: a plan needs layers that see equally many tokens, but those of its stages differ")
    sequence = patches or sizes["sequence_length"] or 256
    precision = str(trainer.get("precision", "32"))
    low, kept = precision.startswith(("bf16", "16")), 2 if precision.endswith("16-true") else 4
    work = Work(
        tokens=sequence * (sizes["batch_size"] or 16),
        sequence=sequence,
        accumulate=sizes["accumulate_grad_batches"] or 1,
        recompute=bool(model.get("activation_checkpointing", False)),
        compute=2 if low else 4,
        parameter=kept,
        gradient=kept,
        state=2 * kept,
    )
    return Facts(network, count_parameters(network)[1], count_parameters(network, learning=True)[1]), work


def _task(model: dict[str, Any], data: dict[str, Any]) -> Any:
    """The task that builds the model: of vision where an argument is one of vision's alone."""
    from tasks.language import LanguageTask
    from tasks.vision import VisionTask

    if not str(model.get("network")).startswith("vision/") and not VISION & {name for name in model if model[name]}:
        return LanguageTask(
            **{name: model[name] for name in (*WHICH, *GATE, "vocab_size") if model.get(name) is not None}
        )
    said: dict[str, Any] = {name: data.get(name) for name in ("image_size", "channels")}
    for ours, theirs in (("image_size", "img_size"), ("channels", "in_chans")):
        if theirs in (model.get("overrides") or {}):
            del said[ours]
    said |= {name: model[name] for name in (*WHICH, *GATE, *VISION) if name in model}
    return VisionTask(**{name: value for name, value in said.items() if value is not None})


def lines(args: argparse.Namespace, facts: Any, work: Any) -> list[str]:
    """What is printed."""
    from zoo.parallel import Sizes
    from zoo.parallel.plan import Machine, check, estimate, ranked

    within, between = INTERCONNECTS[args.interconnect]
    machine = Machine(args.gpus_per_node, args.gpu_memory * 1e9, args.gpu_tflops * 1e12, within, between)
    given = {name: getattr(args, name) for name in ("replicate", "shard", "expert", "tensor")}
    if any(given.values()):
        asked = {name: size for name, size in given.items() if size}
        sizes = Sizes.of_world(args.gpus, **asked)
        check(facts, sizes)
        found = [estimate(facts, sizes, work, machine)]
    else:
        found = ranked(facts, args.gpus, work, machine)
        if not found:
            raise ValueError(f"the model divides into no mesh of {args.gpus} processes")
    best = found[0]
    head = f"{'replicate':>9} {'shard':>6} {'expert':>6} {'tensor':>6} {'GB':>8} {'s/step':>8} {'tokens/s':>12}"
    shown = [head]
    for e in found[: args.top]:
        s = e.sizes
        rate = work.tokens * work.accumulate * s.data / e.step
        row = f"{s.replicate:>9} {s.shard:>6} {s.expert:>6} {s.tensor:>6} {e.total_memory / 1e9:>8.1f} {e.step:>8.2f}"
        shown.append(f"{row} {rate:>12,.0f}" + ("" if e.total_memory <= machine.memory else "  does not fit"))
    shown += ["", f"each process of {_label(best.sizes)}:"]
    shown += [f"  {'parameters':<24}{best.parameters / 1e9:>10.3f} billion"]
    shown += [f"  memory, {name:<16}{size / 1e9:>10.2f} GB" for name, size in best.memory.items()]
    shown += [f"  {'operations a step':<24}{best.flops / 1e12:>10.1f} TFLOP"]
    shown += [f"  sent, {name:<18}{size / 1e9:>10.2f} GB" for name, size in best.sent.items()]
    shown += [f"  time, {name:<18}{seconds:>10.3f} s" for name, seconds in best.seconds.items()]
    if best.total_memory > machine.memory:
        shown += [f"no mesh of {args.gpus} GPUs of {args.gpu_memory:g} GB is enough"]
    return shown


def _label(sizes: Any) -> str:
    return ", ".join(f"{name} {size}" for name, size in vars(sizes).items())
