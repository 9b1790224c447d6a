"""sink_window_attention against the oracle: every rule of the contract, one test each."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import check, make_case

import vicostream_kernels as vk
from kit.backends import backends_of
from kit.ops import check_fullgraph, check_op, check_refuses_grad

each_backend = pytest.mark.parametrize("backend", backends_of("sink_window_attention"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inverse_frequencies(head_dim: int) -> torch.Tensor:
    half = head_dim // 2
    return 1.0 / 10000.0 ** (torch.arange(half, dtype=torch.float32) / half)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("head_dim", (8, 24, 64, 80, 96, 128, 256))
def test_head_dims_and_dtypes(backend, dtype, head_dim):
    case = make_case(
        [3, 1], [[4, 1, 3], [5, 0, -1]], kv_len=[11, 8], head_dim=head_dim, dtype=dtype
    )  # fmt: skip
    check(case, backend)


@each_backend
@pytest.mark.parametrize("page_size", (1, 3, 16, 64, 256))
def test_page_sizes(backend, page_size):
    fill = [min(page_size, n) for n in (page_size, 1, 5, 0)]
    check(make_case([5], [[2, 3, 0, 1]], pages=4, page_size=page_size, page_fill=fill), backend)


@each_backend
@pytest.mark.parametrize(("kv_heads", "group"), ((1, 1), (1, 7), (2, 8), (3, 5), (4, 1)))
def test_head_groups(backend, kv_heads, group):
    case = make_case([4], [[1, 0, 2]], kv_len=[10], kv_heads=kv_heads, group=group)
    check(case, backend)


@each_backend
def test_prefill_of_odd_lengths(backend):
    order = [[7, 2, 9, 0, 5, 3, 1, 8], [4, 6, -1, -1, 11, 10, -1, -1]]
    case = make_case([67, 33], order, page_size=16, kv_len=[123, 50], head_dim=64)
    check(case, backend)
    check(case.changed(window=21, sink_tokens=5), backend)


def test_opcheck_and_fullgraph():
    case = make_case(
        [3, 0, 2],
        [[4, 1], [3, -1], [0, 2]],
        page_fill=[4, 2, 3, 4, 1] + [0] * 7,
        padding=2,
        window_start=[0, 0, 3],
        sink_logits=[0.5, 1.0, -2.0, 0.0],
        page_shift=[[[3, 1, 2]] * 2] * 3,
        inv_freq=inverse_frequencies(16),
    )
    opt = case.options
    pools = [x.nan_to_num(0.0) for x in (case.k_pages, case.v_pages)]
    buffers = torch.zeros(case.q.shape), torch.zeros(case.q.shape[:2])
    args = (case.q, *pools, case.page_table, case.cu_seqlens_q, *buffers, None, opt["page_fill"])
    rest = (2, 3, opt["window_start"], 0.25, opt["sink_logits"], opt["page_shift"])
    args += (*rest, opt["inv_freq"], [4, 2, 2], 3)
    op = torch.ops.vicostream.sink_window_attention.default
    check_op(op, args)
    check_fullgraph(torch.ops.vicostream.sink_window_attention, *args)
    check_refuses_grad(op, args)
    least = (case.q, *pools, case.page_table, case.cu_seqlens_q, buffers[0])
    check_op(op, least, {"page_fill": opt["page_fill"]})


def test_fullgraph_of_the_public_function():
    case = make_case([3], [[4, 1]], kv_len=[7])

    def call(q, k_pages, v_pages, page_table, cu_seqlens_q, kv_len):
        return vk.sink_window_attention(
            q, k_pages, v_pages, page_table, cu_seqlens_q, kv_len=kv_len, return_lse=True
        )

    tables = (case.page_table, case.cu_seqlens_q, case.options["kv_len"])
    check_fullgraph(call, case.q, case.k_pages, case.v_pages, *tables)
