"""What a kernel asks of memory, counted: sectors of global memory, passes of shared memory.

    with counted() as traffic:
        program.launch(...)
    print(traffic.report())

Global memory comes in sectors of 32 bytes: a warp's access costs as many as its bytes lie in.
Shared memory has 32 banks of four bytes: an access costs as many passes as one bank has words to
give, a quarter of a warp at a time for 16 bytes a lane, half of one for 8. Both follow from the
addresses, as a profiler on a GPU counts them; how long it takes does not. Not counted: atomics,
local memory, and what `wgmma` reads.

Instructions a sector tell what bounds a kernel that should be bound by memory: at 4 TB/s an H200
brings each multiprocessor a sector in two cycles, so each of its four schedulers has seven or
eight instructions for one, if no warp ever waited.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ptx.values import Array

_SECTOR, _BANKS = 32, 32
#: The counter of the launches that run now.
current: Traffic | None = None


@dataclass
class Access:
    """All executions of one instruction: what it cost, and the least that its bytes cost."""

    warps: int = 0
    cost: int = 0
    least: int = 0

    @property
    def waste(self) -> int:
        return self.cost - self.least


@dataclass
class Kernel:
    blocks: int = 0
    #: Instructions that warps ran.
    instructions: int = 0
    #: The same by the lines of a stretch without branches.
    stretches: dict[tuple[str, ...], int] = field(default_factory=lambda: defaultdict(int))
    #: By (space, line).
    accesses: dict[tuple[str, str], Access] = field(default_factory=lambda: defaultdict(Access))

    def total(self, space: str) -> Access:
        made = Access()
        for (of, _), access in self.accesses.items():
            if of == space:
                made.warps += access.warps
                made.cost += access.cost
                made.least += access.least
        return made


class Traffic:
    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = defaultdict(Kernel)

    def note(self, kernel: str, space: str, line: str, addresses: Array, width: int,
             threads: Array) -> None:  # fmt: skip
        """One instruction of a block: each thread's address, and its bytes."""
        access = self.kernels[kernel].accesses[space, line]
        count = sectors if space in ("load", "store") else passes
        cost, least = count(addresses.astype(np.int64), width, threads)
        access.warps += len(np.unique(threads // 32))
        access.cost += cost
        access.least += least

    def note_stretch(self, kernel: str, lines: tuple[str, ...], warps: int, branch: bool) -> None:
        """A stretch of instructions that so many warps run, and perhaps a branch after it."""
        counted = self.kernels[kernel]
        counted.instructions += warps * (len(lines) + branch)
        counted.stretches[lines] += warps

    def report(self, worst: int = 4) -> str:
        lines = []
        for name, kernel in self.kernels.items():
            moved = kernel.total("load").cost + kernel.total("store").cost
            lines.append(
                f"{name}: {kernel.blocks} blocks, "
                f"{kernel.instructions / max(kernel.blocks, 1):,.0f} warp instructions each, "
                f"{kernel.instructions / max(moved, 1):.1f} a sector"
            )
            for space, unit in (("load", "sectors"), ("store", "sectors"), ("shared", "passes")):
                total = kernel.total(space)
                if total.warps:
                    lines.append(
                        f"  {space:6} {total.cost:>10,} {unit}, {total.least:,} needed "
                        f"({total.cost / max(total.least, 1):.2f})"
                    )
            ranked = sorted(kernel.accesses.items(), key=lambda item: -item[1].waste)
            for (space, line), access in ranked[:worst]:
                if access.waste > 0:
                    lines.append(f"    +{access.waste:,} {space} at `{line[:100]}`")
        return "\n".join(lines)


def sectors(addresses: Array, width: int, threads: Array) -> tuple[int, int]:
    """Sectors touched by each warp, and those that its distinct bytes would fill."""
    first = addresses // _SECTOR
    last = (addresses + width - 1) // _SECTOR
    owner = threads.astype(np.int64) // 32 << 48
    cost = len(np.unique(np.concatenate([first + owner, last + owner])))
    distinct = np.unique(addresses + owner)
    least = sum(
        -(-int(n) * width // _SECTOR) for n in np.unique(distinct >> 48, return_counts=True)[1]
    )
    return cost, least


def passes(addresses: Array, width: int, threads: Array) -> tuple[int, int]:
    """Passes over the banks: of a word that many lanes read there is one."""
    group = threads.astype(np.int64) // {16: 8, 8: 16}.get(width, 32)
    words = (addresses // 4)[:, None] + np.arange(max(width // 4, 1))
    pairs = np.unique(words.reshape(-1) + (np.repeat(group, words.shape[1]) << 32))
    bank = (pairs & 0xFFFFFFFF) % _BANKS
    counts = np.unique((pairs >> 32) * _BANKS + bank, return_counts=True)
    worst: dict[int, int] = {}
    needed: dict[int, int] = defaultdict(int)
    for key, n in zip((counts[0] // _BANKS).tolist(), counts[1].tolist(), strict=True):
        worst[key] = max(worst.get(key, 0), n)
        needed[key] += n
    return sum(worst.values()), sum(-(-n // _BANKS) for n in needed.values())


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts all launches within."""
    global current
    before, current = current, Traffic()
    try:
        yield current
    finally:
        current = before
