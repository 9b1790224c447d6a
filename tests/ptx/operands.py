"""Reading an instruction's operands and writing its results, for the threads of a mask."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.block import WARP, Block
from ptx.text import (
    SIZES,
    Address,
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
            if name in block.special:
                return decode(block.special[name], kind)
            if name not in block.symbols:
                raise Unsupported(f"the name {name}")
            return decode(np.array([block.symbols[name]], np.uint64), kind)

        return symbol
    raise Unsupported(f"a source like {operand}")


def addresses_of(address: Operand, space: str, kernel: Kernel) -> Reader:
    """The bytes' addresses, in 64 bits; those of memory but global may be held in 32."""
    if not isinstance(address, Address):
        raise Unsupported(f"an address like {address}")
    offset = np.array([address.offset & 2**64 - 1], np.uint64)
    base = address.base
    if base is None:
        return lambda block: offset
    narrow = (
        space in ("shared", "local", "param")
        and isinstance(base, Register)
        and SIZES[kernel.registers[base.index]] == 4
    )
    read = reader(base, "u32" if narrow else "u64")

    def addresses(block: Block) -> Array:
        made = read(block).astype(np.uint64) + offset
        return made & np.uint64(0xFFFFFFFF) if narrow else made

    return addresses


def items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def chosen(block: Block, values: Array, mask: Array | None) -> Array:
    """The values of the threads that run."""
    values = block.full(values)
    return values if mask is None else values[mask]


def put(
    block: Block, item: Operand, values: Array, kind: str, kernel: Kernel, mask: Array | None
) -> None:
    """Writes values of the threads that run, of this type, to a register, or drops them."""
    if isinstance(item, Sink):
        return
    bits = encode(values, kind, kernel.registers[item.index])
    if mask is not None:
        scattered = np.zeros(block.threads, bits.dtype)
        scattered[mask] = bits
        bits = scattered
    block.write(item.index, bits, mask)


def bits_of(kind: str) -> str:
    """The type whose bits are moved: a sign is kept, a float is bits."""
    return kind if kind[0] == "s" else f"b{8 * SIZES[kind]}"


def lanes(values: Array) -> Array:
    return values.reshape(-1, WARP)


def by_all(block: Block, mask: Array | None, what: str) -> None:
    """Refuses what only some threads of the block do."""
    if mask is not None and not (mask | block.ended).all():
        raise Unsupported(f"{what} by some of the block's threads")
