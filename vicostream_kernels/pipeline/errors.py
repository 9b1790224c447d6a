"""What can go wrong on the way from a video to an answer, and whose fault it is."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise


class PipelineError(RuntimeError):
    """A failure while streaming. The message is one line; ``exit_code`` is the command's."""

    exit_code = 1


class InputError(PipelineError, ValueError):
    """Something the user gave cannot be used: a path, a video, a question, an option."""

    exit_code = 2


@dataclass(frozen=True)
class Trouble:
    """One thing that went wrong, as it stands in ``report.json``.

    ``time_s`` is the time of the stream in seconds (None before the first frame), ``where`` the
    part of the pipeline, ``what`` one line.
    """

    time_s: float | None
    where: str
    what: str


def one_line(error: BaseException) -> str:
    """The message of an exception on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def finite(number: object) -> float:
    """``number`` as a float; NaN where it is no finite number, or text."""
    if isinstance(number, (str, bytes)):
        return math.nan
    try:
        value = float(number)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def date(error: BaseException, time_s: float) -> None:
    """Has an error of a stage say of which chunk it is, whoever hears of it and when."""
    with suppress(Exception):  # callers' own exceptions may refuse
        error.chunk_time_s = time_s


def chunk_time(error: BaseException) -> float | None:
    """The time of the first frame of the chunk whose stage raised ``error``; None for others."""
    return getattr(error, "chunk_time_s", None)


def surface(unheard: Iterable[BaseException | None], leaving: BaseException | None = None) -> None:
    """Raises what nobody has heard of, the first one with the others as its context. Where a
    ``with`` block is left by an exception, that goes on and has them all as its context."""
    errors = [error for error in (leaving, *unheard) if error is not None]
    try:
        for before, after in pairwise(errors):
            while before is not after and before.__context__ is not None:
                before = before.__context__
            if before is not after:
                before.__context__ = after
        if leaving is None and errors:
            raise errors[0]
    finally:
        # This frame is in the traceback: an error that it holds would hold itself.
        del errors, unheard
        before = after = None
