"""Instructions that compute a value from values of the same thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ptx.modifiers import COMPARISONS, types_of
from ptx.text import SIZES, Instruction, Unsupported
from ptx.values import DTYPES, Array, pair_of


class Computed(NamedTuple):
    """What an instruction computes: from values of ``sources`` by ``compute`` one of ``result``."""

    sources: tuple[str, ...]
    result: str
    compute: Callable[..., Array]
    #: Of a setp: joins the comparison with its third source.
    join: Callable[[Array, Array], Array] | None = None


def computed(instruction: Instruction) -> Computed | None:
    """None where the opcode is none of these."""
    made = _BUILDERS.get(instruction.opcode)
    return made(instruction.opcode, instruction.modifiers) if made else None


def _is_float(kind: str) -> bool:
    return kind.lstrip("b").startswith("f")


def _flushed(compute: Callable[..., Array]) -> Callable[..., Array]:
    """`.ftz`: subnormal inputs and results are zeros of their sign."""

    def flush(x: Array) -> Array:
        if x.dtype.kind != "f" or x.dtype.itemsize > 4:
            return x
        least = np.finfo(x.dtype).smallest_normal
        return np.where(np.abs(x) < least, np.copysign(x.dtype.type(0), x), x)

    return lambda *xs: flush(compute(*map(flush, xs)))


def _saturated(compute: Callable[..., Array]) -> Callable[..., Array]:
    """`.sat`: into [0, 1], NaN and -0 become +0."""

    def saturate(*xs: Array) -> Array:
        made = compute(*xs)
        return np.where(made > 0, np.minimum(made, 1), 0).astype(made.dtype)

    return saturate


_NAN = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]


def _canonical(compute: Callable[..., Array]) -> Callable[..., Array]:
    """NaN comes out of a float32 instruction as one NaN, whatever went in."""

    def one_nan(*xs: Array) -> Array:
        made = compute(*xs)
        if made.dtype == np.float32:
            wrong = np.isnan(made)
            if wrong.any():
                made = np.where(wrong, _NAN, made)
        return made

    return one_nan


def _finished(compute: Callable[..., Array], modifiers: tuple[str, ...]) -> Callable[..., Array]:
    compute = _saturated(compute) if "sat" in modifiers else compute
    compute = _flushed(compute) if "ftz" in modifiers else compute
    return _canonical(compute) if _is_float(types_of(modifiers)[-1]) else compute


def _trunc_div(a: Array, b: Array) -> Array:
    """Towards zero; by zero it is undefined, and no fault."""
    b = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = a // b
    if a.dtype.kind == "u":
        return quotient
    return (quotient + ((quotient < 0) & (quotient * b != a))).astype(a.dtype)


def _rem(a: Array, b: Array) -> Array:
    return a - _trunc_div(a, b) * b


def _wide(a: Array) -> Array:
    return a.astype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")


def _high_of_product(a: Array, b: Array) -> Array:
    if a.dtype.itemsize < 8:
        return (_wide(a) * _wide(b) >> (8 * a.dtype.itemsize)).astype(a.dtype)
    if a.dtype.kind == "i":
        high = _high_of_product(a.view(np.uint64), b.view(np.uint64))
        high = high - np.where(a < 0, b.view(np.uint64), 0) - np.where(b < 0, a.view(np.uint64), 0)
        return high.astype(np.uint64).view(np.int64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    cross = (a >> half) * (b & low) + ((a & low) * (b & low) >> half)
    other = (a & low) * (b >> half) + (cross & low)
    return (a >> half) * (b >> half) + (cross >> half) + (other >> half)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once; but twice in float64, in bf16, and in float32 where the sum in
    float64 lies within its own rounding of a tie."""
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(a.dtype)


_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "rem": _rem,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype),
    "rcp": lambda x: (1 / x.astype(np.float64)).astype(x.dtype),
    "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(x.dtype),
    "lg2": lambda x: np.log2(x.astype(np.float64)).astype(x.dtype),
    "sin": lambda x: np.sin(x.astype(np.float64)).astype(x.dtype),
    "cos": lambda x: np.cos(x.astype(np.float64)).astype(x.dtype),
    "tanh": lambda x: np.tanh(x.astype(np.float64)).astype(x.dtype),
}


def _binary(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    compute = _BINARY[opcode]
    if "sat" in modifiers and not _is_float(kind):
        raise Unsupported(f"{opcode}.sat.{kind}")
    return Computed((kind, kind), kind, _finished(compute, modifiers))


def _unary(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    return Computed((kind,), kind, _finished(_UNARY[opcode], modifiers))


def _divide(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    compute = np.divide if _is_float(kind) else _trunc_div
    return Computed((kind, kind), kind, _finished(compute, modifiers))


def _extreme(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    whole = not _is_float(pair_of(kind) or kind)
    nan = "NaN" in modifiers or whole
    two = {"max": np.maximum if nan else np.fmax, "min": np.minimum if nan else np.fmin}[opcode]

    def signed(a: Array, b: Array) -> Array:
        # +0 is more than -0.
        zeros = (a == 0) & (b == 0)
        made = two(a, b)
        return np.where(zeros, a + b if opcode == "max" else -(-a - b), made)

    compute = two if whole else signed
    if "relu" in modifiers:
        limited = compute
        compute = lambda a, b: np.maximum(limited(a, b), 0).astype(a.dtype)  # noqa: E731
    return Computed((kind, kind), kind, compute if whole else _finished(compute, modifiers))


def _multiply(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    if "wide" in modifiers:
        result = f"{kind[0]}{2 * int(kind[1:])}"
        return Computed((kind, kind), result, lambda a, b: _wide(a) * _wide(b))
    if "hi" in modifiers:
        return Computed((kind, kind), kind, _high_of_product)
    return Computed((kind, kind), kind, _finished(np.multiply, modifiers))


def _multiply_add(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    if _is_float(pair_of(kind) or kind):
        compute = fused
        if "relu" in modifiers:
            compute = lambda a, b, c: np.maximum(fused(a, b, c), 0).astype(a.dtype)  # noqa: E731
        return Computed((kind,) * 3, kind, _finished(compute, modifiers))
    if "wide" in modifiers:
        result = f"{kind[0]}{2 * int(kind[1:])}"
        return Computed((kind, kind, result), result, lambda a, b, c: _wide(a) * _wide(b) + c)
    if "hi" in modifiers:
        return Computed((kind,) * 3, kind, lambda a, b, c: _high_of_product(a, b) + c)
    return Computed((kind,) * 3, kind, lambda a, b, c: a * b + c)


def _shift(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    width = 8 * SIZES[kind]

    def left(a: Array, by: Array) -> Array:
        shifted = a << np.minimum(by, width - 1).astype(a.dtype)
        return np.where(by < width, shifted, 0).astype(a.dtype)

    def right(a: Array, by: Array) -> Array:
        shifted = a >> np.minimum(by, width - 1).astype(a.dtype)
        return shifted if a.dtype.kind == "i" else np.where(by < width, shifted, 0).astype(a.dtype)

    return Computed((kind, "u32"), kind, left if opcode == "shl" else right)


def _funnel(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    most = 32 if "clamp" in modifiers else 31

    def shift(low: Array, high: Array, by: Array) -> Array:
        both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        by = (np.minimum(by, 32) if most == 32 else by & 31).astype(np.uint64)
        both = both << by >> np.uint64(32) if "l" in modifiers else both >> by
        return both.astype(np.uint32)

    return Computed(("u32",) * 3, "u32", shift)


_COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def _compare(modifiers: tuple[str, ...], kind: str) -> Callable[[Array, Array], Array]:
    """The comparison among the modifiers of a setp."""
    name = next(each for each in modifiers if each in COMPARISONS)
    if not _is_float(kind):
        return _COMPARED[name]

    def unordered(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name == "nan":
        return unordered
    ordered = _COMPARED[name.removesuffix("u") if len(name) == 3 else name]
    if len(name) == 3:
        return lambda a, b: ordered(a, b) | unordered(a, b)
    return lambda a, b: ordered(a, b) & ~unordered(a, b)


def _set_predicate(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    test = _compare(modifiers, kind)
    if "ftz" in modifiers:
        inner = _flushed(lambda a, b: np.stack(np.broadcast_arrays(a, b)))
        plain = test
        test = lambda a, b: plain(*inner(a, b))  # noqa: E731
    join = next((_BINARY[each] for each in modifiers if each in ("and", "or", "xor")), None)
    sources = (kind, kind) if join is None else (kind, kind, "pred")
    return Computed(sources, "pred", test, join)


def _select(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    kind = f"b{8 * SIZES[kind]}"
    return Computed((kind, kind, "pred"), kind, lambda a, b, p: np.where(p, a, b))


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint, "rmi": np.floor, "rpi": np.ceil, "rzi": np.trunc,
}  # fmt: skip


def _convert(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    result, source = types_of(modifiers)
    if pair_of(result):
        half = DTYPES[pair_of(result)]
        if {"sat", "ftz"} & set(modifiers):
            raise Unsupported("a pair that is saturated or flushed")

        def pack(upper: Array, lower: Array) -> Array:
            return np.stack(np.broadcast_arrays(lower.astype(half), upper.astype(half)), -1)

        return Computed((source, source), result, pack)
    rounding = next((_ROUNDINGS[each] for each in modifiers if each in _ROUNDINGS), None)
    into = DTYPES[result]

    def to_integer(x: Array) -> Array:
        # 2^63 and 2^64 have no neighbour below that is an integer of 64 bits in float64.
        low, high = float(np.iinfo(into).min), float(np.iinfo(into).max)
        x = rounding(x.astype(np.float64))
        inside = np.where((x > low) & (x < high), x, 0).astype(into)
        made = np.where(
            x >= high, np.iinfo(into).max, np.where(x <= low, np.iinfo(into).min, inside)
        )
        wide = source == "f64" or into.itemsize == 8
        nothing = np.array([1 << 8 * into.itemsize - 1 if wide else 0], f"u{into.itemsize}")
        return np.where(np.isnan(x), nothing.view(into), made).astype(into)

    def to_float(x: Array) -> Array:
        return (rounding(x) if rounding else x).astype(into)

    def to_same(x: Array) -> Array:
        if "sat" in modifiers:
            return np.clip(x, np.iinfo(into).min, np.iinfo(into).max).astype(into)
        return x.astype(into)

    if _is_float(source):
        compute = to_float if _is_float(result) else to_integer
    else:
        compute = to_float if _is_float(result) else to_same
    if "sat" in modifiers and _is_float(result):
        compute = _saturated(compute)
    return Computed((source,), result, _flushed(compute) if "ftz" in modifiers else compute)


def _extract(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    width = 8 * SIZES[kind]

    def extract(a: Array, start: Array, count: Array) -> Array:
        a, start, count = np.broadcast_arrays(a, start & 255, count & 255)
        left = np.maximum(width - start.astype(np.int64) - count, 0)
        unsigned = a.astype(np.int64) if kind[0] == "s" else a.astype(np.uint64)
        if width == 64:
            raise Unsupported("bfe of 64 bits")
        high = np.minimum(64 - width + left, 63).astype(unsigned.dtype)
        made = unsigned << high >> np.minimum(high + start, 63).astype(unsigned.dtype)
        nothing = (count == 0) | ((start >= width) if kind[0] == "u" else False)
        return np.where(nothing, 0, made).astype(a.dtype)

    return Computed((kind, "u32", "u32"), kind, extract)


def _insert(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    if kind != "b32":
        raise Unsupported(f"bfi.{kind}")

    def insert(a: Array, b: Array, start: Array, count: Array) -> Array:
        start, count = (start & 255).astype(np.uint64), (count & 255).astype(np.uint64)
        ones = (np.uint64(1) << np.minimum(count, 63)) - np.uint64(1)
        mask = (np.where(count >= 64, ~np.uint64(0), ones) << np.minimum(start, 63)).astype(b.dtype)
        moved = (a.astype(np.uint64) << np.minimum(start, 63)).astype(b.dtype)
        return b & ~mask | moved & mask

    return Computed((kind, kind, "u32", "u32"), kind, insert)


def _permute(opcode: str, modifiers: tuple[str, ...]) -> Computed:

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        made = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint64)
        for byte in range(4):
            nibble = (selector >> np.uint32(4 * byte) & 15).astype(np.uint64)
            value = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
            value = np.where(nibble & np.uint64(8), sign, value)
            made = made | value << np.uint64(8 * byte)
        return made.astype(np.uint32)

    return Computed(("b32",) * 3, "b32", permute)


def _logic(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    def logic(a: Array, b: Array, c: Array, table: Array) -> Array:
        made = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
        for row in range(8):
            if int(table[0]) >> row & 1:
                made = made | (
                    (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
                )
        return made

    return Computed(("b32",) * 4, "b32", logic)


def _count_bits(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    width = 8 * SIZES[kind]

    def bits(x: Array) -> Array:
        as_bytes = np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, -1)
        return np.unpackbits(as_bytes, axis=-1, bitorder="little")

    def highest(x: Array) -> Array:
        found = bits(x)
        at = width - 1 - np.argmax(found[..., ::-1], -1)
        return np.where(found.any(-1), at, -1)

    compute = {
        "popc": lambda x: bits(x).sum(-1, dtype=np.uint32),
        "clz": lambda x: (width - 1 - highest(x)).astype(np.uint32),
        "bfind": lambda x: (
            (
                np.where(highest(x) < 0, -1, width - 1 - highest(x))
                if "shiftamt" in modifiers
                else highest(x)
            )
            .astype(np.int32)
            .view(np.uint32)
        ),
        "brev": lambda x: np.packbits(bits(x)[..., ::-1], axis=-1, bitorder="little").view(x.dtype)[
            ..., 0
        ],
    }[opcode]
    if opcode == "bfind" and kind[0] == "s":
        raise Unsupported("bfind of a signed number")
    return Computed((kind,), kind if opcode == "brev" else "u32", compute)


def _copysign(opcode: str, modifiers: tuple[str, ...]) -> Computed:
    (kind,) = types_of(modifiers)
    return Computed((kind, kind), kind, lambda sign, x: np.copysign(x, sign))


_BUILDERS: dict[str, Callable[[str, tuple[str, ...]], Computed]] = {
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(("min", "max"), _extreme),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("mad", "fma"), _multiply_add),
    **dict.fromkeys(("popc", "clz", "bfind", "brev"), _count_bits),
    "div": _divide,
    "mul": _multiply,
    "shf": _funnel,
    "setp": _set_predicate,
    "selp": _select,
    "cvt": _convert,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _logic,
    "copysign": _copysign,
}
