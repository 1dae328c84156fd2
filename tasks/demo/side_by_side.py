"""Several trainings at once, each in a process and on cores of its own.

One after the other, or by turns, each would have all cores: but models that train in minutes are made of small
operations, which gain little from a second core. Side by side every core works, and whatever else slows the machine
down slows all alike.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event
from typing import Any

from .machine import cores_each, keep_freed_memory

# Imported once, in the process that the others are forked from.
HEAVY = ["lightning.pytorch", "transformers", "timm", "tasks.language"]


def side_by_side(
    names: Sequence[str], prepare: Callable[..., Any], train: Callable[..., None], *arguments: Any
) -> bool:
    """Train all to their end; Ctrl-C asks them to stop, and makes the answer False.

    In the first process `prepare(*arguments)` runs, and what it returns goes to all. Then `train(name, prepared, start,
    stopping, *arguments)` runs in each: it calls `start()` before the first step, which waits for the others, and ends
    after the step in which `stopping()` has become true. Both are functions at the top of a module. Raises what any of
    them raised, after the others have stopped.
    """
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(HEAVY)
    stop = context.Event()
    threads = cores_each(len(names))
    runners: dict[str, Any] = {}
    links: dict[str, Connection] = {}
    for name in names:
        links[name], theirs = context.Pipe()
        first = prepare if name == names[0] else None
        runners[name] = context.Process(
            target=_body, args=(name, threads, stop, theirs, first, train, arguments), name=name, daemon=True
        )
    interrupted = False
    ready: set[str] = set()  # outlives an interruption: whoever is ready says so once
    for runner in runners.values():
        runner.start()
    while True:
        try:
            _conduct(runners, links, ready, stop)
            break
        except KeyboardInterrupt:
            if interrupted:  # asked twice: do not wait
                for runner in runners.values():
                    runner.kill()
                raise
            interrupted = True
            stop.set()
            print("\nstopping after this step; Ctrl-C again to stop at once", flush=True)
    return not interrupted


def _conduct(runners: dict[str, Any], links: dict[str, Connection], ready: set[str], stop: Event) -> None:
    """Pass messages on until all processes have ended; raise the first error."""
    errors: list[BaseException] = []
    aborted = False
    while any(runner.is_alive() for runner in runners.values()) or any(link.poll() for link in links.values()):
        wait([*links.values(), *(runner.sentinel for runner in runners.values())], timeout=0.2)
        for name in [name for name, link in links.items() if link.poll()]:
            try:
                kind, content = links[name].recv()
            except (EOFError, ConnectionError):
                links.pop(name)
                continue
            if kind == "prepared":
                for other in links.values():
                    other.send(content)
            elif kind == "ready":
                ready.add(name)
                if ready == set(runners):
                    for other in links.values():
                        other.send(None)
            else:
                errors.append(content)
                stop.set()
        for name, runner in runners.items():
            if runner.exitcode and not errors:
                errors.append(RuntimeError(f"the process that trains {name!r} ended with status {runner.exitcode}"))
                stop.set()
        if errors and not aborted:
            aborted = True
            for link in links.values():  # for whoever waits to be started
                _send(link, _Abort)
    if errors:
        raise errors[0]


class _Abort:
    """Sent in place of an answer: another process failed."""


def _send(link: Connection, content: Any) -> None:
    with suppress(OSError):  # it may have ended
        link.send(content)


def _body(
    name: str,
    threads: int,
    stop: Event,
    link: Connection,
    prepare: Callable[..., Any] | None,
    train: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """What runs in a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent passes it on, between two steps
    keep_freed_memory()

    def answer() -> Any:
        content = link.recv()
        if content is _Abort:
            raise SystemExit(0)
        return content

    def start() -> None:
        link.send(("ready", None))
        answer()

    try:
        import torch

        torch.set_num_threads(threads)
        if prepare is not None:
            link.send(("prepared", prepare(*arguments)))
        train(name, answer(), start, stop.is_set, *arguments)
    except Exception as error:
        _report(link, error)
        raise SystemExit(0) from error


def _report(link: Connection, error: Exception) -> None:
    try:
        link.send(("error", error))
    except Exception:  # one that cannot be sent between processes
        link.send(("error", RuntimeError(f"{type(error).__name__}: {error}")))
