"""The public ops, one file a word."""

from vicostream_kernels.ops.append import KeySummary, rope_append
from vicostream_kernels.ops.preprocess import preprocess_frames, smart_resize

__all__ = ["KeySummary", "preprocess_frames", "rope_append", "smart_resize"]
