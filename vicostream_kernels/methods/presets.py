"""The presets, each exact to what its method published; deviations are said beside the value."""

from __future__ import annotations

from dataclasses import replace

from vicostream_kernels.methods.livevlm import LIVEVLM
from vicostream_kernels.methods.lserve import LSERVE
from vicostream_kernels.methods.prune_rules import CHUNK_INTRA_PER_CHUNK, STC_GAUSSIAN_PER_CHUNK
from vicostream_kernels.methods.pruning import PRUNING, vicostream_variants
from vicostream_kernels.methods.quest import QUEST
from vicostream_kernels.methods.rekv import REKV
from vicostream_kernels.methods.rules import (
    AttentionRule,
    EngineRule,
    Method,
    RetrieveRule,
    ReuseRule,
)
from vicostream_kernels.methods.streamingtom import STREAMINGTOM_METHOD
from vicostream_kernels.methods.vicostream import CHUNKS

#: Bounded attention over chunks, change-driven dropping, retrieval at the question.
VICOSTREAM = Method(
    name="vicostream",
    source="ViCoStream, arXiv 2606.19849; settings of the released launchers",
    prune=CHUNK_INTRA_PER_CHUNK,
    retrieve=CHUNKS,
    engine=EngineRule(
        pixels=90_000,
        # The released loader applies the rule and the processor does again: 16:9 becomes 252 x 420
        # (135 tokens a step), not 224 x 392.
        resizes=2,
        frames_per_chunk=8,
        # The released drivers never pass a frame rate: a step is always one second.
        seconds_per_step=1.0,
        window_chunks=4,
        system_prompt="with_first_chunk",
        history="all",
    ),
)

#: Every token sees everything before it: what the checkpoint itself does, chunk by chunk.
FULL_HISTORY = Method(
    name="full-history",
    source="Qwen2.5-VL, arXiv 2502.13923: plain causal attention over the whole video",
    engine=EngineRule(pixels=90_000, resizes=2),
)

#: Four sink tokens and a window of recent ones; nothing else is kept.
STREAMING_LLM = Method(
    name="streaming-llm",
    source="StreamingLLM, arXiv 2309.17453; window of the paper's longer setting",
    attention=AttentionRule(sink_tokens=4, window=2044, positions="cache"),
    engine=EngineRule(pixels=90_000, resizes=2, history="window"),
)

#: ViCoStream's pipeline with what it lacks: the newest chunk is always read, and the newest of what
#: stands out; few are enough then, and they stand without gaps before the question, so that no
#: position of a question grows with the stream. The system prompt stays visible to video. The sweep
#: that its numbers come from is in docs/accuracy.md.
LIVE = Method(
    name="live",
    source="ViCoStream's pipeline, arXiv 2606.19849; a question reads the newest chunk and the "
    "newest of those that stand out, at consecutive positions as in ReKV, arXiv 2503.00540",
    prune=VICOSTREAM.prune,
    retrieve=RetrieveRule(k=6, score="cosine", force_last=1, relevant=3.0, positions="consecutive"),
    engine=EngineRule(
        pixels=90_000,
        resizes=2,
        frames_per_chunk=8,
        seconds_per_step=1.0,
        window_chunks=4,
    ),
)

_CACHER = "STC-Cacher, arXiv 2512.00891; settings of the README"

#: STC as a whole: patches that did not change are reused, tokens that say nothing new are dropped.
STC = Method(
    name="stc",
    source=_CACHER + ", with STC-Pruner",
    reuse=ReuseRule(ratio=0.25, interval=4),
    prune=STC_GAUSSIAN_PER_CHUNK,
    # One frame a call as published; here that is one step, two frames.
    engine=EngineRule(frames_per_chunk=2),
)

#: ViCoStream over a ViT that reuses.
VICOSTREAM_STC = replace(
    VICOSTREAM,
    name="vicostream+stc",
    source=VICOSTREAM.source + "; " + _CACHER,
    reuse=STC.reuse,
)

PRESETS = {
    method.name: method
    for method in (
        VICOSTREAM,
        FULL_HISTORY,
        STREAMING_LLM,
        LIVE,
        STC,
        VICOSTREAM_STC,
        REKV,
        LIVEVLM,
        QUEST,
        LSERVE,
        STREAMINGTOM_METHOD,
        *vicostream_variants(VICOSTREAM),
        *PRUNING,
    )
}
