"""Tokens a second with experts that stay in files, against the whole model in memory and accelerate's offloading.

python scripts/bench_offload.py: a language model with random weights is written to a folder and read back; each way
decodes the same random tokens in turn, so that no two follow one another because their experts are alike. With --cold
the system forgets the files before every token, so that what is read comes from the disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import zoo
from tasks.cli import run_script
from tasks.folders import check_writable
from tasks.numbers import count
from zoo.moe import OffloadedExperts


def forget(folder: Path) -> None:
    """Let the system drop what it has kept of the files of a folder, but those that a program has mapped."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)  # what is not on the disk yet would be kept
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def bandwidth(folder: Path, cold: bool) -> float:
    """Bytes a second of reading the files, once each into memory that is there."""
    paths = list(folder.glob("*.safetensors"))
    buffer = bytearray(64 << 20)
    if cold:
        forget(folder)
    start, total = time.perf_counter(), 0
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - start)


def decode(model: torch.nn.Module, ids: torch.Tensor, tokens: int, before: Callable[[], None]) -> float:
    """Seconds a token of reading the last `tokens` of `ids` one by one, after the others as a prompt."""
    took = 0.0
    with torch.inference_mode():
        out = model(ids[:, :-tokens], use_cache=True)
        for token in ids[:, -tokens:].split(1, 1):
            before()
            start = time.perf_counter()
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            took += time.perf_counter() - start
    return took / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=count, default=1024)
    parser.add_argument("--expert", type=count, default=2048, help="hidden width of an expert")
    parser.add_argument("--experts", type=count, default=16)
    parser.add_argument("--layers", type=count, default=8)
    parser.add_argument("--slots", type=count, nargs="+", default=[4, 8])
    parser.add_argument("--tokens", type=count, default=16)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--cold", action="store_true", help="the system forgets the files before every token")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.json:
        check_writable("--json", args.json.parent)

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        model = zoo.create_model(
            "language/mixtral_tiny",
            hidden_size=args.hidden,
            intermediate_size=args.expert,
            num_local_experts=args.experts,
            num_hidden_layers=args.layers,
            dtype="bfloat16",
        )
        experts = [m for m in model.modules() if type(m) is zoo.moe.Experts]
        each = sum(p.numel() * p.itemsize for p in experts[0].parameters()) // args.experts
        zoo.save_pretrained(model, folder)
        del model, experts
        ways = {"in memory": zoo.from_pretrained(folder)}
        for slots in args.slots:
            ways[f"{slots} slots"] = zoo.from_pretrained(folder, offload=slots)
        if importlib.util.find_spec("accelerate"):
            # Files of its own: those that it maps into memory are kept by the system.
            theirs = shutil.copytree(folder, Path(root) / "theirs")
            ways["transformers, accelerate"] = by_accelerate(theirs, Path(root), args.layers)
        else:
            print("accelerate is not installed: not compared")
        before = (lambda: forget(Path(root))) if args.cold else (lambda: None)
        prompts = torch.randint(0, 1024, (args.repeats + 1, 1, 4 + args.tokens))
        times: dict[str, list[float]] = {name: [] for name in ways}
        reads: dict[str, list[float]] = {name: [] for name in ways}
        speed = []
        for prompt in prompts:  # the first one warms up
            speed.append(bandwidth(folder, args.cold))
            for name, way in ways.items():
                offloaded = [m for m in way.modules() if isinstance(m, OffloadedExperts)]
                start = sum(m.read + m.guessed for m in offloaded)
                times[name].append(decode(way, prompt, args.tokens, before))
                reads[name].append((sum(m.read + m.guessed for m in offloaded) - start) / args.tokens)
        found = {}
        limit = statistics.median(speed[1:])
        print(
            f"{args.layers} layers of {args.experts} experts of {each / 2**20:.0f} MiB, 2 a token; "
            f"files are read at {limit / 1e9:.2f} GB/s; {torch.get_num_threads()} threads"
        )
        for name in ways:
            took, read = statistics.median(times[name][1:]), statistics.median(reads[name][1:])
            whole = statistics.median(times["in memory"][1:])
            least = whole + read * each / limit
            found[name] = {"tokens_per_second": 1 / took, "experts_read_per_token": read, "of_limit": least / took}
            note = f", {read:.1f} experts read a token, {least / took:.2f} of the limit" if read else ""
            print(f"{name:26} {1 / took:7.2f} tokens/s, {whole / took:.3f} of in memory{note}")
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=2) + "\n")


def by_accelerate(folder: Path, root: Path, layers: int) -> torch.nn.Module:
    """transformers' own model, its layers left on the disk by accelerate."""
    from transformers import AutoModelForCausalLM

    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{n}": "disk" for n in range(layers)}
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=where, offload_folder=root / "offload", dtype="auto"
    ).eval()


if __name__ == "__main__":
    run_script(main)
