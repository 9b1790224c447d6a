"""Memory of the machine that runs PTX, and the faults in its use that it is there to find."""

from __future__ import annotations

import pytest
import torch
from ptx.memory import Fault
from ptx.small_kernels import of_lanes, run


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
