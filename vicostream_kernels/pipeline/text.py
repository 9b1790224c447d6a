"""Text as it is decoded, and questions as they are typed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vicostream_kernels.pipeline.errors import InputError

#: What a byte sequence that is not complete yet decodes to.
_INCOMPLETE = "\ufffd"
_WINDOW, _OVERLAP = 32, 8
_CLOCK = re.compile(r"^(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)$")


def check_text(what: str, text: str) -> None:
    """Raises :class:`InputError` for what Python makes of bytes that are no text: no tokenizer
    takes it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{what} {text!r} holds bytes that are not UTF-8 text")


class TextStream:
    """Token ids in, text out, piece by piece; the pieces joined are the whole decoded answer.

    A character whose bytes come in several tokens is held back until its last byte is there, so
    that no piece ends in a broken character. Only a bounded tail of tokens is decoded again.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty."""
        self._ids.append(token)
        text = self._decode()
        # An incomplete sequence is one replacement character, and only at the end.
        certain = len(text) - text.endswith(_INCOMPLETE)
        piece = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if certain == len(text) and len(self._ids) > _WINDOW:
            self._ids = self._ids[-_OVERLAP:]
            self._shown = len(self._decode())
        return piece

    def finish(self) -> str:
        """What was held back. Bytes that never became a character are left out."""
        return self._decode()[self._shown :].removesuffix(_INCOMPLETE)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)


@dataclass(frozen=True)
class Question:
    """``text`` asked at ``time_s`` seconds of the stream; None is the end. ``expected`` is the
    right answer, where it is known; ``came_s`` when it was typed, by ``time.perf_counter``."""

    time_s: float | None
    text: str
    expected: str | None = None
    came_s: float | None = None


def parse_question(words: str) -> Question:
    """``"TIME TEXT"`` as typed: TIME is seconds, mm:ss, h:mm:ss, or ``end``.

    Raises :class:`InputError` that shows what was got and what would do.
    """
    time, _, text = words.strip().partition(" ")
    text = text.strip()
    if not time:
        raise InputError('--ask "": give a time and a question, as in --ask "12.5 What happened?"')
    when = _seconds(time)
    if when is _NOT_A_TIME:
        raise InputError(
            f"--ask {words!r}: {time!r} is not a time; "
            "start with seconds (12.5), mm:ss (1:05), h:mm:ss or the word end"
        )
    if not text:
        raise InputError(f"--ask {words!r}: the question after the time is empty")
    return Question(when, text)


_NOT_A_TIME = object()


def _seconds(word: str) -> Any:
    if word.lower() == "end":
        return None
    clock = _CLOCK.match(word)
    if clock:
        hours, minutes, seconds = clock.groups()
        if float(seconds) >= 60 or (hours and int(minutes) >= 60):
            return _NOT_A_TIME
        return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)
    try:
        value = float(word.removesuffix("s"))
    except ValueError:
        return _NOT_A_TIME
    return value if value == value and abs(value) != float("inf") else _NOT_A_TIME
