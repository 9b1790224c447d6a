"""The sample clip: a synthetic stream with known answers, made here, the same on every machine.

Sixty seconds of shapes that come, move, change their colour and go (``evaluation.streamqa``), as
H.264. Three questions go with it: one about now, one about what was seen only at the beginning,
one that counts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from vicostream_kernels.evaluation.streamqa import Clip, Question, make_clip

#: The clip is one of the test split: neither the drawing nor the seed was trained on.
SEED, STEPS = 0, 120
#: "The beginning", in seconds.
_EARLY_S = 12.0
#: Changes with the drawing: clips that were made before stay in the cache folder.
_VERSION = 3


@lru_cache(maxsize=1)
def questions() -> tuple[Question, ...]:
    """The three questions, in the order of their times, with their answers and evidence."""
    asked = _clip(frames=False).questions
    middle = asked[-1].time_s / 2
    now = next(q for q in asked if q.kind == "now" and q.time_s > middle and q.answer != "nothing")
    needles = [q for q in asked if q.kind == "past" and _only_early(q)]
    counts = [q for q in asked if q.kind == "count" and q.time_s > now.time_s]
    return tuple(sorted((now, needles[-1], _most(counts)), key=lambda q: q.time_s))


def _clip(*, frames: bool) -> Clip:
    return make_clip(SEED, STEPS, split="test", questions=60, frames=frames)


def _only_early(question: Question) -> bool:
    return bool(question.evidence) and question.evidence[-1][1] <= _EARLY_S


def _most(counts: Sequence[Question]) -> Question:
    """The one with the highest number; the latest of these."""
    numbers = ("zero", "one", "two", "three", "four")
    return max(counts, key=lambda q: (numbers.index(q.answer), q.time_s))


def sample_clip(folder: str | os.PathLike[str] | None = None) -> Path:
    """The path of the sample clip, which is made when it is not there yet.

    ``folder`` is where it is kept; by default ``$XDG_CACHE_HOME/vicostream`` (``~/.cache``), or the
    temporary folder where that cannot be written.
    """
    home = Path(folder) if folder is not None else _cache_folder()
    path = home / f"vicostream-sample-v{_VERSION}-{SEED}-{STEPS}.mp4"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        partial = home / f".{path.stem}-{os.getpid()}.mp4"
        try:
            write_clip(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
            partial.with_suffix(".json").unlink(missing_ok=True)
    return path


def write_clip(path: str | os.PathLike[str]) -> None:
    """Encodes the clip as H.264 into ``path``."""
    _clip(frames=True).save(path)


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "vicostream"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / "vicostream"
