"""Questions that are typed, or come through a pipe, while the video runs: one a line."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

#: So long it takes until the thread sees that nobody wants more.
_LOOK_S = 0.1
#: So long the thread may take to see it.
_LEAVE_S = 1.0
#: Questions that wait; whoever writes more has to wait too.
_MOST_WAITING = 64
#: Bytes without a line end that are taken for a line all the same: too long, as somebody will say.
_LONGEST = 1 << 16


@dataclass(frozen=True)
class Typed:
    """A line, and when it came (``time.perf_counter``)."""

    text: str
    came_s: float


class TypedQuestions:
    """The lines that come from ``descriptor`` (None: standard input), without empty ones; bytes
    that are no UTF-8 are replaced. Read by a thread that never holds a lock of Python's own files,
    so that it may be left waiting."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = _standard_input() if descriptor is None else descriptor
        self._lines: deque[Typed] = deque()
        self._changed = threading.Condition()
        self._over = False
        self.ended = False
        self._thread = threading.Thread(target=self._read, name="vicostream-typed", daemon=True)
        self._thread.start()

    def __bool__(self) -> bool:
        """Whether a question waits."""
        return bool(self._lines)

    def __enter__(self) -> TypedQuestions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Reads no more; what waits can still be taken."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        # Not for ever: somebody else may have read what it was told is there.
        self._thread.join(_LEAVE_S)

    def take(self) -> Typed:
        """The oldest that waits; raises IndexError where none does."""
        with self._changed:
            line = self._lines.popleft()
            self._changed.notify_all()
        return line

    def wait(self, seconds: float) -> None:
        """Until there is one or there will be none, but not longer than that."""
        with self._changed:
            if not self._lines and not self.ended:
                self._changed.wait(seconds)

    # -- the thread ------------------------------------------------------------------------------

    def _read(self) -> None:
        rest = b""
        while not self._over:
            try:
                ready, _, _ = select.select([self._descriptor], [], [], _LOOK_S)
                data = os.read(self._descriptor, _LONGEST) if ready else None
            except (OSError, ValueError):  # closed, or none to begin with
                data = b""
            if data is None:
                continue
            *lines, rest = (rest + data).split(b"\n")
            if rest and (not data or len(rest) >= _LONGEST):
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._put(line.decode(errors="replace").strip())
            if not data:
                break
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def _put(self, text: str) -> None:
        if not text:
            return
        with self._changed:
            while len(self._lines) >= _MOST_WAITING and not self._over:
                self._changed.wait()
            if len(self._lines) >= _MOST_WAITING:
                return  # closed: of a flood no more is left to tell of
            self._lines.append(Typed(text, time.perf_counter()))
            self._changed.notify_all()


def _standard_input() -> int:
    """Its number; none that is open where the process began without one: what it opened since, the
    video say, may have that number."""
    return -1 if sys.stdin is None else 0
