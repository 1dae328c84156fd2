"""What the checks do on a GPU only, run on stand-ins for torch.cuda: that these lines work, and what they compute."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from zoo.bench import turns
from zoo.bench.contestants import Problem, Shape, ours
from zoo.bench.gpu import capture, setting, times

SHAPE = Shape(13, 16, 24, 4, 2)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    replays = 0

    def replay(self):
        self.replays += 1


class Cuda:
    """What was asked of the device."""

    def __init__(self):
        self.waits, self.modes, self.allocated, self.graphs = 0, [], iter(()), []

    def synchronize(self):
        self.waits += 1

    @contextmanager
    def graph(self, graph):
        self.graphs.append(graph)
        yield


@pytest.fixture
def cuda(monkeypatch):
    seen = Cuda()
    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": seen.graph,
        "synchronize": seen.synchronize,
        "current_stream": Stream,
        "stream": nullcontext,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": seen.modes.append,
        "memory_allocated": lambda: next(seen.allocated),
        "get_device_capability": lambda *device: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(setting.Setting, "cuda", True)
    return seen


def small(**changes):
    return replace(setting.cpu("reference"), shapes=(SHAPE,), **changes)


def test_turns_are_timed_by_events(cuda):
    problem = Problem.random(SHAPE, torch.float32, "cpu")
    one = ours(problem, "reference")
    slow = replace(one, run=lambda: (time.sleep(0.02), one.run())[1])
    phases = turns._turn(slow, torch.ones_like(problem.x), "cuda")
    assert phases.forward > 0.02 > phases.backward > 0
    assert turns._turn(slow, None, "cuda").backward == 0


def test_waiting_is_an_error_for_the_run_alone(cuda):
    assert all(row.ok for row in capture.sync(small()))
    assert cuda.modes == ["error", "default"] * 3


def test_graphs_are_captured_after_warming_up_and_replayed(cuda):
    rows = list(capture.graphs(small()))
    assert [graph.replays for graph in cuda.graphs] == [2, 2]
    assert not any(row.ok for row in rows)  # such a graph computes nothing, which is found


def test_memory_is_what_is_allocated_beside_the_output(cuda):
    pre, y = SHAPE.tokens * SHAPE.k * 2 * SHAPE.hidden_dim * 2, SHAPE.tokens * SHAPE.dim * 2
    kept = [pre, pre + capture.metadata_bytes(SHAPE)]
    cuda.allocated = iter([1000, 1000 + kept[0] + y, 1000, 1000 + kept[1] + y])
    rows = list(capture.memory(small()))
    assert [row.figures["share"] for row in rows] == [1.0, 1.0]
    cuda.allocated = iter([1000, 1000 + 2 * kept[0] + y, 1000, 1000 + 2 * kept[1] + y])
    assert [row.ok for row in capture.memory(small())] == [False, False]


def test_decoding_is_timed_over_a_sequence_of_calls(cuda, monkeypatch):
    monkeypatch.setattr(times, "seconds", lambda given, run, repeats: 16e-6)
    fast = times.decode_row(small(), SHAPE._replace(tokens=1), 1e9)
    assert fast.figures["graph_us"] == pytest.approx(1)
    assert fast.ok == (fast.figures["target_us"] >= 1)
    assert not times.decode_row(small(), SHAPE._replace(tokens=1), 1e15).ok
