"""`zoo bench moe`: the expert kernels against one dense MLP that does the same multiplications, and against rivals.

The layer is given its routing, or with --routing the router's logits, whose choice is then part of what is timed.
Forward and backward are timed together and apart, or the forward alone of a few tokens (--decode). Rates count
6*T*F*D*K floating-point operations forward and 12*T*F*D*K backward.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..nearest import unknown
from .turns import add_phases, compare, device_of, file_to_write, machine, measure_phases, show, totals

if TYPE_CHECKING:
    from .contestants import Shape

SHAPES = ("2048,512,1024,8,2", "2048,512,512,64,8", "2048,1024,3584,8,2", "2048,768,3072,8,1")
# From SonicMoE's benchmark (2512.14080) and Mixtral 8x7B: fine-grained to coarse experts, for a GPU with 80 GB or more.
LARGE = (
    "40960,768,256,128,8",
    "24576,1536,256,128,8",
    "24576,1536,1024,32,2",
    "32768,4096,256,256,16",
    "32768,4096,1024,64,4",
    "32768,4096,2048,64,4",
    "16384,4096,14336,8,2",
)
PRESETS = {"small": SHAPES, "h200": LARGE}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="zoo bench moe", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--shape", action="append", metavar="T,D,F,E,K", help="tokens, width, hidden, experts, choices; repeatable"
    )
    parser.add_argument("--shapes", choices=PRESETS, help="a list of shapes by name (default small)")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="repeatable")
    parser.add_argument("--device", default=None, help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--backend", action="append", help="backends to run; default: all that suit the device")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each contestant (default 9)")
    parser.add_argument("--routing", action="store_true", help="time the choice of experts from given logits too")
    parser.add_argument(
        "--decode", type=int, nargs="?", const=1, metavar="T", help="forward only, of T tokens instead (default 1)"
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="also write the figures to FILE")
    args = parser.parse_args(argv)
    check_shapes(parser, args.shape)
    if args.decode is not None and args.decode < 1:
        parser.error(f"--decode {args.decode}: expected at least 1 token")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: expected at least 1")
    return args


def check_shapes(parser: argparse.ArgumentParser, shapes: Sequence[str] | None) -> None:
    """End with a message about the first --shape that is not T,D,F,E,K."""
    for text in shapes or ():
        parts = text.split(",")
        if len(parts) != 5 or not all(p.strip().isdigit() and int(p) for p in parts):
            parser.error(f"--shape {text}: expected five positive integers T,D,F,E,K")
        if int(parts[4]) > int(parts[3]):
            parser.error(f"--shape {text}: K = {parts[4]} choices of E = {parts[3]} experts")


def shape_of(text: str) -> Shape:
    """The shape written as T,D,F,E,K."""
    from .contestants import Shape

    return Shape(*(int(part) for part in text.split(",")))


def measured(
    shape: Shape, dtype: str, device: str, backends: tuple[str, ...], repeats: int, backward: bool, routing: bool
) -> dict[str, Any]:
    """The table of one shape, as it is written to the file; also printed."""
    import torch

    from .contestants import Problem, everyone

    torch.manual_seed(0)
    field = everyone(Problem.random(shape, getattr(torch, dtype), device, routing), backends, backward)
    if not backward:  # a dense MLP reads one set of weights, each token K of them: not the same work
        field = [one for one in field if one.group != "limit"]
    turns = measure_phases([one for one in field if one.refuses is None], repeats, backward, device)
    rows = compare(field, totals(turns))
    if backward:
        add_phases(rows, turns, 6 * shape.tokens * shape.hidden_dim * shape.dim * shape.k)
    what = "forward + backward" if backward else f"forward of {shape.tokens} token(s)"
    if routing:
        what += " with routing"
    show(f"{','.join(map(str, shape))} {dtype}, {what}", rows)
    return {"shape": shape._asdict(), "dtype": dtype, "what": what, "rows": rows}


def default_backends(device: str) -> tuple[str, ...]:
    """Our fast backends on a device."""
    return ("triton", "grouped_mm") if device.startswith("cuda") else ("cpu", "grouped_mm")


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status."""
    args = _parse(argv)
    device = device_of(args.device)
    from ..moe.kernels import BACKENDS

    for name in args.backend or ():
        if name not in BACKENDS:
            print(f"error: {unknown('backend', name, BACKENDS)}", file=sys.stderr)
            return 2
    backends = tuple(args.backend or default_backends(device))
    results = []
    for text in [*PRESETS.get(args.shapes, ()), *(args.shape or ())] or SHAPES:
        shape = shape_of(text)
        if args.decode:
            shape = shape._replace(tokens=args.decode)
        for dtype in args.dtype or ("float32", "bfloat16"):
            results.append(measured(shape, dtype, device, backends, args.repeats, args.decode is None, args.routing))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(device), "results": results}, indent=1) + "\n")
        print(f"\nwritten to {args.json}")
    return 0
