"""The CUDA timer: on a fake clock, what is queued in which order; on a device, that it is right."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import contextmanager

import pytest
import torch

from vicostream_kernels.bench.stats import paired_ratio, timing
from vicostream_kernels.bench.timer import Budget
from vicostream_kernels.bench.timer_cuda import CudaClock, measure_cuda

BUDGET = Budget(seconds=0.0, least_rounds=4, most_rounds=4)


class FakeClock:
    """Counts 1 ms per call, 5 ms per flush; writes down what was asked."""

    def __init__(self, captures: float = math.inf, issuing: float = 0.0) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.captures = captures  # those after so many fail
        self.issuing = issuing  # of a run's milliseconds, what a replay spares the host

    def event(self):
        clock = self

        class Event:
            def record(self):
                self.time = clock.now
                clock.log.append("record")

            def elapsed_time(self, end):
                clock.log.append("read")
                return end.time - self.time

        return Event()

    def flush(self):
        self.now += 5
        self.log.append("flush")

    def synchronize(self):
        self.log.append("synchronize")

    def graph(self, run):
        if self.log.count("capture") >= self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append("capture")

        def replay():
            self.now -= self.issuing
            run()

        return replay


def runs_on(clock: FakeClock, **milliseconds: float):
    def make(name: str, cost: float):
        def run(inputs):
            clock.now += cost
            clock.log.append(name)

        return run

    return {name: make(name, cost) for name, cost in milliseconds.items()}


def measured(clock, *, cold, graphs=True, **milliseconds):
    runs = runs_on(clock, **milliseconds)
    inputs = {"x": torch.zeros(1)}
    return measure_cuda(runs, inputs, cold=cold, budget=BUDGET, clock=clock, graphs=graphs)


def test_cold_times_exclude_the_flush_and_are_per_call():
    taken = measured(FakeClock(), cold=True, a=1.0, b=3.0)
    assert taken.method == "cold: graph replay"
    assert timing(taken.nanoseconds["a"]).p50 == pytest.approx(1000)
    assert timing(taken.nanoseconds["b"]).p50 == pytest.approx(3000)


def test_each_cold_window_holds_one_call_and_no_flush_and_no_wait():
    clock = FakeClock()
    measured(clock, cold=True, a=1.0, b=3.0)
    queued = clock.log[clock.log.index("flush") : clock.log.index("read")]
    assert queued[-1] == "synchronize" and queued.count("synchronize") == 1
    assert queued[:8] == ["flush", "record", "a", "record", "flush", "record", "b", "record"]
    assert queued[8:12] == ["flush", "record", "b", "record"]


def test_warm_graphs_unroll_and_divide():
    clock = FakeClock()
    taken = measured(clock, cold=False, a=1.0)
    assert timing(taken.nanoseconds["a"]).p50 == pytest.approx(1000)
    assert "flush" not in clock.log
    first = clock.log.index("record")
    assert clock.log[first + 1 : clock.log.index("record", first + 1)] == ["a"] * 16


def test_where_no_run_can_be_captured_all_use_events():
    taken = measured(FakeClock(captures=0), cold=True, a=1.0, b=2.0)
    why = "can't be captured: RuntimeError"
    assert taken.method == f"cold: events, a {why}, b {why}"
    assert timing(taken.nanoseconds["b"]).p50 == pytest.approx(2000)


@pytest.mark.parametrize("cold", [True, False])
def test_a_run_that_can_not_be_captured_costs_the_others_their_ratios_by_graph_alone(cold):
    taken = measured(FakeClock(captures=1, issuing=0.5), cold=cold, a=1.0, b=2.0)
    assert taken.method.endswith(
        ": graph replay; ratios by events, b can't be captured: RuntimeError"
    )
    replay = 1000 - 500 / (1 if cold else 16)
    assert timing(taken.nanoseconds["a"]).p50 == pytest.approx(replay)
    assert timing(taken.nanoseconds["b"]).p50 == pytest.approx(2000)
    assert paired_ratio(taken.paired["b"], taken.paired["a"]).median == pytest.approx(2.0)


def test_eager_calls_on_request():
    clock = FakeClock()
    taken = measured(clock, cold=True, graphs=False, a=1.0)
    assert "capture" not in clock.log and taken.method == "cold: events, asked for"


class FakeCuda:
    """Stands in for ``torch.cuda``: one current stream, graphs that are called again on replay."""

    def __init__(self, monkeypatch) -> None:
        self.current, self.mode, self.captures = "default", 0, 0
        cuda = self

        class Stream:
            def __init__(self, *_):
                pass

            def wait_stream(self, _):
                pass

        class Graph:
            def replay(self):
                pass

        @contextmanager
        def stream(side):
            before, cuda.current = cuda.current, side
            yield
            cuda.current = before

        @contextmanager
        def capture(graph):
            cuda.captures += 1
            cuda.current = "capture"
            yield  # what fails inside leaves this stream the current one, as torch does
            cuda.current = cuda.default

        self.default = self.current = Stream()
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": capture,
            "stream": stream,
            "current_stream": lambda _: cuda.current,
            "set_stream": lambda s: setattr(cuda, "current", s),
            "synchronize": lambda _: None,
            "get_sync_debug_mode": lambda: cuda.mode,
            "set_sync_debug_mode": lambda mode: setattr(cuda, "mode", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def clock(self) -> CudaClock:
        clock = object.__new__(CudaClock)
        clock.device = torch.device("cuda")
        return clock


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch):
    clock = FakeCuda(monkeypatch).clock()
    inputs = torch.zeros(3)
    alive = weakref.ref(inputs)
    replay = clock.graph(lambda kept=inputs: kept.add_(1))
    del inputs
    gc.collect()
    assert alive() is not None
    replay()
    del replay
    gc.collect()
    assert alive() is None


def test_a_run_that_waits_is_never_captured(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def run():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        cuda.clock().graph(run)
    assert cuda.captures == 0 and cuda.mode == 0


def test_a_failed_capture_gives_the_stream_back(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def run():
        if cuda.current == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        cuda.clock().graph(run)
    assert cuda.captures == 1 and cuda.current is cuda.default


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_a_run_that_waits_leaves_later_graphs_alone():
    clock, x = CudaClock(torch.device("cuda")), torch.rand(64, device="cuda")
    with pytest.raises(RuntimeError):
        clock.graph(lambda: (x > 0.5).nonzero())
    out = torch.zeros(64, device="cuda")
    replay = clock.graph(lambda: out.copy_(x))
    out.zero_()
    replay()
    assert torch.equal(out, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("cold", [True, False])
def test_on_a_device_twice_the_bytes_take_about_twice_the_time(cold, graphs):
    device = torch.device("cuda")
    inputs = {"x": torch.rand(64 << 20, device=device)}

    def copy(times):
        return lambda given: [given["x"].clone() for _ in range(times)]

    ratio = 0.0
    for _ in range(3):  # other tests may use the device at the same time
        taken = measure_cuda(
            {"one": copy(1), "two": copy(2)},
            inputs,
            cold=cold,
            budget=Budget(1.0, 10, 20),
            clock=CudaClock(device),
            graphs=graphs,
        )
        one, two = (timing(taken.nanoseconds[name]).p50 for name in ("one", "two"))
        assert 20 < one
        ratio = two / one
        if 1.5 < ratio < 2.6:
            break
    assert 1.5 < ratio < 2.6
    assert one < 10_000
