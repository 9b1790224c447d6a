"""The public ops, one file a word."""

from vicostream_kernels.ops.append import KeySummary, rope_append

__all__ = ["KeySummary", "rope_append"]
