"""Global memory, where each access must lie in what the call was given; shared memory, watched."""

from __future__ import annotations

import bisect
import ctypes
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
            if place < 0 or (addresses[chosen] + np.uint64(width)).max() > self._regions[place].end:
                ends = 0 if place < 0 else self._regions[place].end
                outside = addresses[chosen & (addresses + np.uint64(width) > ends)]
                at = self.describe(int(outside[0]))
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

    def peek(self, address: int, size: int) -> int:
        return int(self.load(np.array([address], np.uint64), size, 1)[0][0])

    def poke(self, address: int, size: int, value: int) -> None:
        self.store(np.array([address], np.uint64), [np.array([value], f"u{size}")])


class SharedMemory:
    """A block's. Between two warps' accesses to a byte, one of them a write, must stand a barrier.

    Writes that change nothing are no conflict: layouts with copies of a value write it twice.
    """

    def __init__(self, size: int) -> None:
        # What nobody has written is NaN in every float type, and -1.
        self.data = np.full(-(-size // 16) * 16, 0xFF, np.uint8)
        self.size = size
        self.epoch = 0
        self._wrote_at = np.full(size, -1, np.int64)
        self._wrote = np.full(size, -1, np.int32)
        self._read_at = np.full(size, -1, np.int64)
        self._read = np.full(size, -1, np.int32)
        self._views = {size: self.data.view(f"u{size}") for size in (1, 2, 4, 8)}

    def barrier(self) -> None:
        """All threads of the block wait for each other."""
        self.epoch += 1

    def _check(self, addresses: Array, width: int, aligned: int) -> None:
        if (addresses % aligned).any():
            at = int(addresses[addresses % aligned != 0][0])
            raise Fault(f"a misaligned access of {aligned} bytes at byte {at} of shared memory")
        if len(addresses) and int(addresses.max()) + width > self.size:
            at = int(addresses.max())
            raise Fault(f"{width} bytes at byte {at} of {self.size} of shared memory")

    def load(self, addresses: Array, size: int, count: int, warps: Array) -> list[Array]:
        width = size * count
        self._check(addresses, width, width)
        self._note_read(addresses, width, warps)
        index = (addresses // size).astype(np.int64)
        return [self._views[size][index + k] for k in range(count)]

    def store(self, addresses: Array, values: list[Array], warps: Array) -> None:
        size = values[0].itemsize
        width = size * len(values)
        self._check(addresses, width, width)
        index = (addresses // size).astype(np.int64)
        view = self._views[size]
        change = np.zeros(len(addresses), bool)
        for k, value in enumerate(values):
            change |= view[index + k] != value
        for k, value in enumerate(values):
            view[index + k] = value
        for k, value in enumerate(values):
            if (view[index + k] != value).any():
                self._two_of_one_instruction(addresses, view[index + k] != value, warps)
        self._note_write(addresses[change], width, warps[change])

    def peek(self, address: int, size: int) -> int:
        """For atomics, which the watch does not see."""
        self._check(np.array([address]), size, size)
        return int(self._views[size][address // size])

    def poke(self, address: int, size: int, value: int) -> None:
        self._views[size][address // size] = value

    def _two_of_one_instruction(self, addresses: Array, lost: Array, warps: Array) -> None:
        at = int(addresses[lost][0])
        raise Fault(f"two threads write byte {at} of shared memory at once, with other values")

    def _bytes(self, addresses: Array, width: int, warps: Array) -> tuple[Array, Array]:
        places = addresses.astype(np.int64)[:, None] + np.arange(width)
        return places.reshape(-1), np.repeat(warps, width)

    def _note_read(self, addresses: Array, width: int, warps: Array) -> None:
        places, warps = self._bytes(addresses, width, warps)
        wrong = (self._wrote_at[places] == self.epoch) & (self._wrote[places] != warps)
        if wrong.any():
            self._conflict("reads", "wrote", places[wrong][0], warps[wrong][0], self._wrote)
        known = (self._read_at[places] == self.epoch) & (self._read[places] != warps)
        self._read_at[places] = self.epoch
        self._read[places] = warps
        known |= self._read[places] != warps
        self._read[places[known]] = _MANY

    def _note_write(self, addresses: Array, width: int, warps: Array) -> None:
        places, warps = self._bytes(addresses, width, warps)
        wrong = (self._wrote_at[places] == self.epoch) & (self._wrote[places] != warps)
        if wrong.any():
            self._conflict("writes", "wrote", places[wrong][0], warps[wrong][0], self._wrote)
        wrong = (self._read_at[places] == self.epoch) & (self._read[places] != warps)
        if wrong.any():
            self._conflict("writes", "read", places[wrong][0], warps[wrong][0], self._read)
        self._wrote_at[places] = self.epoch
        self._wrote[places] = warps

    def _conflict(self, does: str, did: str, place: int, warp: int, who: Array) -> None:
        other = int(who[place])
        by = "several warps" if other == _MANY else f"warp {other}"
        raise Fault(
            f"warp {warp} {does} byte {place} of shared memory, which {by} {did} with no barrier "
            "between"
        )
