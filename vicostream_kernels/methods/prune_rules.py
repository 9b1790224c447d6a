"""Published pruning rules as values: what ``prune_tokens`` takes.

Rules that weigh an ``external`` score need one: from the scorer that their section names, or from
whatever the caller computes. ``rule.causal`` says whether steps may be fed one by one with the
same result; names that end in ``_PER_CALL`` or ``_PER_CHUNK`` say where they may not, and so do
the docstrings of functions. Of a rule with a scorer it speaks of the rule alone: the scorer of
``STC_AS_RELEASED_PER_CHUNK`` looks at the whole chunk.
``docs/methods.md`` lists what differs from the publications.
"""

from __future__ import annotations

from dataclasses import replace

from vicostream_kernels.ops.prune import PruneRule

# -- ViCoStream, arXiv 2606.19849: chunk-intra ---------------------------------------------------

#: A location stays for the whole chunk where one adjacent pair of steps has a cosine below 0.25.
#: Not causal: a column is decided by all steps of its chunk. StreamingBench and the training.
CHUNK_INTRA_PER_CHUNK = PruneRule(
    reference="previous",
    metric="cosine",
    keep="below",
    threshold=0.25,
    reduce="any",
    always_keep="first",
)
#: The threshold that the released launchers pass for each benchmark.
CHUNK_INTRA_EPS = {
    "streamingbench": 0.25,
    "ovo-bench": 0.15,
    "etbench": 0.15,
    "streambench": 0.15,
    "vstream-movienet": 0.15,
    "vstream-ego4d": 0.5,
}


def chunk_intra(benchmark: str) -> PruneRule:
    """ViCoStream's rule with the threshold of a benchmark, one of ``CHUNK_INTRA_EPS``. Not
    causal: a column is decided by all steps of its chunk."""
    if benchmark not in CHUNK_INTRA_EPS:
        raise ValueError(f"chunk_intra: {benchmark!r} is not one of {', '.join(CHUNK_INTRA_EPS)}")
    return replace(CHUNK_INTRA_PER_CHUNK, threshold=CHUNK_INTRA_EPS[benchmark])


# -- TimeChat-Online, arXiv 2504.17343: differential token dropping ------------------------------

#: Feature mode: dropped where the cosine with the step before is above 0.5 (the README's setting).
DTD_FEATURE = PruneRule(
    reference="previous",
    metric="cosine",
    keep="at_most",
    threshold=0.5,
    always_keep="first_of_stream",
)
#: Pixel mode: dropped where the mean absolute difference of RGB in [0, 1] is below the threshold.
#: No value is published with it; 0.1 is ours. The score is ``methods.pixel.PixelDifference``.
DTD_PIXEL = PruneRule(
    reference=(), external=1.0, keep="at_least", threshold=0.1, always_keep="first_of_stream"
)


def dtd_relative(drop: float) -> PruneRule:
    """Feature mode, relative, as in TimeChat-Online: ``drop`` is the share of a step that goes, the
    ``int(N * drop)`` most similar tokens."""
    return PruneRule(drop_ratio=drop, always_keep="first_of_stream")


def dtd_relative_vicostream(keep: float) -> PruneRule:
    """The same in ViCoStream's copy (its ``feature`` method): ``keep`` is the share that stays, and
    the number dropped, ``int(N * (1 - keep))``, is rounded down to an even one. Not causal: the
    first step of every chunk stays whole, so a stream is to be fed chunk by chunk."""
    return PruneRule(drop_ratio=1 - keep, drop_multiple=2, always_keep="first")


def dtd_relative_pixel(drop: float) -> PruneRule:
    """Pixel mode, relative: the ``int(N * drop)`` tokens that differ least go."""
    return PruneRule(
        reference=(),
        external=1.0,
        keep="at_least",
        drop_ratio=drop,
        always_keep="first_of_stream",
    )


# -- STC-Pruner, arXiv 2512.00891 ----------------------------------------------------------------

#: Released score: multi-scale gaussians around the history's mean and the frame's, over the half of
#: the channels that vary least; the 64 smallest of a frame stay. Not causal: channels and history
#: count by chunk.
STC_GAUSSIAN_PER_CHUNK = PruneRule(
    reference=("running_mean", "frame_mean"),
    metric="gaussian",
    keep="below",
    k=64,
    channels=0.5,
    history="chunk",
)
#: The paper's score: ``a (1 - cos to history) + (1 - a) (1 - cos to frame)``, a = 0.5, largest.
STC_DUAL_ANCHOR_PER_CHUNK = PruneRule(
    reference=("running_mean", "frame_mean"),
    metric="cosine",
    weights=(0.5, 0.5),
    keep="below",
    k=64,
    channels=0.5,
    history="chunk",
)
#: With the score of ``methods.stc.AsReleased``: the history as the released code keeps it.
STC_AS_RELEASED_PER_CHUNK = PruneRule(reference=(), external=1.0, keep="below", k=64)

# -- Others --------------------------------------------------------------------------------------


def evs_per_call(prune: float) -> PruneRule:
    """EVS, arXiv 2510.14624: of all M tokens of a call the ``max(N, int(M * (1 - prune)))`` that
    changed most stay, the first step among them. Not causal: the whole call is ranked."""
    return PruneRule(ratio=1 - prune, scope="call", always_keep="first")


#: StreamingTOM's budget of 50 a step, arXiv 2510.18269; the split into static and dynamic tokens
#: and the saliency come from ``methods.streamingtom.StaticDynamic``.
STREAMINGTOM = PruneRule(reference=(), external=1.0, keep="above", k=50)
#: VideoLLM-MoD, arXiv 2408.16730: the 20 % of a frame that its layer's expert scores highest
#: (``methods.attention_scores.linear_score``). There the others skip a layer; here they are gone.
MIXTURE_OF_DEPTHS = PruneRule(reference=(), external=1.0, keep="above", ratio=0.2)


def most_attended(share: float) -> PruneRule:
    """miniReranker, arXiv 2606.10759: the share of a step that the embedder attends to most
    (``methods.attention_scores.attention_received``). The share is the caller's."""
    return PruneRule(reference=(), external=1.0, keep="above", ratio=share)


def quota_per_type(quotas: tuple[int, ...]) -> PruneRule:
    """UTPTrack, arXiv 2602.23734: of each token type (``group_ids``) the quota that the static
    template's centre attends to most."""
    return PruneRule(reference=(), external=1.0, keep="above", k=tuple(quotas))
