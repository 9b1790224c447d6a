"""Registers hold bits; a type says what they mean.

A value is an array with an element for each thread, or with one element for all of them. bf16,
which numpy lacks, is float32 while it is computed with; a pair (``f16x2``) has a second axis.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx.text import SIZES, Number, Unsupported

Array = NDArray[Any]

#: Registers of a declared type are kept as these.
_STORED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
#: numpy's type for each of PTX.
DTYPES = {
    name: np.dtype(f"{_KINDS[name[0]]}{size}") for name, size in SIZES.items() if name != "bf16"
} | {"bf16": np.dtype(np.float32), "pred": np.dtype(bool)}
# Each byte 0xA5: a small negative number in every float type, never what a test expects.
_POISON = 0xA5A5A5A5A5A5A5A5


def stored(kind: str) -> np.dtype[Any]:
    """What holds a register of this declared type."""
    return DTYPES["pred"] if kind == "pred" else _STORED[SIZES[kind]]


@cache
def poison(kind: str) -> Array:
    """What a register holds before anything is written to it."""
    if kind == "pred":
        return np.array([False])
    return np.array([_POISON & (1 << 8 * SIZES[kind]) - 1], stored(kind))


def pair_of(kind: str) -> str | None:
    """``f16`` for ``f16x2``."""
    return kind[:-2] if kind.endswith("x2") else None


def literal(number: Number, kind: str) -> Array:
    """A literal as bits of this type."""
    if kind == "pred":
        return np.array([number.value != 0])
    size = SIZES[pair_of(kind) or kind] * (2 if pair_of(kind) else 1)
    if number.float_bits and number.float_bits != 8 * size:
        raise Unsupported(f"a literal of {number.float_bits} bits for {kind}")
    return np.array([number.value & (1 << 8 * size) - 1], _STORED[size])


def decode(bits: Array, kind: str) -> Array:
    """What the bits of a register mean; a wider register gives its low part."""
    return decoder(kind)(bits)


def encode(values: Array, kind: str, register: str) -> Array:
    """The bits that a register of type ``register`` keeps of values of type ``kind``."""
    return encoder(kind, register)(values)


@cache
def decoder(kind: str) -> Callable[[Array], Array]:
    """`decode` for one type."""
    if kind == "pred":
        return lambda bits: bits
    single = pair_of(kind)
    if single is not None:
        half = decoder(single)
        return lambda bits: half(np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2))
    unsigned, meant = _STORED[SIZES[kind]], DTYPES[kind]

    def narrow(bits: Array) -> Array:
        if bits.dtype.itemsize < unsigned.itemsize:
            raise Unsupported(f"a register of {bits.dtype.itemsize} bytes read as {kind}")
        return bits.astype(unsigned)

    if kind == "bf16":
        return lambda bits: (bits.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if meant == unsigned:
        return lambda bits: bits if bits.dtype == unsigned else narrow(bits)
    return lambda bits: (bits if bits.dtype == unsigned else narrow(bits)).view(meant)


@cache
def encoder(kind: str, register: str) -> Callable[[Array], Array]:
    """`encode` for one pair of types."""
    if register == "pred":
        return lambda values: values
    single = pair_of(kind)
    if single is not None:
        half = encoder(single, "b16")
        return lambda values: np.ascontiguousarray(half(values)).view(np.uint32).reshape(-1)
    into, meant = stored(register), DTYPES[kind]
    if kind == "bf16":
        return lambda values: to_bf16(values).astype(into)
    if meant.itemsize == into.itemsize:
        return lambda values: (values if values.dtype == meant else values.astype(meant)).view(into)
    unsigned = _STORED[meant.itemsize]
    # A loaded or converted sign goes on.
    wide = np.dtype(f"i{into.itemsize}") if meant.kind == "i" else None

    def other(values: Array) -> Array:
        values = values.astype(meant)
        return (values.view(unsigned) if wide is None else values.astype(wide)).astype(into)

    return other


def to_bf16(values: Array) -> Array:
    """float32 rounded to the nearest bf16, ties to even; NaN is the canonical one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def all_threads(value: Array, threads: int) -> Array:
    """A value with an element for each thread."""
    return (
        value if value.shape[0] == threads else np.broadcast_to(value, (threads, *value.shape[1:]))
    )
