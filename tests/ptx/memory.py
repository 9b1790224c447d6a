"""Global memory, where each access must lie in what the call was given; shared memory, watched."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.values import Array

_MANY = -2  # several warps have read a place since the last barrier


class Fault(RuntimeError):
    """What a GPU would have failed on, or done by chance."""


class Region:
    """Bytes from an address on."""

    def __init__(self, base: int, data: Array, name: str) -> None:
        self.base, self.end, self.data, self.name = base, base + data.nbytes, data, name
        self._views: dict[int, Array] = {}

    def elements(self, size: int) -> Array:
        """As whole elements of this many bytes; all starts of elements are multiples of it."""
        if size not in self._views:
            skip = -self.base % size
            data = self.data[skip : skip + (len(self.data) - skip) // size * size]
            self._views[size] = data.view(f"u{size}")
        return self._views[size]

    def index(self, addresses: Array, size: int) -> Array:
        return ((addresses - np.uint64(self.base + -self.base % size)) // size).astype(np.int64)


class GlobalMemory:
    """The regions that a launch may touch."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._bases: list[int] = []

    def add(self, address: int, size: int, name: str) -> None:
        """Bytes of this process, such as a tensor's; those that are there already stay."""
        if size == 0 or any(r.base <= address and address + size <= r.end for r in self._regions):
            return
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
        self._insert(Region(address, data, name))

    def add_array(self, data: Array, name: str) -> int:
        """An array of bytes; returns its address."""
        address = data.ctypes.data
        self._insert(Region(address, data, name))
        return address

    def _insert(self, region: Region) -> None:
        overlapping = [r for r in self._regions if r.base < region.end and region.base < r.end]
        for each in overlapping:  # a wider view of the same storage
            self._regions.remove(each)
            low, high = min(each.base, region.base), max(each.end, region.end)
            data = np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), np.uint8)
            region = Region(low, data, region.name)
        self._regions.append(region)
        self._regions.sort(key=lambda each: each.base)
        self._bases = [each.base for each in self._regions]

    def _regions_of(self, addresses: Array, width: int, aligned: int) -> list[tuple[Region, Any]]:
        """Each region that is touched, and by which of the addresses (None: by all)."""
        wrong = addresses % np.uint64(aligned) != 0
        if wrong.any():
            at = int(addresses[wrong][0])
            raise Fault(f"a misaligned access of {aligned} bytes at {self.describe(at)}")
        low, high = int(addresses.min()), int(addresses.max())
        region = self._region(low)
        if region is not None and high + width <= region.end:
            return [(region, None)]
        places = np.searchsorted(self._bases, addresses, side="right") - 1
        made = []
        for place in np.unique(places):
            chosen = places == place
            if place < 0 or int(addresses[chosen].max()) + width > self._regions[place].end:
                ends = 0 if place < 0 else self._regions[place].end
                outside = [int(a) for a in addresses[chosen] if int(a) + width > ends]
                at = self.describe(outside[0])
                raise Fault(f"{len(outside)} threads access {width} bytes outside, at {at}")
            made.append((self._regions[place], chosen))
        return made

    def _region(self, address: int) -> Region | None:
        place = bisect.bisect_right(self._bases, address) - 1
        return self._regions[place] if place >= 0 else None

    def describe(self, address: int) -> str:
        region = self._region(address)
        if region is None:
            return f"{address:#x}, before all of {self._names()}"
        offset = address - region.base
        return f"byte {offset} of {region.name} ({region.end - region.base} bytes)"

    def _names(self) -> str:
        return ", ".join(region.name for region in self._regions)

    def check(self, addresses: Array, width: int) -> None:
        """Fails where these bytes may not be read."""
        if len(addresses):
            self._regions_of(addresses, width, width)

    def load(self, addresses: Array, size: int, count: int) -> list[Array]:
        """``count`` elements of ``size`` bytes from each address on."""
        made = [np.zeros(len(addresses), f"u{size}") for _ in range(count)]
        for region, chosen in self._regions_of(addresses, size * count, size * count):
            elements = region.elements(size)
            index = region.index(addresses if chosen is None else addresses[chosen], size)
            for k, values in enumerate(made):
                values[slice(None) if chosen is None else chosen] = elements[index + k]
        return made

    def store(self, addresses: Array, values: list[Array]) -> None:
        size = values[0].itemsize
        width = size * len(values)
        for region, chosen in self._regions_of(addresses, width, width):
            if not region.data.flags.writeable:
                raise Fault(f"a store to {region.name}")
            elements = region.elements(size)
            index = region.index(addresses if chosen is None else addresses[chosen], size)
            for k, value in enumerate(values):
                elements[index + k] = value if chosen is None else value[chosen]

    def update(self, address: int, size: int, warp: int, change: Callable[[int], int]) -> int:
        """One thread's atomic operation; what was there before."""
        at = np.array([address], np.uint64)
        before = int(self.load(at, size, 1)[0][0])
        self.store(at, [np.array([change(before)], f"u{size}")])
        return before


class SharedMemory:
    """A block's. Between two warps' accesses to a byte must stand a barrier, unless both read or
    both are atomic; and what a copy is on its way to must not be touched.

    Writes that change nothing are no conflict: layouts with copies of a value write it twice.
    """

    def __init__(self, size: int) -> None:
        # What nobody has written is NaN in every float type, and -1.
        self.data = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.size = size
        self.epoch = 0
        self._views = {size: self.data.view(f"u{size}") for size in (1, 2, 4, 8)}
        #: By byte, who did that last, and in which epoch.
        self._last = {does: _Last(size) for does in _CONFLICTS}
        #: By byte, how many copies are on their way there.
        self._coming = np.zeros(size, np.int16)

    def barrier(self) -> None:
        """All threads of the block wait for each other."""
        self.epoch += 1

    def _check(self, addresses: Array, width: int) -> None:
        if (addresses % width).any():
            at = int(addresses[addresses % width != 0][0])
            raise Fault(f"a misaligned access of {width} bytes at byte {at} of shared memory")
        if len(addresses) and int(addresses.max()) + width > self.size:
            at = int(addresses.max())
            raise Fault(f"{width} bytes at byte {at} of {self.size} of shared memory")

    def load(self, addresses: Array, size: int, count: int, warps: Array) -> list[Array]:
        self._check(addresses, size * count)
        self._note("reads", addresses, size * count, warps)
        index = (addresses // size).astype(np.int64)
        return [self._views[size][index + k] for k in range(count)]

    def store(self, addresses: Array, values: list[Array], warps: Array) -> None:
        size = values[0].itemsize
        self._check(addresses, size * len(values))
        index = (addresses // size).astype(np.int64)
        view = self._views[size]
        change = np.zeros(len(addresses), bool)
        for k, value in enumerate(values):
            change |= view[index + k] != value
        self._write(addresses, values)
        self._note("writes", addresses[change], size * len(values), warps[change])

    def _write(self, addresses: Array, values: list[Array]) -> None:
        size = values[0].itemsize
        index, view = (addresses // size).astype(np.int64), self._views[size]
        for k, value in enumerate(values):
            view[index + k] = value
        for k, value in enumerate(values):
            lost = view[index + k] != value
            if lost.any():
                at = int(addresses[lost][0])
                raise Fault(f"two threads write byte {at} of shared memory at once, other values")

    def begin_copy(self, addresses: Array, width: int, warps: Array) -> None:
        self._check(addresses, width)
        places = self._note("writes", addresses, width, warps)
        np.add.at(self._coming, places, 1)

    def end_copy(self, addresses: Array, values: list[Array], warps: Array) -> None:
        width = values[0].itemsize * len(values)
        np.subtract.at(self._coming, _bytes(addresses, width), 1)
        self._write(addresses, values)
        self._note("writes", addresses, width, warps)

    def update(self, address: int, size: int, warp: int, change: Callable[[int], int]) -> int:
        """One thread's atomic operation; what was there before."""
        at = np.array([address], np.uint64)
        self._check(at, size)
        self._note("updates", at, size, np.array([warp]))
        view = self._views[size]
        before = int(view[address // size])
        view[address // size] = change(before)
        return before

    def _note(self, does: str, addresses: Array, width: int, warps: Array) -> Array:
        """Fails on a conflict with what other warps have done; the bytes."""
        places, warps = _bytes(addresses, width), np.repeat(warps, width)
        if self._coming[places].any():
            at = int(places[self._coming[places] > 0][0])
            raise Fault(f"warp {warps[0]} {does} byte {at} of shared memory, where a copy arrives")
        for did in _CONFLICTS[does]:
            other = self._last[did].other(places, self.epoch, warps)
            if other is not None:
                n, who = other
                by = "several warps" if who == _MANY else f"warp {who}"
                raise Fault(
                    f"warp {warps[n]} {does} byte {places[n]} of shared memory, which {by} "
                    f"{_PAST[did]} with no barrier between"
                )
        self._last[does].note(places, self.epoch, warps)
        return places


_CONFLICTS = {
    "reads": ("writes", "updates"),
    "writes": ("writes", "reads", "updates"),
    "updates": ("writes", "reads"),
}
_PAST = {"reads": "read", "writes": "wrote", "updates": "updated"}


def _bytes(addresses: Array, width: int) -> Array:
    return (addresses.astype(np.int64)[:, None] + np.arange(width)).reshape(-1)


class _Last:
    """Of each byte, in which epoch and by which warps something was done last."""

    def __init__(self, size: int) -> None:
        self._epoch = np.full(size, -1, np.int64)
        self._warp = np.full(size, -1, np.int32)

    def other(self, places: Array, epoch: int, warps: Array) -> tuple[int, int] | None:
        """The first of the places where another warp did it in this epoch, and which."""
        found = (self._epoch[places] == epoch) & (self._warp[places] != warps)
        if not found.any():
            return None
        n = int(np.argmax(found))
        return n, int(self._warp[places[n]])

    def note(self, places: Array, epoch: int, warps: Array) -> None:
        several = (self._epoch[places] == epoch) & (self._warp[places] != warps)
        self._epoch[places] = epoch
        self._warp[places] = warps
        several |= self._warp[places] != warps
        self._warp[places[several]] = _MANY
