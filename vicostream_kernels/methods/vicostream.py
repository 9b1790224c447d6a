"""ViCoStream's retrieval (arXiv 2606.19849): chunks by the cosine of mean input embeddings."""

from __future__ import annotations

from vicostream_kernels.methods.rules import RetrieveRule

#: 64 chunks (32 where the launcher is StreamingBench's); one choice for all layers and all tokens.
CHUNKS = RetrieveRule(summary="embedding", score="cosine", k=64)
