"""``vicostream eval streamqa``: arms in, a table, CSV, JSON and figures out."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vicostream_kernels.evaluation import study as studies
from vicostream_kernels.evaluation.arms import Arm, expand, parse_sweep
from vicostream_kernels.evaluation.console import Console, interval, percent
from vicostream_kernels.evaluation.measure import ClipSet, each_clip, summarize
from vicostream_kernels.evaluation.store import (
    Journal,
    code_hash,
    fingerprint,
    key_of,
    make_folder,
    write_csv,
    write_json,
)
from vicostream_kernels.evaluation.streamqa import KINDS
from vicostream_kernels.pipeline.errors import InputError, PipelineError, one_line
from vicostream_kernels.pipeline.failures import INTERRUPTED
from vicostream_kernels.pipeline.options import parse_device, parse_settings, quiet_transformers

#: What shows results but does not make them: a change there leaves what was measured valid.
_SHOWING = frozenset(
    {"cli.py", "console.py", "figures.py", "study.py", "qa_run.py", "run.py", "store.py"}
)


@dataclass(frozen=True)
class QAOptions:
    """What was asked for; strings as they were typed. ``studies`` are names of ``study.names()``,
    ``plot`` is the folder for the figures."""

    model: str = "tiny"
    preset: str = "live"
    settings: Sequence[str] = ()
    sweeps: Sequence[str] = ()
    studies: Sequence[str] = ()
    untuned: str = "tiny-full"
    clips: ClipSet = ClipSet()
    plot: str | None = None
    device: str = "cpu"
    out: str = "out/eval/streamqa"
    fresh: bool = False
    debug: bool = False


def run_streamqa(options: QAOptions, console: Console | None = None) -> int:
    """Measures; returns the exit code. 0: done; 1: something failed; 2: what was given cannot be
    used; 130: interrupted, and the same command goes on from there."""
    console = console or Console()
    try:
        _StreamQA(options, console).run()
    except KeyboardInterrupt:
        console.error("interrupted; the same command goes on from here")
        return INTERRUPTED
    except (ValueError, TypeError, PipelineError) as error:
        console.error(one_line(error))
        if options.debug:
            traceback.print_exc(file=sys.stderr)
        return getattr(error, "exit_code", 2)
    return 0


class _StreamQA:
    def __init__(self, options: QAOptions, console: Console) -> None:
        self._options, self._console = options, console
        self._device = parse_device(options.device)
        clips = options.clips
        if clips.clips < 1 or clips.questions < 1:
            raise InputError(
                f"--clips {clips.clips} --questions {clips.questions}: at least 1 of each"
            )
        self._lines = self._arms()
        clips.make(0, frames=False)  # unknown kinds and clips that are too short end here
        self._folder = make_folder(options.out, "--out")
        if options.plot is not None:
            make_folder(options.plot, "--plot")
        self._engine: tuple[Any, Any] = (None, None)
        self._runners: dict[str, Any] = {}

    def _arms(self) -> dict[str, dict[str, list[Arm]]]:
        """Figure -> line -> arms."""
        options = self._options
        asked = list(options.studies)
        if options.plot is not None and not options.sweeps and not asked:
            asked = list(studies.names())
        found = {}
        for name in asked:
            lines = studies.study(name, options.model, options.untuned)
            for arm in (arm for arms in lines.values() for arm in arms):
                arm.method()
            found[name] = lines
        if not asked or options.sweeps:
            base = Arm(options.model, options.preset, parse_settings(options.settings))
            sweeps = [parse_sweep(text) for text in options.sweeps]
            arms = expand(base, sweeps)
            if not sweeps:
                arms = [replace(base, label=base.name)]
            found["sweep"] = {"": arms}
        return found

    def run(self) -> None:
        flat = [arm for lines in self._lines.values() for arms in lines.values() for arm in arms]
        unique = list(dict.fromkeys(_identity(arm) for arm in flat))
        clips = self._options.clips
        results: dict[str, dict[str, Any]] = {}
        with self._console.progress(len(unique) * clips.clips, "streamqa") as advance:
            for arm in flat:
                if _identity(arm) not in results:
                    results[_identity(arm)] = self._measure(arm, advance)
        rows: dict[str, Any] = {}
        for figure, lines in self._lines.items():
            rows[figure] = {
                line: [{**results[_identity(arm)], "name": arm.name} for arm in arms]
                for line, arms in lines.items()
            }
            self._show(figure, rows[figure])
        self._write(rows)

    def _measure(self, arm: Arm, advance: Any) -> dict[str, Any]:
        clips = self._options.clips
        config = {
            "model": arm.model,
            "weights": fingerprint(arm.model),
            "method": arm.method(),
            "selector": arm.selector,
            "device": str(self._device),
            "code": _code(),
            **{k: v for k, v in clips.facts().items() if k != "clips"},
        }
        folder = make_folder(self._folder / key_of(config), "--out")
        if self._options.fresh:
            (folder / "answers.jsonl").unlink(missing_ok=True)
        journal = Journal(folder, {"name": arm.name, **config}, ignore=("name",))
        missing = [n for n in range(clips.clips) if n not in journal.rows]
        advance(clips.clips - len(missing), arm.name)
        if missing:
            for clip in each_clip(self._load(arm), arm, clips, missing):
                journal.add({"id": clip["clip"], **clip})
                advance(1, arm.name)
        return summarize(arm, [journal.rows[n] for n in range(clips.clips)])

    def _load(self, arm: Arm) -> Any:
        """The engine of an arm; the newest one is kept."""
        from vicostream_kernels.models import load_model
        from vicostream_kernels.pipeline.engine import StreamEngine

        if arm.model not in self._runners:
            with quiet_transformers(not self._options.debug):
                self._runners[arm.model] = load_model(arm.model, device=self._device)
        known, engine = self._engine
        method = arm.method()
        if known != (arm.model, method):
            if engine is not None:
                engine.close()
            engine = StreamEngine(self._runners[arm.model], method)
            self._engine = (arm.model, method), engine
        return engine

    # -- results ---------------------------------------------------------------------------------

    def _show(self, figure: str, lines: Mapping[str, list[dict[str, Any]]]) -> None:
        rows = [row for line in lines.values() for row in line]
        kinds = list(rows[0]["kinds"])
        columns = ["", *kinds, "mean", "kept %", "KV KiB", "frames/s", "TTFT ms", "chunks read"]
        best = rows[0]["kinds"]
        table = [
            ["best constant answer"]
            + [
                f"{percent(best[kind]['constant_share'])} {best[kind]['constant']}"
                for kind in kinds
            ]
            + [percent(sum(best[k]["constant_share"] for k in kinds) / len(kinds)), *[""] * 5]
        ]
        table += [
            [row["name"]]
            + [_with_interval(row["kinds"][kind]) for kind in kinds]
            + [
                percent(row["mean"]),
                percent(row["kept"]),
                f"{row['kv_bytes'] / 1024:.0f}",
                f"{row['frames_per_s']:.0f}",
                f"{row['ttft_ms']:.1f}",
                f"{row['blocks']:.1f}",
            ]
            for row in rows
        ]
        clips = self._options.clips
        asked = sum(rows[0]["kinds"][kind]["asked"] for kind in kinds)
        title = (
            f"{figure}: accuracy in % (95 % interval), {clips.clips} clips of {clips.steps} steps, "
            f"{asked} questions"
        )
        self._console.table(title, columns, table)

    def _write(self, figures: dict[str, Any]) -> None:
        flat = [
            {"figure": figure, "line": line, **_flat(row)}
            for figure, lines in figures.items()
            for line, rows in lines.items()
            for row in rows
        ]
        clips = self._options.clips.facts()
        write_json(self._folder / "results.json", {"clips": clips, "figures": figures})
        write_csv(self._folder / "results.csv", flat)
        written = [f"{self._folder}: results.json, results.csv"]
        if self._options.plot is not None:
            from vicostream_kernels.evaluation.figures import draw

            target = Path(self._options.plot)
            keys = ", ".join(parse_sweep(sweep)[0] for sweep in self._options.sweeps)
            made = draw(figures, target, keys)
            written.append(f"{target}: {', '.join(made)}")
        for line in written:
            self._console.say(line)


def _identity(arm: Arm) -> str:
    facts = (arm.model, arm.preset, sorted(arm.overrides.items()), arm.selector, arm.keep)
    return json.dumps(facts, default=str)


def _with_interval(figures: Mapping[str, Any]) -> str:
    said = interval(figures["low"], figures["high"])
    return f"{percent(figures['accuracy'])} ({said})"


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = {k: v for k, v in row.items() if not isinstance(v, Mapping)}
    flat["overrides"] = " ".join(f"{k}={v}" for k, v in row["overrides"].items())
    for kind in KINDS:
        for key, value in row["kinds"].get(kind, {}).items():
            flat[f"{kind}_{key}"] = value
    for name in ("past_hit", "past_miss"):
        flat[f"{name}_asked"], flat[f"{name}_right"] = row[name]["asked"], row[name]["right"]
    return flat


def _code() -> str:
    return code_hash(_SHOWING)
