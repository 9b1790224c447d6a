"""A pipe as a video: read in Python, where signals are heard."""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable

#: So long a signal may wait that raises nothing.
_LOOK_S = 0.2


class Piped:
    """What comes out of ``pipe``, as PyAV reads a file; ends early once it is ``enough``.

    FFmpeg's own read does not come back before there is data, whatever signal arrives. An
    interrupt ends the pipe too, since it cannot pass through FFmpeg; :meth:`check` raises it.
    """

    def __init__(self, pipe: str | int, enough: Callable[[], bool]) -> None:
        self._pipe = open(pipe, "rb", buffering=0, closefd=isinstance(pipe, str))
        self._enough = enough
        self._interrupt: KeyboardInterrupt | None = None

    def read(self, size: int) -> bytes:
        try:
            return self._read(size)
        except KeyboardInterrupt as interrupt:
            self._interrupt = interrupt
            return b""

    def check(self) -> None:
        """Raises the interrupt that came while FFmpeg was reading."""
        if self._interrupt is not None:
            raise self._interrupt

    def _read(self, size: int) -> bytes:
        while self._interrupt is None and not self._enough():
            ready, _, _ = select.select([self._pipe], [], [], _LOOK_S)
            if ready:
                return os.read(self._pipe.fileno(), size)
        return b""


def is_pipe(path: str) -> bool:
    return stat.S_ISFIFO(os.stat(path).st_mode)
