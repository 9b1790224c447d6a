"""The stages a chunk passes: preprocess, encode, prune, prefill. Values in, values out.

Each stage is an object with ``run(input) -> output``. Inputs and outputs are frozen, and a stage
shares nothing with another: what must outlive a chunk (the pruning state, the history in the cache)
belongs to the one stage that uses it, which sees the chunks in their order. So the same objects
run one after another, or each in a thread of its own (``belt``) and on a CUDA stream of its own
(``lanes``).

The only thing that travels from the device to the host is the number of kept tokens, four bytes,
started by ``Prune`` and read by ``Prefill``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vicostream_kernels.cache import Block
from vicostream_kernels.methods import External, Method, ScoredChunk
from vicostream_kernels.models import Qwen2_5_VLRunner
from vicostream_kernels.ops.preprocess import preprocess_frames, smart_resize
from vicostream_kernels.ops.prune import PrunedTokens, PruneState, prune_tokens
from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.lanes import Lane
from vicostream_kernels.pipeline.llm import LLMSteps
from vicostream_kernels.pipeline.visibility import History, View, chunk_window, window_view


@dataclass(frozen=True)
class ChunkFrames:
    """``images`` uint8 ``[F, H, W, 3]`` on any device; the times of its first and last frame."""

    images: torch.Tensor
    start_s: float
    end_s: float
    seconds_per_step: float

    @property
    def frames(self) -> int:
        return self.images.shape[0]


@dataclass(frozen=True)
class ChunkPatches:
    """``patches`` ``[T*h*w, 3*2*14*14]`` in the model's dtype, ``grid`` = (T, h, w) in patches."""

    source: ChunkFrames
    patches: torch.Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class ChunkTokens:
    """``tokens`` ``[T, N, D]``: the projected visual tokens, in raster order; ``patches`` as they
    were before, and ``features`` that the ViT's merger read, where a scorer looks at them."""

    source: ChunkFrames
    grid: tuple[int, int, int]
    tokens: torch.Tensor
    patches: torch.Tensor | None = None
    features: torch.Tensor | None = None


class HostCopy:
    """A tensor on its way to the host; ``get`` waits for it and for nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: Any = None
        self._value = tensor
        if not tensor.is_cuda:
            return
        self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._value.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._value


class HostCount:
    """A count, perhaps on its way to the host; ``get`` waits for it and for nothing else."""

    def __init__(self, count: torch.Tensor | int) -> None:
        self._value = count if isinstance(count, int) else HostCopy(count.reshape(()))

    def get(self) -> int:
        return self._value if isinstance(self._value, int) else int(self._value.get())


@dataclass(frozen=True)
class ChunkKept:
    """What enters the LLM: the first ``count`` of ``tokens`` ``[C, D]``, with ``positions``
    ``[3, C]`` int32 relative to the chunk's first video id. ``span`` ids are taken whatever was
    kept; ``seen`` is T * N."""

    source: ChunkFrames
    tokens: torch.Tensor
    positions: torch.Tensor
    count: HostCount
    seen: int
    span: int


@dataclass(frozen=True)
class ChunkMask:
    """What was kept of a chunk, for whoever looks on: ``grid`` = (T, rows, columns) in tokens."""

    source: ChunkFrames
    grid: tuple[int, int, int]
    frames_per_step: int
    mask: HostCopy | None  # None: everything

    def kept(self) -> np.ndarray:
        """bool ``[T, rows, columns]`` on the host."""
        if self.mask is None:
            return np.ones(self.grid, dtype=bool)
        return self.mask.get().view(self.grid).numpy()


@dataclass(frozen=True)
class ChunkDone:
    """A chunk in the cache."""

    source: ChunkFrames
    block: Block
    seen: int
    kept: int


class Preprocess:
    """uint8 frames -> normalised patches, at the method's size within the checkpoint's limits."""

    def __init__(self, runner: Qwen2_5_VLRunner, method: Method) -> None:
        self._runner = runner
        self._resizes = method.engine.resizes
        pixels = method.engine.pixels
        self.min_pixels, self.max_pixels = runner.min_pixels, runner.max_pixels
        if pixels is not None:
            pixels = min(max(pixels, runner.min_pixels), runner.max_pixels)
            self.min_pixels = self.max_pixels = pixels

    def check_size(self, height: int, width: int) -> None:
        """Raises :class:`InputError` for frames that the model's resizing refuses."""
        factor = self._runner.patch_size * self._runner.merge_size
        try:
            smart_resize(height, width, factor, self.min_pixels, self.max_pixels)
        except ValueError as error:
            raise InputError(f"frames of {width} x {height} pixels: {error}") from error

    def run(self, chunk: ChunkFrames) -> ChunkPatches:
        runner, images = self._runner, chunk.images
        if runner.device.type == "cuda" and not images.is_cuda:
            images = images.pin_memory()  # from pageable memory the host would wait for the copy
        patches, grid = preprocess_frames(
            images.to(runner.device, non_blocking=True),
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            mean=runner.image_mean,
            std=runner.image_std,
            patch=runner.patch_size,
            merge=runner.merge_size,
            temporal=runner.temporal_patch_size,
            resizes=self._resizes,
            dtype=runner.dtype,
            backend=runner.backend,
        )
        return ChunkPatches(chunk, patches, grid)


class Encode:
    """Patches -> projected visual tokens: every chunk on its own, or, where the method reuses,
    with what ``state`` keeps of this stream's chunks before."""

    def __init__(self, runner: Qwen2_5_VLRunner, method: Method) -> None:
        self._runner = runner
        self.state = None if method.reuse is None else runner.encoder_state(method.reuse)
        self._needs = frozenset() if method.scorer is None else method.scorer.needs
        self._at_work = threading.Lock()

    def figures(self, lane: Lane) -> dict[str, Any]:
        """What was reused of the chunks so far, none of them half; any thread may ask. ``lane`` is
        the one that this stage runs on."""
        with self._at_work:
            lane.join()
            return self.state.figures()

    def run(self, chunk: ChunkPatches) -> ChunkTokens:
        with self._at_work:
            return self._encoded(chunk)

    def _encoded(self, chunk: ChunkPatches) -> ChunkTokens:
        # Frames on a GPU are not compared: the host would wait for each chunk.
        images = chunk.source.images
        frames = images if self.state is not None and images.device.type == "cpu" else None
        seen: list[torch.Tensor] = []
        tokens = self._runner.encode(
            chunk.patches,
            chunk.grid,
            state=self.state,
            frames=frames,
            watch=seen.append if "features" in self._needs else None,
        )
        patches = chunk.patches if "patches" in self._needs else None
        return ChunkTokens(chunk.source, chunk.grid, tokens, patches, *seen)


class Prune:
    """Visual tokens -> those that are kept, in order, with the position ids that they had.

    ``watch`` is called with a :class:`ChunkMask` after each chunk.
    """

    def __init__(
        self,
        runner: Qwen2_5_VLRunner,
        method: Method,
        watch: Callable[[ChunkMask], None] | None = None,
    ) -> None:
        self._runner, self._watch = runner, watch
        self._rule, self._scorer = method.prune, method.scorer
        self._grid: tuple[int, int] | None = None
        self._state: PruneState | None = None
        self._scorer_state: dict[str, Any] = {}

    def run(self, chunk: ChunkTokens) -> ChunkKept:
        runner, source = self._runner, chunk.source
        t, h, w = chunk.grid
        positions = runner.video_positions(t, h, w, 0, source.seconds_per_step)
        span = runner.video_span(t, h, w, source.seconds_per_step)
        grid = (t, h // runner.merge_size, w // runner.merge_size)
        steps, locations, width = chunk.tokens.shape
        seen = steps * locations
        if self._rule is None:
            self._show(source, grid, None)
            tokens = chunk.tokens.view(seen, width)
            return ChunkKept(source, tokens, positions.view(3, seen), HostCount(seen), seen, span)
        self._match(grid[1:], chunk.tokens)
        given = self._score(chunk, grid)
        pruned: PrunedTokens = prune_tokens(
            chunk.tokens if given.tokens is None else given.tokens,
            positions,
            self._rule,
            state=self._state,
            external_score=given.score,
            external_mask=given.mask,
            group_ids=given.group_ids,
            group_k=given.group_k,
            backend=runner.backend,
        )
        self._show(source, grid, pruned.mask)
        count = HostCount(pruned.count)
        return ChunkKept(source, pruned.tokens, pruned.positions, count, seen, span)

    def _match(self, grid: tuple[int, int], tokens: torch.Tensor) -> None:
        """Frames of another size have other places: what was carried starts anew."""
        if grid == self._grid:
            return
        self._grid, self._scorer_state = grid, {}
        rule, (_, locations, width) = self._rule, tokens.shape
        if rule.needs or rule.always_keep == "first_of_stream":
            self._state = PruneState.empty(
                rule, locations, width, dtype=tokens.dtype, device=tokens.device
            )

    def _score(self, chunk: ChunkTokens, grid: tuple[int, int, int]) -> External:
        if self._scorer is None:
            return External()
        runner = self._runner
        seen = ScoredChunk(
            chunk.tokens,
            grid,
            chunk.patches,
            tuple(runner.image_mean),
            tuple(runner.image_std),
            runner.temporal_patch_size,
            chunk.features,
        )
        return self._scorer(seen, self._scorer_state)

    def _show(
        self, source: ChunkFrames, grid: tuple[int, int, int], mask: torch.Tensor | None
    ) -> None:
        if self._watch is None:
            return
        copy = None if mask is None else HostCopy(mask)
        self._watch(ChunkMask(source, grid, self._runner.temporal_patch_size, copy))


class Prefill:
    """Kept tokens -> keys and values in the cache, under the method's window.

    Takes the chunks of one stream in their order and adds them to ``history``.
    """

    def __init__(self, llm: LLMSteps, method: Method, history: History, bucket: int) -> None:
        self._llm, self._method, self._history, self._bucket = llm, method, history, bucket
        runner = llm.runner
        markers = runner.embed(llm.ids([runner.vision_start_id, runner.vision_end_id]))
        self._start, self._end = markers.split(1)
        self._bounded = (
            method.engine.window_chunks is not None or method.attention.window is not None
        )

    def begin(self, system_ids: list[int]) -> None:
        """Writes the system prompt; what of it stays visible for good has pages of its own."""
        attention, history = self._method.attention, self._history
        leaves = attention.window is not None or (
            self._method.engine.system_prompt == "with_first_chunk"
        )
        sinks = min(attention.sink_tokens, len(system_ids)) if leaves else len(system_ids)
        if sinks:
            history.sink = self._write_text(system_ids[:sinks], "sink")
        if system_ids[sinks:]:
            history.preamble = self._write_text(system_ids[sinks:], "text")

    def run(self, chunk: ChunkKept) -> ChunkDone:
        history, source = self._history, chunk.source
        capacity = chunk.tokens.shape[0]
        kept = min(chunk.count.get(), capacity)
        new_tokens = kept + 2
        bucket = min(-(-kept // self._bucket) * self._bucket, capacity)
        if self._method.engine.history == "window":
            visible = chunk_window(self._method, history, new_tokens).blocks
            # First the room: while a chunk waits for it, questions see what they saw before.
            spare = history.spare_pages(visible)
            history.cache.make_room(bucket, markers=(1, 1), spare=spare)
            history.retire(visible)
        with self._llm.reserved(
            bucket,
            markers=(1, 1),
            start_s=source.start_s,
            end_s=source.end_s,
            pinned=self._bounded,
        ) as block:
            # The reservation may have evicted old chunks: the view is made after it.
            window = chunk_window(self._method, history, new_tokens)
            first = history.next_id
            view = window_view(self._method, history, window, first)
            embeds, positions = self._assemble(chunk, kept, bucket, first)
            self._llm.write(block, kept, embeds, positions, view, "none")
            rule = self._method.retrieve
            if rule is not None and rule.summary == "embedding":
                history.cache.set_summary(block, chunk.tokens[:kept].float().mean(0))
        history.add(block, first, first + chunk.span + 2)
        history.chunks_seen += 1
        self._unpin()
        return ChunkDone(source, block, chunk.seen, kept)

    def _write_text(self, ids: list[int], kind: str) -> Block:
        history, first = self._history, self._history.next_id
        before = () if history.sink is None else (history.sink,)
        with self._llm.reserved(len(ids), kind=kind, pinned=True) as block:
            runner = self._llm.runner
            embeds = runner.embed(self._llm.ids(ids))
            positions = runner.text_positions(len(ids), first)
            sinks = sum(block.tokens for block in before)
            view = View(history.cache.page_table(before), before, (), sink_tokens=sinks)
            self._llm.write(block, len(ids), embeds, positions, view, "none")
        history.add(block, first, first + len(ids))
        return block

    def _assemble(
        self, chunk: ChunkKept, kept: int, bucket: int, first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the LLM step: vision_start, kept tokens, vision_end, padding (never read)."""
        padding = chunk.tokens[kept:bucket]
        embeds = torch.cat((self._start, chunk.tokens[:kept], self._end, padding))
        positions = chunk.positions.new_full((3, bucket + 2), first + 1 + chunk.span)
        positions[:, 0] = first
        positions[:, 1 : kept + 1] = chunk.positions[:, :kept] + (first + 1)
        return embeds, positions

    def _unpin(self) -> None:
        """A full cache may take the oldest chunk, but none that the window still needs."""
        if not self._bounded or self._method.engine.history == "window":
            return
        chunks = self._history.cache.chunks
        # The smallest chunk that may come: its two markers.
        needed = sum(b.kind == "chunk" for b in chunk_window(self._method, self._history, 2).blocks)
        for at in range(len(chunks) - needed - 1, -1, -1):
            if not chunks[at].pinned:
                break
            chunks[at].pinned = False
