"""What a run shows: progress and remarks on stderr, questions, answers and figures on stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from vicostream_kernels.pipeline.report import CHUNK_STAGES, QuestionFigures, Recorder

#: Control characters in an answer would move the cursor or worse; they are shown as symbols.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_VISIBLE |= {code: 0xFFFD for code in range(0x80, 0xA0)}
#: So many chunks of an answer are listed.
_STARTS = 8
#: Where nobody watches, a line about the progress every so many seconds: a service's log says that
#: it lives.
EVERY_S = 30.0


class Screen:
    """Rich progress where stderr is a terminal, plain lines elsewhere."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._progress: Any = None
        self._task: Any = None
        self._due = float("inf")  # the next line about the progress

    def say(self, text: str) -> None:
        """A remark."""
        self._line(f"vicostream: {text}")

    def error(self, text: str) -> None:
        """What went wrong, on one line."""
        self._line(f"vicostream: error: {text}")

    def at_once(self, text: str) -> None:
        """A remark from a signal handler, which must not enter a file that is being written."""
        line = f"vicostream: {text}\n"
        try:
            descriptor = self._err.fileno()
        except (OSError, ValueError):  # no true file: io.StringIO and the like
            self._err.write(line)
            return
        with suppress(OSError):
            os.write(descriptor, line.encode(errors="replace"))

    def _line(self, text: str) -> None:
        if self._progress is None:
            self._err.write(f"{text}\n")
            self._err.flush()
        else:  # above the progress
            self._progress.console.print(
                text, markup=False, emoji=False, highlight=False, soft_wrap=True
            )

    # -- progress --------------------------------------------------------------------------------

    def start(self, duration_s: float | None, name: str, *, typing: bool = False) -> None:
        """Shows live progress until :meth:`stop`; where nobody watches, a line now and then.
        Where somebody types, nothing: it would stand in the midst of that."""
        if not self._err.isatty():
            self._due = time.monotonic() + EVERY_S
            return
        if typing:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=Console(file=self._err),
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._progress.add_task(_short(name), total=duration_s, figures="")
        self._progress.start()

    def update(self, recorder: Recorder, time_s: float) -> None:
        """The state after a chunk."""
        if self._progress is None and time.monotonic() < self._due:
            return
        speed = recorder.frames_processed / recorder.ingest_s if recorder.ingest_s else 0.0
        kept = recorder.tokens_kept / recorder.tokens_seen if recorder.tokens_seen else 1.0
        figures = (
            f"{clock(time_s)}  {speed:.0f} frames/s  {kept:.0%} of tokens kept  "
            f"KV {mib(recorder.kv['bytes'])} in {recorder.chunk_count} chunks"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=time_s, figures=figures)
        else:
            self._due = time.monotonic() + EVERY_S
            self.say(f"at {figures}")

    def stop(self) -> None:
        """Takes the progress away; a second call does nothing."""
        self._due = float("inf")
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    # -- questions -------------------------------------------------------------------------------

    def question(self, time_s: float, text: str) -> None:
        """The question that is being answered."""
        if self._progress is not None:
            # The answer is written where the progress stands.
            self._progress.stop()
        self._out.write(f"\n[{clock(time_s)}] {_visible(text)}\n  > ")
        self._out.flush()

    def piece(self, text: str) -> None:
        """A piece of the answer, as it is decoded."""
        self._out.write(_visible(text).replace("\n", "\n    "))
        self._out.flush()

    def answered(self, figures: QuestionFigures) -> None:
        """How the answer went."""
        speed = f", {figures.tokens_per_s:.0f} tokens/s" if figures.tokens_per_s else ""
        if figures.right is not None:
            verdict = "right" if figures.right else "WRONG"
            self._out.write(f"\n    expected {figures.expected}: {verdict}")
        waited = "" if figures.waited_ms is None else f"waited {figures.waited_ms:.0f} ms, "
        self._out.write(
            f"\n    ({waited}first token after {figures.ttft_ms:.0f} ms, "
            f"{figures.tokens} tokens{speed}, read {_chunks(figures.blocks)})\n"
        )
        self._out.flush()
        self._go_on()

    def unanswered(self) -> None:
        """The question has failed."""
        self._out.write("\n")
        self._out.flush()
        self._go_on()

    def _go_on(self) -> None:
        if self._progress is not None:
            self._progress.start()

    def summary(self, report: dict[str, Any]) -> None:
        """The figures of the whole run."""
        self._out.write("\n")
        for title, text in summary_lines(report):
            self._out.write(f"{title:<9} {text}\n")
        self._out.flush()


def summary_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, text) for each line of the summary."""
    frames, fps, tokens, kv = report["frames"], report["fps"], report["tokens"], report["kv"]
    chunks, stages, live = report["chunks"], report["stages_ms"], report["live"]
    video_s = chunks[-1]["end_s"] if chunks else 0.0  # of the session, as all else here
    lines = [
        (
            "frames",
            f"{frames['read']} read, {frames['processed']} processed, "
            f"{frames['dropped']} dropped; {video_s:.1f} s of video",
        )
    ]
    if fps["ingest"]:
        each = ", ".join(f"{stage} {fps[stage]:.0f}" for stage in CHUNK_STAGES if fps.get(stage))
        decoding = "decode included" if live is None else "decode beside it"
        lines.append(("speed", f"{fps['ingest']:.1f} frames/s, {decoding} ({each})"))
        each = ", ".join(f"{s} {v['p50']:.1f}/{v['p99']:.1f}" for s, v in stages.items())
        lines.append(("latency", f"ms per chunk, p50/p99: {each}"))
        share = tokens["kept"] / max(tokens["seen"], 1)
        lines.append(("tokens", f"{tokens['seen']} seen, {tokens['kept']} kept ({share:.1%})"))
    lines.append(
        (
            "KV cache",
            f"{mib(kv['bytes'])} in {kv['pages']} pages of {kv['page_size']} tokens, "
            f"peak {mib(kv['peak_bytes'])}",
        )
    )
    if live is not None and live["lag_s"] is not None:
        lag = live["lag_s"]
        lines.insert(
            1,
            (
                "lag",
                f"frames taken {lag['p50']:.2f} s after they were due (p50), {lag['max']:.2f} s at "
                f"most; {live['late']} left out as too late",
            ),
        )
    judged = [q["right"] for q in report["questions"] if q["right"] is not None]
    if judged:
        lines.insert(1, ("answers", f"{sum(judged)} of {len(judged)} right"))
    memory = report["memory"]
    device = (
        f", {mib(memory['peak_device_bytes'])} on the GPU" if memory["peak_device_bytes"] else ""
    )
    lines.append(("memory", f"{mib(memory['peak_rss_bytes'])} at the peak{device}"))
    return lines


def clock(time_s: float) -> str:
    """Seconds as ``mm:ss.s``, with hours where there are any."""
    sign, tenths = ("-" if time_s < 0 else ""), round(abs(time_s) * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    head = f"{hours}:{minutes:02d}" if hours else f"{minutes:02d}"
    return f"{sign}{head}:{rest / 10:04.1f}"


def mib(count: int) -> str:
    """Bytes in MiB, or GiB where that reads better."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _chunks(blocks: Sequence[tuple[float, float]]) -> str:
    """How many chunks were read, and where they began."""
    if not blocks:
        return "0 chunks"
    starts = [clock(start) for start, _ in blocks]
    if len(starts) > _STARTS:
        starts = [*starts[: _STARTS // 2], "...", *starts[-_STARTS // 2 :]]
    return f"{len(blocks)} chunks: {', '.join(starts)}"


def _visible(text: str) -> str:
    return text.translate(_VISIBLE)


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"...{name[-29:]}"
