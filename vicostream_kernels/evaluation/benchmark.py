"""What the readers of published benchmarks have in common: items, and finding their files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vicostream_kernels.pipeline.errors import InputError

_SHOWN = 8


class LayoutError(InputError):
    """A data folder that is laid out differently: the message says what was expected and found."""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    id: unique within the benchmark, the same in every run.
    group, task: as the benchmark calls them; accuracy is reported per task.
    video: how the annotation names the video; ``path`` is the file, None where there is none.
    time_s: when it is asked, in seconds of the video; only what came before is shown.
    prompt: what the model is asked.
    truth: the right answer, ``rule`` names how an answer is compared with it (``scoring.RULES``).
    options: of a multiple choice, for reading the letter from a longer answer.
    alert: for questions that the model is to answer by itself at the right moment.
    """

    id: str
    group: str
    task: str
    video: str
    path: Path | None
    time_s: float
    prompt: str
    truth: str
    rule: str
    options: tuple[str, ...] = ()
    alert: Alert | None = None


@dataclass(frozen=True)
class Alert:
    """An item that is polled: each second after ``Item.time_s`` until ``until_s`` the model is
    asked ``gate``; once it says yes, the prompt is asked. Right within ``slack_s`` of ``due_s``."""

    gate: str
    due_s: float
    until_s: float
    slack_s: float


def folder(data: str | Path) -> Path:
    """``data`` as an existing folder; raises :class:`InputError`."""
    path = Path(data)
    if not path.is_dir():
        raise InputError(f"--data {data}: no such folder")
    return path


def expected(data: Path, name: str, wanted: str) -> LayoutError:
    """The error for a folder without annotations: what should be there, and what is."""
    names = sorted(p.name + ("/" if p.is_dir() else "") for p in data.iterdir())
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return LayoutError(
        f"--data {data}: not the layout of {name}. Expected {wanted}; found "
        f"{', '.join(names[:_SHOWN]) or 'nothing'}{more}"
    )


def require(entry: object, keys: Sequence[str], where: str) -> dict:
    """``entry`` as a mapping with ``keys``; raises :class:`LayoutError` for another."""
    if not isinstance(entry, dict):
        raise LayoutError(f"{where}: expected an object, found {type(entry).__name__}")
    missing = [key for key in keys if key not in entry]
    if missing:
        found = ", ".join(map(str, entry)) or "nothing"
        raise LayoutError(f"{where}: expected {', '.join(missing)}; found {found}")
    return entry


def choose(only: Iterable[str] | None, known: Sequence[str], what: str) -> list[str]:
    """Those of ``known`` that were asked for, in their order; raises for others."""
    if not only:
        return list(known)
    wanted = [name.strip() for name in only]
    for name in wanted:
        if name not in known:
            raise InputError(f"--only {name!r}: unknown {what}, known here: {', '.join(known)}")
    return [name for name in known if name in wanted]


def seconds(stamp: object, where: str) -> float:
    """``"H:MM:SS"``, ``"MM:SS"`` or a number as seconds; raises :class:`LayoutError`.

    A part may exceed 59: published annotations have such slips (``00:12450``).
    """
    if isinstance(stamp, (int, float)) and not isinstance(stamp, bool):
        value = float(stamp)
    elif isinstance(stamp, str) and re.fullmatch(r"\d+(:\d+){0,2}(\.\d+)?", stamp.strip()):
        value = 0.0
        for part in stamp.strip().split(":"):
            value = 60 * value + float(part)
    else:
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise LayoutError(f"{where}: expected a time such as 00:01:30, found {stamp!r}")
    return value


def videos_below(root: Path) -> Iterator[Path]:
    """Every video file under ``root``, sorted, without what archives leave behind."""
    for place, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if f != "__MACOSX" and not f.startswith("."))
        for name in sorted(files):
            if name.lower().endswith((".mp4", ".mkv", ".webm")) and not name.startswith("._"):
                yield Path(place) / name
