"""Every configuration of the attention kernels compiles for sm_80 and sm_90 without a spill.

No GPU is needed: what a call launches is recorded and compiled. A compilation takes some seconds,
so the whole product of dtypes, head dims and devices is marked slow; by default each head dim, each
dtype and each variant is compiled where its registers are tightest.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from kit import interpreter

pytest.importorskip("triton")
if interpreter.ACTIVE:
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from triton_calls import (  # noqa: E402
    BF16,
    FP16,
    FP32,
    build_attention,
    check_attention,
    empty,
    paged_call,
    varlen_call,
)

from kit.cubin import compile_launch, record_launches  # noqa: E402
from vicostream_kernels.triton_kernels import attention  # noqa: E402

# The plain call is the smallest; a window adds a loop, a shift the angles.
PAGED = {
    (FP32, 64, 90): dict(window=True),
    (FP32, 128, 80): dict(shift=True),
    (FP16, 80, 80): dict(),
    (FP16, 256, 90): dict(window=True),
    (BF16, 64, 80): dict(window=True, logits=True),
    (BF16, 128, 80): dict(window=True),
    (BF16, 128, 90): dict(window=True, shift=True, per_head=True),
    (BF16, 256, 80): dict(shift=True),
}
VARLEN = [
    (FP32, 128, 90),
    (FP16, 64, 90),
    (BF16, 80, 80),
    (BF16, 80, 90),
    (BF16, 96, 80),
    (BF16, 256, 80),
]


def name_of(value) -> str:
    return "-".join(map(str, value)).replace("torch.", "")


@pytest.mark.parametrize(("key", "options"), PAGED.items(), ids=name_of)
def test_pages(key, options):
    dtype, d, capability = key
    built = build_attention(paged_call(dtype, d, **options), capability)
    assert list(built) == ["index_kernel", "prefill_kernel", "split_kernel", "combine_kernel"]
    check_attention(built, dtype, capability)


@pytest.mark.parametrize("capability", (80, 90))
def test_turned_keys_of_groups_of_eight(capability):
    """Where ptxas would rather spill than have one program less at a time."""
    call = paged_call(
        BF16, 128, rows=1, window=True, shift=True, per_head=True, heads=(16, 2)
    )  # fmt: skip
    check_attention(build_attention(call, capability), BF16, capability)


@pytest.mark.parametrize(
    ("capability", "cores"),
    (((8, 9), "mma"), ((9, 0), "wgmma"), ((10, 0), "tcgen05"), ((12, 0), "mma")),
)
def test_tiles_follow_the_tensor_cores_of_the_device(monkeypatch, capability, cores):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention._tensor_cores.__wrapped__(torch.device("cuda")) == cores


@pytest.mark.parametrize("key", VARLEN, ids=name_of)
def test_packed_windows(key):
    dtype, d, capability = key
    built = build_attention(varlen_call(dtype, d), capability)
    assert list(built) == ["varlen_kernel"]
    check_attention(built, dtype, capability)


def test_merge():
    out, lse = empty(320, 28, 128, dtype=BF16), empty(320, 28, dtype=FP32)
    built = build_attention(lambda: attention.merge_states(out, lse, out, lse), 90)
    assert list(built) == ["merge_kernel"]
    check_attention(built, BF16, 90)
    assert "ld.global.v4.b32" in built["merge_kernel"].ptx, "vectors of 16 bytes"


PRODUCT = list(itertools.product((FP32, FP16, BF16), (64, 80, 128, 256), (80, 90)))


@pytest.mark.slow
@pytest.mark.parametrize("key", PRODUCT, ids=name_of)
@pytest.mark.parametrize("turned", (False, True), ids=("plain", "turned"))
def test_the_whole_product(key, turned):
    dtype, d, capability = key
    call = paged_call(dtype, d, window=True, shift=turned)
    check_attention(build_attention(call, capability), dtype, capability)
    if not turned:
        check_attention(build_attention(varlen_call(dtype, d), capability), dtype, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("d", (8, 24, 96, 112, 160, 192, 224))
def test_other_head_dims(d, capability):
    check_attention(build_attention(paged_call(BF16, d, window=True), capability), BF16, capability)
    check_attention(build_attention(varlen_call(BF16, d), capability), BF16, capability)


# ---- what is launched


def test_few_rows_launch_no_prefill():
    names = [launch.kernel.__name__ for launch in record_launches(paged_call(BF16, 128, rows=16))]
    assert names == ["index_kernel", "split_kernel", "combine_kernel"]


def test_head_dim_80_is_not_padded_to_128():
    for call in (varlen_call(BF16, 80), paged_call(BF16, 80, rows=1)):
        for launch in record_launches(call):
            if "PART_A" in launch.arguments:
                assert (launch.arguments["PART_A"], launch.arguments["PART_B"]) == (64, 16)


def test_keys_and_values_are_copied_in_16_bytes_and_asynchronously():
    (launch,) = [
        launch
        for launch in record_launches(paged_call(BF16, 128, rows=1))
        if launch.kernel.__name__ == "split_kernel"
    ]
    ptx = compile_launch(launch, 90).ptx
    # A tile of 64 keys is 8 vectors of each of 128 threads, for keys and for values.
    assert ptx.count("cp.async.cg.shared.global") >= 16
    assert launch.grid == (4 * 64,), "one tile of rows, 4 key heads, a run for each 256 keys"


def test_a_pool_without_gaps_has_pages_of_one_slot():
    def launched(pool):
        x, table = empty(1, 28, 128, dtype=BF16), empty(1, 20)
        _, split, _ = record_launches(
            lambda: attention.sink_window_attention(
                x, pool, pool, table, empty(2), x, None, None, empty(30)
            )
        )
        return split.arguments["PAGE_SIZE"], split.arguments["k_stride_p"]

    assert launched(empty(30, 64, 4, 128, dtype=BF16)) == (1, 4 * 128)
    assert launched(empty(30, 80, 4, 128, dtype=BF16)[:, :64]) == (64, 80 * 4 * 128)


@pytest.mark.parametrize("rows", [1, 320])
@pytest.mark.parametrize("capability", [80, 90])
def test_keys_are_on_their_way_while_the_tile_before_is_worked_on(rows, capability):
    """With too few stages each tile is waited for as soon as it is asked for."""
    name = "prefill_kernel" if rows > 16 else "split_kernel"
    cubin = build_attention(paged_call(BF16, 128, rows=rows), capability, name)[name]
    waits = [int(left) for left in re.findall(r"cp\.async\.wait_group\s+(\w+);", cubin.ptx)]
    # A tile is three groups (slots, keys, values); all are waited for behind a loop only.
    loops = waits.count(0)
    assert waits.count(3) == 2 * loops > 0, waits


def test_the_temporary_memory_does_not_grow_with_the_history():
    def bytes_of(listed: int) -> int:
        table, x = empty(1, listed), empty(1, 28, 128, dtype=BF16)
        pool = empty(300, 64, 4, 128, dtype=BF16)
        launches = record_launches(
            lambda: attention.sink_window_attention(
                x, pool, pool, table, empty(2), x, None, None, empty(300), 4, 4096
            )
        )
        made = {
            id(value): value.numel() * value.element_size()
            for launch in launches
            for name, value in launch.arguments.items()
            if name in ("slots_ptr", "totals_ptr", "partial_ptr", "state_ptr")
        }
        return sum(made.values())

    assert bytes_of(10_000) == bytes_of(1000) < 2**20
