"""What a method is made of: frozen values, one per op, and one for the engine around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vicostream_kernels.ops.prune import PruneRule


@dataclass(frozen=True)
class ReuseRule:
    """Which patches the ViT computes again; ``kwargs()`` are those of ``select_changed``."""

    ratio: float | None = 0.25
    threshold: float | None = None
    metric: Literal["cosine", "l1", "l2", "dot"] = "cosine"

    def kwargs(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "threshold": self.threshold, "metric": self.metric}


@dataclass(frozen=True)
class AttentionRule:
    """Limits in tokens; ``kwargs()`` are those of ``sink_window_attention``.

    ``sink_tokens`` first tokens of the stream stay visible for good; ``window`` is how many tokens
    a query sees besides, itself included (None: no limit in tokens). ``positions="cache"`` moves
    the sinks along with the window, so that they always stand right before it; ``"absolute"``
    leaves every token at the position it was written with.
    """

    sink_tokens: int = 0
    window: int | None = None
    positions: Literal["absolute", "cache"] = "absolute"

    def __post_init__(self) -> None:
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens={self.sink_tokens} must not be negative")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token, or none")
        if self.positions == "cache" and self.window is None:
            raise ValueError("positions='cache' moves sinks with a window: set a window")

    def kwargs(self) -> dict[str, Any]:
        return {"sink_tokens": self.sink_tokens, "window": self.window}


@dataclass(frozen=True)
class RetrieveRule:
    """Which chunks of the history a question reads; ``kwargs()`` are those of ``topk_blocks``.

    A chunk is represented by the mean of its kept input embeddings, the question by the mean
    of its prompt's token embeddings; one selection serves all layers and every decode step.
    """

    k: int = 64
    score: Literal["dot", "cosine"] = "cosine"
    force_first: int = 0
    force_last: int = 0

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1 chunk")
        for name in ("force_first", "force_last"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def kwargs(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "score": self.score,
            "force_first": self.force_first,
            "force_last": self.force_last,
        }


@dataclass(frozen=True)
class EngineRule:
    """How the stream is cut, what of it stays, and the budgets.

    pixels: each frame is resized to about this many pixels (least = most), within the checkpoint's
        own limits; None takes those limits.
    resizes: how often the resize rule is applied to the frames' size (they are resampled once).
    frames_per_chunk: raw frames of a chunk; two make a temporal step.
    seconds_per_step: what a step counts as in the temporal position ids. None measures it from the
        frame times of the chunk.
    window_chunks: how many chunks before it a chunk attends to; None is all of them.
    system_prompt: ``"always"`` visible to video, or only ``"with_first_chunk"``: as long as the
        window still covers chunk 0.
    history: ``"all"`` keeps every chunk for later questions, ``"window"`` frees what no later chunk
        can see.
    page_size: tokens in a page of the KV cache.
    max_pages: capacity of the KV cache; None lets it grow. When it is full the oldest chunk goes.
    bucket: the LLM step runs on lengths rounded up to a multiple of this (None: 64 on a GPU, exact
        lengths on the CPU).
    max_new_tokens, max_question_tokens: budgets of an answer and of a question.
    """

    pixels: int | None = None
    resizes: int = 1
    frames_per_chunk: int = 8
    seconds_per_step: float | None = None
    window_chunks: int | None = None
    system_prompt: Literal["always", "with_first_chunk"] = "always"
    history: Literal["all", "window"] = "all"
    page_size: int = 16
    max_pages: int | None = None
    bucket: int | None = None
    max_new_tokens: int = 128
    max_question_tokens: int = 1024

    def __post_init__(self) -> None:
        for name in ("pixels", "max_pages", "bucket"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, or none")
        for name in (
            "resizes",
            "frames_per_chunk",
            "page_size",
            "max_new_tokens",
            "max_question_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.window_chunks is not None and self.window_chunks < 0:
            raise ValueError(f"window_chunks={self.window_chunks} must not be negative, or none")
        if self.seconds_per_step is not None and not 0 <= self.seconds_per_step < float("inf"):
            raise ValueError(f"seconds_per_step={self.seconds_per_step} must be finite seconds")


@dataclass(frozen=True)
class Method:
    """A published method as a configuration of the ops; None where it does not use an op."""

    name: str
    source: str
    prune: PruneRule | None = None
    reuse: ReuseRule | None = None
    attention: AttentionRule = AttentionRule()
    retrieve: RetrieveRule | None = None
    engine: EngineRule = EngineRule()

    def __post_init__(self) -> None:
        keeps_window_only = self.engine.history == "window"
        bounded = self.engine.window_chunks is not None or self.attention.window is not None
        if keeps_window_only and not bounded:
            raise ValueError(
                "engine.history=window needs a window: set engine.window_chunks or attention.window"
            )
        if keeps_window_only and self.retrieve is not None:
            raise ValueError(
                "engine.history=window leaves nothing to retrieve: set retrieve=none or "
                "engine.history=all"
            )
        if self.attention.window is not None and self.engine.window_chunks is not None:
            raise ValueError(
                "attention.window counts tokens and engine.window_chunks counts chunks: "
                "set one of them to none"
            )
