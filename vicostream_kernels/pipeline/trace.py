"""Where the time goes: spans per stage, for percentiles and for a Chrome / Perfetto trace.

On the CPU a span is wall time. On a GPU it is the time between two events on the current stream,
read long after they have passed, so that measuring never makes the host wait.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: A trace keeps this many spans, the newest; a stream that never ends must not fill the memory.
CAPACITY = 100_000
_SETTLE_EVERY = 64


@dataclass(eq=False, slots=True)
class Span:
    """One run of a stage: ``start_s`` from the trace's start; ``seconds`` None while on its way."""

    stage: str
    start_s: float
    seconds: float | None = None
    args: dict[str, Any] = field(default_factory=dict)
    _events: tuple[Any, Any] | None = None

    @property
    def ms(self) -> float:
        return 1e3 * (self.seconds or 0.0)


class Trace:
    """The spans of one stream on ``device``."""

    def __init__(self, device: torch.device | str = "cpu", *, capacity: int = CAPACITY) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._device = torch.device(device)
        self.spans: deque[Span] = deque(maxlen=capacity)
        self._pending: deque[Span] = deque()
        self._settling = threading.Lock()  # stages may have threads of their own
        self._origin = time.perf_counter()
        self._first = self._event() if self._cuda else None

    @property
    def now(self) -> float:
        """Seconds since the trace began."""
        return time.perf_counter() - self._origin

    @contextmanager
    def span(self, stage: str, *, host: bool = False, **args: Any) -> Iterator[Span]:
        """Measures the body; ``host`` forces wall time for work that no GPU does. A body that
        raises is measured too: the trace is most needed then."""
        on_device = self._cuda and not host
        span = Span(stage, self.now, args=args)
        begin = self._event() if on_device else None
        try:
            yield span
        finally:
            if on_device:
                span._events = (begin, self._event())
                self._pending.append(span)
                if len(self._pending) > _SETTLE_EVERY:
                    self.settle()
            else:
                span.seconds = self.now - span.start_s
            self.spans.append(span)

    def past(self, stage: str, began_s: float, seconds: float) -> Span:
        """Adds what was measured elsewhere; ``began_s`` is by ``time.perf_counter``."""
        span = Span(stage, began_s - self._origin, seconds)
        self.spans.append(span)
        return span

    def settle(self, *, wait: bool = False) -> None:
        """Reads the events that have passed; with ``wait``, all of them."""
        with self._settling:
            while self._pending:
                span = self._pending[0]
                begin, end = span._events
                if wait:
                    end.synchronize()
                elif not end.query():
                    return
                span.seconds = begin.elapsed_time(end) / 1e3
                span.start_s = self._first.elapsed_time(begin) / 1e3
                span._events = None
                self._pending.popleft()

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def to_chrome(self) -> dict[str, Any]:
        """The trace as Chrome's JSON object format: one track per stage, times in microseconds."""
        self.settle(wait=True)
        tracks: dict[str, int] = {}
        events = []
        for span in list(self.spans):
            tid = tracks.setdefault(span.stage, len(tracks) + 1)
            events.append(
                {
                    "name": span.stage,
                    "cat": "stage",
                    "ph": "X",
                    "pid": 1,
                    "tid": tid,
                    "ts": round(1e6 * span.start_s, 1),
                    "dur": round(1e6 * (span.seconds or 0.0), 1),
                    "args": span.args,
                }
            )
        names = [_metadata("process_name", 0, {"name": "vicostream"})]
        for stage, tid in tracks.items():
            names.append(_metadata("thread_name", tid, {"name": stage}))
            names.append(_metadata("thread_sort_index", tid, {"sort_index": tid}))
        return {"traceEvents": names + events, "displayTimeUnit": "ms"}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes :meth:`to_chrome`; open it in chrome://tracing or ui.perfetto.dev."""
        write_atomically(path, json.dumps(self.to_chrome(), separators=(",", ":")))


def _metadata(name: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": 1, "tid": tid, "args": args}


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Readers see the old file or the new one, never half of it. A file name need not be UTF-8: its
    bytes are written as JSON escapes have them."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
