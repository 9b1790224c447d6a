"""What a run did, in figures: collected while it runs, written as ``report.json``.

``report.schema.json`` beside this file documents every field; a test validates against it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels.cache import Forgotten
from vicostream_kernels.pipeline.errors import PipelineError, Trouble, one_line
from vicostream_kernels.pipeline.trace import Span, Trace, write_atomically

SCHEMA = "vicostream-report/1"
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
#: Entries kept of chunks, questions and errors each: a stream that never ends keeps the newest.
KEPT_ENTRIES = 20_000
#: Stages that a chunk passes, in order; the rest of a trace belongs to questions.
CHUNK_STAGES = ("decode", "preprocess", "encode", "prune", "prefill")
_PACKAGES = ("vicostream-kernels", "torch", "transformers", "triton", "av", "numpy")


@dataclass(slots=True)
class ChunkFigures:
    """One chunk as reported. ``seen`` and ``kept`` count video tokens, markers aside."""

    start_s: float
    end_s: float
    frames: int
    seen: int
    kept: int
    kv_pages: int
    kv_bytes: int
    rss_bytes: int
    spans: list[Span] = field(default_factory=list)

    def stages_ms(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for span in self.spans:
            total[span.stage] = total.get(span.stage, 0.0) + span.ms
        return {stage: round(ms, 4) for stage, ms in total.items()}

    def entry(self) -> dict[str, Any]:
        stages = self.stages_ms()
        compute = sum(ms for stage, ms in stages.items() if stage != "decode")
        return {
            "start_s": round(self.start_s, 6),
            "end_s": round(self.end_s, 6),
            "frames": self.frames,
            "seen": self.seen,
            "kept": self.kept,
            "ms": round(compute, 4),
            "stages_ms": stages,
            "kv_pages": self.kv_pages,
            "kv_bytes": self.kv_bytes,
            "rss_bytes": self.rss_bytes,
        }


@dataclass(frozen=True, slots=True)
class BlockRead:
    """One chunk as a question's retrieval saw it; fields as ``report.schema.json`` has them."""

    start_s: float
    end_s: float
    score: float
    share: float
    tier: str

    def entry(self) -> dict[str, Any]:
        score = round(self.score, 6) if math.isfinite(self.score) else None
        times = {"start_s": round(self.start_s, 6), "end_s": round(self.end_s, 6)}
        return {**times, "score": score, "share": round(self.share, 6), "tier": self.tier}


@dataclass
class QuestionFigures:
    """One question as reported. ``blocks`` are the times of the chunks that it read; ``reads`` the
    chunks that retrieval chose, ``relevance`` all that it could have (where that is wanted);
    ``right`` says whether the answer is the ``expected`` one, where that is known; ``waited_ms`` is
    how long a typed question waited to be asked."""

    time_s: float
    text: str
    answer: str = ""
    ttft_ms: float | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    blocks: list[tuple[float, float]] = field(default_factory=list)
    finish: str = "open"
    reads: list[BlockRead] = field(default_factory=list)
    relevance: list[BlockRead] = field(default_factory=list)
    expected: str | None = None
    right: bool | None = None
    waited_ms: float | None = None

    def judge(self, expected: str) -> None:
        """Compares the answer with the right one; case, blanks and a full stop do not matter."""
        self.expected = expected
        self.right = self.answer.strip().rstrip(".").strip().lower() == expected.lower()


class Recorder:
    """Collects the figures of one stream; totals are exact however long it runs."""

    def __init__(
        self,
        *,
        model: str,
        preset: str,
        config: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model: dict[str, Any] = {"name": model, "dtype": None}
        self.preset = preset
        self.config = config or {}
        self.source: dict[str, Any] | None = None
        self.pictures: dict[str, str] | None = None
        #: How a run kept up with the time that passes, where it did.
        self.live: dict[str, Any] | None = None
        self.use_device(device)
        self.chunks: deque[ChunkFigures] = deque(maxlen=KEPT_ENTRIES)
        self.questions: deque[QuestionFigures] = deque(maxlen=KEPT_ENTRIES)
        self.errors: deque[Trouble] = deque(maxlen=KEPT_ENTRIES)
        #: Whether questions note the relevance of what they did not read, too.
        self.explain = False
        #: As whoever decodes them counts; None: all are ingested. See `read`.
        self.frames_read: int | None = None
        #: Decoded before a restore, but never ingested: --fps left them out.
        self.frames_left_out = 0
        self.frames_ingested = 0
        self.frames_processed = 0
        self.chunk_count = 0
        self.tokens_seen = 0
        self.tokens_kept = 0
        self.kv: dict[str, Any] = dict.fromkeys(
            ("pages", "bytes", "summary_bytes", "peak_bytes", "pool_bytes", "page_size"), 0
        )
        self.kv["tiers"] = {}
        #: What retrieval can't reach any more.
        self.forgotten = Forgotten()
        #: What the encoder reused so far, read when the report is made (it waits for the device).
        self.reuse: Callable[[], dict[str, Any]] | None = None
        #: Time in which video was decoded or taken in, by however many at a time.
        self.ingest_s = 0.0
        self._counting = threading.Lock()  # stages may have threads of their own
        self._at_work, self._since = 0, -math.inf
        self._began = time.perf_counter()
        self._ended: float | None = None
        self._peaks: dict[str, int] | None = None
        self._decoded: list[Span] = []

    def use_device(self, device: torch.device | str) -> None:
        """Where the spans are measured; called before the first one."""
        self.device = torch.device(device)
        self.trace = Trace(self.device)

    def restart(self) -> None:
        """Starts the clocks anew: what was loaded before is not part of the run."""
        self._began = time.perf_counter()
        self.trace = Trace(self.device)

    def decoded(self, span: Span) -> None:
        """Puts a decoding span on the account of the chunk that is being filled."""
        self._decoded.append(span)
        with self._counting:
            # Beside stages at work it took no time of its own.
            alone = 0.0 if self._at_work else time.perf_counter() - self._since
            self.ingest_s += min(span.seconds or 0.0, alone)

    def decoded_beside(self, began_s: float, seconds: float) -> None:
        """The same for decoding in a thread of its own, which takes no time of anybody; it began at
        that ``time.perf_counter``."""
        self._decoded.append(self.trace.past("decode", began_s, seconds))

    @contextmanager
    def taking_in(self) -> Iterator[None]:
        """Puts the body's time on ``ingest_s``, once where several run at a time."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, more: int) -> None:
        with self._counting:
            now = time.perf_counter()
            if self._at_work:
                self.ingest_s += now - self._since
            self._at_work, self._since = self._at_work + more, now

    def take_decoded(self) -> tuple[Span, ...]:
        """The decoding spans of the chunk that is full now."""
        taken, self._decoded = tuple(self._decoded), []
        return taken

    def chunk(self, figures: ChunkFigures) -> None:
        """Adds a finished chunk."""
        self.chunks.append(figures)
        self.chunk_count += 1
        self.tokens_seen += figures.seen
        self.tokens_kept += figures.kept
        self.frames_processed += figures.frames

    def error(self, where: str, error: BaseException | str, time_s: float | None = None) -> None:
        """Notes what went wrong."""
        what = error if isinstance(error, str) else one_line(error)
        self.errors.append(Trouble(None if time_s is None else round(time_s, 6), where, what))

    @property
    def read(self) -> int:
        """Frames decoded, in earlier runs of a restored session too."""
        if self.frames_read is not None:
            return self.frames_read
        return self.frames_left_out + self.frames_ingested

    def end(self) -> None:
        """Stops the clock of ``wall_s`` and keeps the peaks of memory, so that pictures drawn later
        are not among them; the first call counts."""
        if self._ended is None:
            self._ended, self._peaks = time.perf_counter(), self._peaks_now()

    @property
    def wall_s(self) -> float:
        return (self._ended or time.perf_counter()) - self._began

    def report(self) -> dict[str, Any]:
        """Everything so far as plain JSON data."""
        chunks, errors = list(self.chunks), list(self.errors)  # overlapped stages may add some
        self.trace.settle(wait=True)
        chunks = [chunk.entry() for chunk in chunks]
        read = self.read
        return {
            "schema": SCHEMA,
            "versions": versions(),
            "device": describe_device(self.device),
            "model": self.model,
            "preset": self.preset,
            "config": self.config,
            "source": self.source,
            "frames": {
                "read": read,
                "processed": self.frames_processed,
                "dropped": read - self.frames_processed,
            },
            "wall_s": round(self.wall_s, 6),
            "live": self.live,
            "fps": self._fps(chunks),
            "stages_ms": {
                stage: percentiles(c["stages_ms"][stage] for c in chunks if stage in c["stages_ms"])
                for stage in CHUNK_STAGES
                if any(stage in c["stages_ms"] for c in chunks)
            },
            "tokens": {"seen": self.tokens_seen, "kept": self.tokens_kept},
            "reuse": None if self.reuse is None else self.reuse(),
            "kv": dict(self.kv),
            "forgotten": {
                "chunks": self.forgotten.chunks,
                "tokens": self.forgotten.tokens,
                "spans": [[round(a, 6), round(b, 6)] for a, b in self.forgotten.spans],
            },
            "memory": self._peaks or self._peaks_now(),
            "chunks": chunks,
            "questions": [_question(q) for q in self.questions],
            "pictures": self.pictures,
            "errors": [asdict(error) for error in errors],
        }

    def _peaks_now(self) -> dict[str, int]:
        return {
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": peak_device_bytes(self.device),
        }

    def _fps(self, chunks: list[dict[str, Any]]) -> dict[str, float | None]:
        spent: Counter[str] = Counter()
        frames: Counter[str] = Counter()
        for chunk in chunks:
            for stage, ms in chunk["stages_ms"].items():
                spent[stage] += ms / 1e3
                frames[stage] += chunk["frames"]
        fps = {"ingest": _rate(self.frames_processed, self.ingest_s)}
        for stage in CHUNK_STAGES:
            if stage != "decode" or spent[stage]:
                fps[stage] = _rate(frames[stage], spent[stage])
        return fps

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Writes ``report.json`` and ``trace.json`` into ``folder``; returns the report.

        Raises :class:`PipelineError` when the folder cannot be written.
        """
        report = self.report()
        try:
            text = json.dumps(_finite(report), indent=1, ensure_ascii=False, allow_nan=False)
            write_atomically(Path(folder) / "report.json", text + "\n")
            self.trace.write(Path(folder) / "trace.json")
        except OSError as error:
            raise PipelineError(f"the report cannot be written to {folder}: {error}") from error
        return report


def _question(figures: QuestionFigures) -> dict[str, Any]:
    entry = {f.name: getattr(figures, f.name) for f in fields(figures) if f.name != "relevance"}
    entry["time_s"] = round(figures.time_s, 6)
    entry["blocks"] = [[round(start, 6), round(end, 6)] for start, end in figures.blocks]
    entry["reads"] = [block.entry() for block in figures.reads]
    return entry


def _rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 3) if count and seconds > 0 else None


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """p50, p90 and p99 by linear interpolation; ``values`` must not be empty."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("percentiles: values is empty")
    result = {}
    for name, share in (("p50", 0.50), ("p90", 0.90), ("p99", 0.99)):
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        result[name] = round(ordered[low] + (place - low) * (ordered[high] - ordered[low]), 4)
    return result


def versions() -> dict[str, str | None]:
    """Versions of what takes part; None where a package is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def describe_device(device: torch.device) -> dict[str, Any]:
    """Kind, name and intra-op threads."""
    if device.type == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
    return {"type": device.type, "name": name, "threads": torch.get_num_threads()}


def rss_bytes() -> int:
    """Resident memory of this process now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most resident memory that this process had."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: torch.device) -> int:
    """The most memory that torch held on the GPU; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _finite(value: Any) -> Any:
    """JSON has no infinity: an unbounded limit is written as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
