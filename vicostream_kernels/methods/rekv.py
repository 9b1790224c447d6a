"""ReKV (arXiv 2503.00540): frames chosen by each layer's own un-rotated keys, read back to back."""

from __future__ import annotations

from vicostream_kernels.methods.rules import AttentionRule, EngineRule, Method, RetrieveRule

#: The mean of a frame's keys before rotation, all heads in one vector; plain dot product with the
#: mean query of the question (the paper's name for it, cosine, is not what the code computes).
FRAMES = RetrieveRule(
    summary="raw_mean_key",
    query="question",
    layers="each",
    score="dot",
    k=64,
    positions="consecutive",
)

#: A frame here is a temporal step, two raw frames: Qwen2.5-VL has no smaller unit. The window of
#: 15,000 tokens holds while video is encoded; the released code gives its sinks, the whole system
#: prompt, one fixed angle, where ours stand right before the window.
REKV = Method(
    name="rekv",
    source="ReKV, arXiv 2503.00540; settings of the released code",
    attention=AttentionRule(sink_tokens=4096, window=15_000, positions="cache"),
    retrieve=FRAMES,
    engine=EngineRule(pixels=196 * 28 * 28, frames_per_chunk=2),
)
