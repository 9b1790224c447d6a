"""What instructions on numbers give in the machine that runs PTX."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import text
from ptx.small_kernels import as_bits, as_float, of_lanes, run, signed

WORDS = st.integers(0, 2**32 - 1)
EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x0F0F1234]


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


WHOLE = {
    "add.s32 %r10, %r1, %r2;": lambda a, b, c: a + b,
    "sub.s32 %r10, %r1, %r2;": lambda a, b, c: a - b,
    "mul.lo.s32 %r10, %r1, %r2;": lambda a, b, c: a * b,
    "mul.hi.s32 %r10, %r1, %r2;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul.hi.u32 %r10, %r1, %r2;": lambda a, b, c: a * b >> 32,
    "mad.lo.s32 %r10, %r1, %r2, %r3;": lambda a, b, c: a * b + c,
    "max.s32 %r10, %r1, %r2;": lambda a, b, c: max(signed(a), signed(b)),
    "min.u32 %r10, %r1, %r2;": lambda a, b, c: min(a, b),
    "max.relu.s32 %r10, %r1, %r2;": lambda a, b, c: max(signed(a), signed(b), 0),
    "abs.s32 %r10, %r1;": lambda a, b, c: abs(signed(a)),
    "shl.b32 %r10, %r1, %r2;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %r10, %r1, %r2;": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 %r10, %r1, %r2;": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r10, %r1, %r2, %r3;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32 %r10, %r1, %r2, %r3;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "lop3.b32 %r10, %r1, %r2, %r3, 0xE8;": lambda a, b, c: a & b | a & c | b & c,
    "popc.b32 %r10, %r1;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %r10, %r1;": lambda a, b, c: 32 - a.bit_length(),
    "bfind.u32 %r10, %r1;": lambda a, b, c: a.bit_length() - 1,
    "bfind.shiftamt.u32 %r10, %r1;": lambda a, b, c: 32 - a.bit_length() if a else -1,
    "brev.b32 %r10, %r1;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "bfe.u32 %r10, %r1, 5, 9;": lambda a, b, c: a >> 5 & 511,
    "bfe.s32 %r10, %r1, 5, 9;": lambda a, b, c: signed(a >> 5 & 511, 9),
    "bfe.s32 %r10, %r1, 28, 9;": lambda a, b, c: signed(a) >> 28,
    "bfi.b32 %r10, %r1, %r2, 7, 10;": lambda a, b, c: b & ~(1023 << 7) | (a & 1023) << 7,
    "prmt.b32 %r10, %r1, %r2, 0x5410;": lambda a, b, c: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 %r10, %r1, %r2, 0x7770U;": lambda a, b, c: (
        a & 255 | (b >> 24 << 8) | (b >> 24 << 16) | (b >> 24 << 24)
    ),
    "prmt.b32 %r10, %r1, %r2, 0xB;": lambda a, b, c: (
        (255 if a >> 31 else 0) | (a & 255) * 0x1010100
    ),
    "add.cc.u32 %r9, %r1, %r2; addc.u32 %r10, %r3, 0;": lambda a, b, c: c + (a + b >> 32),
    "mad.lo.cc.u32 %r9, %r1, %r2, %r3; madc.hi.u32 %r10, %r1, %r2, 0;": lambda a, b, c: (
        a * b + c >> 32
    ),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r10, 1, 0, %p1;": lambda a, b, c: signed(a) < signed(b),
    "setp.lt.u32 %p1, %r1, %r2; selp.b32 %r10, 1, 0, %p1;": lambda a, b, c: a < b,
    "setp.ne.b32 %p3, %r3, 0; setp.ge.and.s32 %p1|%p2, %r1, %r2, %p3; selp.b32 %r10, 1, 0, %p2;": (
        lambda a, b, c: signed(a) < signed(b) and c != 0
    ),
    "setp.ne.b32 %p3, %r3, 0; setp.ge.or.s32 _|%p2, %r1, %r2, %p3; selp.b32 %r10, 1, 0, %p2;": (
        lambda a, b, c: signed(a) < signed(b) or c != 0
    ),
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r10, {%h2, %h1};": lambda a, b, c: a << 16 | a >> 16,
    "cvt.u16.u32 %h1, %r1; cvt.s32.s16 %r10, %h1;": lambda a, b, c: signed(a & 0xFFFF, 16),
    "add.s16x2 %r10, %r1, %r2;": lambda a, b, c: (
        a + b & 0xFFFF | ((a >> 16) + (b >> 16) & 0xFFFF) << 16
    ),
}  # fmt: skip


@pytest.mark.parametrize("instructions", WHOLE)
@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(*[st.one_of(WORDS, st.sampled_from(EDGES))] * 3), min_size=32, max_size=32)
)
def test_whole_numbers(instructions, inputs):
    got = of_lanes(instructions, *map(list, zip(*inputs)))
    wanted = [int(WHOLE[instructions](*each)) & 0xFFFFFFFF for each in inputs]
    assert got == wanted


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=32, max_size=32))
def test_division(inputs):
    a, b = map(list, zip(*inputs))
    quotients = of_lanes("div.s32 %r10, %r1, %r2;", a, b)
    assert quotients == [towards_zero(signed(x), signed(y)) & 0xFFFFFFFF for x, y in inputs]
    remainders = of_lanes("rem.s32 %r10, %r1, %r2;", a, b)
    wanted = [signed(x) - towards_zero(signed(x), signed(y)) * signed(y) for x, y in inputs]
    assert remainders == [each & 0xFFFFFFFF for each in wanted]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS), min_size=32, max_size=32))
def test_products_of_64_bits(inputs):
    pack = "mov.b64 %rd21, {%r1, %r2}; mov.b64 %rd22, {%r3, %r4};"
    lists = list(map(list, zip(*inputs)))
    pairs = [(b << 32 | a, d << 32 | c) for a, b, c, d in inputs]
    high = of_lanes(pack + "mul.hi.u64 %rd20, %rd21, %rd22;", *lists, bits=64)
    assert high == [x * y >> 64 for x, y in pairs]
    high = of_lanes(pack + "mul.hi.s64 %rd20, %rd21, %rd22;", *lists, bits=64)
    assert high == [signed(x, 64) * signed(y, 64) >> 64 & 2**64 - 1 for x, y in pairs]
    wide = of_lanes("mul.wide.s32 %rd20, %r1, %r2;", *lists[:2], bits=64)
    assert wide == [signed(a) * signed(b) & 2**64 - 1 for a, b, *_ in inputs]


FLOATS = [0.0, -0.0, 1.0, -2.5, 3.1e-39, 1e38, -1e38, math.inf, -math.inf, math.nan, 0.1, 2.0**31]


REAL = {
    "add.f32 %r10, %r1, %r2;": lambda a, b: np.add(a, b),
    "mul.f32 %r10, %r1, %r2;": lambda a, b: np.multiply(a, b),
    "max.f32 %r10, %r1, %r2;": lambda a, b: np.fmax(a, b),
    "min.NaN.f32 %r10, %r1, %r2;": lambda a, b: np.minimum(a, b),
    "neg.f32 %r10, %r1;": lambda a, b: -a,
    "setp.ne.f32 %p1, %r1, %r2; selp.f32 %r10, 0f3F800000, 0f00000000, %p1;": lambda a, b: (
        (a != b) & ~np.isnan(a) & ~np.isnan(b)
    ),
    "setp.neu.f32 %p1, %r1, %r2; selp.f32 %r10, 0f3F800000, 0f00000000, %p1;": lambda a, b: a != b,
    "setp.gtu.f32 %p1, %r1, %r2; selp.f32 %r10, 0f3F800000, 0f00000000, %p1;": lambda a, b: (
        ~(a <= b)
    ),
    "setp.num.f32 %p1, %r1, %r2; selp.f32 %r10, 0f3F800000, 0f00000000, %p1;": lambda a, b: (
        ~(np.isnan(a) | np.isnan(b))
    ),
    "mul.ftz.f32 %r10, %r1, %r2;": lambda a, b: flush(flush(a) * flush(b)),
    "cvt.rmi.f32.f32 %r10, %r1;": lambda a, b: np.floor(a),
    "cvt.rn.f16x2.f32 %r9, %r1, %r2; mov.b32 {%h1, %h2}, %r9; cvt.f32.f16 %r10, %h2;": (
        lambda a, b: a.astype(np.float16).astype(np.float32)
    ),
    "cvt.rn.bf16.f32 %h1, %r1; cvt.f32.bf16 %r10, %h1;": lambda a, b: (
        torch.from_numpy(a).bfloat16().float().numpy()
    ),
}  # fmt: skip


def test_zeros_and_nan_have_one_sign():
    zero, minus, nan, inf = 0, 1 << 31, 0xFFC00001, as_bits(math.inf)
    assert of_lanes("max.f32 %r10, %r1, %r2;", [zero] * 32, [minus] * 32)[0] == zero
    assert of_lanes("min.f32 %r10, %r1, %r2;", [zero] * 32, [minus] * 32)[0] == minus
    for instruction in ("add.f32 %r10, %r1, %r2;", "mul.f32 %r10, %r1, %r2;"):
        assert of_lanes(instruction, [nan] * 32, [zero] * 32)[0] == 0x7FFFFFFF
    assert of_lanes("sub.f32 %r10, %r1, %r2;", [inf] * 32, [inf] * 32)[0] == 0x7FFFFFFF


def flush(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(np.float32)


@pytest.mark.parametrize("instructions", REAL)
def test_real_numbers(instructions):
    pairs = [(a, b) for a in FLOATS for b in FLOATS]
    pairs += [(0.0, 0.0)] * (-len(pairs) % 32)
    a, b = (np.array(each, np.float32) for each in zip(*pairs))
    got = of_lanes(
        instructions, a.view(np.uint32).tolist(), b.view(np.uint32).tolist(), threads=len(pairs)
    )
    with np.errstate(all="ignore"):
        wanted = np.asarray(REAL[instructions](a, b), np.float32)
    got = np.array(got, np.uint32).view(np.float32)
    np.testing.assert_array_equal(got, wanted)
    numbers = ~np.isnan(wanted) & (wanted != 0)
    assert (np.signbit(got) == np.signbit(wanted))[numbers].all()


@pytest.mark.parametrize(
    ("value", "wanted"),
    ((2.5, 2), (3.5, 4), (-2.5, -2), (3e9, 2**31 - 1), (-3e9, -(2**31)), (math.nan, 0)),
)
def test_a_float_becomes_the_nearest_integer_there_is(value, wanted):
    got = of_lanes("cvt.rni.s32.f32 %r10, %r1;", [as_bits(value)] * 32)
    assert [signed(each) for each in got] == [wanted] * 32


def test_a_number_that_is_none_becomes_an_integer():
    nan = [as_bits(math.nan)] * 32
    assert of_lanes("cvt.rzi.s32.f32 %r10, %r1;", nan)[0] == 0
    assert of_lanes("cvt.rzi.s64.f32 %rd20, %r1;", nan, bits=64)[0] == 1 << 63


def test_a_fused_sum_is_rounded_once():
    a, b, c = 1 + 2.0**-23, 1 + 2.0**-23, -1 - 2.0**-22
    got = of_lanes("fma.rn.f32 %r10, %r1, %r2, %r3;", *[[as_bits(x)] * 32 for x in (a, b, c)])
    assert as_float(got[0]) == 2.0**-46
    got = of_lanes(
        "mul.f32 %r9, %r1, %r2; add.f32 %r10, %r9, %r3;",
        *[[as_bits(x)] * 32 for x in (a, b, c)],
    )
    assert as_float(got[0]) == 0


def test_what_is_not_known_is_refused():
    with pytest.raises(text.Unsupported, match="the opcode frobnicate"):
        run("frobnicate.b32 %r1, %r0;", torch.zeros(1))
    with pytest.raises(text.Unsupported, match="add with rz"):
        run("add.rz.f32 %r1, %r0, %r0;", torch.zeros(1))
