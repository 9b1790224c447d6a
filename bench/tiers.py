"""``vicostream bench tiers``: what it costs that history leaves memory, and that it comes back.

Two streams of the same frames, one with a budget for its history and one without, take turns.
*ingest* compares the time of a run of chunks while every chunk pushes one down. *fetch* asks both
the same question about ``CHOSEN`` old chunks, which one of them has to bring back first, and holds
the added time to first token to the time that the bytes alone need: a copy to the GPU, on the CPU
reading a file that is in the page cache.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels import methods
from vicostream_kernels.bench.reuse_error import make_clip
from vicostream_kernels.bench.stats import Ratio, paired_ratio
from vicostream_kernels.pipeline.engine import StreamEngine
from vicostream_kernels.pipeline.selection import Asked, chosen_rows

#: Chunks that a question reads, and chunks that the budget holds.
CHOSEN, HELD = 64, 160
_QUESTION = "What happened at the beginning?"


class WrongResult(RuntimeError):
    """What must be true before a time means anything is not."""


@dataclass(frozen=True)
class Ingest:
    """``ratio``: time of a run of chunks with nothing below memory over the time while they move
    (below 1: slower). ``ms``: of a chunk while they move. ``moved_bytes`` of history went down."""

    ratio: Ratio
    ms: float
    moved_bytes: int


@dataclass(frozen=True)
class Fetch:
    """``added_ms``: of time to first token, where ``tier`` had the chunks (median over questions).
    ``floor_ms``: what their ``bytes`` need. ``ttft_ms``: with all of them in memory."""

    added_ms: float
    floor_ms: float
    ttft_ms: float
    bytes: int
    tier: str

    @property
    def over_floor(self) -> float:
        return self.added_ms / self.floor_ms


@dataclass(frozen=True)
class _These:
    """Reads the chunks ``first`` to ``first + CHOSEN``."""

    first: int
    per_layer: bool = False

    def select(self, asked: Asked) -> Any:
        return chosen_rows(range(self.first, self.first + CHOSEN), asked.rows)


class _Side:
    """One of the two streams."""

    def __init__(self, runner: Any, frames: torch.Tensor, settings: dict[str, Any]) -> None:
        method = methods.get("vicostream", settings)
        self.engine = StreamEngine(runner, method)
        self.stream = self.engine.open(fps=4)
        self._frames, self._at = frames, 0
        self._count = method.engine.frames_per_chunk
        self._cuda = runner.device.type == "cuda"

    def feed(self, chunks: int) -> float:
        """Seconds."""
        began = time.perf_counter()
        for _ in range(chunks):
            at = self._at % len(self._frames)
            self.stream.ingest(self._frames[at : at + self._count])
            self._at += self._count
        self.stream.flush()
        self.finish()
        return time.perf_counter() - began

    def finish(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def below(self) -> int:
        """Bytes that left memory."""
        first, *rest = self.engine.cache.tier_bytes().values()
        return sum(used for used, _ in rest)

    def ask(self, first: int) -> tuple[float, str, list[Any]]:
        """Milliseconds to the first token, the answer, and what was read."""
        self.finish()
        sampler = self.engine.runner.sampler(do_sample=False)
        with self.stream.ask(
            _QUESTION, sampler=sampler, selector=_These(first), max_new_tokens=4
        ) as answer:
            for _ in answer:
                pass
        return answer.figures.ttft_ms, answer.text, answer.figures.reads

    def close(self) -> None:
        self.stream.close()
        self.engine.close()


def measure(
    runner: Any,
    *,
    turns: int = 20,
    chunks: int = 24,
    questions: int = 8,
    size: tuple[int, int] = (252, 420),
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Ingest, Fetch]:
    """Raises WrongResult where nothing moved, or the two streams answer differently."""
    frames = make_clip("pan", 64, *size, seed=seed)
    plain = _Side(runner, frames, {})
    plain.feed(8)
    chunk_bytes = -(-plain.engine.cache.bytes // 8)
    budget: dict[str, Any] = {"engine.history_bytes": HELD * chunk_bytes}
    if runner.device.type == "cuda":  # down to host memory, and no further
        budget["engine.host_bytes"] = 64 * HELD * chunk_bytes
    tiered = _Side(runner, frames, budget)
    try:
        tiered.feed(8)
        fed = 8
        while fed < questions * CHOSEN or not tiered.below():
            progress(f"{fed} chunks")
            for side in (plain, tiered):
                side.feed(CHOSEN)
            fed += CHOSEN
            if fed > questions * CHOSEN + 4 * HELD:
                raise WrongResult(f"nothing left memory in {fed} chunks")
        ingest = _ingest(plain, tiered, turns, chunks, progress)
        return ingest, _fetch(plain, tiered, questions, progress)
    finally:
        plain.close()
        tiered.close()


def _ingest(plain: _Side, tiered: _Side, turns: int, chunks: int, progress) -> Ingest:
    times: dict[_Side, list[float]] = {plain: [], tiered: []}
    before = tiered.below()
    for turn in range(turns):
        progress(f"ingest, turn {turn + 1} of {turns}")
        for side in (plain, tiered) if turn % 2 else (tiered, plain):
            times[side].append(side.feed(chunks))
            tiered.engine.cache.settle()  # what is still on its way must not slow the other
    moved = tiered.below() - before
    if moved <= 0:
        raise WrongResult("no history left memory while the chunks were timed")
    ratio = paired_ratio(times[plain], times[tiered])
    return Ingest(ratio, 1e3 * statistics.median(times[tiered]) / chunks, moved)


def _fetch(plain: _Side, tiered: _Side, questions: int, progress) -> Fetch:
    added, base, floors, sizes, tiers = [], [], [], [], set()
    for number in range(questions):
        progress(f"fetch, question {number + 1} of {questions}")
        first = number * CHOSEN
        kept_ms, expected, _ = plain.ask(first)
        away_ms, said, reads = tiered.ask(first)
        if said != expected:
            raise WrongResult(f"chunks {first} on: {said!r} where all is in memory: {expected!r}")
        below = {read.tier for read in reads} - {"memory", "device"}
        if not below:
            raise WrongResult(f"chunks {first} on were in memory")
        tiers |= below
        here = [b for b in tiered.stream.history.cache.chunks[first : first + CHOSEN]]
        tokens = sum(block.tokens for block in here)
        sizes.append(tokens * _token_bytes(tiered.engine.runner))
        added.append(away_ms - kept_ms)
        base.append(kept_ms)
        floors.append(_floor_ms(sizes[-1], tiered.engine.runner.device))
    middle = statistics.median
    return Fetch(
        middle(added), middle(floors), middle(base), int(middle(sizes)), ", ".join(sorted(tiers))
    )


def _token_bytes(runner: Any) -> int:
    """Of the keys and values of a token in all layers."""
    return 2 * runner.layers * runner.kv_heads * runner.head_dim * runner.dtype.itemsize


def _floor_ms(nbytes: int, device: torch.device) -> float:
    """Milliseconds that it takes to bring so many bytes here; the best of five."""
    if device.type == "cuda":
        source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        target = torch.empty(nbytes, dtype=torch.uint8, device=device)

        def bring() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        return _best_ms(bring)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes"
        path.write_bytes(bytes(nbytes))
        buffer = bytearray(nbytes)

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                view = memoryview(buffer)
                while view:
                    view = view[file.readinto(view) :]

        return _best_ms(read)


def _best_ms(job: Callable[[], None]) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        job()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


def table(ingest: Ingest, fetch: Fetch) -> str:
    ratio = ingest.ratio
    slower = 100 * (1 / ratio.median - 1)
    return "\n".join(
        (
            f"ingest while history leaves memory: {ingest.ms:.2f} ms a chunk, {slower:+.1f} % "
            f"(ratio {ratio.median:.3f}, {ratio.low:.3f} to {ratio.high:.3f}); "
            f"{ingest.moved_bytes / 1e6:.1f} MB moved",
            f"a question that brings back {CHOSEN} chunks from {fetch.tier}: "
            f"{fetch.added_ms:+.2f} ms to {fetch.ttft_ms:.2f} ms of time to first token; "
            f"{fetch.bytes / 1e6:.1f} MB need {fetch.floor_ms:.2f} ms at least: "
            f"{fetch.over_floor:.2f} x",
        )
    )


def as_data(ingest: Ingest, fetch: Fetch) -> dict[str, Any]:
    return {"ingest": asdict(ingest), "fetch": asdict(fetch) | {"over_floor": fetch.over_floor}}
