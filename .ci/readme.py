"""Run what the READMEs tell a user to run: each line of their ```bash blocks, and each ```python block.

`make test` is left to the caller, who has just run it; `make demo` trains for a third of its time. Stops at the first
failure.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *(page for top in ("zoo", "tasks", "configs") for page in sorted((ROOT / top).rglob("README.md"))),
]


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order, the first page's first."""
    fenced = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [block for page in PAGES for block in fenced.findall(page.read_text())]


def run(what: str, command: list[str], **variables: str) -> None:
    """Run one command in the checkout, with the environment's programs first on the path."""
    print(f"README: {what}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **variables}
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdin=subprocess.DEVNULL)
    print(f"README: done in {time.monotonic() - started:.0f} s: {what}", flush=True)


def main() -> None:
    """Run what `make` does by itself, then the other commands and all Python examples, two at a time."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [command for line in lines if (command := line.split("#")[0].strip()) and command != "make test"]
    for command in (command for command in commands if command.startswith("make ")):
        run(command, ["bash", "-ec", command], DEMO="--seconds 20")
    others = [command for command in commands if not command.startswith("make ")]
    # Those that train write to one folder, and read what another wrote.
    training = [command for command in others if " fit " in command or "runs/" in command]
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(several, part) for part in (training, [c for c in others if c not in training])]
        found += [pool.submit(example, *numbered) for numbered in enumerate(blocks("python"), 1)]
        for result in as_completed(found):
            if result.exception() is not None:
                pool.shutdown(cancel_futures=True)
            result.result()


def several(commands: list[str]) -> None:
    """Run commands one after another, on one core each."""
    for command in commands:
        run(command, ["bash", "-ec", command], OMP_NUM_THREADS="1")


def example(number: int, source: str) -> None:
    """Run one Python example."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(source)
        script.flush()
        run(f"Python example {number}", [sys.executable, script.name], OMP_NUM_THREADS="1")


if __name__ == "__main__":
    main()
