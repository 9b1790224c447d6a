"""Kernels that keep streaming video LLMs bounded: prune, attention, reuse, retrieve.

The ops are functions of this package and ``torch.ops.vicostream.*``; see ``docs/ops.md``.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (before _C, so that both share torch's OpenMP runtime)

from vicostream_kernels.backends import BackendUnavailable
from vicostream_kernels.ops import *  # noqa: F403
from vicostream_kernels.ops import __all__ as _ops

if TYPE_CHECKING:
    from vicostream_kernels.cache import PagedKVCache
    from vicostream_kernels.pipeline.engine import StreamEngine

try:
    __version__ = version("vicostream-kernels")
except PackageNotFoundError:
    __version__ = "0+unknown"

#: Names that pull in more than torch are imported when they are first asked for.
_LAZY = {
    "PagedKVCache": "vicostream_kernels.cache",
    "StreamEngine": "vicostream_kernels.pipeline.engine",
}

__all__ = ["BackendUnavailable", "PagedKVCache", "StreamEngine", "__version__", *_ops]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
