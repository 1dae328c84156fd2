"""Check and time the mixture-of-experts layer on one CUDA GPU, in one call, with nothing but torch and triton.

PYTHONPATH=. python scripts/check_gpu.py --json check.json --seconds 540

Sections, each of which may fail without stopping the others: device, correct, time, decode, repeat, sync, memory, far,
graphs, compile, bits, away, tiles. The file holds all figures, and is written after every finding. Sections run in a
process of their own, and in another one after a section that crashes, hangs, or leaves the GPU unusable; where that was
one case of several, as an illegal access spoils it for a process, the others follow there. With `--device cpu` all runs
in small on the CPU, to try the script itself; TRITON_INTERPRET=1 takes the Triton kernels for that.
Liger-Kernel, if installed, is timed untuned unless LIGER_FUSED_MOE_AUTOTUNE=1: tuning takes minutes a shape.
"""

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Section: where it is, and the most seconds it gets of all. What matters most comes first.
SECTIONS = {
    "device": ("times", "ceilings", 20),
    "correct": ("results", "correct", 150),
    "time": ("times", "timed", 200),
    "decode": ("times", "decode", 60),
    "repeat": ("results", "repeat", 30),
    "sync": ("capture", "sync", 30),
    "memory": ("capture", "memory", 30),
    "far": ("results", "far", 60),
    "graphs": ("capture", "graphs", 30),
    "compile": ("capture", "compiled", 90),
    "bits": ("bits", "few_bits", 120),
    "away": ("away", "offloaded", 30),
    "tiles": ("tiles", "tiles", 240),
}
# A section that is still running so long after its time hangs.
PATIENCE = 60
# Exit statuses of the process that runs sections; LOST where a section had cases left.
DONE, REFUSED, UNUSABLE, LOST = 0, 2, 3, 4
# Times that a section goes on in another process.
AGAIN = 3


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"sections, separated by commas; all by default: {','.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=540, help="of all sections together (default 540)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script in small")
    parser.add_argument("--shape", action="append", metavar="T,D,F,E,K", help="instead of the list; repeatable")
    parser.add_argument("--json", type=Path, default=Path("check_gpu.json"), metavar="FILE", help="all figures")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # runs sections, adds to the file
    args = parser.parse_args()
    args.sections = list(SECTIONS) if args.only is None else [name.strip() for name in args.only.split(",")]
    for name in args.sections:
        if name not in SECTIONS:
            parser.error(f"--only {name}: expected some of {', '.join(SECTIONS)}")
    return args


def setting_of(args: argparse.Namespace) -> Any:
    import torch

    from zoo.bench.gpu import setting
    from zoo.bench.moe import shape_of

    if args.device.startswith("cuda"):
        if not torch.cuda.is_available():
            print("check_gpu: no CUDA device was found here; --device cpu tries the script in small", file=sys.stderr)
            sys.exit(REFUSED)
        found = setting.gpu(args.device)
    else:
        from zoo.moe.kernels.triton.numerics import INTERPRETED

        found = setting.cpu("triton" if INTERPRETED else "reference")
    if args.shape:
        found.shapes = tuple(shape_of(text) for text in args.shape)
    return found


def usable(setting: Any) -> bool:
    """Whether the device still computes: an illegal access spoils it for the whole process."""
    import torch

    try:
        gc.collect()
        if setting.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return float(torch.ones(3, device=setting.device).sum()) == 3
    except Exception:
        return False


class Report:
    """The file, and what is printed."""

    def __init__(self, file: Path, resume: bool) -> None:
        self.file = file
        self.results: dict[str, Any] = {"machine": {}, "sections": {}}
        if resume and file.exists():
            self.results = json.loads(file.read_text())
        self.sections: dict[str, Any] = self.results["sections"]

    def write(self) -> None:
        """Write the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.results, indent=1, default=str) + "\n")

    def open(self, name: str) -> dict[str, Any]:
        """Begin a section, or go on with it; what an earlier process found is there."""
        before: dict[str, Any] = self.sections.get(name, {"rows": [], "seconds": 0.0})
        self.sections[name] = {"rows": [*before["rows"]], "seconds": None, "error": None}
        self.write()
        return before

    def add(self, name: str, row: Any) -> None:
        """Note and print one finding of a section."""
        self.sections[name]["rows"].append(asdict(row))
        mark = {True: "ok  ", False: "FAIL", None: "    "}[row.ok]
        print(f"{name:8} {mark} {row.what}: {row.note}", flush=True)
        self.write()

    def close(self, name: str, seconds: float, error: str | None) -> None:
        """End a section."""
        self.sections[name] |= {"seconds": seconds, "error": error}
        self.write()
        if error:
            print(f"{name:8} FAIL {error}", flush=True)

    def unfinished(self) -> str | None:
        """The section that was begun and has no end."""
        return next((name for name, section in self.sections.items() if section["seconds"] is None), None)

    def summary(self) -> bool:
        """Print a line a section; whether all is well."""
        print("\nsection   result")
        good = True
        for name, section in self.sections.items():
            judged = [row["ok"] for row in section["rows"] if row["ok"] is not None]
            well = all(judged) and not section["error"]
            good &= well
            of = f"{sum(judged)} of {len(judged)}" if judged else f"{len(section['rows'])} measured"
            stopped = ", not all for want of time" if section.get("stopped") else ""
            error = f"; {section['error'].strip().splitlines()[0][:120]}" if section["error"] else ""
            print(f"{name:9} {'ok  ' if well else 'FAIL'} {of}, {section['seconds']:.0f} s{stopped}{error}")
        return good


def rows_of(name: str) -> Callable[[Any], Iterator[Any]]:
    module, function, _ = SECTIONS[name]
    found: Callable[[Any], Iterator[Any]] = getattr(importlib.import_module(f"zoo.bench.gpu.{module}"), function)
    return found


def run(setting: Any, report: Report, name: str, end: float) -> None:
    """One section, its rows as they come; ends the process where no other could run after it."""
    before = report.open(name)
    start = time.monotonic() - before["seconds"]
    setting.deadline, setting.skip = min(end, start + SECTIONS[name][2]), len(before["rows"])

    def hangs() -> None:
        report.close(name, time.monotonic() - start, f"it did not end {PATIENCE} s after its time")
        os._exit(UNUSABLE)

    watch = threading.Timer(max(setting.left, 0) + PATIENCE, hangs)
    watch.daemon = True
    watch.start()
    error, lost = None, False
    try:
        if setting.left <= 0:
            raise TimeoutError("no time was left")
        for row in rows_of(name)(setting):
            report.add(name, row)
            if lost := row.ok is False and not usable(setting):
                break
            if setting.left <= 0:
                report.sections[name]["stopped"] = True
                break
    except Exception as caught:
        traceback.print_exc()
        error = f"{type(caught).__name__}: {str(caught)[:500]}"
    watch.cancel()
    report.close(name, time.monotonic() - start, error)
    if lost or not usable(setting):
        os._exit(LOST if lost else UNUSABLE)  # an ordinary end would wait for the device


def work(args: argparse.Namespace, end: float) -> int:
    """Run sections, one after another."""
    os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")
    setting = setting_of(args)
    from zoo.bench.turns import machine

    report = Report(args.json, resume=True)
    report.results["machine"] = machine(setting.device)
    for name in args.sections:
        run(setting, report, name, end)
    return DONE


def main() -> int:
    start = time.monotonic()
    args = options()
    end = start + args.seconds
    if args.worker:
        return work(args, end)
    report, rest = Report(args.json, resume=False), args.sections
    report.write()
    again = dict.fromkeys(rest, AGAIN)
    while rest:
        command = [sys.executable, __file__, "--worker", "--only", ",".join(rest), "--device", args.device]
        command += ["--seconds", f"{end - time.monotonic():.0f}", "--json", str(args.json)]
        command += [part for text in args.shape or () for part in ("--shape", text)]
        status = subprocess.run(command, check=False).returncode
        if status == REFUSED:
            return REFUSED
        report = Report(args.json, resume=True)
        if (name := report.unfinished()) is not None:
            report.close(name, 0.0, f"its process ended with status {status}")
        left = [name for name in rest if name not in report.sections]
        last = next((name for name in reversed(rest) if name in report.sections), None)
        if status == LOST and last is not None and again[last]:
            again[last] -= 1
            left.insert(0, last)
        elif len(left) == len(rest):
            print(f"check_gpu: the process that runs {', '.join(rest)} ended with status {status}", file=sys.stderr)
            return 1
        rest = left
    good = report.summary()
    print(f"written to {args.json}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
