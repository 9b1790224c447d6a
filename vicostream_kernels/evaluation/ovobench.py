"""Reading OVO-Bench (arXiv 2501.05510) in its published layout.

``data/ovo_bench_new.json`` is a list of entries with ``id``, ``task`` and ``video``; the videos lie
in ``data/src_videos/VIDEO``, or, cut at each question's time, in ``data/chunked_videos/ID.mp4``
(``ID_J.mp4`` for the J-th test of a forward task).

Backward tracing (EPM, ASI, HLD) and real-time perception (OCR, ACR, ATR, STU, FPD, OJR) ask a
multiple choice at ``realtime``: ``question``, ``options``, ``gt`` (an index). The forward tasks ask
at each ``realtime`` of ``test_info``: REC how often ``activity`` has happened (``count``), SSR
whether ``step`` is being done and CRR whether ``question`` can be answered yet (``type`` 1 or 0).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vicostream_kernels.evaluation.benchmark import (
    Item,
    LayoutError,
    choose,
    expected,
    folder,
    require,
    seconds,
)
from vicostream_kernels.evaluation.scoring import lettered

NAME = "OVO-Bench"
GROUPS = {
    "backward": ("EPM", "ASI", "HLD"),
    "realtime": ("OCR", "ACR", "ATR", "STU", "FPD", "OJR"),
    "forward": ("REC", "SSR", "CRR"),
}
_GROUP_OF = {task: group for group, tasks in GROUPS.items() for task in tasks}
_FILES = ("ovo_bench_new.json", "ovo_bench.json")


def read(data: str | Path, only: Iterable[str] | None = None) -> list[Item]:
    """The questions of the tasks ``only`` (None: all twelve).

    Raises :class:`InputError` for a folder that is not there, :class:`LayoutError` for one of
    another layout; a question whose video is missing has ``path`` None.
    """
    tasks = choose(only, list(_GROUP_OF), "task")
    (file,) = annotations(data)
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LayoutError(f"{file}: expected JSON: {error}") from error
    if not isinstance(entries, list):
        raise LayoutError(f"{file}: expected a list of entries, found {type(entries).__name__}")
    items: list[Item] = []
    for index, entry in enumerate(entries):
        where = f"{file.name}, entry {index}"
        entry = require(entry, ("id", "task", "video"), where)
        if entry["task"] not in _GROUP_OF:
            raise LayoutError(
                f"{where}: expected a task among {', '.join(_GROUP_OF)}; found {entry['task']!r}"
            )
        if entry["task"] in tasks:
            items += _items(entry, where, file.parent)
    return items


def annotations(data: str | Path) -> list[Path]:
    """The one file that holds the questions."""
    root = folder(data)
    file = next((p / f for p in (root, root / "data") for f in _FILES if (p / f).is_file()), None)
    if file is None:
        raise expected(
            root,
            NAME,
            "ovo_bench_new.json (here or in data), with videos in src_videos/ or chunked_videos/ "
            "beside it",
        )
    return [file]


def _items(entry: dict[str, Any], where: str, home: Path) -> Iterator[Item]:
    task = entry["task"]
    if _GROUP_OF[task] != "forward":
        yield _choice(entry, where, home)
        return
    keys = {"REC": ("activity",), "SSR": (), "CRR": ("question",)}[task]
    require(entry, ("test_info", *keys), where)
    for index, test in enumerate(entry["test_info"]):
        place = f"{where}, test {index}"
        keys = {"REC": ("count",), "SSR": ("step", "type"), "CRR": ("type",)}[task]
        test = require(test, ("realtime", *keys), place)
        yield Item(
            **_common(entry, f"{entry['id']}_{index}", home),
            time_s=seconds(test["realtime"], place),
            prompt=_forward_prompt(task, entry, test),
            truth=str(test["count"]) if task == "REC" else ("No", "Yes")[bool(test["type"])],
            rule="digits" if task == "REC" else "yes_or_no",
        )


def _choice(entry: dict[str, Any], where: str, home: Path) -> Item:
    require(entry, ("realtime", "question", "options", "gt"), where)
    options, gt = lettered([str(option) for option in entry["options"]]), entry["gt"]
    if not isinstance(gt, int) or not 0 <= gt < len(options):
        raise LayoutError(f"{where}: expected gt below {len(options)}, found {gt!r}")
    lines = [f"Question: {entry['question']}", *options, "Reply with the option's letter alone."]
    return Item(
        **_common(entry, str(entry["id"]), home),
        time_s=seconds(entry["realtime"], where),
        prompt="\n".join(lines),
        truth=chr(ord("A") + gt),
        rule="contains",
        options=tuple(options),
    )


def _common(entry: dict[str, Any], name: str, home: Path) -> dict[str, Any]:
    places = (home / "src_videos" / str(entry["video"]), home / "chunked_videos" / f"{name}.mp4")
    return {
        "id": name,
        "group": _GROUP_OF[entry["task"]],
        "task": entry["task"],
        "video": str(entry["video"]),
        "path": next((path for path in places if path.is_file()), None),
    }


def _forward_prompt(task: str, entry: dict[str, Any], test: dict[str, Any]) -> str:
    if task == "REC":
        return (
            f"How many times has this been done in the video so far, by anybody: "
            f"{entry['activity']}?\nEvery complete motion counts once. Reply with the number alone."
        )
    if task == "SSR":
        return (
            f"The video shows a task made of steps. One of the steps is: {test['step']}\n"
            "Is this step being carried out right now? Reply with Yes or No alone."
        )
    return (
        f"A question about the end of the video: {entry['question']}\nHas the video shown enough "
        "by now to answer it? Reply with Yes or No alone."
    )
