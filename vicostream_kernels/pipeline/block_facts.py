"""The facts of a stream's blocks as columns: one tensor a fact, however many blocks there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import torch

_KINDS = ("sink", "chunk", "text")
_PARTS = ("", "sink", "preamble")


class BlockFacts(NamedTuple):
    """What a session keeps of a block beside its keys and values.

    ``part`` is its name in the history, empty for a chunk; ``number`` counts the stream's chunks;
    ``first_id`` and ``after_id`` are the position ids that it took; ``rows`` are its rows of key
    summaries; ``summarised`` says whether it has a summary of its own.
    """

    kind: str
    part: str
    tokens: int
    lead: int
    trail: int
    start_s: float
    end_s: float
    pinned: bool
    number: int
    first_id: int
    after_id: int
    rows: int
    summarised: bool


_DTYPES = {
    "kind": torch.uint8, "part": torch.uint8, "tokens": torch.int32, "lead": torch.int32,
    "trail": torch.int32, "start_s": torch.float64, "end_s": torch.float64, "pinned": torch.bool,
    "number": torch.int64, "first_id": torch.int64, "after_id": torch.int64, "rows": torch.int32,
    "summarised": torch.bool,
}  # fmt: skip
_WORDS = {"kind": _KINDS, "part": _PARTS}
_COUNTS = ("tokens", "lead", "trail", "rows")


def to_columns(blocks: Sequence[BlockFacts]) -> dict[str, torch.Tensor]:
    """A tensor [blocks] for each fact, by its name."""
    found = {}
    for place, name in enumerate(BlockFacts._fields):
        values = map(itemgetter(place), blocks)
        if name in _WORDS:
            values = map(_WORDS[name].index, values)
        found[name] = torch.tensor(list(values), dtype=_DTYPES[name])
    return found


def from_columns(columns: Mapping[str, torch.Tensor]) -> Iterator[BlockFacts]:
    """What `to_columns` was given."""
    found = []
    for name in BlockFacts._fields:
        values = columns[name].tolist()
        found.append(map(_WORDS[name].__getitem__, values) if name in _WORDS else values)
    return map(BlockFacts._make, zip(*found))


def check_columns(columns: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for what `to_columns` never gives."""
    for name in BlockFacts._fields:
        column = columns.get(name)
        if column is None or column.dim() != 1 or column.dtype != _DTYPES[name]:
            raise ValueError(f"its blocks' {name} is missing or of another kind")
        if name in _COUNTS and bool((column < 0).any()):
            raise ValueError(f"its blocks' {name} is negative")
        if name in _WORDS and bool((column >= len(_WORDS[name])).any()):
            raise ValueError(f"its blocks' {name} is unknown")
    if len({len(columns[name]) for name in BlockFacts._fields}) > 1:
        raise ValueError("its blocks' facts differ in number")
