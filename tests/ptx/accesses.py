"""Loads, stores, atomics and moves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.block import PARAMETER, PARAMETERS, Block, Step
from ptx.memory import Fault
from ptx.modifiers import types_of
from ptx.operands import addresses_of, bits_of, chosen, items, put, reader
from ptx.text import SIZES, Instruction, Kernel, Register, Sink, Unsupported, Vector
from ptx.values import Array, decode, encode

#: Where shared memory begins among the generic addresses.
SHARED_WINDOW = 1 << 60


def _space(instruction: Instruction) -> str:
    for space in ("global", "shared", "local", "param"):
        if space in instruction.modifiers or f"{space}__cta" in instruction.modifiers:
            return space
    return "generic"


def _windows(
    block: Block, addresses: Array, mask: Array | None
) -> list[tuple[str, Array, Array, Array]]:
    """Generic addresses by the memory that they mean: which of them, there, and whose they are."""
    shared = addresses >= np.uint64(SHARED_WINDOW)
    threads = np.arange(block.threads) if mask is None else np.flatnonzero(mask)
    made = []
    for of, some, base in (("shared", shared, SHARED_WINDOW), ("global", ~shared, 0)):
        if some.any():
            whose = np.zeros(block.threads, bool)
            whose[threads[some]] = True
            made.append((of, some, addresses[some] - np.uint64(base), whose))
    return made


def load(instruction: Instruction, kernel: Kernel) -> Step:
    (kind,) = types_of(instruction.modifiers)
    target, source = instruction.operands[:2]
    if len(instruction.operands) > 2:
        raise Unsupported("a cache hint")
    targets, size = items(target), SIZES[kind]
    count = len(targets)
    space, width = _space(instruction), size * count
    addresses = addresses_of(source, space, kernel)

    def load_from(block: Block, at: Array, of: str, mask: Array | None) -> list[Array]:
        if of in ("global", "shared"):
            warps = chosen(block, block.warps, mask)
            block.note("load" if of == "global" else of, instruction.line, at, width, mask)
        if of == "global":
            return block.memory.load(at, size, count)
        if of == "shared":
            return block.shared.load(at, size, count, warps)
        if of == "local":
            return _load_local(block, at, size, count, mask)
        return _load_parameter(block, at, size, count)

    def run(block: Block, mask: Array | None) -> None:
        at = chosen(block, addresses(block), mask)
        if space != "generic":
            loaded = load_from(block, at, space, mask)
        else:
            loaded = [np.zeros(len(at), f"u{size}") for _ in targets]
            for of, some, places, threads in _windows(block, at, mask):
                for each, got in zip(loaded, load_from(block, places, of, threads), strict=True):
                    each[some] = got
        for target, bits in zip(targets, loaded, strict=True):
            put(block, target, decode(bits, bits_of(kind)), bits_of(kind), kernel, mask)

    return run


def _load_parameter(block: Block, addresses: Array, size: int, count: int) -> list[Array]:
    """An array of parameters with its place is told by the address, in each thread its own."""
    places, whose = np.unique(addresses, return_inverse=True)
    words = np.zeros((len(places), count), f"u{size}")
    for word, place in zip(words, places, strict=True):
        number, offset = divmod(int(place) - PARAMETERS, PARAMETER)
        if not 0 <= number < len(block.parameters):
            raise Fault(f"parameter {number} of {len(block.parameters)}")
        data = block.parameters[number]
        if offset + size * count > len(data):
            raise Fault(f"byte {offset} of a parameter of {len(data)} bytes")
        word[:] = np.frombuffer(data, f"u{size}", count, offset)
    return list(words[whose].T)


def _local_places(block: Block, at: Array, width: int, mask: Array | None) -> tuple[Array, Array]:
    threads = np.arange(block.threads)
    threads = threads if mask is None else threads[mask]
    at = at.astype(np.int64)
    if (at % width).any():
        raise Fault(f"a misaligned access of {width} bytes to local memory")
    if len(at) and (at.min() < 0 or at.max() + width > block.local.shape[1]):
        raise Fault(f"local memory at byte {int(at.max())} of {block.local.shape[1]}")
    return threads[:, None], at[:, None] + np.arange(width)


def _load_local(block: Block, at: Array, size: int, count: int, mask: Array | None) -> list[Array]:
    threads, places = _local_places(block, at, size * count, mask)
    data = np.ascontiguousarray(block.local[threads, places]).view(f"u{size}")
    return [np.ascontiguousarray(data[:, k]) for k in range(count)]


def store(instruction: Instruction, kernel: Kernel) -> Step:
    (kind,) = types_of(instruction.modifiers)
    target, source = instruction.operands[:2]
    if len(instruction.operands) > 2:
        raise Unsupported("a cache hint")
    space = _space(instruction)
    bits = f"b{8 * SIZES[kind]}"
    reads = [reader(item, bits) for item in items(source)]
    addresses = addresses_of(target, space, kernel)

    def store_to(block: Block, at: Array, values: list[Array], of: str, mask: Array | None) -> None:
        if of in ("global", "shared"):
            warps = chosen(block, block.warps, mask)
            width = SIZES[kind] * len(values)
            block.note("store" if of == "global" else of, instruction.line, at, width, mask)
        if of == "global":
            block.memory.store(at, values)
        elif of == "shared":
            block.shared.store(at, values, warps)
        else:
            threads, places = _local_places(block, at, SIZES[kind] * len(values), mask)
            data = np.ascontiguousarray(np.stack(values, 1))
            block.local[threads, places] = data.view(np.uint8).reshape(len(at), -1)

    def run(block: Block, mask: Array | None) -> None:
        at = chosen(block, addresses(block), mask)
        values = [chosen(block, read(block), mask) for read in reads]
        if space != "generic":
            return store_to(block, at, values, space, mask)
        for of, some, places, threads in _windows(block, at, mask):
            store_to(block, places, [value[some] for value in values], of, threads)

    return run


_ATOMIC: dict[str, Callable[..., int]] = {
    "add": lambda old, x: old + x, "min": min, "max": max, "exch": lambda old, x: x,
    "and": lambda old, x: old & x, "or": lambda old, x: old | x,
    "cas": lambda old, compared, x: x if old == compared else old,
}  # fmt: skip


def atomic(instruction: Instruction, kernel: Kernel) -> Step:
    """Thread by thread."""
    (kind,) = types_of(instruction.modifiers)
    name = next(each for each in instruction.modifiers if each in _ATOMIC)
    target, place, *sources = instruction.operands
    space = _space(instruction)
    if "f" in kind or len(instruction.operands) == 2:
        raise Unsupported(f"`{instruction.line}`")
    reads = [reader(each, kind) for each in sources]
    addresses = addresses_of(place, space, kernel)
    bits = 8 * SIZES[kind]

    def run(block: Block, mask: Array | None) -> None:
        at = chosen(block, addresses(block), mask)
        values = [chosen(block, read(block), mask) for read in reads]
        warps = chosen(block, block.warps, mask)
        old = np.zeros(len(at), f"u{bits // 8}")
        for i, address in enumerate(map(int, at)):
            memory = block.shared if space == "shared" else block.memory
            if space == "generic" and address >= SHARED_WINDOW:
                memory, address = block.shared, address - SHARED_WINDOW

            def change(before: int, i: int = i) -> int:
                signed = before - (before >> bits - 1 << bits) if kind[0] == "s" else before
                return _ATOMIC[name](signed, *(int(x[i]) for x in values)) & (1 << bits) - 1

            old[i] = memory.update(address, bits // 8, int(warps[i]), change)
        put(block, target, decode(old, bits_of(kind)), bits_of(kind), kernel, mask)

    return run


def move(instruction: Instruction, kernel: Kernel) -> Step:
    """`mov`: a value, an address, or halves packed into a register and taken out of it."""
    (kind,) = types_of(instruction.modifiers)
    target, source = instruction.operands
    if isinstance(target, Vector):
        count = len(target.items)
        size = SIZES[kind] // count
        read = reader(source, f"b{8 * SIZES[kind]}")

        def unpack(block: Block, mask: Array | None) -> None:
            parts = np.ascontiguousarray(read(block)).view(f"u{size}").reshape(-1, count)
            for k, item in enumerate(target.items):
                if not isinstance(item, Sink):
                    value = encode(
                        np.ascontiguousarray(parts[:, k]),
                        f"b{8 * size}",
                        kernel.registers[item.index],
                    )
                    block.write(item.index, value, mask)

        return unpack
    assert isinstance(target, Register)
    index, register = target.index, kernel.registers[target.index]
    if isinstance(source, Vector):
        size = SIZES[kind] // len(source.items)
        reads = [reader(item, f"b{8 * size}") for item in source.items]

        def pack(block: Block, mask: Array | None) -> None:
            parts = np.stack(np.broadcast_arrays(*[read(block) for read in reads]), -1)
            value = np.ascontiguousarray(parts).view(f"u{SIZES[kind]}").reshape(-1)
            block.write(index, encode(value, f"b{8 * SIZES[kind]}", register), mask)

        return pack
    bits = kind if kind == "pred" else f"b{8 * SIZES[kind]}"
    read = reader(source, bits)

    def move(block: Block, mask: Array | None) -> None:
        block.write(index, encode(read(block), bits, register), mask)

    return move


def to_address(instruction: Instruction, kernel: Kernel) -> Step:
    """`cvta`: among generic addresses, those of global memory are its own; shared has a window."""
    target, source = instruction.operands
    window = SHARED_WINDOW if "shared" in instruction.modifiers else 0
    shift = np.uint64(-window & 2**64 - 1 if "to" in instruction.modifiers else window)
    if not window and "global" not in instruction.modifiers:
        raise Unsupported(instruction.line)
    read = reader(source, "u64")
    return lambda block, mask: block.write(target.index, read(block) + shift, mask)
