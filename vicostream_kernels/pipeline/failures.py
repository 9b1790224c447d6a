"""What fails in a run: a line on stderr, an entry of the report and an exit code."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from vicostream_kernels.pipeline.errors import PipelineError, chunk_time, one_line
from vicostream_kernels.pipeline.names import without_secrets
from vicostream_kernels.pipeline.report import Recorder
from vicostream_kernels.pipeline.screen import Screen

#: Options may be wrong in these parts of a run; anywhere else a ValueError is our failure.
_USERS_PARTS = ("options", "video", "model")
INTERRUPTED = 130


class Failures:
    """Tells what was raised. ``part`` and ``time_s`` say where the run is, ``code`` how it ends.

    ``interrupts``: how often the user has interrupted; ``unheard``: nobody reads the answers any
    more.
    """

    def __init__(self, recorder: Recorder, screen: Screen, *, debug: bool) -> None:
        self._recorder, self._screen, self._debug = recorder, screen, debug
        self.part = "options"
        self.time_s: float | None = None
        self.code = 0
        self.interrupts = 0
        self.unheard = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Tells what is raised inside, and goes on."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            # One that came before all was closed for another has that in its context.
            self.interrupts += 1 + isinstance(interrupt.__context__, KeyboardInterrupt)
            self.tell("interrupted", INTERRUPTED)
        except Exception as error:
            self.tell_of(error)

    def tell_of(self, error: Exception) -> None:
        part, time_s = self.part, chunk_time(error)
        self.unheard = self.unheard or isinstance(error, BrokenPipeError)
        if time_s is not None:
            part = "ingest"  # a stage's, whichever call it came from
        code = getattr(error, "exit_code", 1)
        if isinstance(error, (ValueError, TypeError)) and part in _USERS_PARTS:
            code = 2
        self.tell(_said(error), code, part, time_s)

    def tell(
        self, what: str, code: int, part: str | None = None, time_s: float | None = None
    ) -> None:
        what = without_secrets(what)  # FFmpeg's own words may have the URL in them
        time_s = self.time_s if time_s is None else time_s
        self._recorder.error(part or self.part, what, time_s)
        with suppress(OSError):  # where nobody reads stderr any more there still is a report
            self._screen.error(what)
            if self._debug and sys.exc_info()[0] is not None:
                sys.stderr.write(without_secrets(traceback.format_exc()))
        self.code = max(self.code, code)

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """The run is in ``part``, and where it was before when nothing is raised."""
        before, self.part = self.part, part
        yield
        self.part = before


def _said(error: Exception) -> str:
    if isinstance(error, (PipelineError, ValueError)):
        return one_line(error)
    if isinstance(error, BrokenPipeError):
        return "stopped: nobody reads the output any more"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"out of memory: {one_line(error)}"
    return f"{type(error).__name__}: {one_line(error)}"
