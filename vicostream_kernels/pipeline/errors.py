"""What can go wrong on the way from a video to an answer, and whose fault it is."""

from __future__ import annotations

from dataclasses import dataclass


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
