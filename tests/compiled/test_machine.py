"""The machine that runs PTX: what instructions give, and the faults that it is there to find."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ptx import text
from ptx.machine import Program
from ptx.memory import Fault, GlobalMemory

WORDS = st.integers(0, 2**32 - 1)
EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x0F0F1234]


def run(body: str, *tensors: torch.Tensor, threads: int = 32, shared: int = 0, grid=(1,)) -> None:
    """A kernel of ``body`` on these tensors' addresses, ``%rd0`` on; ``%r0`` is the thread."""
    parameters = ",".join(f".param .u64 k_{i}" for i in range(len(tensors)))
    loads = "".join(f"ld.param.u64 %rd{i}, [k_{i}];" for i in range(len(tensors)))
    ptx = f""".version 8.0
    .target sm_90a
    .address_size 64
    .extern .shared .align 16 .b8 smem[];
    .visible .entry k({parameters}) {{
      .reg .pred %p<8>; .reg .b16 %h<32>; .reg .b32 %r<64>; .reg .b64 %rd<32>;
      {loads} mov.u32 %r0, %tid.x; {body} ret;
    }}"""
    memory = GlobalMemory()
    for i, tensor in enumerate(tensors):
        memory.add(tensor.data_ptr(), tensor.untyped_storage().nbytes(), f"tensor {i}")
    Program(text.parse(ptx)["k"]).launch(
        grid, threads, [t.data_ptr() for t in tensors], memory, shared
    )


def of_lanes(instructions: str, *inputs: list[int], bits: int = 32, threads: int = 32) -> list[int]:
    """``%r10`` (``%rd20`` for 64 bits) of each thread after instructions on ``%r1``, ``%r2`` ..."""
    given_ = torch.tensor([list(map(signed, each)) for each in inputs], dtype=torch.int32)
    out = torch.zeros(threads, dtype=torch.int64 if bits == 64 else torch.int32)
    loads = "".join(
        f"ld.global.b32 %r{i + 1}, [%rd11+{4 * threads * i}];" for i in range(len(inputs))
    )
    result = "%rd20" if bits == 64 else "%r10"
    run(
        f"mul.wide.u32 %rd10, %r0, 4; add.s64 %rd11, %rd0, %rd10; {loads} {instructions}"
        f"mul.wide.u32 %rd12, %r0, {bits // 8}; add.s64 %rd13, %rd1, %rd12;"
        f"st.global.b{bits} [%rd13], {result};",
        given_.reshape(-1), out, threads=threads,
    )  # fmt: skip
    return [value & (1 << bits) - 1 for value in out.tolist()]


def signed(value: int, bits: int = 32) -> int:
    return value - (value >> bits - 1 << bits)


def as_float(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


def as_bits(value: float) -> int:
    return struct.unpack("I", struct.pack("f", value))[0]


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


def test_a_thread_has_memory_of_its_own():
    body = """.local .align 8 .b8 first[8]; .local .align 4 .b8 second[8]; mov.b64 %rd21, second;
      add.u32 %r5, %r0, 7; st.local.b32 [%rd21+4], %r5; mov.b64 %rd22, first;
      st.local.b32 [%rd22], %r0; ld.local.b32 %r10, [%rd21+4];"""
    assert of_lanes(body) == [i + 7 for i in range(32)]
    with pytest.raises(Fault, match="local memory at byte 16 of 16"):
        of_lanes(body + "ld.local.b32 %r10, [%rd21+8];")


def test_a_generic_address_means_either_memory():
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """mov.u64 %rd4, smem; cvta.shared.u64 %rd5, %rd4; shl.b32 %r2, %r0, 2;
        mul.wide.u32 %rd6, %r2, 1; add.s64 %rd7, %rd5, %rd6; add.s64 %rd8, %rd0, %rd6;
        setp.lt.u32 %p1, %r0, 20; selp.b64 %rd9, %rd7, %rd8, %p1; st.u32 [%rd9], %r0;
        ld.u32 %r3, [%rd9]; add.u32 %r4, %r3, 100; st.global.b32 [%rd8+128], %r4;""",
        out, shared=128,
    )  # fmt: skip
    assert out.tolist() == [0] * 20 + list(range(20, 32)) + list(range(100, 132))


def test_a_fused_sum_is_rounded_once():
    a, b, c = 1 + 2.0**-23, 1 + 2.0**-23, -1 - 2.0**-22
    got = of_lanes("fma.rn.f32 %r10, %r1, %r2, %r3;", *[[as_bits(x)] * 32 for x in (a, b, c)])
    assert as_float(got[0]) == 2.0**-46
    got = of_lanes(
        "mul.f32 %r9, %r1, %r2; add.f32 %r10, %r9, %r3;",
        *[[as_bits(x)] * 32 for x in (a, b, c)],
    )
    assert as_float(got[0]) == 0


def test_shuffles():
    lanes = list(range(32))
    assert of_lanes("shfl.sync.bfly.b32 %r10, %r1, 5, 31, -1;", lanes) == [i ^ 5 for i in lanes]
    assert of_lanes("shfl.sync.idx.b32 %r10, %r1, 7, 31, -1;", lanes) == [7] * 32
    up = of_lanes("shfl.sync.up.b32 %r10, %r1, 3, 0, -1;", lanes)
    assert up == [i - 3 if i >= 3 else i for i in lanes]
    down = of_lanes("shfl.sync.down.b32 %r10, %r1, 30, 31, -1;", lanes)
    assert down == [30, 31, *range(2, 32)]
    # Halves of a warp: the upper bits of the last operand but one.
    half = of_lanes("shfl.sync.idx.b32 %r10, %r1, 1, 0x101f, -1;", lanes)
    assert half == [1] * 16 + [17] * 16
    valid = of_lanes("shfl.sync.up.b32 %r9|%p1, %r1, 3, 0, -1; selp.b32 %r10, 1, 0, %p1;", lanes)
    assert valid == [0] * 3 + [1] * 29


def test_what_a_warp_decides_together():
    lanes = list(range(32))
    test = "setp.ge.u32 %p1, %r1, 29;"
    ballot = of_lanes(test + "vote.sync.ballot.b32 %r10, %p1, -1;", lanes)
    assert ballot == [0b111 << 29] * 32
    some = of_lanes(test + "vote.sync.any.pred %p2, %p1, -1; selp.b32 %r10, 1, 0, %p2;", lanes)
    assert some == [1] * 32
    every = of_lanes(test + "vote.sync.all.pred %p2, %p1, -1; selp.b32 %r10, 1, 0, %p2;", lanes)
    assert every == [0] * 32
    assert of_lanes("redux.sync.add.s32 %r10, %r1, -1;", lanes) == [sum(lanes)] * 32


def test_threads_part_and_meet_again():
    loop = """
      mov.b32 %r10, 0; mov.b32 %r5, 0;
      LOOP: setp.ge.u32 %p1, %r5, %r1; @%p1 bra DONE;
      add.s32 %r10, %r10, %r5; add.s32 %r5, %r5, 1; bra LOOP;
      DONE: shfl.sync.bfly.b32 %r6, %r10, 1, 31, -1; add.s32 %r10, %r10, %r6;
    """
    sums = [sum(range(i)) for i in range(32)]
    assert of_lanes(loop, list(range(32))) == [sums[i] + sums[i ^ 1] for i in range(32)]


def test_threads_that_ended_hold_no_barrier_up():
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;
        mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1; st.global.b32 [%rd2], %r0;""",
        out, threads=64,
    )  # fmt: skip
    assert out.tolist() == [0] * 32 + list(range(32, 64))


def test_an_atomic_counts_every_thread():
    total = torch.zeros(2, dtype=torch.int32)
    run("atom.global.add.u32 %r1, [%rd0], 1; atom.global.max.s32 %r2, [%rd0+4], %r0;", total,
        threads=64, grid=(3,))  # fmt: skip
    assert total.tolist() == [192, 63]


EXCHANGE = """shl.b32 %r1, %r0, 2; xor.b32 %r2, %r1, {across}; st.shared.b32 [%r1], %r0;
  {between} ld.shared.b32 %r10, [%r2];"""


def exchanged(across: int, between: str) -> None:
    body = EXCHANGE.format(across=across, between=between)
    out = torch.zeros(64, dtype=torch.int32)
    run(
        body + "mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1; st.global.b32 [%rd2], %r10;",
        out, threads=64, shared=256,
    )  # fmt: skip
    assert out.tolist() == [i ^ across // 4 for i in range(64)]


def test_shared_memory_between_warps_needs_a_barrier():
    exchanged(128, "bar.sync 0;")
    exchanged(4, "bar.warp.sync -1;")
    with pytest.raises(Fault, match="warp 0 reads byte 128 .* warp 1 wrote with no barrier"):
        exchanged(128, "")


def test_what_several_warps_have_read_is_not_overwritten_before_a_barrier():
    body = """ld.shared.b32 %r1, [smem]; {} setp.eq.u32 %p1, %r0, 0;
      @%p1 st.shared.b32 [smem], %r0;"""
    out = torch.zeros(1)
    run(body.format("bar.sync 0;"), out, threads=64, shared=16)
    with pytest.raises(Fault, match="several warps read with no barrier"):
        run(body.format(""), out, threads=64, shared=16)


def test_two_threads_do_not_write_a_place_at_once():
    run("mov.b32 %r1, 5; st.shared.b32 [smem], %r1;", torch.zeros(1), threads=64, shared=16)
    with pytest.raises(Fault, match="two threads write byte 0"):
        run("st.shared.b32 [smem], %r0;", torch.zeros(1), threads=64, shared=16)


COPY = """mul.wide.u32 %rd10, %r0, 16; add.s64 %rd11, %rd0, %rd10; shl.b32 %r1, %r0, 4;
  cp.async.cg.shared.global [%r1], [%rd11], 0x10; cp.async.commit_group; {wait}
  ld.shared.b32 %r10, [%r1]; mul.wide.u32 %rd12, %r0, 4; add.s64 %rd13, %rd1, %rd12;
  st.global.b32 [%rd13], %r10; {last}"""


def test_a_copy_is_there_after_its_wait_and_not_before():
    source, out = torch.arange(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        out.zero_()
        run(COPY.format(wait=wait, last=""), source, out, shared=512)
        assert out.tolist() == list(range(0, 128, 4))
    with pytest.raises(Fault, match="reads byte 0 of shared memory, where a copy arrives"):
        run(COPY.format(wait="", last="cp.async.wait_group 0;"), source, out, shared=512)
    unread = COPY.replace("ld.shared.b32 %r10, [%r1];", "mov.b32 %r10, 0;")
    with pytest.raises(Fault, match="ends before 1 cp.async are waited for"):
        run(unread.format(wait="", last=""), source, out, shared=512)


@pytest.mark.parametrize("uses", ("ld.shared.b32 %r3, [smem];", "st.shared.b32 [smem], %r0;"))
def test_a_copy_is_not_begun_where_another_warp_is_at_work(uses):
    body = """setp.eq.u32 %p1, %r0, 40; @%p1 {uses} {between} setp.eq.u32 %p2, %r0, 0;
      @%p2 cp.async.ca.shared.global [smem], [%rd0], 0x4; cp.async.commit_group; bar.sync 0;
      cp.async.wait_group 0;"""
    run(body.format(uses=uses, between="bar.sync 0;"), torch.zeros(4), threads=64, shared=16)
    with pytest.raises(Fault, match="warp 0 writes byte 0 .* warp 1 .* with no barrier"):
        run(body.format(uses=uses, between=""), torch.zeros(4), threads=64, shared=16)


def test_a_copy_of_nothing_brings_zeros():
    source, out = torch.arange(128, dtype=torch.int32), torch.ones(32, dtype=torch.int32)
    body = COPY.replace("0x10;", "0x10, %r5;").format(wait="cp.async.wait_group 0;", last="")
    # An address that may not be read is none that is.
    run("mov.b32 %r5, 0;" + body.replace("[%rd11]", "[%rd11+99968]"), source, out, shared=512)
    assert out.tolist() == [0] * 32


ATOMIC = "atom.shared.add.u32 %r3, [smem], 1;"


@pytest.mark.parametrize(
    "body",
    (
        "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [smem], %r0; {} " + ATOMIC,
        ATOMIC + " {} ld.shared.b32 %r4, [smem];",
    ),
)
def test_atomics_need_no_barrier_among_themselves_alone(body):
    run(ATOMIC + ATOMIC, torch.zeros(1), threads=64, shared=16)
    run(body.format("bar.sync 0;"), torch.zeros(1), threads=64, shared=16)
    with pytest.raises(Fault, match="with no barrier between"):
        run(body.format(""), torch.zeros(1), threads=64, shared=16)


def test_halves_of_a_warp_do_not_meet_at_two_barriers():
    body = """setp.lt.u32 %p1, %r0, 16; @%p1 bra LOW; bar.sync 0; bra DONE; LOW: bar.sync 0;
      DONE: add.u32 %r1, %r0, 1;"""
    with pytest.raises(Fault, match="lane .* of warp 0 is not there"):
        run(body, torch.zeros(1))


def test_what_has_ended_gives_nothing():
    body = "setp.lt.u32 %p1, %r0, 16; @%p1 ret; {}"
    with pytest.raises(Fault, match="does not name, or that has ended"):
        run(body.format("shfl.sync.idx.b32 %r1, %r0, 3, 31, -1;"), torch.zeros(1))
    with pytest.raises(text.Unsupported, match="a reduction over a part"):
        run(body.format("redux.sync.add.s32 %r1, %r0, -1;"), torch.zeros(1))
    with pytest.raises(Fault, match="a lane of a warp is missing"):
        run(body.format("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [smem];"),
            torch.zeros(1), shared=512)  # fmt: skip


def test_a_lane_names_itself():
    with pytest.raises(Fault, match="a lane that the mask does not name"):
        run("shfl.sync.idx.b32 %r1, %r0, 0, 31, 1;", torch.zeros(1))


def test_matrices_go_out_as_they_came():
    """Rows of 16 bytes to fragments and back, transposed twice."""
    out = torch.zeros(128, dtype=torch.int32)
    run(
        """shl.b32 %r1, %r0, 4; shl.b32 %r2, %r0, 2; add.u32 %r3, %r2, 1; add.u32 %r4, %r2, 2;
        add.u32 %r5, %r2, 3; st.shared.v4.b32 [%r1], {%r2, %r3, %r4, %r5}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r6, %r7, %r8, %r9}, [%r1];
        stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r1+512], {%r6, %r7, %r8, %r9};
        bar.warp.sync -1; ld.shared.v4.b32 {%r2, %r3, %r4, %r5}, [%r1+512];
        mul.wide.u32 %rd1, %r1, 1; add.s64 %rd2, %rd0, %rd1;
        st.global.v4.b32 [%rd2], {%r2, %r3, %r4, %r5};""",
        out, shared=1024,
    )  # fmt: skip
    assert out.tolist() == list(range(128))


def test_a_product_of_a_warp():
    a, b = torch.randn(16, 16).half(), torch.randn(8, 16).half()
    out = torch.zeros(16, 8)
    run(
        """and.b32 %r1, %r0, 15; shl.b32 %r2, %r1, 5; shr.u32 %r3, %r0, 4; shl.b32 %r4, %r3, 4;
        add.u32 %r5, %r2, %r4; mul.wide.u32 %rd3, %r5, 1; add.s64 %rd4, %rd0, %rd3;
        ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd4]; st.shared.v4.b32 [%r5],
        {%r6, %r7, %r8, %r9}; and.b32 %r10, %r0, 7; shl.b32 %r11, %r10, 5; shr.u32 %r12, %r0, 3;
        and.b32 %r13, %r12, 1; shl.b32 %r14, %r13, 4; add.u32 %r15, %r11, %r14;
        mul.wide.u32 %rd5, %r15, 1; add.s64 %rd6, %rd1, %rd5;
        ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd6]; st.shared.v4.b32 [%r15+512],
        {%r6, %r7, %r8, %r9}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r5];
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r24, %r25}, [%r15+512];
        mov.b32 %r30, 0; mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
        {%r31, %r32, %r33, %r34}, {%r20, %r21, %r22, %r23}, {%r24, %r25},
        {%r30, %r30, %r30, %r30}; shr.u32 %r40, %r0, 2; and.b32 %r41, %r0, 3;
        shl.b32 %r42, %r40, 5; shl.b32 %r43, %r41, 3; add.u32 %r44, %r42, %r43;
        mul.wide.u32 %rd7, %r44, 1; add.s64 %rd8, %rd2, %rd7;
        st.global.v2.b32 [%rd8], {%r31, %r32}; st.global.v2.b32 [%rd8+256], {%r33, %r34};""",
        a, b, out, shared=1024,
    )  # fmt: skip
    torch.testing.assert_close(out, a.float() @ b.float().T)


@pytest.mark.parametrize(
    ("instruction", "what"),
    (
        ("ld.global.b32 %r1, [%rd0+16];", "outside, at byte 16 of tensor 0"),
        ("ld.global.b32 %r1, [%rd0-4];", "before all of tensor 0|outside"),
        ("st.global.b32 [%rd0+2], %r0;", "misaligned access of 4 bytes"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", "misaligned access of 16"),
        ("ld.shared.b32 %r1, [smem+64];", "4 bytes at byte 64 of 64 of shared memory"),
        ("st.shared.v2.b32 [smem+4], {%r0, %r0};", "misaligned access of 8"),
    ),
)
def test_memory_that_is_not_the_calls(instruction, what):
    with pytest.raises(Fault, match=what):
        run(instruction, torch.zeros(4), shared=64)


def test_lanes_that_a_mask_names_must_be_there():
    body = "setp.lt.u32 %p1, %r0, 8; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, {};"
    run(body.format("0xff"), torch.zeros(1))
    with pytest.raises(Fault, match="lane 8 of warp 0 is not there"):
        run(body.format("-1"), torch.zeros(1))


def test_what_is_not_known_is_refused():
    with pytest.raises(text.Unsupported, match="the opcode frobnicate"):
        run("frobnicate.b32 %r1, %r0;", torch.zeros(1))
    with pytest.raises(text.Unsupported, match="add with rz"):
        run("add.rz.f32 %r1, %r0, %r0;", torch.zeros(1))
