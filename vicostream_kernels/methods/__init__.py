"""Published methods as configurations of the ops.

``names()`` lists them, ``get(name, overrides)`` returns one as frozen values:
``get("vicostream", {"prune.threshold": 0.15}).prune`` is what ``prune_tokens`` takes. The pruning
rules alone are values in ``methods.prune_rules``; what computes the scores that some of them take
from outside stands in ``methods.pixel``, ``stc``, ``streamingtom``, ``spatial``,
``attention_scores``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vicostream_kernels.methods.overrides import InvalidValue, UnknownName, apply
from vicostream_kernels.methods.presets import PRESETS
from vicostream_kernels.methods.rules import (
    AttentionRule,
    EngineRule,
    Method,
    RetrieveRule,
    ReuseRule,
)
from vicostream_kernels.methods.scorer import External, ScoredChunk, Scorer

__all__ = [
    "AttentionRule",
    "EngineRule",
    "External",
    "InvalidValue",
    "Method",
    "RetrieveRule",
    "ReuseRule",
    "ScoredChunk",
    "Scorer",
    "UnknownName",
    "get",
    "names",
]


def names() -> list[str]:
    """The names of the presets."""
    return list(PRESETS)


def get(name: str, overrides: Mapping[str, Any] | None = None) -> Method:
    """The preset ``name`` with ``overrides`` applied (dotted keys, see ``overrides.apply``).

    Raises :class:`UnknownName` for a preset or key that does not exist, with the nearest that does,
    and :class:`InvalidValue` for a value its key does not take; both are ``ValueError``.
    """
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return apply(PRESETS[name], overrides or {}, PRESETS)
