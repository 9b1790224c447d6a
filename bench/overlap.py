"""``vicostream bench overlap``: what it saves that the engine's stages work at the same time.

Two streams of the same frames, one with ``engine.overlap`` and one without, take turns at a run of
chunks; frames come as a decoder gives them, a chunk a call. Beside the ratio stands what could be
reached: the stages' times in a serial run, all together over the longest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vicostream_kernels import methods
from vicostream_kernels.bench.reuse_error import make_clip
from vicostream_kernels.bench.stats import Ratio, paired_ratio
from vicostream_kernels.pipeline.engine import StreamEngine

#: What `measure` does less of where time is short.
QUICK = {"turns": 6, "chunks": 12}
_STAGES = ("preprocess", "encode", "prune", "prefill")


class WrongResult(RuntimeError):
    """The two streams do not hold the same bits."""


@dataclass(frozen=True)
class Overlap:
    """``ratio``: time of a run of chunks in turn over the time overlapped (above 1: faster).
    ``fps``: frames a second, overlapped. ``stages_ms``: of a chunk, in turn."""

    ratio: Ratio
    fps: float
    stages_ms: dict[str, float]

    @property
    def at_best(self) -> float:
        return sum(self.stages_ms.values()) / max(self.stages_ms.values())


class _Side:
    """One of the two streams."""

    def __init__(self, runner: Any, overlap: bool, preset: str, frames: torch.Tensor) -> None:
        self.engine = StreamEngine(runner, methods.get(preset, {"engine.overlap": overlap}))
        self.stream = self.engine.open()
        self._parts = frames.split(self.stream.frames_per_chunk)
        self._cuda = runner.device.type == "cuda"

    def feed(self, chunks: int) -> float:
        """Seconds."""
        began = time.perf_counter()
        for _ in range(chunks):
            number = self.stream.recorder.frames_ingested // self.stream.frames_per_chunk
            self.stream.ingest(self._parts[number % len(self._parts)])
        self.stream.flush()
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def close(self) -> None:
        self.stream.close()
        self.engine.close()


def measure(
    runner: Any,
    *,
    preset: str = "live",
    turns: int = 15,
    chunks: int = 24,
    size: tuple[int, int] = (252, 420),
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Overlap:
    """Raises WrongResult where the two streams do not hold the same bits."""
    frames = make_clip("pan", 64, *size, seed=seed)
    with ExitStack() as ends:
        sides = [_Side(runner, overlap, preset, frames) for overlap in (False, True)]
        for side in sides:
            ends.callback(side.close)
            side.feed(4)
        times: tuple[list[float], list[float]] = [], []
        for turn in range(turns):
            progress(f"turn {turn + 1} of {turns}")
            for at in (0, 1) if turn % 2 else (1, 0):
                times[at].append(sides[at].feed(chunks))
        _check(*sides)
        report = sides[0].stream.report()
        stages = {name: report["stages_ms"][name]["p50"] for name in _STAGES}
        fps = chunks * sides[1].stream.frames_per_chunk / statistics.median(times[1])
        return Overlap(paired_ratio(*times), fps, stages)


def _check(*sides: _Side) -> None:
    caches = [side.stream.history.cache for side in sides]
    pairs = list(zip(*(cache.chunks for cache in caches)))
    same = len(caches[0].chunks) == len(caches[1].chunks)
    for pair in pairs:
        one, other = (cache.contents(block) for cache, block in zip(caches, pair))
        same = same and torch.equal(one, other)
    if not pairs or not same:
        raise WrongResult("overlapped stages do not give the bits of a serial run")


def table(found: Overlap) -> str:
    ratio, stages = found.ratio, found.stages_ms
    each = ", ".join(f"{name} {ms:.2f}" for name, ms in stages.items())
    return (
        f"{found.fps:.1f} frames/s overlapped, {ratio.median:.2f} x a serial run "
        f"({ratio.low:.2f} to {ratio.high:.2f}); ms a chunk in turn: {each}: "
        f"{found.at_best:.2f} x at best"
    )


def as_data(found: Overlap) -> dict[str, Any]:
    return asdict(found) | {"at_best": found.at_best}
