"""The public ops, one file a word."""

from vicostream_kernels.ops.append import KeySummary, rope_append
from vicostream_kernels.ops.attention import (
    merge_states,
    sink_window_attention,
    varlen_attention,
)
from vicostream_kernels.ops.preprocess import preprocess_frames, smart_resize

__all__ = [
    "KeySummary",
    "merge_states",
    "preprocess_frames",
    "rope_append",
    "sink_window_attention",
    "smart_resize",
    "varlen_attention",
]
