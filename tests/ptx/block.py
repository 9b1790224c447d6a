"""The state of one block: its registers, its memories, and what is still on its way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ptx import traffic
from ptx.memory import Fault, GlobalMemory, SharedMemory
from ptx.text import Kernel
from ptx.values import Array, all_threads, poison

WARP = 32
#: Parameter ``n`` has the address ``PARAMETERS + n * PARAMETER``, and that many bytes at most.
PARAMETERS, PARAMETER = 1 << 56, 1 << 16


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
    ) -> None:
        self.name = kernel.name
        self.threads, self.place, self.grid = threads, place, grid
        self.symbols, self.parameters, self.memory = symbols, parameters, memory
        self.shared = SharedMemory(shared)
        self.registers = list(map(poison, kernel.registers))
        self.warps = np.arange(threads) // WARP
        self.ended = np.zeros(threads, bool)
        self.carry: Array = np.zeros(1, np.uint64)
        local = [v for v in kernel.variables.values() if v.space == "local"]
        self.local = np.full((threads, sum(v.size for v in local)), 0xFF, np.uint8)
        #: Copies that `cp.async` has begun: of the open group, and of those committed.
        self.copies: list[Callable[[], None]] = []
        self.copy_groups: list[list[Callable[[], None]]] = []
        #: The same for products of `wgmma`.
        self.products: list[Callable[[], None]] = []
        self.product_groups: list[list[Callable[[], None]]] = []
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
        """The lanes [warps, 32] that are not there although one is whose members they are."""
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

    def note(self, space: str, line: str, addresses: Array, width: int, warps: Array) -> None:
        """For whoever counts."""
        if traffic.current is not None and len(addresses):
            traffic.current.note(self.name, space, line, addresses, width, warps)

    def note_rows(self, line: str, addresses: Array, count: int, warps: Array) -> None:
        """Rows of 16 bytes of matrices, whose addresses the first 8 ``count`` lanes have."""
        if traffic.current is not None:
            rows = addresses.reshape(-1, WARP)[:, : 8 * count]
            owners = np.repeat(warps.reshape(-1, WARP)[:, 0], 8 * count)
            self.note("shared", line, rows.reshape(-1), 16, owners)

    def wait_copies(self, most: int) -> None:
        """Lets all groups of copies but the last ``most`` arrive."""
        self.copy_groups = _finish(self.copy_groups, most)

    def wait_products(self, most: int) -> None:
        self.product_groups = _finish(self.product_groups, most)

    def end(self) -> None:
        for name, left in {
            "cp.async": [*self.copies, *sum(self.copy_groups, [])],
            "wgmma": [*self.products, *sum(self.product_groups, [])],
        }.items():
            if left:
                raise Fault(f"the block {self.place} ends before {len(left)} {name} are waited for")


def _finish(groups: list[Any], most: int) -> list[Any]:
    done = len(groups) - most if most else len(groups)
    for group in groups[: max(done, 0)]:
        for each in group:
            each()
    return groups[max(done, 0) :]


#: Runs an instruction for the threads of a mask; None: for all.
Step = Callable[[Block, "Array | None"], None]
