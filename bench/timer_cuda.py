"""The paired timer on a CUDA device: events around graph replays, the L2 cache flushed between.

The host never waits inside a measurement: all rounds are queued, then synchronised once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch

from vicostream_kernels.bench.inputs import clone
from vicostream_kernels.bench.registry import Inputs
from vicostream_kernels.bench.timer import Budget, Run, Samples, no_garbage_collection, turns

#: Calls unrolled into one graph in the warm state: an event pair alone costs about a microsecond.
_UNROLL = 16
#: Rounds queued before the host looks at the clock again.
_QUEUED = 16


class Clock(Protocol):
    """What the timer needs of a device; tests give a fake one."""

    def event(self) -> Any: ...
    def flush(self) -> None: ...
    def synchronize(self) -> None: ...
    def graph(self, run: Callable[[], Any]) -> Callable[[], None]: ...


class CudaClock:
    """Events, graphs and an L2 flush on one device, on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 << 20)
        self._others = torch.zeros(size // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def flush(self) -> None:
        # By reading: lines that were written would go back to memory in the midst of the timed
        # call, as many as the L2 holds.
        torch.sum(self._others, dim=0, out=self._sum)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def graph(self, run: Callable[[], Any]) -> Callable[[], None]:
        """Captures ``run``; raises what it or the capture raises."""
        before = torch.cuda.current_stream(self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
            _check_no_wait(run)
        before.wait_stream(side)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
        except Exception:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own stream behind
            raise
        # A graph holds no tensor that was there before it: what `run` reads must live as long.
        return partial(_replay, graph, run)


def _replay(graph: torch.cuda.CUDAGraph, _reads: Any) -> None:
    graph.replay()


def _check_no_wait(run: Callable[[], Any]) -> None:
    """Raises where ``run`` waits for the device. Found out before a capture: one that fails leaves
    torch's allocator in the midst of it, and no later graph of the process could be captured."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def measure_cuda(
    runs: Mapping[str, Run],
    inputs: Inputs,
    *,
    cold: bool,
    budget: Budget,
    clock: Clock,
    graphs: bool = True,
) -> Samples:
    """Times each run on the device.

    Cold: other data fills the L2 before each call, outside the timed window. Warm: a graph of 16
    calls, the time divided by 16. ``graphs=False`` times the calls as a host issues them: what an
    eager user sees, launch gaps included. A run that can't be captured (it waits for the device) is
    timed like that too, and so are all once more, for their ratios; ``method`` says which it was.
    """
    state = "cold" if cold else "warm"
    count = 1 if cold else _UNROLL
    replays: dict[str, Callable[[], Any]] = {}
    refused: list[str] = [] if graphs else list(runs)
    for name in runs if graphs else ():
        try:
            replays[name] = clock.graph(_repeat(runs[name], clone(inputs), count))
        except Exception as error:  # capture fails in many ways; the reason goes into the row
            refused.append(f"{name} can't be captured: {type(error).__name__}")
            clock.synchronize()
    with no_garbage_collection():
        replayed = _measure(replays, count, cold, budget, clock)
        if not refused:
            return Samples(replayed, f"{state}: graph replay")
        replays.clear()  # a graph keeps what its calls took
        calls = {name: _repeat(run, clone(inputs), 1) for name, run in runs.items()}
        issued = _measure(calls, 1, cold, budget, clock)
    why = ", ".join(refused) if graphs else "asked for"
    if not replayed:
        return Samples(issued, f"{state}: events, {why}")
    method = f"{state}: graph replay; ratios by events, {why}"
    return Samples({**issued, **replayed}, method, issued)


def _repeat(run: Run, inputs: Inputs, count: int) -> Callable[[], Any]:
    def call() -> None:
        for _ in range(count):
            run(inputs)

    return call


def _measure(
    calls: Mapping[str, Callable[[], Any]], count: int, cold: bool, budget: Budget, clock: Clock
) -> dict[str, list[float]]:
    if not calls:
        return {}
    for call in calls.values():
        for _ in range(3):
            call()
    clock.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds, started = turns(list(calls)), time.perf_counter()
    done = 0
    while done < budget.most_rounds:
        if done >= budget.least_rounds and time.perf_counter() - started > budget.seconds:
            break
        queued = []
        for _ in range(min(_QUEUED, budget.most_rounds - done)):
            for name in next(rounds):
                start, end = clock.event(), clock.event()
                if cold:
                    clock.flush()
                start.record()
                calls[name]()
                end.record()
                queued.append((name, start, end))
            done += 1
        clock.synchronize()
        for name, start, end in queued:
            samples[name].append(start.elapsed_time(end) * 1e6 / count)
    return samples
