"""The state of one block: its registers, its memories, and what is still on its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ptx import traffic
from ptx.memory import Fault, GlobalMemory, SharedMemory
from ptx.text import Kernel
from ptx.values import Array, all_threads, poison

WARP = 32
#: Parameter ``n`` has the address ``PARAMETERS + n * PARAMETER``, and that many bytes at most.
PARAMETERS, PARAMETER = 1 << 28, 1 << 16


class Block:
    def __init__(
        self,
        kernel: Kernel,
        threads: int,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        symbols: Mapping[str, int],
        parameters: Sequence[bytes],
        memory: GlobalMemory,
        shared: int,
        local: int,
    ) -> None:
        self.name = kernel.name
        self.threads, self.place, self.grid = threads, place, grid
        self.symbols, self.parameters, self.memory = symbols, parameters, memory
        self.shared = SharedMemory(shared)
        self.registers = list(map(poison, kernel.registers))
        self.warps = np.arange(threads) // WARP
        self.ended = np.zeros(threads, bool)
        self.carry: Array = np.zeros(1, np.uint64)
        self.local = np.full((threads, local), 0xFF, np.uint8)
        self.copies, self.products = Pending("cp.async"), Pending("wgmma")
        self.special = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%laneid": np.arange(threads, dtype=np.uint32) % WARP,
            "%warpid": np.arange(threads, dtype=np.uint32) // WARP,
        } | {
            name: np.array([value], np.uint32)
            for name, value in {
                "%tid.y": 0, "%tid.z": 0, "%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1,
                "%ctaid.x": place[0], "%ctaid.y": place[1], "%ctaid.z": place[2],
                "%nctaid.x": grid[0], "%nctaid.y": grid[1], "%nctaid.z": grid[2],
            }.items()
        }  # fmt: skip

    def full(self, value: Array) -> Array:
        return all_threads(value, self.threads)

    def write(self, index: int, value: Array, mask: Array | None) -> None:
        if mask is not None:
            value = np.where(mask, value, self.registers[index])
        self.registers[index] = value

    def missing(self, mask: Array, members: Array) -> Array:
        """The lanes [warps, 32] that are not there although one is whose members they are.

        Those that have ended hold nobody up; what they would have given is another matter.
        """
        lanes = mask.reshape(-1, WARP)
        alive = ~self.ended.reshape(-1, WARP)
        return lanes.any(1, keepdims=True) & members & ~lanes & alive

    def whole_warps(self, mask: Array | None, members: Array | None = None) -> None:
        """Fails where a warp acts as one but some of its lanes are elsewhere."""
        if mask is None:
            return
        missing = self.missing(mask, np.True_ if members is None else members)
        if missing.any():
            warp, lane = np.argwhere(missing)[0]
            raise Fault(f"lane {lane} of warp {warp} is not there, although the mask names it")

    def note(self, space: str, line: str, addresses: Array, width: int, mask: Array | None) -> None:
        """For whoever counts: the addresses of the threads of the mask."""
        if traffic.current is not None and len(addresses):
            threads = np.arange(self.threads)
            threads = threads if mask is None else threads[mask]
            traffic.current.note(self.name, space, line, addresses, width, threads)

    def note_rows(self, line: str, addresses: Array, count: int, mask: Array | None) -> None:
        """Rows of 16 bytes of matrices, whose addresses the first 8 ``count`` lanes have."""
        if traffic.current is not None:
            first = np.arange(self.threads) % WARP < 8 * count
            chosen = first if mask is None else first[mask]
            mask = first if mask is None else first & mask
            self.note("shared", line, addresses[chosen], 16, mask)

    def end(self) -> None:
        for pending in (self.copies, self.products):
            if pending.left:
                what = f"{pending.left} {pending.name} are waited for"
                raise Fault(f"the block {self.place} ends before {what}")


class Pending:
    """What has begun and is done only when it is waited for, in groups."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open: list[Callable[[], None]] = []
        self._groups: list[list[Callable[[], None]]] = []

    def add(self, finish: Callable[[], None]) -> None:
        self._open.append(finish)

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = []

    def wait(self, most: int) -> None:
        """Until ``most`` groups at most are left, the newest."""
        while len(self._groups) > most:
            for finish in self._groups.pop(0):
                finish()

    @property
    def left(self) -> int:
        return len(self._open) + sum(map(len, self._groups))


#: Runs an instruction for the threads of a mask; None: for all.
Step = Callable[[Block, "Array | None"], None]
