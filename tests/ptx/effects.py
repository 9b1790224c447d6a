"""Instructions that do more than compute: memory, shuffles, matrices, waits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx import tensor_cores
from ptx.arithmetic import types_of
from ptx.block import PARAMETER, PARAMETERS, WARP, Block, Step
from ptx.memory import Fault
from ptx.text import (
    SIZES,
    Address,
    Instruction,
    Kernel,
    Negated,
    Number,
    Operand,
    Register,
    Sink,
    Symbol,
    Unsupported,
    Vector,
)
from ptx.values import Array, decode, decoder, encode, literal

Reader = Callable[[Block], Array]
#: Where shared memory begins among the generic addresses.
SHARED_WINDOW = 1 << 60


def effect(instruction: Instruction, kernel: Kernel) -> Step:
    made = _EFFECTS.get(instruction.opcode)
    if made is None:
        raise Unsupported(f"the opcode {instruction.opcode}")
    return made(instruction, kernel)


def is_warp_barrier(instruction: Instruction) -> bool:
    return instruction.opcode == "bar" and "warp" in instruction.modifiers


def members_of(instruction: Instruction) -> Callable[[Block, Array], Array] | None:
    """Which lanes [warps, 32] must meet at this instruction, as those that are there say.

    None where each is on its own.
    """
    if instruction.guard is not None:
        return None
    opcode = instruction.opcode
    if opcode in ("shfl", "vote", "redux") or is_warp_barrier(instruction):
        read = reader(instruction.operands[-1], "b32")
        return lambda block, there: _members(block, read(block), there)
    if opcode in ("ldmatrix", "stmatrix", "mma"):
        return lambda block, there: np.ones((block.threads // WARP, WARP), bool)
    return None


def reader(operand: Operand, kind: str) -> Reader:
    """The value of an operand as this type."""
    if isinstance(operand, Register):
        index, meaning = operand.index, decoder(kind)
        return lambda block: meaning(block.registers[index])
    if isinstance(operand, Number):
        value = decode(literal(operand, kind), kind)
        return lambda block: value
    if isinstance(operand, Negated):
        index = operand.register.index
        return lambda block: ~block.registers[index]
    if isinstance(operand, Symbol):
        name = operand.name

        def symbol(block: Block) -> Array:
            if name == "WARP_SZ":
                return decode(np.array([WARP], np.uint32), kind)
            if name in block.special:
                return decode(block.special[name], kind)
            if name.startswith("__local_depot"):
                return decode(np.zeros(1, np.uint64), kind)
            if name not in block.symbols:
                raise Unsupported(f"the name {name}")
            return decode(np.array([block.symbols[name]], np.uint64), kind)

        return symbol
    raise Unsupported(f"a source like {operand}")


def _addresses(address: Operand, bits: int) -> Reader:
    """The bytes' addresses, as 64-bit numbers."""
    if not isinstance(address, Address):
        raise Unsupported(f"an address like {address}")
    offset = np.array([address.offset & 2**64 - 1], np.uint64)
    if address.base is None:
        return lambda block: offset
    base = address.base
    wide = isinstance(base, Symbol)
    read = reader(base, "u64" if wide or bits == 64 else "u32")
    narrow = bits == 32

    def addresses(block: Block) -> Array:
        made = read(block).astype(np.uint64) + offset
        return made & np.uint64(0xFFFFFFFF) if narrow else made

    return addresses


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _chosen(block: Block, values: Array, mask: Array | None) -> Array:
    values = block.full(values)
    return values if mask is None else values[mask]


def _scattered(block: Block, values: Array, mask: Array | None) -> Array:
    if mask is None:
        return values
    made = np.zeros(block.threads, values.dtype)
    made[mask] = values
    return made


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


def _address_bits(space: str, kernel: Kernel, address: Operand) -> int:
    """Shared and local addresses may be held in 32 bits."""
    if space in ("global", "generic", "param") or not isinstance(address, Address):
        return 64
    base = address.base
    if isinstance(base, Register):
        return 8 * SIZES[kernel.registers[base.index]]
    return 64


def _load(instruction: Instruction, kernel: Kernel) -> Step:
    (kind,) = types_of(instruction.modifiers)
    target, source = instruction.operands[:2]
    if len(instruction.operands) > 2:
        raise Unsupported("a cache hint")
    items, size = _items(target), SIZES[kind]
    space, width = _space(instruction), size * len(items)
    addresses = _addresses(source, _address_bits(space, kernel, source))

    def load(block: Block, at: Array, of: str, mask: Array | None) -> list[Array]:
        if of in ("global", "shared"):
            warps = _chosen(block, block.warps, mask)
            block.note("load" if of == "global" else of, instruction.line, at, width, warps)
        if of == "global":
            return block.memory.load(at, size, len(items))
        if of == "shared":
            return block.shared.load(at, size, len(items), warps)
        if of == "local":
            return _load_local(block, at, size, len(items), mask)
        return _load_parameter(block, at, size, len(items))

    def run(block: Block, mask: Array | None) -> None:
        at = _chosen(block, addresses(block), mask)
        if space != "generic":
            loaded = load(block, at, space, mask)
        else:
            loaded = [np.zeros(len(at), f"u{size}") for _ in items]
            for of, some, places, threads in _windows(block, at, mask):
                for each, got in zip(loaded, load(block, places, of, threads), strict=True):
                    each[some] = got
        for item, bits in zip(items, loaded, strict=True):
            if isinstance(item, Sink):
                continue
            value = encode(
                decode(bits, _as_bits(kind)), _as_bits(kind), kernel.registers[item.index]
            )
            block.write(item.index, _scattered(block, value, mask), mask)

    return run


def _as_bits(kind: str) -> str:
    """The type whose bits are moved: a sign is kept, a float is bits."""
    return kind if kind[0] == "s" else f"b{8 * SIZES[kind]}"


def _load_parameter(block: Block, addresses: Array, size: int, count: int) -> list[Array]:
    """All threads read the same parameter; an array of it with its place is told by the address."""
    if (addresses != addresses[0]).any():
        raise Unsupported("parameters by thread")
    number, offset = divmod(int(addresses[0]) - PARAMETERS, PARAMETER)
    data = block.parameters[number]
    if offset + size * count > len(data):
        raise Fault(f"byte {offset} of a parameter of {len(data)} bytes")
    words = np.frombuffer(data, f"u{size}", count, offset)
    return [np.full(len(addresses), word) for word in words]


def _local_places(block: Block, at: Array, width: int, mask: Array | None) -> tuple[Array, Array]:
    threads = np.arange(block.threads)
    threads = threads if mask is None else threads[mask]
    at = at.astype(np.int64)
    if len(at) and (at.min() < 0 or at.max() + width > block.local.shape[1]):
        raise Fault(f"local memory at byte {int(at.max())} of {block.local.shape[1]}")
    return threads[:, None], at[:, None] + np.arange(width)


def _load_local(block: Block, at: Array, size: int, count: int, mask: Array | None) -> list[Array]:
    threads, places = _local_places(block, at, size * count, mask)
    data = np.ascontiguousarray(block.local[threads, places]).view(f"u{size}")
    return [np.ascontiguousarray(data[:, k]) for k in range(count)]


def _store(instruction: Instruction, kernel: Kernel) -> Step:
    (kind,) = types_of(instruction.modifiers)
    target, source = instruction.operands[:2]
    if len(instruction.operands) > 2:
        raise Unsupported("a cache hint")
    space = _space(instruction)
    bits = f"b{8 * SIZES[kind]}"
    reads = [reader(item, bits) for item in _items(source)]
    addresses = _addresses(target, _address_bits(space, kernel, target))

    def store(block: Block, at: Array, values: list[Array], of: str, mask: Array | None) -> None:
        if of in ("global", "shared"):
            warps = _chosen(block, block.warps, mask)
            width = SIZES[kind] * len(values)
            block.note("store" if of == "global" else of, instruction.line, at, width, warps)
        if of == "global":
            block.memory.store(at, values)
        elif of == "shared":
            block.shared.store(at, values, warps)
        else:
            threads, places = _local_places(block, at, SIZES[kind] * len(values), mask)
            data = np.ascontiguousarray(np.stack(values, 1))
            block.local[threads, places] = data.view(np.uint8).reshape(len(at), -1)

    def run(block: Block, mask: Array | None) -> None:
        at = _chosen(block, addresses(block), mask)
        values = [_chosen(block, read(block), mask) for read in reads]
        if space != "generic":
            return store(block, at, values, space, mask)
        for of, some, places, threads in _windows(block, at, mask):
            store(block, places, [value[some] for value in values], of, threads)

    return run


_ATOMIC: dict[str, Callable[..., int]] = {
    "add": lambda old, x: old + x, "min": min, "max": max, "exch": lambda old, x: x,
    "and": lambda old, x: old & x, "or": lambda old, x: old | x,
    "cas": lambda old, compared, x: x if old == compared else old,
}  # fmt: skip


def _atomic(instruction: Instruction, kernel: Kernel) -> Step:
    """Thread by thread. The watch over shared memory does not see it: atomics need no barrier."""
    (kind,) = types_of(instruction.modifiers)
    name = next(each for each in instruction.modifiers if each in _ATOMIC)
    target, place, *sources = instruction.operands
    space = _space(instruction)
    if _ATOMIC[name] is None or kind[0] == "f":
        raise Unsupported("atomics of floats")
    reads = [reader(each, kind) for each in sources]
    addresses = _addresses(place, _address_bits(space, kernel, place))
    bits = 8 * SIZES[kind]

    def run(block: Block, mask: Array | None) -> None:
        at = _chosen(block, addresses(block), mask)
        values = [_chosen(block, read(block), mask) for read in reads]
        window = "shared" if space == "generic" and int(at[0]) >= SHARED_WINDOW else space
        if space == "generic" and window == "shared":
            at = at - np.uint64(SHARED_WINDOW)
        memory = block.shared if window == "shared" else block.memory
        old = np.zeros(len(at), f"u{bits // 8}")
        for i in range(len(at)):
            before = memory.peek(int(at[i]), bits // 8)
            old[i] = before
            signed = before - (before >> bits - 1 << bits) if kind[0] == "s" else before
            made = _ATOMIC[name](signed, *(int(value[i]) for value in values))
            memory.poke(int(at[i]), bits // 8, made & (1 << bits) - 1)
        if isinstance(target, Register):
            value = encode(
                decode(old, _as_bits(kind)), _as_bits(kind), kernel.registers[target.index]
            )
            block.write(target.index, _scattered(block, value, mask), mask)

    return run


def _move(instruction: Instruction, kernel: Kernel) -> Step:
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


def _carried(instruction: Instruction, kernel: Kernel) -> Step:
    """Sums and products with a carry, in 32 bits."""
    if types_of(instruction.modifiers) not in (["u32"], ["s32"], ["b32"]):
        raise Unsupported("carries of other than 32 bits")
    target, *sources = instruction.operands
    opcode = instruction.opcode.removesuffix("c")
    takes, gives = instruction.opcode.endswith("c"), "cc" in instruction.modifiers
    high = "hi" in instruction.modifiers
    reads = [reader(each, "u32") for each in sources]
    index = target.index
    if opcode not in ("add", "mad"):
        raise Unsupported(f"{opcode} with a carry")

    def run(block: Block, mask: Array | None) -> None:
        values = [read(block).astype(np.uint64) for read in reads]
        if opcode == "mad":
            product = values[0] * values[1]
            part = product >> np.uint64(32) if high else product & np.uint64(0xFFFFFFFF)
            values = [part, values[2]]
        total = values[0] + values[1] + (block.carry if takes else np.uint64(0))
        if gives:
            block.carry = total >> np.uint64(32)
        block.write(index, total.astype(np.uint32), mask)

    return run


def _lanes(values: Array) -> Array:
    return values.reshape(-1, WARP)


def _members(block: Block, masks: Array, there: Array | None) -> Array:
    """The lanes [warps, 32] that the member mask names, as one says that is there."""
    bits = _lanes(block.full(masks))
    if there is not None:
        one = np.argmax(_lanes(there), 1)[:, None]
        bits = np.take_along_axis(bits, one, 1)
    return (bits[:, :1] >> np.arange(WARP, dtype=np.uint32) & 1).astype(bool)


def _shuffle(instruction: Instruction, kernel: Kernel) -> Step:
    mode = next(each for each in instruction.modifiers if each in ("up", "down", "bfly", "idx"))
    operands = list(instruction.operands)
    target = operands.pop(0)
    valid = operands.pop(0) if len(operands) == 5 else None
    read, by, clamp = (reader(each, "b32") for each in operands[:3])
    member = reader(operands[3], "b32")
    lane = np.arange(WARP)

    def run(block: Block, mask: Array | None) -> None:
        members = _members(block, member(block), mask)
        block.whole_warps(mask, members)
        values = _lanes(block.full(read(block)))
        b = _lanes(block.full(by(block))).astype(np.int64) & 31
        c = _lanes(block.full(clamp(block))).astype(np.int64)
        segment, bound = c >> 8 & 31, c & 31
        most = lane & segment | bound & ~segment
        least = lane & segment
        if mode == "up":
            source = lane - b
            inside = source >= most
        else:
            source = {"down": lane + b, "bfly": lane ^ b, "idx": least | b & ~segment}[mode]
            inside = source <= most
        source = np.where(inside, source, lane)
        unnamed = ~np.take_along_axis(members, source, 1)
        if (unnamed if mask is None else unnamed & _lanes(mask)).any():
            raise Fault("a lane takes from one that the mask does not name")
        made = np.take_along_axis(values, source, 1).reshape(-1)
        if not isinstance(target, Sink):
            block.write(target.index, made, mask)
        if valid is not None:
            block.write(valid.index, np.broadcast_to(inside, values.shape).reshape(-1), mask)

    return run


def _reduce(instruction: Instruction, kernel: Kernel) -> Step:
    """`redux.sync`: one result for a warp."""
    (kind,) = types_of(instruction.modifiers)
    how = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[next(each for each in instruction.modifiers if each not in ("sync", kind))]  # fmt: skip
    target, source, members = instruction.operands
    read, member = reader(source, kind), reader(members, "b32")

    def run(block: Block, mask: Array | None) -> None:
        named = _members(block, member(block), mask)
        block.whole_warps(mask, named)
        if not named.all():
            raise Unsupported("a reduction over a part of a warp")
        values = _lanes(block.full(read(block)))
        made = how.reduce(values, axis=1, dtype=values.dtype)
        value = encode(np.repeat(made, WARP), kind, kernel.registers[target.index])
        block.write(target.index, value, mask)

    return run


def _vote(instruction: Instruction, kernel: Kernel) -> Step:
    target, source, members = instruction.operands
    read, member = reader(source, "pred"), reader(members, "b32")
    mode = next(each for each in instruction.modifiers if each in ("all", "any", "ballot", "uni"))
    weights = np.uint32(1) << np.arange(WARP, dtype=np.uint32)

    def run(block: Block, mask: Array | None) -> None:
        named = _members(block, member(block), mask)
        block.whole_warps(mask, named)
        held = _lanes(block.full(read(block)))
        there = named if mask is None else named & _lanes(mask)
        if mode == "ballot":
            made = np.where(held & there, weights, 0).sum(1, dtype=np.uint32)
        elif mode == "any":
            made = (held & there).any(1)
        elif mode == "all":
            made = (held | ~there).all(1)
        else:
            raise Unsupported("vote.uni")
        block.write(target.index, np.repeat(made, WARP), mask)

    return run


def _copy_later(instruction: Instruction, kernel: Kernel) -> Step:
    """`cp.async`: the bytes are there once the thread's wait is over, and not a moment before."""
    modifiers = instruction.modifiers
    if "commit_group" in modifiers:

        def commit(block: Block, mask: Array | None) -> None:
            _by_all(block, mask, "a group of copies")
            block.copy_groups.append(block.copies)
            block.copies = []

        return commit
    if "wait_group" in modifiers or "wait_all" in modifiers:
        count = instruction.operands[0].value if instruction.operands else 0

        def wait(block: Block, mask: Array | None) -> None:
            _by_all(block, mask, "a wait for copies")
            block.wait_copies(count)

        return wait
    if not {"shared", "shared__cta"} & set(modifiers) or "global" not in modifiers:
        raise Unsupported(f"cp.{'.'.join(modifiers)}")
    target, source, size, *rest = instruction.operands
    into = _addresses(target, _address_bits("shared", kernel, target))
    out_of = _addresses(source, 64)
    width = size.value
    kept = reader(rest[0], "u32") if rest else None
    if width not in (4, 8, 16) or ("cg" in modifiers and width != 16):
        raise Unsupported(f"a copy of {width} bytes")

    def run(block: Block, mask: Array | None) -> None:
        to = _chosen(block, into(block), mask)
        warps = _chosen(block, block.warps, mask)
        at = _chosen(block, out_of(block), mask)
        count = None if kept is None else _chosen(block, kept(block), mask)
        some = np.ones(len(at), bool) if count is None else count > 0
        block.note("load", instruction.line, at[some], width, warps[some])
        block.note("shared", instruction.line, to, width, warps)
        if count is not None and (count > width).any():
            raise Fault(f"{int(count.max())} bytes of a copy of {width}")

        def arrive() -> None:
            words = width // 4
            loaded = [np.zeros(len(at), np.uint32) for _ in range(words)]
            if some.any():
                part = count is not None and ((count != 0) & (count != width)).any()
                if part:
                    raise Unsupported("a copy that fills up")
                got = block.memory.load(at[some], 4, words)
                _aligned(at[some], width)
                for each, values in zip(loaded, got, strict=True):
                    each[some] = values
            block.shared.store(to, loaded, warps)

        block.copies.append(arrive)

    return run


def _aligned(addresses: Array, width: int) -> None:
    if (addresses % np.uint64(width)).any():
        raise Fault(f"a copy of {width} bytes from a misaligned address")


def _by_all(block: Block, mask: Array | None, what: str) -> None:
    if mask is not None and not (mask | block.ended).all():
        raise Unsupported(f"{what} by some of the block's threads")


def _load_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    target, source = instruction.operands
    items = _items(target)
    addresses = _addresses(source, _address_bits("shared", kernel, source))
    transposed = "trans" in instruction.modifiers

    def run(block: Block, mask: Array | None) -> None:
        block.whole_warps(mask)
        at = _chosen(block, addresses(block), mask)
        warps = _chosen(block, block.warps, mask)
        block.note_rows(instruction.line, at, len(items), warps)
        made = tensor_cores.load_matrices(block.shared, at, len(items), transposed, warps)
        for item, value in zip(items, made, strict=True):
            block.write(item.index, _scattered(block, value, mask), mask)

    return run


def _store_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    target, source = instruction.operands
    reads = [reader(item, "b32") for item in _items(source)]
    addresses = _addresses(target, _address_bits("shared", kernel, target))
    transposed = "trans" in instruction.modifiers

    def run(block: Block, mask: Array | None) -> None:
        block.whole_warps(mask)
        at = _chosen(block, addresses(block), mask)
        warps = _chosen(block, block.warps, mask)
        values = [_chosen(block, read(block), mask) for read in reads]
        block.note_rows(instruction.line, at, len(reads), warps)
        tensor_cores.store_matrices(block.shared, at, values, transposed, warps)

    return run


def _multiply_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    modifiers = instruction.modifiers
    kinds = types_of(modifiers)
    if "m16n8k16" not in modifiers or kinds[0] != "f32" or kinds[1] not in ("f16", "bf16"):
        raise Unsupported(f"mma.{'.'.join(modifiers)}")
    d, a, b, c = (_items(each) for each in instruction.operands)
    reads = [[reader(item, "b32") for item in items] for items in (a, b, c)]

    def run(block: Block, mask: Array | None) -> None:
        block.whole_warps(mask)
        a, b, c = ([_chosen(block, read(block), mask) for read in each] for each in reads)
        made = tensor_cores.product(
            tensor_cores.a_fragment(a, kinds[1]),
            tensor_cores.b_fragment(b, kinds[1]),
            tensor_cores.c_fragment(c),
        )
        for item, value in zip(d, tensor_cores.c_registers(made), strict=True):
            block.write(item.index, _scattered(block, value, mask), mask)

    return run


def _multiply_later(instruction: Instruction, kernel: Kernel) -> Step:
    """`wgmma`: four warps multiply together; shared memory is read when they wait for it."""
    modifiers = instruction.modifiers
    if "fence" in modifiers:
        return lambda block, mask: _by_all(block, mask, "wgmma")
    if "commit_group" in modifiers:

        def commit(block: Block, mask: Array | None) -> None:
            _by_all(block, mask, "wgmma")
            block.product_groups.append(block.products)
            block.products = []

        return commit
    if "wait_group" in modifiers:
        count = instruction.operands[0].value

        def wait(block: Block, mask: Array | None) -> None:
            _by_all(block, mask, "wgmma")
            block.wait_products(count)

        return wait
    shape = next(each for each in modifiers if each.startswith("m64n"))
    columns = int(shape[4:].partition("k")[0])
    kind = types_of(modifiers)[1]
    if not shape.endswith("k16") or types_of(modifiers)[0] != "f32" or kind not in ("f16", "bf16"):
        raise Unsupported(f"wgmma.{'.'.join(modifiers)}")
    d, a, b, accumulate, *flags = instruction.operands
    numbers = [flag.value for flag in flags]
    if numbers[:2] != [1, 1]:
        raise Unsupported("a negated factor")
    a_outer = len(numbers) == 4 and numbers[2]
    b_outer = numbers[-1]
    registers = [item.index for item in d.items]
    left = [reader(item, "b32") for item in _items(a)] if isinstance(a, Vector) else None
    a_at = None if left else reader(a, "b64")
    b_at = reader(b, "b64")
    keeps = reader(accumulate, "pred")

    def run(block: Block, mask: Array | None) -> None:
        _by_all(block, mask, "wgmma")
        held = None if left is None else [block.full(read(block)) for read in left]
        groups = block.threads // 128
        # One thread's descriptor and flag stand for those of its four warps.
        at = [block.full(read(block))[::128] if read else None for read in (a_at, b_at)]
        keep = block.full(keeps(block))[::128]

        def multiply() -> None:
            c = tensor_cores.c_fragment([block.full(block.registers[r]) for r in registers])
            rows = c.reshape(groups, 64, columns)
            made = np.zeros_like(rows)
            fragments = tensor_cores.a_fragment(held, kind) if held else None
            for g in range(groups):
                reader_id = 1_000 + g  # it is none of the warps that have written
                if fragments is not None:
                    factor = fragments[4 * g : 4 * g + 4].reshape(64, 16)
                else:
                    major = "outer" if a_outer else "k"
                    factor = tensor_cores.described_matrix(
                        block.shared, int(at[0][g]), 64, kind, major, reader_id
                    )
                other = tensor_cores.described_matrix(
                    block.shared,
                    int(at[1][g]),
                    columns,
                    kind,
                    "outer" if b_outer else "k",
                    reader_id,
                )
                before = rows[g] if keep[g] else np.zeros_like(rows[g])
                made[g] = tensor_cores.product(factor, other.T, before)
            values = tensor_cores.c_registers(made.reshape(-1, 16, columns))
            for r, value in zip(registers, values, strict=True):
                block.registers[r] = value

        block.products.append(multiply)

    return run


def _nothing(instruction: Instruction, kernel: Kernel) -> Step:
    return lambda block, mask: None


def _warp_barrier(instruction: Instruction, kernel: Kernel) -> Step:
    member = reader(instruction.operands[0], "b32")

    def run(block: Block, mask: Array | None) -> None:
        block.whole_warps(mask, _members(block, member(block), mask))

    return run


def _to_address(instruction: Instruction, kernel: Kernel) -> Step:
    """`cvta`: among generic addresses, those of global memory are its own; shared has a window."""
    target, source = instruction.operands
    window = SHARED_WINDOW if "shared" in instruction.modifiers else 0
    shift = np.uint64(-window & 2**64 - 1 if "to" in instruction.modifiers else window)
    if not window and "global" not in instruction.modifiers:
        raise Unsupported(instruction.line)
    read = reader(source, "u64")
    return lambda block, mask: block.write(target.index, read(block) + shift, mask)


_EFFECTS: dict[str, Callable[[Instruction, Kernel], Step]] = {
    "atom": _atomic,
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "mov": _move,
    "mad": _carried,
    "madc": _carried,
    "add": _carried,
    "addc": _carried,
    "shfl": _shuffle,
    "redux": _reduce,
    "vote": _vote,
    "cp": _copy_later,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "mma": _multiply_matrices,
    "wgmma": _multiply_later,
    "bar": _warp_barrier,
    "cvta": _to_address,
    "fence": _nothing,
    "membar": _nothing,
    "prefetch": _nothing,
}
