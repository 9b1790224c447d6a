"""A stream: frames go in, questions are asked, answers come out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, WeakSet, finalize

import numpy as np
import torch

from vicostream_kernels.cache import CacheStream, DiskFull, OutOfPages
from vicostream_kernels.methods import Method
from vicostream_kernels.models import Qwen2_5_VLRunner, Sampler
from vicostream_kernels.pipeline.answer import Answer
from vicostream_kernels.pipeline.belt import Belt, Line, Stage, Way
from vicostream_kernels.pipeline.carried import Carried, counted, dated, dropped, timed
from vicostream_kernels.pipeline.errors import InputError, PipelineError, date, finite, surface
from vicostream_kernels.pipeline.frames import as_frames, joined
from vicostream_kernels.pipeline.lanes import CudaLane, Lane
from vicostream_kernels.pipeline.llm import LLMSteps
from vicostream_kernels.pipeline.report import ChunkFigures, Recorder, rss_bytes
from vicostream_kernels.pipeline.saving import save
from vicostream_kernels.pipeline.selection import RuleSelector, Selector
from vicostream_kernels.pipeline.snapshot import Snapshot
from vicostream_kernels.pipeline.stages import (
    ChunkFrames,
    ChunkMask,
    Encode,
    Prefill,
    Preprocess,
    Prune,
)
from vicostream_kernels.pipeline.visibility import History

if TYPE_CHECKING:
    from vicostream_kernels.pipeline.engine import StreamEngine

#: A chunk that finds no room waits and is tried again: files may be freed, answers end.
_NO_ROOM = (DiskFull, OutOfPages)


class Stream:
    """One video stream of an engine, made by ``StreamEngine.open``; a context manager.

    Frames are cut into chunks of ``engine.frames_per_chunk``, however many arrive at a time; each
    chunk goes through the stages as soon as it is full. A chunk never mixes frame sizes: a change
    of size ends the chunk before it. One thread at a time may use a stream, or streams of one
    engine.

    With ``engine.overlap`` each stage has a thread of its own (on a GPU a CUDA stream, too), a few
    chunks are on their way when ``ingest`` returns, and what a stage raises is raised by the next
    call; ``ask``, ``flush``, ``save`` wait for them. The bits are the same. A call that is
    interrupted while it waits (Ctrl-C) leaves the stream as it was, the chunks on their way, and
    may be made again.
    """

    def __init__(
        self,
        engine: StreamEngine,
        recorder: Recorder,
        *,
        fps: float,
        system: str | None,
        on_pruned: Callable[[ChunkMask], None] | None = None,
        snapshot: Snapshot | None = None,
    ) -> None:
        method, runner = engine.method, engine.runner
        self._engine, self.recorder, self._method = engine, recorder, method
        self._period = 1.0 / fps
        self._step = runner.temporal_patch_size
        self._buffer: list[torch.Tensor] = []
        self._times: list[float] = []
        self._now: float | None = None
        self._given, self._since = 0.0, -1  # the last given time, and frames taken since
        self._answers: WeakSet[Answer] = WeakSet()
        self._failed = False
        self._most_pages = 0  # of a chunk so far
        self._written = self._told = 0  # chunks in the cache, of which the caller knows
        self._turn = engine.turn
        self._cleanup = ExitStack()
        with self._turn, torch.no_grad():
            cache = self._cleanup.enter_context(engine.cache.open())
            self.history = History(cache)
            recorder.forgotten = cache.forgotten
            try:
                self._selector = _follow(method, runner, cache)
                self._llm = LLMSteps(runner, cache, method)
                self._preprocess = Preprocess(runner, method)
                # Behind weights and cache; each stage's own state is made on its lane.
                self._lanes = self._stage_lanes()
                with self._lanes[1]:
                    self._encode = Encode(runner, method)
                if self._encode.state is not None:
                    recorder.reuse = partial(self._encode.figures, self._lanes[1])
                self._prune = Prune(runner, method, on_pruned)
                self._prefill = Prefill(self._llm, method, self.history, engine.bucket)
                if snapshot is None:
                    self._prefill.begin(runner.system_ids(system))
                else:
                    snapshot.into(self)
                self._account()
                self._way = self._make_way()
            except BaseException:
                self._cleanup.close()
                raise
        # One that is dropped gives its pages back, too, when its answers are gone as well.
        finalize(self.history, self._turn.later, self._cleanup.close).atexit = False

    # -- frames ----------------------------------------------------------------------------------

    def ingest(
        self, frames: torch.Tensor | np.ndarray, times_s: Sequence[float] | None = None
    ) -> int:
        """Takes frames; returns how many chunks were finished since the last call.

        Args:
            frames: ``[F, H, W, 3]`` uint8 RGB, strided tensor on any device or NumPy array, any
                F >= 0. They may be overwritten after the call. Calls that fill one chunk may bring
                frames on several devices.
            times_s: F times in seconds from the start of the stream, not decreasing; None goes on
                at the ``fps`` that the stream was opened with.

        Raises ``TypeError``, ``ValueError`` for bad arguments, before anything is taken in. What
        else a chunk raises leaves the frames after that chunk untaken: ``recorder.frames_ingested``
        grew by those that were taken. After ``DiskFull`` or ``OutOfPages`` for want of room (open
        answers may hold what would have to go), or an interrupt while it waited for room, the
        chunk's own frames wait in the stream, and the caller may go on with the rest; where the
        chunk itself failed, the stream has failed.
        """
        self._check_open()
        frames = as_frames(frames)
        self._preprocess.check_size(*frames.shape[1:3])
        times = self._check_times(frames.shape[0], times_s)
        at = 0
        with self.recorder.taking_in():
            try:
                while at < frames.shape[0]:
                    if self._buffer and self._buffer[0].shape[1:] != frames.shape[1:]:
                        self._finish_chunk()
                    room = self._method.engine.frames_per_chunk - len(self._times)
                    if room == 0:  # a full chunk has waited
                        self._finish_chunk()
                        continue
                    part = frames[at : at + room]
                    if part.shape[0] < room:
                        part = part.clone()  # what waits must not change with the caller's memory
                    with self._fails_whole():
                        self._buffer.append(part)
                        self._times += times[at : at + room]
                        self._now = self._times[-1]
                        self._since += part.shape[0]
                        if times_s is not None:
                            self._given, self._since = self._now, 0
                        at += part.shape[0]
                        self.recorder.frames_ingested += part.shape[0]
                    if len(self._times) == self._method.engine.frames_per_chunk:
                        self._finish_chunk()
            except BaseException:
                with self._fails_whole():  # a full chunk waits as well
                    self._buffer[-1:] = [part.clone() for part in self._buffer[-1:]]
                raise
            finally:
                done = self._finished()
        return done

    def flush(self) -> int:
        """Finishes the chunk that is being filled, short as it is; returns how many chunks were
        finished since the last call. An odd last frame is repeated to fill its step."""
        self._check_open()
        with self.recorder.taking_in():
            try:
                self._finish_chunk()
                self._way.drain()
            finally:
                done = self._finished()
        return done

    @property
    def frames_per_chunk(self) -> int:
        """How many frames fill a chunk."""
        return self._method.engine.frames_per_chunk

    @property
    def time_s(self) -> float:
        """The time of the newest frame, 0 before the first."""
        return self._now or 0.0

    def _finish_chunk(self) -> None:
        """Hands the chunk that is being filled on, short as it is."""
        self._way.ready()
        if not self._buffer:
            return
        if not self._overlaps:
            # What must move for it moves now: where that fails, the chunk's frames wait.
            try:
                with self._turn:
                    self._make_room()
            except Exception as error:
                date(error, self._times[0])
                raise
        images = joined(self._buffer, self._engine.runner.device)
        if self._overlaps and len(self._buffer) == 1:
            images = images.clone()  # the caller may overwrite them
        chunk = ChunkFrames(images, self._times[0], self._times[-1], self._seconds_per_step())
        with self._fails_whole():
            self._buffer, self._times = [], []
            self._way.put(Carried(chunk, chunk, self.recorder.take_decoded()))

    def _make_room(self) -> None:
        """Before each chunk, at one moment of the cache: what moves together is dropped together,
        where the files have a budget, and that must not depend on ``engine.overlap``."""
        self._engine.cache.make_room(self._most_pages)

    def _finished(self) -> int:
        """How many chunks were finished since the call before."""
        written = self._written
        told, self._told = self._told, written
        return written - told

    @property
    def _overlaps(self) -> bool:
        return self._method.engine.overlap

    def _stage_lanes(self) -> list[Lane]:
        device = self._engine.runner.device
        own = CudaLane if self._overlaps and device.type == "cuda" else lambda _: Lane()
        return [*(own(device) for _ in range(3)), self._engine.stages_turn]

    def _make_way(self) -> Way:
        # None of them keeps the stream: one that nobody uses any more goes, its threads with it.
        write = WeakMethod(self._write)
        prune = timed(self.recorder, "prune", self._prune)
        stages: list[Stage] = [
            timed(self.recorder, "preprocess", self._preprocess),
            timed(self.recorder, "encode", self._encode),
            counted(prune) if self._overlaps else prune,
            lambda chunk: (write() or dropped)(chunk),
        ]
        stages = [dated(stage) for stage in stages]
        if not self._overlaps:
            return Line(stages, _NO_ROOM)
        belt = Belt(stages, _NO_ROOM, self._lanes)
        self._engine.belts.add(belt)
        finalize(self, belt.stop).atexit = False
        return belt

    def _write(self, chunk: Carried) -> None:
        """The last stage. Where it finds no room nothing has been written."""
        recorder, source = self.recorder, chunk.source
        span = recorder.trace.span("prefill", start_s=source.start_s)
        with self._turn:
            with recorder.taking_in(), torch.no_grad(), span as span:
                if self._overlaps:
                    self._make_room()
                done = self._prefill.run(chunk.value)
            self._most_pages = max(self._most_pages, len(done.block.pages))
            kv = self._account()
        recorder.chunk(
            ChunkFigures(
                source.start_s,
                source.end_s,
                source.frames,
                done.seen,
                done.kept,
                kv["pages"],
                kv["bytes"],
                rss_bytes(),
                [*chunk.spans, span],
            )
        )
        self._written += 1

    @contextmanager
    def _fails_whole(self) -> Iterator[None]:
        """Around what must not be left half done, by Ctrl-C say: frames that are missing, or there
        twice, would be seen by nobody. The stream fails."""
        try:
            yield
        except _NO_ROOM:
            raise
        except BaseException:
            self._failed = True
            raise

    def _seconds_per_step(self) -> float:
        """What a step counts as: fixed by the method, or measured from this chunk's times."""
        fixed = self._method.engine.seconds_per_step
        if fixed is not None:
            return fixed
        starts = self._times[:: self._step]
        if len(starts) < 2:
            return round(self._step * self._period, 3)
        # Containers round times; a chunk must not count its steps in noise.
        return round((starts[-1] - starts[0]) / (len(starts) - 1), 3)

    def _check_times(self, count: int, times_s: Sequence[float] | None) -> list[float]:
        last = self._now
        if times_s is None:
            # Counted: added up, times would depend on how frames are cut into calls.
            first = self._since + 1
            return [self._given + (first + i) * self._period for i in range(count)]
        times = [float(t) for t in times_s]
        if len(times) != count:
            raise ValueError(f"ingest: times_s has {len(times)} entries for {count} frames")
        for t in times:
            if not math.isfinite(t) or (last is not None and t < last):
                raise ValueError(
                    f"ingest: times_s={t} must be finite and not before the time {last} s before it"
                )
            last = t
        return times

    # -- questions -------------------------------------------------------------------------------

    def ask(
        self,
        text: str,
        time_s: float | None = None,
        *,
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        selector: Selector | None = None,
    ) -> Answer:
        """Asks about the stream as it was at ``time_s`` (None: now); iterate over the result.

        The question sees exactly the chunks whose last frame is not after ``time_s``; frames that
        wait for the rest of their chunk are not among them (``flush`` first to include them). It is
        a fork: neither video nor other questions ever see it. Before the first chunk it is answered
        from the text alone; a time after the newest frame means now.

        Args:
            text: the question.
            time_s: seconds of the stream.
            max_new_tokens: at most this many tokens; None takes the method's budget.
            sampler: how tokens are picked; None goes by the checkpoint's generation settings.
            selector: decides which blocks are read, in place of the method's own rule.

        Raises :class:`InputError` (a ``ValueError``) for an empty question, one longer than the
        method's budget, a wrong time, or a selector where the method retrieves nothing;
        ``DiskFull``, ``OutOfPages`` or ``LostBlock`` where there is no room, or where history
        cannot be read from its tier. The stream goes on.
        """
        self._check_open()
        limit = self._method.engine.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not hasattr(limit, "__index__") or limit < 1:
            raise InputError(f"ask: max_new_tokens={limit!r} must be an int of at least 1")
        if time_s is None:
            time_s = self.time_s
        if math.isnan(finite(time_s)):
            raise InputError(f"ask: time_s={time_s!r} must be finite seconds")
        if selector is not None and self._selector is None:
            raise InputError("ask: a selector needs a method that retrieves; set retrieve")
        ids = self._engine.question_ids(text)
        began = time.perf_counter()
        self._way.settle()
        self._turn.follow()  # whatever the selector and the sampler hold
        with self._turn:
            answer = Answer(
                self._llm,
                self._method,
                self.history,
                self.recorder,
                ids=ids,
                text=text,
                time_s=float(time_s),
                asking=self._asking(ids),
                max_new_tokens=limit,
                sampler=sampler or self._engine.runner.sampler(),
                selector=selector or self._selector,
                turn=self._turn,
                began=began,
            )
            self._answers.add(answer)
            self._engine.answers.add(answer)
            self._account()
        return answer

    def _asking(self, ids: list[int]) -> slice:
        """Which tokens of a prompt ask for blocks."""
        rule = self._method.retrieve
        if rule is None or rule.query == "prompt":
            return slice(0, len(ids))
        return self._engine.runner.prompt.question_slice(ids)

    # -- a session survives its process ----------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session into a file, from which ``StreamEngine.restore`` goes on: its next
        answers have the same bits. Open answers and the figures of single chunks are not in it.

        The file is written aside and renamed when it is safe on the disk: whatever happens, the
        path holds the session before or this one. One process saves to a path at a time.

        Raises :class:`InputError` where ``path`` names no file, :class:`PipelineError` where it
        cannot be written, ``LostBlock`` where history cannot be read from its tier (with
        ``engine.allow_missing`` it is forgotten instead), ``DiskFull`` or ``OutOfPages`` where a
        chunk still waits for room in the cache.
        """
        self._check_open()
        self._way.drain()
        self._turn.follow()  # frames that wait are the caller's work
        with self._turn, torch.no_grad():
            for lane in self._lanes:
                lane.join()
            save(self, path)

    # -- accounts --------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The figures so far, as ``report.json`` has them (see ``report.schema.json``)."""
        return self.recorder.report()

    def _account(self) -> dict[str, int]:
        cache = self._engine.cache
        summaries = cache.summary_bytes
        kv = {
            "pages": cache.used_pages,
            "bytes": cache.bytes + summaries,
            "summary_bytes": summaries,
            "peak_bytes": max(self.recorder.kv["peak_bytes"], cache.peak_bytes + summaries),
            "pool_bytes": cache.pool_bytes,
            "page_size": cache.page_size,
        }
        self.recorder.kv = kv | {
            "tiers": {
                name: {"bytes": used, "budget": budget}
                for name, (used, budget) in cache.tier_bytes().items()
            }
        }
        losses = self.history.cache.losses
        while losses:
            loss = losses.popleft()
            what = f"the history of {loss.start_s:g}-{loss.end_s:g} s went missing: {loss.why}"
            self.recorder.error("history", what, self.time_s)
        return kv

    def _check_open(self) -> None:
        if self.history.cache.closed:
            raise PipelineError("the stream was closed")
        if self._failed or self._way.over:
            raise PipelineError("the stream failed before; open a new one")

    def close(self) -> None:
        """Ends open answers and gives all pages back; frames of an unfinished chunk are dropped.
        The report stays readable.

        Raises what a stage raised and no call has raised yet, after all of that; where a ``with``
        block is left by another exception, that one goes on, with the stage's as its context.
        """
        self._end()
        surface([self._way.unheard()])

    def _end(self) -> None:
        self._way.close()
        with self._turn, self._cleanup:  # the pages go back whatever an answer raises
            for answer in list(self._answers):
                answer.close()
            self._buffer, self._times = [], []

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, _: object, leaving: BaseException | None, __: object) -> None:
        self._end()
        surface([self._way.unheard()], leaving)


def _follow(method: Method, runner: Qwen2_5_VLRunner, cache: CacheStream) -> Selector | None:
    """The selector of the method's rule; the cache keeps the summaries that it goes by."""
    rule = method.retrieve
    if rule is None:
        return None
    if rule.summary != "embedding":
        cache.keep_keys(
            kind="minmax" if rule.summary == "minmax" else "mean",
            unit=rule.unit,
            sub=rule.sub,
            source="raw" if rule.summary == "raw_mean_key" else "rotated",
        )
    return RuleSelector(rule, method.engine.page_size, runner.backend)
