"""What is particular to the attention kernels: who computes what, and in which order.

The contract itself is tested on every backend in tests/ops.
"""

from __future__ import annotations

import pytest
import torch
from attention_oracle import check, inverse_frequencies, make_case

from kit import tensors
from kit.compare import assert_same_bits
from vicostream_kernels.reference import attention as reference

pytest.importorskip("triton")

TRITON = ("triton", "cpu")


def test_the_order_of_the_programs_does_not_matter(shuffled_programs):
    # Both kinds of streams, padding, several runs of keys, and a gap between sinks and window.
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2)).tolist()
    case = make_case(
        [3, 18, 0, 1], [order, order[::-1], order, [-1] * 30], pages=30, page_size=16,
        page_fill=[(5 * page) % 17 for page in range(30)], padding=2, sink_tokens=70, window=90,
        page_shift=tensors.ints((4, 30, 3), -50, 50, seed=3), inv_freq=inverse_frequencies(16),
    )  # fmt: skip
    out, lse = check(case, TRITON)
    ran = len(shuffled_programs)
    again, lse_again = case.run(TRITON)
    assert shuffled_programs[:3] != [(0, 0, 0), (1, 0, 0), (2, 0, 0)] and ran > 100
    assert_same_bits(again, out)
    assert_same_bits(lse_again, lse)


def test_runs_grow_where_a_stream_has_more_keys_than_the_runs_take():
    from vicostream_kernels.triton_kernels import _attention_decode as decode
    from vicostream_kernels.triton_kernels import attention

    page_size, d = 256, 8
    pages = decode.MAX_RUNS * decode.MIN_RUN * 64 // page_size + 6
    pools = [tensors.randn((pages, page_size, 1, d), seed=seed, gaps=False) for seed in (1, 2)]
    q = tensors.randn((1, 2, d), seed=3)
    rest = (torch.arange(pages, dtype=torch.int32)[None], torch.tensor([0, 1], dtype=torch.int32))
    fill = torch.full((pages,), page_size - 3, dtype=torch.int32)
    out, truth = torch.empty(1, 2, d), torch.empty(1, 2, d)
    lse, true_lse = torch.empty(1, 2), torch.empty(1, 2)
    attention.sink_window_attention(q, *pools, *rest, out, lse, None, fill)
    reference.sink_window_attention(q, *pools, *rest, truth, true_lse, None, fill)
    torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lse, true_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("queries", (4, 40))
def test_hidden_pages_are_not_read(queries):
    # Between the sinks' granule and the window's all is NaN, and nothing of it comes through:
    # masked after a load it would stay NaN in the product with V.
    case = make_case(
        [queries], [[*range(32)]], pages=32, page_size=16, kv_len=[512], sink_tokens=5, window=30
    )
    out, lse = case.run(TRITON)
    for pool in (case.k_pages, case.v_pages):
        for page in range(4, (512 - queries - 30) // 64 * 4):
            pool[page] = torch.nan
    again, lse_again = case.run(TRITON)
    assert_same_bits(again, out)
    assert_same_bits(lse_again, lse)
    assert out.isfinite().all()


def test_head_parts_cover_each_channel_once():
    from vicostream_kernels.triton_kernels import attention

    for d in range(8, 257, 8):
        for halves in (False, True):
            parts = attention._parts(d, halves)
            split, a, b = parts["SPLIT"], parts["PART_A"], parts["PART_B"]
            assert split <= a and d - split <= b, f"{d} channels in {parts}"
            assert {a, b} <= {0, 16, 32, 64, 128, 256}, "what tl.dot takes"
            if halves:
                assert 2 * split == d and a == b
    assert attention._parts(96, False) == dict(HEAD_DIM=96, SPLIT=64, PART_A=64, PART_B=32)
