"""Rotary angles that keep their precision at every int32 position, in integers and fp32."""

import math

import triton
import triton.language as tl

# 2^65 / 2 pi, to the nearest integer. It fits into 63 bits, so that signed and unsigned agree.
_TURN = tl.constexpr(5871781006564002453)
# A phase that was shifted left by two counts quarter turns in units of 2^-32.
_QUARTER = tl.constexpr(math.pi / 2 / 2**32)


@triton.jit
def turns_per_position(inv_freq):
    """inv_freq / 2 pi in units of 2^-64 turns, as int64 that wraps at a whole turn.

    Integers, because the product with a position then reduces itself modulo one turn and is exact:
    neither fp64 nor a splitting of the position is needed. The error is below 1.25 units of 2^-63
    turns for frequencies below 2, hence below 2e-9 radians at every int32 position.
    """
    bits = inv_freq.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 0xFF
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    # inv_freq = mantissa 2^(exponent - 150), and scaled = mantissa 2^40 / 2 pi.
    scaled = tl.umulhi(mantissa << 39, tl.full(mantissa.shape, _TURN, tl.int64))
    right = tl.minimum(tl.maximum(126 - exponent, 0), 63).to(tl.int64)
    left = tl.minimum(tl.maximum(exponent - 126, 0), 63).to(tl.int64)
    turns = (scaled >> right) << left
    return tl.where(bits < 0, -turns, turns)


@triton.jit
def cos_sin(positions, turns):
    """Cosine and sine of positions * turns, within 1.5e-7 at every int32 position.

    The top 32 bits of the product are the phase. Its nearest quarter turn is taken off as an
    integer, so what fp32 rounds is at most an eighth of a turn. The polynomials are the
    single-precision ones of Cephes: libdevice's sin and cos bring a slow path with local memory.
    """
    phase = ((positions.to(tl.int64) * turns) >> 32).to(tl.int32)
    quadrant = ((phase >> 29) + 1) >> 1
    x = (phase << 2).to(tl.float32) * _QUARTER
    z = x * x
    sin = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1.0 + z * (-0.5 + z * (4.1666645683e-2 + z * (-1.3887316255e-3 + z * 2.4433157118e-5)))
    odd = (quadrant & 1) != 0
    swapped_cos = tl.where(odd, sin, cos)
    swapped_sin = tl.where(odd, cos, sin)
    cos = tl.where(((quadrant + 1) & 2) != 0, -swapped_cos, swapped_cos)
    sin = tl.where((quadrant & 2) != 0, -swapped_sin, swapped_sin)
    return cos, sin
