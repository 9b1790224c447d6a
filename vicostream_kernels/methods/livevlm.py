"""LiveVLM's retrieval (arXiv 2505.15269): pages by pooled attention, with rotation taken away."""

from __future__ import annotations

from vicostream_kernels.methods.rules import EngineRule, Method, RetrieveRule

#: Attention of every query token and head over the mean un-rotated keys of pages of 16, averaged;
#: the best 40 % of the pages, read at the positions that they had.
PAGES = RetrieveRule(
    summary="raw_mean_key",
    unit="page",
    layers="each",
    score="dot",
    pool="softmax",
    k=None,
    ratio=0.4,
)

#: Without the publication's bucketed eviction while video is encoded: all is kept and seen.
LIVEVLM = Method(
    name="livevlm",
    source="LiveVLM, arXiv 2505.15269 v2; the position-agnostic retrieval",
    retrieve=PAGES,
    engine=EngineRule(pixels=196 * 28 * 28, page_size=16),
)
