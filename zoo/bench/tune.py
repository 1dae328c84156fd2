"""`zoo tune`: Search for the fastest tiles of the Triton kernels on this GPU, and keep them for its model.

Kernels use them for experts of the same widths with about as many rows each (at most 24, at most 96, more), from the
next start of Python on. Without it they use a table that was made for GPUs like this one. Minutes a shape.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from .moe import PRESETS, check_shapes, shape_of


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    first, rest = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(prog="zoo tune", description=first.removeprefix("`zoo tune`: "), epilog=rest)
    parser.add_argument(
        "--shape", action="append", metavar="T,D,F,E,K", help="tokens, width, hidden, experts, choices; repeatable"
    )
    parser.add_argument("--shapes", choices=PRESETS, help="a list of shapes by name")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--device", default="cuda", help="default cuda")
    parser.add_argument("--seconds", type=float, default=600, help="of each shape at most (default 600)")
    parser.add_argument("--rounds", type=int, default=4, help="of changes to every kernel at most (default 4)")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each candidate (default 9)")
    args = parser.parse_args(argv)
    check_shapes(parser, args.shape)
    if not (args.shape or args.shapes):
        parser.error("expected --shape T,D,F,E,K of a layer on one GPU, or --shapes NAME")
    for text in args.shape or ():
        shape = shape_of(text)
        if shape.dim % 16 or shape.hidden_dim % 16:
            parser.error(f"--shape {text}: tiles are chosen by shape only where D and F are multiples of 16")
    for name in ("seconds", "rounds", "repeats"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} {getattr(args, name)}: expected a positive number")
    return args


def main(argv: Sequence[str]) -> int:
    """Tune; returns the exit status."""
    args = _parse(argv)
    import torch

    from .gpu.setting import gpu
    from .gpu.tiles import refusal

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("zoo tune: no CUDA device was found here", file=sys.stderr)
        return 2
    setting = replace(gpu(args.device), dtype=getattr(torch, args.dtype), repeats=args.repeats)
    if (reason := refusal(setting)) is not None:
        print(f"zoo tune: the Triton kernels do not run on {args.device}: {reason}", file=sys.stderr)
        return 2
    from ..moe.kernels.triton.tuned import Entry, gpu_name, write
    from .gpu.ahead import Compiler
    from .gpu.tiles import best_tiles, key_of

    name = gpu_name(torch.device(args.device))
    try:  # a file that cannot be added to is found before the work
        write(name, [])
    except (OSError, ValueError) as error:
        print(f"zoo tune: {error}", file=sys.stderr)
        return 2
    compiler = Compiler(setting)
    try:
        for shape in [shape_of(text) for text in (*PRESETS.get(args.shapes, ()), *(args.shape or ()))]:
            setting.deadline = time.monotonic() + args.seconds
            key = key_of(shape, setting.dtype)
            found = best_tiles(setting, shape, compiler, args.rounds)
            gain = {"forward": found.gain(True), "backward": found.gain(False)}
            file = write(name, [Entry(key, found.plan, gain)])
            speeds = ", ".join(f"{direction} {times:.2f}" for direction, times in gain.items())
            left = "" if found.whole else "; not everything was tried"
            print(f"{','.join(map(str, shape))}: {speeds} times the table's speed{left}", flush=True)
    finally:
        compiler.close()
    print(f"written to {file}")
    return 0
