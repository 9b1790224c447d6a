"""Quest (arXiv 2406.10774): pages by an upper bound of their scores, per query head and token."""

from __future__ import annotations

from vicostream_kernels.methods.rules import EngineRule, Method, RetrieveRule

#: max(3, budget / 16) pages of 16 for every query head, anew for every decoded token; the prompt
#: and the first two layers read everything. The evaluation code does not force the last page, the
#: CUDA code does: ``--set retrieve.force_last=1``.
PAGES = RetrieveRule(
    summary="minmax",
    unit="page",
    layers="each",
    scope="query_head",
    score="bound",
    k=None,
    token_budget=1024,
    min_k=3,
    dense_layers=2,
    prefill="dense",
    reuse_steps=1,
)

QUEST = Method(
    name="quest",
    source="Quest, arXiv 2406.10774; the evaluation code, at its smallest usual budget",
    retrieve=PAGES,
    engine=EngineRule(pixels=90_000, page_size=16),
)
