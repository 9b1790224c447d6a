"""The public ops, one file a word."""

from vicostream_kernels.ops.append import KeySummary, rope_append
from vicostream_kernels.ops.attention import (
    merge_states,
    sink_window_attention,
    varlen_attention,
)
from vicostream_kernels.ops.preprocess import preprocess_frames, smart_resize
from vicostream_kernels.ops.prune import PrunedTokens, PruneRule, PruneState, prune_tokens
from vicostream_kernels.ops.retrieve import (
    TopBlocks,
    select_pages,
    summarize_blocks,
    topk_blocks,
    topk_pages,
)
from vicostream_kernels.ops.reuse import Changed, gather_rows, merge_rows, select_changed

__all__ = [
    "Changed",
    "KeySummary",
    "PruneRule",
    "PruneState",
    "PrunedTokens",
    "TopBlocks",
    "gather_rows",
    "merge_rows",
    "merge_states",
    "preprocess_frames",
    "prune_tokens",
    "rope_append",
    "select_changed",
    "select_pages",
    "sink_window_attention",
    "smart_resize",
    "summarize_blocks",
    "topk_blocks",
    "topk_pages",
    "varlen_attention",
]
