"""Reading StreamingBench (arXiv 2411.03628) in both of its published layouts.

The repository's: ``src/data/questions_{real,omni,sqa,proactive}.json`` beside ``videos/``, with
``sample_N_KIND.mp4`` in it. The dataset's: ``StreamingBench/*.csv`` and the unpacked archives with
``sample_N/video.mp4``. Videos of one layout serve the annotations of the other.

Per subset a file is a list of ``{"video_path", "questions": [...]}`` (sqa: a list of such lists);
a question has ``task_type``, ``question``, ``time_stamp``, ``answer`` (a letter) and ``options``;
a proactive one ``ground_truth_time_stamp`` and ``ground_truth_output`` in place of the last two.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicostream_kernels.evaluation.benchmark import (
    Alert,
    Item,
    LayoutError,
    choose,
    expected,
    folder,
    require,
    seconds,
    videos_below,
)
from vicostream_kernels.evaluation.scoring import lettered

NAME = "StreamingBench"
#: Subset -> its file in the dataset's layout. The repository's is ``questions_SUBSET.json``.
_TABLES = {
    "real": "Real_Time_Visual_Understanding.csv",
    "omni": "Omni_Source_Understanding.csv",
    "contextual": "Contextual_Understanding.csv",
    "sqa": "Sequential_Question_Answering.csv",
    "proactive": "Proactive_Output.csv",
    "proactive_50": "Proactive_Output_50.csv",
}
#: Fifty of the proactive questions once more: asked only when named.
_ON_REQUEST = ("proactive_50",)
#: Words of which a path has one where a subset's videos lie. Others go by the question's category.
_WORDS = {
    "real": ("real", "real time visual understanding"),
    "sqa": ("sqa", "sequential question answering"),
    "proactive": ("proactive", "proactive output"),
}
#: An answer within two seconds counts; after four the benchmark stops asking.
_SLACK_S, _PATIENCE_S = 2.0, 4.0


def read(data: str | Path, only: Iterable[str] | None = None) -> list[Item]:
    """The questions of the subsets ``only`` (None: all that are there, proactive_50 aside).

    Raises :class:`InputError` for a folder that is not there, :class:`LayoutError` for one of
    another layout; a question whose video is missing has ``path`` None.
    """
    root = folder(data)
    files = _annotations(root)
    asked = choose(only, list(files), "subset")
    if not only:
        asked = [name for name in asked if name not in _ON_REQUEST] or asked
    videos = _Videos(root, alone=len(asked) == 1)
    items: list[Item] = []
    for subset in asked:
        read_rows = _from_csv if files[subset].suffix == ".csv" else _from_json
        rows = list(read_rows(subset, files[subset]))
        items += _items(subset, rows, videos)
    return items


def annotations(data: str | Path) -> list[Path]:
    """The files that hold the questions, of all subsets."""
    return list(_annotations(folder(data)).values())


@dataclass(frozen=True)
class _Row:
    """A question as annotated; ``sample`` and ``kind`` say which video it is about."""

    fields: dict[str, Any]
    where: str
    video: str
    sample: int | None
    kind: str
    direct: Path | None


def _annotations(root: Path) -> dict[str, Path]:
    for place in (root, root / "src" / "data", root / NAME, root / "data"):
        found = {
            subset: path
            for subset, table in _TABLES.items()
            for path in (place / f"questions_{subset}.json", place / table)
            if path.is_file()
        }
        if found:
            return found
    raise expected(
        root,
        NAME,
        "questions_real.json and the like (here or in src/data), or "
        "Real_Time_Visual_Understanding.csv and the like (here or in StreamingBench), with videos "
        "in videos/sample_N_KIND.mp4 or sample_N/video.mp4",
    )


def _from_json(subset: str, path: Path) -> Iterator[_Row]:
    for index, entry in enumerate(_flat(_load(path))):
        where = f"{path.name}, entry {index}"
        entry = require(entry, ("video_path", "questions"), where)
        video = str(entry["video_path"])
        name = re.match(r"sample_(\d+)_(.+)", Path(video).stem)
        for number, question in enumerate(entry["questions"]):
            yield _Row(
                fields=require(question, _wanted(subset), f"{where}, question {number}"),
                where=f"{where}, question {number}",
                video=video,
                sample=int(name[1]) if name else None,
                kind=_words(name[2]) if name else subset,
                direct=path.parent / video,
            )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LayoutError(f"{path}: expected JSON: {error}") from error


def _flat(entries: Any) -> Iterator[Any]:
    """sqa groups the entries of a video in a list of their own."""
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, list):
            yield from entry
        else:
            yield entry


def _from_csv(subset: str, path: Path) -> Iterator[_Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, fields in enumerate(csv.DictReader(file)):
            where = f"{path.name}, row {number + 2}"
            require(fields, ("question_id", *_wanted(subset)), where)
            name = re.match(r"(.*?)_?sample_(\d+)_", fields["question_id"])
            if name is None:
                raise LayoutError(
                    f"{where}: expected question_id as CATEGORY_sample_N_M, found "
                    f"{fields['question_id']!r}"
                )
            if "options" in fields and subset not in ("proactive", "proactive_50"):
                fields["options"] = _options(fields["options"], where)
            category = _words(name[1]) or subset
            yield _Row(fields, where, f"{category} sample_{name[2]}", int(name[2]), category, None)


def _options(text: str, where: str) -> list[str]:
    try:
        options = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, (list, tuple)):
        raise LayoutError(f"{where}: expected options as a list, found {text!r}")
    return [str(option) for option in options]


def _wanted(subset: str) -> tuple[str, ...]:
    if subset.startswith("proactive"):
        return ("question", "time_stamp", "ground_truth_time_stamp", "ground_truth_output")
    return ("task_type", "question", "time_stamp", "answer", "options")


class _Videos:
    """Finds ``sample_N`` of a kind among all videos of the folder, wherever they were unpacked."""

    def __init__(self, root: Path, *, alone: bool) -> None:
        self._alone = alone
        self._by_sample: dict[int, list[tuple[str, Path]]] = defaultdict(list)
        for path in videos_below(root):
            inner = path.relative_to(root)
            match = re.search(r"sample_(\d+)(?!\d)", str(inner))
            if match:
                self._by_sample[int(match[1])].append((f" {_words(str(inner))} ", path))

    def find(self, subset: str, row: _Row) -> Path | None:
        if row.direct is not None and row.direct.is_file():
            return row.direct
        if row.sample is None:
            return None
        family = subset.removesuffix("_50")
        words = {row.kind, *_WORDS.get(family, ())}
        known = self._by_sample.get(row.sample, [])
        fitting = [path for name, path in known if any(f" {word} " in name for word in words)]
        if not fitting and self._alone and len(known) == 1:
            fitting = [known[0][1]]  # a folder of nothing but this subset need not name it
        return fitting[0] if fitting else None


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _items(subset: str, rows: list[_Row], videos: _Videos) -> Iterator[Item]:
    said: dict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(rows):
        fields = row.fields
        time_s = seconds(fields["time_stamp"], row.where)
        common = {
            "id": f"{subset}/{number}",
            "group": subset,
            "task": str(fields.get("task_type") or "Proactive Output"),
            "video": row.video,
            "path": videos.find(subset, row),
            "time_s": time_s,
        }
        if subset.startswith("proactive"):
            yield _proactive(fields, row.where, common)
            continue
        options = lettered([str(option) for option in fields["options"]])
        truth = str(fields["answer"]).strip()
        if not re.fullmatch(r"[A-Z]", truth):
            raise LayoutError(f"{row.where}: expected a letter as answer, found {truth!r}")
        prompt = _choice_prompt(str(fields["question"]), options, said[row.video])
        yield Item(
            **common, prompt=prompt, truth=truth, rule="first_letter", options=tuple(options)
        )
        if subset == "sqa":
            # Later questions refer to earlier ones, which come with their true answers.
            said[row.video].append(
                f"{fields['time_stamp']}: {fields['question']} {' '.join(options)} -> {truth}"
            )


def _choice_prompt(question: str, options: list[str], before: list[str]) -> str:
    lines = ["Watch the video and pick the one option that answers the question."]
    if before:
        lines += ["Asked and answered earlier in this video:", *before]
    lines += [f"Question: {question}", *options, "Reply with the option's letter alone."]
    return "\n".join(lines)


def _proactive(fields: dict[str, Any], where: str, common: dict[str, Any]) -> Item:
    task, output = str(fields["question"]), str(fields["ground_truth_output"])
    due = seconds(fields["ground_truth_time_stamp"], where)
    gate = f'{task}\nHas the moment come to output "{output}"? Reply with yes or no alone.'
    return Item(
        **common,
        prompt=f"{task}\nGive the output now.",
        truth=output,
        rule="alert",
        alert=Alert(gate, due, due + _PATIENCE_S, _SLACK_S),
    )
