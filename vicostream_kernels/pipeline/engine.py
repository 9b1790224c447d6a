"""The engine: one model, one method, one cache; any number of streams."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from vicostream_kernels import methods
from vicostream_kernels.cache import PagedKVCache, Tiers
from vicostream_kernels.models import Qwen2_5_VLRunner, load_model
from vicostream_kernels.pipeline.answer import Answer
from vicostream_kernels.pipeline.belt import Belt
from vicostream_kernels.pipeline.errors import InputError, finite, surface
from vicostream_kernels.pipeline.lanes import CudaLane, Lane
from vicostream_kernels.pipeline.report import Recorder
from vicostream_kernels.pipeline.session import Stream
from vicostream_kernels.pipeline.snapshot import Snapshot, fingerprint, settings_of
from vicostream_kernels.pipeline.stages import ChunkMask
from vicostream_kernels.pipeline.text import check_text
from vicostream_kernels.pipeline.turn import Turn

_FIRST_PAGES = 256
_CUDA_BUCKET = 64
#: What frames without times count as; most video has about this rate.
_DEFAULT_FPS = 30.0


class StreamEngine:
    """Runs streams of video through a model by a method.

    ::

        with StreamEngine.from_pretrained("tiny", preset="live") as engine:
            with engine.open() as stream:
                stream.ingest(frames)
                for piece in stream.ask("What happened?"):
                    print(piece, end="")

    Attributes: ``runner`` (the model), ``method`` (frozen), ``cache`` (the paged KV cache that all
    streams share), ``bucket`` (LLM lengths are multiples of it), ``turn`` (entered by whoever uses
    the cache), ``stages_turn`` (the way to it for stages), ``belts`` (of streams that overlap their
    stages), ``answers`` (those that somebody has).
    """

    def __init__(self, runner: Qwen2_5_VLRunner, method: methods.Method) -> None:
        check_supported(method)
        self.runner, self.method = runner, method
        self._fingerprint: str | None = None
        rule = method.engine
        self.bucket = rule.bucket or (_CUDA_BUCKET if runner.device.type == "cuda" else 1)
        tiers = _tiers(rule, runner.device)
        first = _FIRST_PAGES if rule.max_pages is None else min(_FIRST_PAGES, rule.max_pages)
        if tiers is not None:
            # As many as the budget allows; on the CPU memory is taken as it is first written.
            first = rule.max_pages or 2**31 // rule.page_size - 1
        overlaps = rule.overlap and runner.device.type == "cuda"
        self.turn = Turn(CudaLane(runner.device) if overlaps else Lane())
        # Stages wait for each other first: of all streams one at most stands before an answer.
        self.stages_turn = Turn(self.turn)
        with self.turn:  # pools that grow are freed where they were made
            self.cache = PagedKVCache(
                layers=runner.layers,
                pages=first,
                page_size=rule.page_size,
                kv_heads=runner.kv_heads,
                head_dim=runner.head_dim,
                dtype=runner.dtype,
                device=runner.device,
                grow=tiers is None,
                max_pages=rule.max_pages if tiers is None else None,
                on_full="evict_oldest",
                tiers=tiers,
            )
        self.belts: WeakSet[Belt] = WeakSet()
        self.answers: WeakSet[Answer] = WeakSet()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        *,
        preset: str = "live",
        overrides: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> StreamEngine:
        """Loads a model and sets it up for a preset.

        Args:
            model: a named model, a folder with a Hugging Face checkpoint, or a hub name.
            preset: one of ``methods.names()``.
            overrides: dotted keys as ``methods.get`` takes them: ``{"prune.threshold": 0.15}``.
            device: where the weights and the cache go, as ``"cuda"``.
            dtype: of weights and activations, as ``torch.bfloat16``; None is float32 on the CPU
                and the checkpoint's own elsewhere.
            backend: of our ops: "auto", "cuda", "triton", "cpu" or "reference".

        Raises ``ValueError`` with one line that says what would serve: an unknown preset or key, a
        checkpoint that cannot be used.
        """
        method = methods.get(preset, overrides)
        check_supported(method)
        return cls(load_model(model, device=device, dtype=dtype, backend=backend), method)

    def open(
        self,
        *,
        fps: float = _DEFAULT_FPS,
        system: str | None = None,
        recorder: Recorder | None = None,
        on_pruned: Callable[[ChunkMask], None] | None = None,
    ) -> Stream:
        """A new stream. ``fps`` is the rate of frames that come without times; ``system`` replaces
        the chat template's own system message; ``recorder`` collects the figures (default: a new
        one); ``on_pruned`` sees each chunk's frames and what pruning kept of them.

        Raises ``DiskFull`` or ``OutOfPages`` where there is no room for the system prompt; nothing
        of the stream is left then, and the call may be made again.
        """
        if not finite(fps) > 0:
            raise InputError(f"open: fps={fps!r} must be a positive number of frames per second")
        check_text("open: the system message", system or "")
        recorder = self._described(recorder)
        return Stream(self, recorder, fps=fps, system=system, on_pruned=on_pruned)

    def restore(
        self,
        path: str | os.PathLike[str],
        *,
        recorder: Recorder | None = None,
        on_pruned: Callable[[ChunkMask], None] | None = None,
    ) -> Stream:
        """The stream that ``Stream.save`` wrote, as it was; its frames go on at the same rate.

        The model and every setting that a result depends on must be the same; budgets and the
        lengths of answers may differ. Raises ``SnapshotError`` (an :class:`InputError`) with the
        reason where the file cannot be used, before anything is changed; ``DiskFull`` or
        ``OutOfPages`` as ``open`` does.
        """
        with Snapshot(path) as snapshot:
            snapshot.check(self)
            fps = 1.0 / snapshot.state["stream"]["period"]
            recorder = self._described(recorder)
            return Stream(
                self, recorder, fps=fps, system=None, on_pruned=on_pruned, snapshot=snapshot
            )

    def identity(self) -> dict[str, str]:
        """What tells this model from others; the weights are read once per engine."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.runner.model)
        return {
            "weights": self._fingerprint,
            "settings": settings_of(self.runner),
            "dtype": str(self.runner.dtype),
        }

    def question_ids(self, text: str) -> list[int]:
        """Token ids of a question with its template; raises :class:`InputError` when it is empty or
        longer than the method's budget."""
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"ask: the question is empty, got {text!r}")
        check_text("ask: the question", text)
        ids = self.runner.question_ids(text)
        budget = self.method.engine.max_question_tokens
        if len(ids) > budget:
            raise InputError(
                f"ask: the question has {len(ids)} tokens, allowed: {budget} "
                "(engine.max_question_tokens)"
            )
        return ids

    def config(self) -> dict[str, Any]:
        """The method as plain data, every key that ``--set`` knows with its value."""
        method = self.method
        return {
            section: None if value is None else dataclasses.asdict(value)
            for section in ("prune", "scorer", "reuse", "attention", "retrieve", "engine")
            for value in (getattr(method, section),)
        }

    def _described(self, recorder: Recorder | None) -> Recorder:
        if recorder is None:
            recorder = Recorder(
                model=str(self.runner.name), preset=self.method.name, device=self.runner.device
            )
        recorder.model["dtype"] = str(self.runner.dtype).removeprefix("torch.")
        recorder.config = self.config()
        return recorder

    def close(self) -> None:
        """Ends open answers, closes every stream and the cache; a second close does nothing. Raises
        as ``Stream.close`` does."""
        surface(self._end())

    def _end(self) -> list[BaseException | None]:
        belts = list(self.belts)
        for belt in belts:
            belt.close()
        with self.turn, ExitStack() as ending:  # the cache goes whatever an answer raises
            ending.callback(self.cache.close)
            for answer in list(self.answers):
                ending.callback(answer.close)
        return [belt.unheard() for belt in belts]

    def __enter__(self) -> StreamEngine:
        return self

    def __exit__(self, _: object, leaving: BaseException | None, __: object) -> None:
        surface(self._end(), leaving)


def _tiers(rule: methods.EngineRule, device: torch.device) -> Tiers | None:
    if rule.history_bytes is None:
        return None
    # On the CPU host memory is where the pages are.
    host = rule.host_bytes if device.type == "cuda" else 0
    if not host and rule.disk_bytes == 0:
        raise InputError("engine.disk_bytes=0 leaves nothing below memory: set engine.max_pages")
    return Tiers(
        rule.history_bytes,
        host_bytes=host,
        disk_bytes=rule.disk_bytes,
        folder=rule.spill_dir,
        allow_missing=rule.allow_missing,
    )


def _check_spill_folder(rule: methods.EngineRule) -> None:
    """The first file may come after hours: what is wrong with its folder is said before."""
    if rule.spill_dir is None or rule.history_bytes is None or rule.disk_bytes == 0:
        return
    folder = os.path.expanduser(rule.spill_dir)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"engine.spill_dir={folder}: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"engine.spill_dir={folder}: the folder cannot be written")


def check_supported(method: methods.Method) -> None:
    """Refuses what the ops can do and this engine does not: better than ignoring it."""
    _check_spill_folder(method.engine)
    rule, scorer = method.prune, method.scorer
    gives = frozenset() if scorer is None else scorer.gives
    if rule is not None and rule.external and "score" not in gives:
        raise InputError(
            "prune: nothing here computes an external score; set prune.external=0, or take a "
            "preset's with its scorer, as in prune=timechat-online-pixel"
        )
    if rule is not None and isinstance(rule.k, tuple) and "groups" not in gives:
        raise InputError("prune: this engine has no groups of tokens; give one number for prune.k")
