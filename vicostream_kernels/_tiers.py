"""The budgets of the places where history lives, and what can go wrong there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vicostream_kernels._pages import check_int

_MIN_GROUP, _MAX_GROUP = 1 << 16, 1 << 25
#: Groups that may be on their way to files at a time; their memory is part of the budget.
IN_FLIGHT = 2


class TierError(RuntimeError):
    """History that left the pages cannot be kept or read. ``spans``: the blocks' times (s)."""

    def __init__(self, what: str, spans: Sequence[tuple[float, float]]) -> None:
        super().__init__(what)
        self.spans = tuple(spans)


class LostBlock(TierError):
    """A block's file is missing or altered."""


class DiskFull(TierError):
    """Blocks cannot be written to a file. They are still there: free space and go on."""


class NotResident(ValueError):
    """A block that has no pages now was asked for them; `CacheStream.fetch` it first."""


class Loss(NamedTuple):
    """A block that was given up because its file could not be written or read; times in s."""

    start_s: float
    end_s: float
    why: str


@dataclass(frozen=True)
class Tiers:
    """Budgets, in bytes, of the places where a `PagedKVCache` keeps its history.

    memory_bytes: pages of every kind, summaries, and what is on its way to files. On a GPU this is
        the GPU's memory.
    host_bytes: host memory between the pages and the files, pinned on a GPU machine; 0: none.
    disk_bytes: files; None: as much as there is; 0: none.
    folder: where a private folder for the files is made, and removed at the close; None: the
        system's folder for temporary files.
    allow_missing: blocks whose file cannot be written or read are given up and noted in
        ``CacheStream.losses``. Otherwise that raises.
    group_bytes: about the size of a file. None: a 64th of ``memory_bytes`` (at most a quarter of
        ``host_bytes``), from 64 KiB to 32 MiB.
    """

    memory_bytes: int
    host_bytes: int = 0
    disk_bytes: int | None = None
    folder: str | None = None
    allow_missing: bool = False
    group_bytes: int | None = None

    def __post_init__(self) -> None:
        check_int("Tiers", "memory_bytes", self.memory_bytes, 1)
        check_int("Tiers", "host_bytes", self.host_bytes, 0)
        for name in ("disk_bytes", "group_bytes"):
            if (value := getattr(self, name)) is not None:
                check_int("Tiers", name, value, 0 if name == "disk_bytes" else 1)
        if not self.host_bytes and self.disk_bytes == 0:
            raise ValueError("Tiers: host_bytes=0 with disk_bytes=0 leaves no tier below the pages")

    @property
    def group(self) -> int:
        """Bytes of a group, as far as blocks allow."""
        if self.group_bytes is not None:
            return self.group_bytes
        size = self.memory_bytes // 64
        if self.host_bytes:
            size = min(size, self.host_bytes // 4)
        return min(max(size, _MIN_GROUP), _MAX_GROUP)

    @property
    def reserve_bytes(self) -> int:
        """An eighth of the memory budget, where rows of summaries, and what is kept of each block,
        grow before they take from the pages."""
        return self.memory_bytes // 8

    @property
    def page_bytes(self) -> int:
        """What of the memory budget is left for pages and summaries."""
        return self.memory_bytes - (0 if self.host_bytes else IN_FLIGHT * self.group)
