"""Warps of the machine that runs PTX: what their lanes do together, and may not."""

from __future__ import annotations

import pytest
import torch
from ptx import text
from ptx.memory import Fault
from ptx.small_kernels import of_lanes, run


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


def test_lanes_that_a_mask_names_must_be_there():
    body = "setp.lt.u32 %p1, %r0, 8; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, {};"
    run(body.format("0xff"), torch.zeros(1))
    with pytest.raises(Fault, match="lane 8 of warp 0 is not there"):
        run(body.format("-1"), torch.zeros(1))
