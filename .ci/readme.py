"""Run what the READMEs tell a user to run: each line of their ```bash blocks, and each ```python block.

`make test` is left to the caller, who has just run it. Stops at the first failure.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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


def run(what: str, command: list[str]) -> None:
    """Run one command in the checkout, with the environment's programs first on the path."""
    print(f"README: {what}", flush=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdin=subprocess.DEVNULL)
    print(f"README: done in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Run all commands, then all Python examples."""
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    for line in joined.splitlines():
        command = line.split("#")[0].strip()
        if command and command != "make test" and not command.startswith(("git clone", "cd ")):
            run(command, ["bash", "-ec", command])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(example, *zip(*enumerate(blocks("python"), 1))))


def example(number: int, source: str) -> None:
    """Run one Python example."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(source)
        script.flush()
        run(f"Python example {number}", [sys.executable, script.name])


if __name__ == "__main__":
    main()
