"""Two trainings in one process by turns, so that whatever else slows the machine down slows both alike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence


class Turns:
    """Only one runner runs at a time; it hands over when it has used up its share of the time."""

    def __init__(self, names: Sequence[str], slice_seconds: float) -> None:
        self.slice_seconds = slice_seconds
        self._waiting = list(names)  # the first one runs
        self._shares = dict.fromkeys(names, slice_seconds)
        self._change = threading.Condition()
        self.stopping = False

    def start(self, name: str) -> None:
        """Wait for the first turn."""
        with self._change:
            self._change.wait_for(lambda: self._waiting[0] == name)

    def offer(self, name: str, seconds: float) -> None:
        """After a step: hand over if `seconds`, what this runner used so far, is its share, and wait for a turn."""
        if seconds < self._shares[name] or self.stopping:
            return
        with self._change:
            # By the clock of training and not by turns: whoever overran its share waits longer.
            self._shares[name] = (seconds // self.slice_seconds + 1) * self.slice_seconds
            self._waiting.append(self._waiting.pop(0))
            self._change.notify_all()
            self._change.wait_for(lambda: self._waiting[0] == name)

    def leave(self, name: str) -> None:
        """Take no more turns."""
        with self._change:
            self._waiting.remove(name)
            self._change.notify_all()


class Stopwatch:
    """Seconds of training: it stands still in evaluations and while the other one has its turn."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def go(self) -> None:
        """Run on."""
        self._since = time.perf_counter()

    def halt(self) -> None:
        """Stand still; harmless when it does."""
        if self._since:
            self.seconds += time.perf_counter() - self._since
            self._since = 0.0


def take_turns(turns: Turns, runners: dict[str, Callable[[], None]]) -> bool:
    """Run all to their end, each in a thread of its own; Ctrl-C asks them to stop, and makes the answer False.

    Threads, because the signal reaches the main thread alone: training ends between two steps, never within one.
    Raises what a runner raised.
    """
    errors: list[BaseException] = []

    def body(name: str) -> None:
        turns.start(name)
        try:
            if not turns.stopping:
                runners[name]()
        except BaseException as error:
            errors.append(error)
            turns.stopping = True
        finally:
            turns.leave(name)

    threads = [threading.Thread(target=body, args=(name,), name=name, daemon=True) for name in runners]
    for thread in threads:
        thread.start()
    interrupted = False
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                thread.join(0.2)
        except KeyboardInterrupt:
            if interrupted:  # asked twice: do not wait
                raise
            interrupted = turns.stopping = True
            print("\nstopping after this step; Ctrl-C again to stop at once", flush=True)
    if errors:
        raise errors[0]
    return not interrupted
