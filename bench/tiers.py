"""``vicostream bench tiers``: what it costs that history leaves memory, and that it comes back.

Two streams of the same frames, one with a budget for its history and one without, take turns.
*ingest* compares the time of a run of chunks, while every chunk pushes one down, until the last of
them is where it goes. *fetch* asks both the same question about ``CHOSEN`` old chunks, which one of
them has to bring back first, and holds the added time to first token to the time that the bytes
alone need: a copy to the GPU, on the CPU reading a file that is in the page cache. A question that
has to send other chunks down first pays for that too: such ones are told apart.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
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
#: What `measure` does less of where time is short.
QUICK = {"turns": 6, "questions": 5}
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
    """``added_ms``: of time to first token, where ``tier`` had the chunks, median over
    ``questions`` that had room for them; ``room_ms``: of the others, which had to make room, None
    where there were none.
    ``floor_ms``: what their ``bytes`` need. ``ttft_ms``: with all of them in memory."""

    added_ms: float
    room_ms: float | None
    questions: int
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
        self._frames, self._fed = frames, 0
        self._count = method.engine.frames_per_chunk
        self._cuda = runner.device.type == "cuda"

    def feed(self, chunks: int) -> float:
        """Seconds."""
        began = time.perf_counter()
        for _ in range(chunks):
            at = self._fed * self._count % len(self._frames)
            # No chunk shows what another one does.
            shifted = self._frames[at : at + self._count].roll((self._fed, 2 * self._fed), (1, 2))
            self.stream.ingest(shifted)
            self._fed += 1
        self.stream.flush()
        if self.engine.cache.tiers is not None:
            self.engine.cache.settle()
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
    with ExitStack() as ends:
        plain = _Side(runner, frames, {})
        ends.callback(plain.close)
        plain.feed(8)
        chunk_bytes = -(-plain.engine.cache.bytes // 8)
        budget: dict[str, Any] = {"engine.history_bytes": HELD * chunk_bytes}
        if runner.device.type == "cuda":  # down to host memory, and no further
            budget["engine.host_bytes"] = 64 * HELD * chunk_bytes
        tiered = _Side(runner, frames, budget)
        ends.callback(tiered.close)
        tiered.feed(8)
        fed = 8
        while fed < questions * CHOSEN + HELD:
            progress(f"{fed} chunks")
            for side in (plain, tiered):
                side.feed(CHOSEN)
            fed += CHOSEN
        moved = turns * chunks * chunk_bytes
        ingest = _ingest(plain, tiered, turns, chunks, moved // 2, progress)
        return ingest, _fetch(plain, tiered, questions, progress)


def _ingest(plain: _Side, tiered: _Side, turns: int, chunks: int, least: int, progress) -> Ingest:
    times: dict[_Side, list[float]] = {plain: [], tiered: []}
    before = tiered.below()
    for turn in range(turns):
        progress(f"ingest, turn {turn + 1} of {turns}")
        for side in (plain, tiered) if turn % 2 else (tiered, plain):
            times[side].append(side.feed(chunks))
    moved = tiered.below() - before
    if moved < least:
        raise WrongResult(f"{moved} bytes left memory while chunks were timed, not {least}")
    ratio = paired_ratio(times[plain], times[tiered])
    return Ingest(ratio, 1e3 * statistics.median(times[tiered]) / chunks, moved)


def _fetch(plain: _Side, tiered: _Side, questions: int, progress) -> Fetch:
    added, base, floors, sizes, tiers, making_room = [], [], [], [], set(), []
    _warm(plain, tiered)
    for number in range(questions):
        progress(f"fetch, question {number + 1} of {questions}")
        first, before, asked = number * CHOSEN, tiered.below(), {}
        for side in (plain, tiered) if number % 2 else (tiered, plain):
            asked[side] = side.ask(first)
        kept_ms, expected, _ = asked[plain]
        away_ms, said, reads = asked[tiered]
        if said != expected or not _same(plain, tiered, first):
            raise WrongResult(f"chunks {first} on are not what they were in memory")
        found = {read.tier for read in reads}
        if len(reads) != CHOSEN or found & {"memory", "device"}:
            raise WrongResult(f"of chunks {first} on, {len(reads)} were read, from {found}")
        tiers |= found
        if tiered.below() > before:
            making_room.append(away_ms - kept_ms)
            continue
        here = tiered.stream.history.cache.chunks[first : first + CHOSEN]
        sizes.append(sum(block.tokens for block in here) * _token_bytes(tiered.engine.runner))
        added.append(away_ms - kept_ms)
        base.append(kept_ms)
        floors.append(_floor_ms(sizes[-1], tiered.engine.runner.device))
    if not added:
        raise WrongResult(f"each of {questions} questions had to make room first")
    middle = statistics.median
    return Fetch(
        middle(added),
        middle(making_room) if making_room else None,
        len(added),
        middle(floors),
        middle(base),
        int(middle(sizes)),
        ", ".join(sorted(tiers)),
    )


def _warm(plain: _Side, tiered: _Side) -> None:
    """Both have been asked once, about what is in memory, before anything counts."""
    last = len(plain.stream.history.cache.chunks) - CHOSEN
    for side in (plain, tiered):
        side.ask(last)


def _same(plain: _Side, tiered: _Side, first: int) -> bool:
    """Whether both hold the same bits of the chunks."""
    caches = (plain.stream.history.cache, tiered.stream.history.cache)
    pairs = zip(*(cache.chunks[first : first + CHOSEN] for cache in caches))
    return all(
        torch.equal(*(cache.contents(block) for cache, block in zip(caches, pair)))
        for pair in pairs
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


def table(found: tuple[Ingest, Fetch]) -> str:
    ingest, fetch = found
    ratio = ingest.ratio
    slower = 100 * (1 / ratio.median - 1)
    room = "" if fetch.room_ms is None else f" ({fetch.room_ms:+.2f} ms where others leave first)"
    return "\n".join(
        (
            f"ingest while history leaves memory: {ingest.ms:.2f} ms a chunk, {slower:+.1f} % "
            f"(ratio {ratio.median:.3f}, {ratio.low:.3f} to {ratio.high:.3f}); "
            f"{ingest.moved_bytes / 1e6:.1f} MB moved",
            f"a question that brings back {CHOSEN} chunks from {fetch.tier}: "
            f"{fetch.added_ms:+.2f} ms{room} to {fetch.ttft_ms:.2f} ms of time to first token; "
            f"{fetch.bytes / 1e6:.1f} MB need {fetch.floor_ms:.2f} ms at least: "
            f"{fetch.over_floor:.2f} x",
        )
    )


def as_data(found: tuple[Ingest, Fetch]) -> dict[str, Any]:
    ingest, fetch = found
    return {"ingest": asdict(ingest), "fetch": asdict(fetch) | {"over_floor": fetch.over_floor}}
