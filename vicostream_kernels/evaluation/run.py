"""``vicostream eval streamingbench|ovobench``: ask, keep every answer, score as published."""

from __future__ import annotations

import heapq
import json
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicostream_kernels import __version__, methods
from vicostream_kernels.evaluation import ovobench, streamingbench
from vicostream_kernels.evaluation.benchmark import Item
from vicostream_kernels.evaluation.console import Console, interval, percent
from vicostream_kernels.evaluation.scoring import RULES, option_letter, wilson
from vicostream_kernels.evaluation.store import (
    Journal,
    code_hash,
    contents,
    fingerprint,
    key_of,
    make_folder,
    write_csv,
    write_json,
)
from vicostream_kernels.pipeline.errors import InputError, PipelineError, one_line
from vicostream_kernels.pipeline.failures import INTERRUPTED
from vicostream_kernels.pipeline.options import parse_device, parse_settings, quiet_transformers
from vicostream_kernels.pipeline.source import FrameGroups, VideoSource, stack

BENCHMARKS = {"streamingbench": streamingbench, "ovobench": ovobench}
#: Prompts hold every earlier question of a video, answers a letter or a few words.
_BUDGETS = {"engine.max_question_tokens": 8192, "engine.max_new_tokens": 32}
#: What shows answers but does not make them. This file does, so it is not among them.
_SHOWING = frozenset({"cli.py", "console.py", "figures.py", "study.py", "qa_run.py", "store.py"})
#: Kept for the reader: the resolved method says what they came to.
_ASIDE = ("preset", "overrides")
_YES = "yes"
_SHOWN = 5


@dataclass(frozen=True)
class BenchmarkOptions:
    """What was asked for; strings as they were typed.

    fps: frames taken per second of video. context_s: how much of the video before a question is
    shown (None: all of it, from one stream per video). only: subsets or tasks.
    """

    benchmark: str
    data: str
    model: str
    preset: str = "vicostream"
    settings: Sequence[str] = ()
    fps: float = 1.0
    context_s: float | None = None
    only: Sequence[str] = ()
    device: str = "cpu"
    out: str | None = None
    debug: bool = False


def run_benchmark(options: BenchmarkOptions, console: Console | None = None) -> int:
    """Runs a benchmark; returns the exit code.

    0: every question was asked; 1: a video was missing or something failed (it is listed); 2: what
    was given cannot be used; 130: interrupted. A second run goes on where the first stopped.
    """
    console = console or Console()
    try:
        return _Benchmark(options, console).run()
    except KeyboardInterrupt:
        console.error("interrupted; the same command goes on from here")
        return INTERRUPTED
    except (ValueError, TypeError, PipelineError) as error:
        console.error(one_line(error))
        if options.debug:
            traceback.print_exc(file=sys.stderr)
        return getattr(error, "exit_code", 2)


class _Benchmark:
    def __init__(self, options: BenchmarkOptions, console: Console) -> None:
        if not 0 < options.fps < float("inf"):
            raise InputError(f"--fps {options.fps}: must be a positive number of frames per second")
        if options.context_s is not None and not 0 < options.context_s < float("inf"):
            raise InputError(
                f"--context {options.context_s}: must be positive seconds, or left out"
            )
        self._options, self._console = options, console
        self._device = parse_device(options.device)
        overrides = {**_BUDGETS, **parse_settings(options.settings)}
        self._method = methods.get(options.preset, overrides)
        self._reader = BENCHMARKS[options.benchmark]
        self._items = self._reader.read(options.data, options.only or None)
        config = {
            "benchmark": options.benchmark,
            "version": __version__,
            "model": options.model,
            "weights": fingerprint(options.model),
            "code": _code(),
            "method": self._method,
            "preset": options.preset,
            "overrides": overrides,
            "device": str(self._device),
            # As load_model chooses; a checkpoint's own is in its config.json, part of "weights".
            "dtype": "float32" if self._device.type == "cpu" else "checkpoint",
            "fps": options.fps,
            "context_s": options.context_s,
            "data": str(Path(options.data).resolve()),
            "annotations": contents(self._reader.annotations(options.data)),
        }
        key = key_of({k: v for k, v in config.items() if k not in _ASIDE})
        default = Path("out") / "eval" / f"{options.benchmark}-{key}"
        self._folder = make_folder(options.out or default, "--out")
        self._journal = Journal(self._folder, config, ignore=_ASIDE)
        self._config = config
        self._lost: dict[str, str] = {}
        self._speed_file = self._folder / "speed.json"
        self._speed: Counter[str] = Counter()
        if self._journal.rows and self._speed_file.exists():
            # What earlier parts of this run measured counts on.
            self._speed.update(json.loads(self._speed_file.read_text(encoding="utf-8")))

    def run(self) -> int:
        by_video: dict[tuple[Path, int], list[Item]] = defaultdict(list)
        for number, item in enumerate(self._items):
            if item.id in self._journal.rows:
                continue
            if item.path is None:
                self._lost[item.id] = "no such video"
                continue
            # With a limited context every question starts a stream of its own.
            alone = number if self._options.context_s is not None else 0
            by_video[item.path, alone].append(item)
        known = len(self._journal.rows)
        if known:
            self._console.say(f"{self._folder}: {known} questions were answered before")
        interrupted = False
        if by_video:
            engine = self._engine()
            self._greedy = engine.runner.sampler(do_sample=False)
            try:
                with engine, self._console.progress(len(self._items), self._reader.NAME) as advance:
                    advance(known + len(self._lost))
                    for (path, _), items in by_video.items():
                        self._video(engine, path, items)
                        advance(len(items), path.name)
            except KeyboardInterrupt:
                interrupted = True
        self._report()
        if interrupted:
            raise KeyboardInterrupt
        return 1 if self._lost else 0

    def _engine(self) -> Any:
        from vicostream_kernels.models import load_model
        from vicostream_kernels.pipeline.engine import StreamEngine, check_supported

        check_supported(self._method)
        self._console.say(f"loading {self._options.model} on {self._device} ...")
        with quiet_transformers(not self._options.debug):
            return StreamEngine(load_model(self._options.model, device=self._device), self._method)

    def _video(self, engine: Any, path: Path, items: list[Item]) -> None:
        """Asks ``items`` about one video. What cannot be read or fails is noted for each of them,
        and the others go on."""
        try:
            with VideoSource(str(path), fps=self._options.fps) as source:
                self._stream(engine, source, items)
        except Exception as error:
            for item in items:
                if item.id not in self._journal.rows and item.id not in self._lost:
                    self._lost[item.id] = one_line(error)
            if self._options.debug:
                traceback.print_exc(file=sys.stderr)

    def _stream(self, engine: Any, source: VideoSource, items: list[Item]) -> None:
        groups = FrameGroups(iter(source))
        context = self._options.context_s
        if context is not None:
            _skip(groups, items[0].time_s - context)
        # (when, order, item): alerts come back every second until they are answered.
        agenda = [(i.time_s + 1.0 if i.alert else i.time_s, n, i) for n, i in enumerate(items)]
        heapq.heapify(agenda)
        with engine.open(fps=self._options.fps) as stream:
            try:
                while agenda:
                    when, order, item = heapq.heappop(agenda)
                    while batch := groups.take(stream.frames_per_chunk, when):
                        stream.ingest(stack(batch), [frame.time_s for frame in batch])
                    # The question sees every frame up to its time: the chunk that is being filled
                    # ends here.
                    stream.flush()
                    try:
                        done = self._ask(stream, item, when)
                    except Exception as error:  # the video and the other questions go on
                        self._lost[item.id] = one_line(error)
                        continue
                    if not done:
                        heapq.heappush(agenda, (when + 1.0, order, item))
            finally:
                self._account(stream.recorder)
        if source.troubles:
            self._console.say(f"{source.info.name}: {source.troubles[0].what}")

    def _ask(self, stream: Any, item: Item, when: float) -> bool:
        """Asks and notes the answer; False for an alert that is to be asked again."""
        alert, text, figures = item.alert, "", None
        if alert is None or _YES in self._answer(stream, alert.gate, when)[0].lower():
            text, figures = self._answer(stream, item.prompt, when)
        elif when + 1.0 <= alert.until_s:
            return False
        row = self._row(item, text, when)
        if figures is not None:
            row |= {"ttft_ms": figures.ttft_ms, "blocks": len(figures.blocks)}
        if (late := when - stream.time_s) > 1.0 / self._options.fps + 1.0:
            row["late_s"] = round(late, 3)
        self._journal.add(row)
        return True

    def _answer(self, stream: Any, prompt: str, when: float) -> tuple[str, Any]:
        """The most probable answer, token by token, and its figures."""
        with stream.ask(prompt, when, sampler=self._greedy) as answer:
            for _ in answer:
                pass
        return answer.text.strip(), answer.figures

    def _row(self, item: Item, text: str, when: float) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": item.id,
            "group": item.group,
            "task": item.task,
            "video": item.video,
            "time_s": when,
            "answer": text,
            "truth": item.truth,
            "right": bool(text) and RULES[item.rule](text, item.truth),
        }
        if item.options:
            row["letter"] = option_letter(text, item.options)
        if item.alert is not None:
            row["on_time"] = bool(text) and abs(when - item.alert.due_s) <= item.alert.slack_s
            row["right"] = row["right"] and row["on_time"]
        return row

    def _account(self, recorder: Any) -> None:
        self._speed["frames"] += recorder.frames_processed
        self._speed["ingest_s"] += recorder.ingest_s
        self._speed["seen"] += recorder.tokens_seen
        self._speed["kept"] += recorder.tokens_kept
        self._speed["kv_bytes"] = max(self._speed["kv_bytes"], recorder.kv["peak_bytes"])
        write_json(self._speed_file, self._speed)

    # -- results ---------------------------------------------------------------------------------

    def _report(self) -> None:
        rows = list(self._journal.rows.values())
        tasks = task_scores(self._items, rows, self._lost)
        summary = averages(self._options.benchmark, tasks)
        lost = [
            {"id": item.id, "task": item.task, "video": item.video, "why": self._lost[item.id]}
            for item in self._items
            if item.id in self._lost
        ]
        speed = self._speed
        results = {
            **self._config,
            "tasks": tasks,
            "averages": summary,
            "lost": lost,
            "after_the_end": sum("late_s" in row for row in rows),
            "frames_per_s": _ratio(speed["frames"], speed["ingest_s"]),
            "kept": _ratio(speed["kept"], speed["seen"]),
            "peak_kv_bytes": speed["kv_bytes"] or None,
        }
        write_json(self._folder / "results.json", results)
        write_csv(self._folder / "results.csv", tasks)
        self._show(results)

    def _show(self, results: dict[str, Any]) -> None:
        columns = (
            "task",
            "questions",
            "asked",
            "right",
            "accuracy %",
            "95 %",
            "by letter %",
            "lost",
        )
        lines = [
            (
                f"{t['group']}: {t['task']}",
                str(t["questions"]),
                str(t["asked"]),
                str(t["right"]),
                percent(t["accuracy"]),
                interval(t["low"], t["high"]) if t["asked"] else "-",
                percent(t["by_letter"]),
                str(t["lost"]),
            )
            for t in results["tasks"]
        ]
        title = f"{self._reader.NAME}, {self._options.model}, {self._options.preset}"
        self._console.table(title, columns, lines)
        averages_said = ", ".join(f"{k} {percent(v)}" for k, v in results["averages"].items())
        self._console.say(f"averages (%): {averages_said}")
        if results["after_the_end"]:
            self._console.say(
                f"{results['after_the_end']} questions came after their video's last frame"
            )
        reasons = Counter(f"{entry['video']}: {entry['why']}" for entry in results["lost"])
        for reason, count in reasons.most_common(_SHOWN):
            self._console.error(f"{count} questions lost: {reason}")
        if len(reasons) > _SHOWN:
            self._console.error(f"and {len(reasons) - _SHOWN} more videos (results.json lists all)")
        self._console.say(f"{self._folder}: results.json, results.csv, answers.jsonl")


def _code() -> str:
    return code_hash(_SHOWING)


def _skip(groups: FrameGroups, until_s: float) -> None:
    while until_s > 0 and groups.take(64, until_s):
        pass


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def task_scores(
    items: Iterable[Item], rows: Iterable[dict[str, Any]], lost: dict[str, str]
) -> list[dict[str, Any]]:
    """Per task: questions, asked, right by the benchmark's own rule, its share of those asked with
    a 95 % interval, the share by the option letter read from the answer, lost questions, and the
    share of all questions with the lost ones taken as wrong."""
    by_task: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        by_task[item.group, item.task].append(item)
    found = {row["id"]: row for row in rows}
    scores = []
    for (group, task), members in by_task.items():
        asked = [found[item.id] for item in members if item.id in found]
        right = sum(row["right"] for row in asked)
        lettered = [row for row in asked if "letter" in row]
        low, high = wilson(right, len(asked))
        score: dict[str, Any] = {
            "group": group,
            "task": task,
            "questions": len(members),
            "asked": len(asked),
            "right": right,
            "accuracy": _ratio(right, len(asked)),
            "low": low,
            "high": high,
            "by_letter": _ratio(
                sum(row["letter"] == row["truth"] for row in lettered), len(lettered)
            ),
            "lost": sum(item.id in lost for item in members),
            "of_all": right / len(members),
        }
        if any("on_time" in row for row in asked):
            score["on_time"] = _ratio(sum(row["on_time"] for row in asked), len(asked))
        scores.append(score)
    return scores


def averages(benchmark: str, tasks: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """As the benchmarks average: StreamingBench over the questions of a subset; OVO-Bench over
    tasks, then over its three groups (total only where all three were asked)."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for task in tasks:
        if task["asked"]:
            groups[task["group"]].append(task)
    if benchmark == "streamingbench":
        return {
            name: sum(t["right"] for t in members) / sum(t["asked"] for t in members)
            for name, members in groups.items()
        }
    result: dict[str, float | None] = {
        name: sum(t["accuracy"] for t in members) / len(members) for name, members in groups.items()
    }
    if set(result) == set(ovobench.GROUPS):
        result["total"] = sum(result.values()) / len(result)
    return result
