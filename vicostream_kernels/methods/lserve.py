"""LServe (arXiv 2502.14866): bounds of sub-pages, one choice for several decoded tokens."""

from __future__ import annotations

from vicostream_kernels.methods.rules import EngineRule, Method, RetrieveRule

#: Pages of 64 in four parts of 16; a page counts as its best part. 4,096 tokens, at least three
#: pages, the last one always; a choice serves four decoded tokens. The prompt reads everything.
PAGES = RetrieveRule(
    summary="minmax",
    unit="page",
    sub=4,
    layers="each",
    scope="query_head",
    score="bound",
    k=None,
    token_budget=4096,
    min_k=3,
    force_last=1,
    prefill="dense",
    reuse_steps=4,
)

#: Of the publication's two kinds of heads all are the retrieving one; keys are not quantised.
LSERVE = Method(
    name="lserve",
    source="LServe, arXiv 2502.14866; the hierarchical page selection",
    retrieve=PAGES,
    engine=EngineRule(pixels=90_000, page_size=64),
)
