"""What a method is made of: frozen values, one per op, and one for the engine around them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from vicostream_kernels.methods.scorer import Scorer
from vicostream_kernels.ops.prune import PruneRule
from vicostream_kernels.ops.reuse import SIMILARITY_RANGE


@dataclass(frozen=True)
class ReuseRule:
    """Which patches the ViT computes again; ``kwargs()`` are those of ``select_changed``.

    Every ``interval``-th call of the encoder (a chunk each) computes all patches; its last step is
    the reference of the calls up to the next. In between, each layer compares the keys of every
    patch with the reference's and computes Q, V, attention output and MLP for the changed ones.

    ratio: this share of a step's patches, the least similar, changed (at least one where there is
        no threshold). 1 is the plain ViT, bit for bit where no step is skipped (a call with fewer
        steps is another product of matrices): with ``skip_tolerance=None`` always.
    threshold: patches less similar than this changed, besides the ratio's. Their number is not
        known to the host: see ``max_ratio``.
    metric: of the similarity.
    max_ratio: with a threshold, at most this share of a step's patches is computed (the least
        similar); None is all. On a GPU it fixes the shapes, and so the time.
    interval: calls from one full call to the next, counting those that skip every step (one that
        is due then is not made up for); None: only the first call is full.
    selection: "layer": each layer selects by its own keys; "shared": the first layer's selection
        serves all.
    max_age: a patch is reused in at most this many calls in a row (skipped ones aside), then it is
        computed again and becomes its own reference. A ``1 / (max_age + 1)`` share of the patches
        has its turn in each call, within the ratio's number where that is enough.
    skip_tolerance: a step whose frames differ from the reference's nowhere by more than this (of
        255) skips the ViT and gets the reference's tokens; None never skips. Frames that lie on
        a GPU are not compared.
    """

    ratio: float | None = 0.25
    threshold: float | None = None
    metric: Literal["cosine", "l1", "l2", "dot"] = "cosine"
    max_ratio: float | None = None
    interval: int | None = 4
    selection: Literal["layer", "shared"] = "layer"
    max_age: int | None = None
    skip_tolerance: int | None = 0

    def __post_init__(self) -> None:
        if self.ratio is None and self.threshold is None:
            raise ValueError("ratio=none and threshold=none select nothing: set one of them")
        for name in ("ratio", "max_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value} is outside [0, 1]")
        if self.max_ratio is not None and self.threshold is None:
            raise ValueError(f"max_ratio={self.max_ratio} limits a threshold: set a threshold")
        if self.max_ratio is not None and self.max_ratio < (self.ratio or 0):
            raise ValueError(f"max_ratio={self.max_ratio} is below ratio={self.ratio}")
        if self.metric not in SIMILARITY_RANGE:
            raise ValueError(f"metric={self.metric!r}: one of {', '.join(SIMILARITY_RANGE)}")
        if self.threshold is not None:
            low, high = SIMILARITY_RANGE[self.metric]
            low, high = -math.inf if low is None else low, math.inf if high is None else high
            if not low <= self.threshold <= high:
                raise ValueError(
                    f"threshold={self.threshold} is outside [{low}, {high}] of {self.metric}"
                )
        if self.selection not in ("layer", "shared"):
            raise ValueError(f"selection={self.selection!r}: 'layer' or 'shared'")
        for name, lowest in (("interval", 1), ("max_age", 1), ("skip_tolerance", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name}={value} must be at least {lowest}, or none")

    def kwargs(self) -> dict[str, Any]:
        return {"ratio": self.ratio, "threshold": self.threshold, "metric": self.metric}


@dataclass(frozen=True)
class AttentionRule:
    """Limits in tokens; ``kwargs()`` are those of ``sink_window_attention``.

    ``sink_tokens`` first tokens of the stream stay visible for good; ``window`` is how many tokens
    a query sees besides, itself included (None: no limit in tokens). ``positions="cache"`` moves
    the sinks along with the window, right before the oldest block that it touches; ``"absolute"``
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
    """Which blocks of the history a question reads; ``kwargs()`` are those of ``topk_blocks``.

    summary: what stands for a block. ``"embedding"``: the mean of its kept input embeddings, asked
        by the mean embedding of the prompt, once for all layers. Of its keys, asked by the queries
        of the layer: ``"mean_key"`` as cached, ``"raw_mean_key"`` before rotation (queries too), or
        ``"minmax"``, their bounds as cached.
    unit: a block is a ``"chunk"``, or a ``"page"`` of one (``engine.page_size`` tokens; no page
        holds tokens of two chunks).
    sub: parts of a page with bounds of their own.
    query: which tokens ask while the prompt is read: the whole ``"prompt"``, or the ``"question"``
        without the template around it. Later it is the token that is being decoded.
    layers: ``"each"`` chooses for itself, or one choice is ``"shared"``: the first layer that is
        not dense makes it where keys are summarised.
    scope: who chooses together in a layer: all heads, those of a KV head, each query head alone.
    score, pool, k, ratio, mass, token_budget, min_k, group, force_first, force_last: as
        ``topk_blocks`` has them; exactly one of k, ratio, mass, token_budget.
    relevant: a block is relevant whose score lies this many median absolute deviations above the
        median, and at least a tenth as far above it as the best: one that stands out. What a scene
        scores that stands still counts once. Of relevant blocks the newest are read, then the
        others by score, so that "last" means last, however much better an older one matches. None:
        by score alone. Not with ``mass`` or ``group``.
    dense_layers: so many first layers read everything.
    prefill: the prompt reads the ``"selected"`` blocks, or everything (``"dense"``).
    reuse_steps: a choice serves so many tokens, then it is made anew; None: the whole answer.
    positions: ``"absolute"`` as written, or ``"consecutive"``: what is read stands without gaps
        right before the question, chunk by chunk, the system prompt in front.
    """

    summary: Literal["embedding", "mean_key", "raw_mean_key", "minmax"] = "embedding"
    unit: Literal["chunk", "page"] = "chunk"
    sub: int = 1
    query: Literal["prompt", "question"] = "prompt"
    layers: Literal["shared", "each"] = "shared"
    scope: Literal["stream", "kv_head", "query_head"] = "stream"
    score: Literal["dot", "cosine", "bound"] = "cosine"
    pool: Literal["mean", "max", "softmax"] = "mean"
    k: int | None = 64
    ratio: float | None = None
    mass: float | None = None
    token_budget: int | None = None
    min_k: int = 1
    group: int = 1
    force_first: int = 0
    force_last: int = 0
    relevant: float | None = None
    dense_layers: int = 0
    prefill: Literal["selected", "dense"] = "selected"
    reuse_steps: int | None = None
    positions: Literal["absolute", "consecutive"] = "absolute"

    def __post_init__(self) -> None:
        self._check_numbers()
        if (self.summary == "minmax") != (self.score == "bound"):
            raise ValueError(f"summary={self.summary!r} does not go with score={self.score!r}")
        if self.sub > 1 and self.summary != "minmax":
            raise ValueError(f"sub={self.sub} needs summary='minmax', got {self.summary!r}")
        if self.summary == "embedding":
            for name, only in _EMBEDDING_ONLY.items():
                if getattr(self, name) != only:
                    raise ValueError(
                        f"{name}={getattr(self, name)} needs a summary of keys: with "
                        f"summary='embedding' only {name}={only} is possible"
                    )

    def _check_numbers(self) -> None:
        given = {name: getattr(self, name) for name in _AMOUNTS if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(_AMOUNTS)} and none for the others, "
                f"got {', '.join(f'{n}={v}' for n, v in given.items()) or 'none'}"
            )
        for name in ("k", "token_budget", "sub", "group", "reuse_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("ratio", "mass"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value} must be above 0 and at most 1")
        for name in ("min_k", "force_first", "force_last", "dense_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.relevant is not None and not 0 <= self.relevant < math.inf:
            raise ValueError(f"relevant={self.relevant} must be a number from 0 up, or none")
        if self.relevant is not None and self.mass is not None:
            raise ValueError("relevant and mass exclude each other: mass is a sum of plain scores")
        if self.relevant is not None and self.group > 1:
            raise ValueError(f"relevant is of single blocks: set group=1, got {self.group}")
        if self.k is not None and self.k % self.group:
            raise ValueError(f"k={self.k} must be a multiple of group={self.group}")

    def kwargs(self) -> dict[str, Any]:
        names = (*_AMOUNTS, "min_k", "score", "pool", "scope", "group", "force_first", "force_last")
        return {name: getattr(self, name) for name in names}


_AMOUNTS = ("k", "ratio", "mass", "token_budget")
#: One vector a chunk, known before the first layer: there is nothing to choose anew or per head.
_EMBEDDING_ONLY = {
    "unit": "chunk",
    "query": "prompt",
    "layers": "shared",
    "scope": "stream",
    "pool": "mean",
    "dense_layers": 0,
    "prefill": "selected",
    "reuse_steps": None,
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
    system_prompt: ``"always"`` visible to video, or only ``"with_first_chunk"``: to the first
        ``window_chunks`` chunks, since it counts as one of those before them.
    history: ``"all"`` keeps every chunk for later questions, ``"window"`` frees what no later chunk
        can see.
    page_size: tokens in a page of the KV cache.
    max_pages: capacity of the KV cache; None lets it grow. When it is full the oldest chunk goes.
    history_bytes: budget of the KV cache in memory (of the GPU, where the model is there): pages,
        summaries, and what is on its way to files. Beyond it the chunks that were not retrieved for
        longest go to the next tier, and come back when a question reads them. None: no tiers.
    host_bytes: host memory between a GPU's and the files; 0: none. Not used on the CPU.
    disk_bytes: files; None: as much as there is; 0: none. Beyond the last budget the oldest chunks
        are forgotten.
    spill_dir: where a private folder for the files is made, and removed at the end; None: the
        system's folder for temporary files.
    allow_missing: chunks whose file cannot be written or read are forgotten, and reported;
        otherwise that is an error.
    bucket: the LLM step runs on lengths rounded up to a multiple of this (None: 64 on a GPU, exact
        lengths on the CPU).
    max_new_tokens, max_question_tokens: budgets of an answer and of a question.
    overlap: stages work at the same time, on chunks one after another: a thread each, on a GPU a
        CUDA stream each. The results have the same bits.
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
    history_bytes: int | None = None
    host_bytes: int = 0
    disk_bytes: int | None = None
    spill_dir: str | None = None
    allow_missing: bool = False
    bucket: int | None = None
    max_new_tokens: int = 128
    max_question_tokens: int = 1024
    overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("pixels", "max_pages", "history_bytes", "bucket"):
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
        for name in ("host_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value and value < 0:
                raise ValueError(f"{name}={value} must not be negative")
            if value and self.history_bytes is None:
                raise ValueError(
                    f"{name}={value} needs a budget for memory: set engine.history_bytes"
                )
        if self.seconds_per_step is not None and not 0 <= self.seconds_per_step < float("inf"):
            raise ValueError(f"seconds_per_step={self.seconds_per_step} must be finite seconds")


@dataclass(frozen=True)
class Method:
    """A published method as a configuration of the ops; None where it does not use an op.

    ``scorer`` computes what ``prune`` takes from outside: a score, groups, or a mask.
    """

    name: str
    source: str
    prune: PruneRule | None = None
    scorer: Scorer | None = None
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
        if self.retrieve is not None and self.retrieve.sub > self.engine.page_size:
            raise ValueError(
                f"retrieve.sub={self.retrieve.sub} parts do not fit in a page of "
                f"engine.page_size={self.engine.page_size} tokens"
            )
        if self.engine.history_bytes is not None:
            if not bounded:
                raise ValueError(
                    "engine.history_bytes: every chunk reads all chunks before it, so none can "
                    "leave memory: set engine.window_chunks or attention.window"
                )
            rule = self.retrieve
            if rule is not None and (rule.dense_layers or rule.prefill == "dense"):
                raise ValueError(
                    "engine.history_bytes: with retrieve.dense_layers or retrieve.prefill=dense a "
                    "question reads every chunk, so the whole history has to fit in memory"
                )
        self._check_scorer()

    def _check_scorer(self) -> None:
        if self.scorer is None:
            return
        if self.prune is None:
            raise ValueError("scorer: there is no prune step that would take its score")
        gives, name = self.scorer.gives, self.scorer.name
        if ("score" in gives) != bool(self.prune.external):
            verb = "gives a score" if "score" in gives else "gives no score"
            raise ValueError(f"scorer {name!r} {verb}, but prune.external={self.prune.external}")
        skips = self.reuse is not None and self.reuse.skip_tolerance is not None
        if "features" in self.scorer.needs and skips:
            raise ValueError(
                f"scorer {name!r} reads the ViT's features of every step, and a step that did not "
                "change skips the ViT: set reuse.skip_tolerance=none"
            )
        if "groups" in gives and self.prune.k is None:
            raise ValueError(f"scorer {name!r} gives quotas in place of prune.k: set prune.k")
