import signal
import threading
import time

import pytest

from tasks.demo.turns import Stopwatch, Turns, take_turns


def runner(turns, name, log, steps, cost):
    """Pretends to train: each step takes `cost` seconds of its own clock."""

    def run():
        for i in range(1, steps + 1):
            log.append(name)
            if turns.stopping:
                return
            turns.offer(name, i * cost)

    return run


def test_both_get_the_same_time_however_long_a_step_takes():
    turns, log = Turns(["slow", "fast"], 1.0), []
    finished = take_turns(
        turns, {"slow": runner(turns, "slow", log, 10, 0.5), "fast": runner(turns, "fast", log, 20, 0.25)}
    )
    assert finished
    assert log == (["slow"] * 2 + ["fast"] * 4) * 5


def test_only_one_runs_at_a_time():
    turns = Turns(["a", "b", "c"], 1.0)
    busy, overlaps = threading.Lock(), []

    def body(name):
        for i in range(1, 30):
            overlaps.append(not busy.acquire(blocking=False))
            time.sleep(0.0005)
            busy.release()
            turns.offer(name, i * 0.4)

    assert take_turns(turns, {name: lambda name=name: body(name) for name in "abc"})
    assert len(overlaps) == 87
    assert not any(overlaps)


def test_whoever_ends_early_leaves_the_rest_to_the_other():
    turns, log = Turns(["a", "b"], 1.0), []
    take_turns(turns, {"a": runner(turns, "a", log, 1, 1.0), "b": runner(turns, "b", log, 5, 1.0)})
    assert log == ["a"] + ["b"] * 5


def test_an_error_stops_the_other_and_comes_out():
    turns, log = Turns(["a", "b"], 1.0), []

    def fail():
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        take_turns(turns, {"a": fail, "b": runner(turns, "b", log, 100, 1.0)})
    assert log == []


def test_ctrl_c_lets_the_running_step_end_and_stops_both():
    turns, log = Turns(["a", "b"], 1.0), []
    threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT)).start()

    def body(name):
        i = 0
        while not turns.stopping:
            i += 1
            time.sleep(0.01)
            log.append(name)
            turns.offer(name, i * 0.2)

    assert not take_turns(turns, {"a": lambda: body("a"), "b": lambda: body("b")})
    assert set(log) == {"a", "b"}


def test_the_stopwatch_counts_only_while_it_runs():
    watch = Stopwatch()
    watch.halt()
    assert watch.seconds == 0
    watch.go()
    time.sleep(0.02)
    watch.halt()
    before = watch.seconds
    time.sleep(0.02)
    watch.halt()
    assert watch.seconds == before >= 0.02
