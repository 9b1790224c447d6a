"""Rows all of whose scores are -inf: such keys weigh nothing, as if the rows did not see them."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import Case, check, logical_sequence, make_case

import vicostream_kernels as vk
from kit.backends import backends_of
from vicostream_kernels.reference import attention as reference

each_backend = pytest.mark.parametrize("backend", backends_of("sink_window_attention"))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def with_weightless(case: Case, count: int) -> Case:
    """The first ``count`` logical keys of each stream score -inf with every query."""
    case.q[..., 0] = case.q[..., 0].abs() + 1
    for s in range(case.page_table.shape[0]):
        for page, offset, _ in logical_sequence(case, s, 0)[:count]:
            case.k_pages[page, offset, :, 0] = -math.inf
    return case


@each_backend
@each_dtype
@pytest.mark.parametrize("options", [{}, {"sink_logits": [0.5, -1.0, 8.0, 0.0]}], ids=str)
@pytest.mark.parametrize("queries", [3, 40])
def test_the_first_rows_see_such_keys_alone(queries, options, dtype, backend):
    blind = min(queries, 20) - 1
    first = 44 - queries
    case = make_case([queries], [list(range(11))], kv_len=[44], dtype=dtype, **options)
    out, lse = check(with_weightless(case, first + blind), backend)
    assert out[:blind].eq(0).all() and lse[:blind].eq(-math.inf).all()
    assert out[blind:].ne(0).any() and lse[blind:].isfinite().all()


@each_backend
@each_dtype
def test_a_query_of_minus_infinity(dtype, backend):
    case = make_case([5], [list(range(5))], kv_len=[20], dtype=dtype)
    case.k_pages[..., 0] = case.k_pages[..., 0].abs() + 1
    case.q[2, 1, 0] = -math.inf
    out, lse = check(case, backend)
    assert out[2, 1].eq(0).all() and lse[2, 1] == -math.inf
    case.q[2, 1, 0] = math.inf  # the other one is no such case
    out, lse = case.run(backend)
    assert out[2, 1].isnan().all() and not lse[2, 1].isfinite()


@each_backend
@pytest.mark.parametrize("weightless", [300, 590, 600])
def test_decode_over_whole_runs_of_such_keys(weightless, backend):
    """A run is 256 keys: one, all but a part, and all of them weigh nothing."""
    case = make_case([1], [list(range(38))], pages=38, page_size=16, kv_len=[600], head_dim=8)
    out, lse = check(with_weightless(case, weightless), backend)
    assert out.ne(0).any() == lse.isfinite().all() == (weightless < 600)


@each_backend
def test_scores_that_overflow_are_such_scores(backend):
    case = make_case([2], [[3, 1]], kv_len=[8])
    case.q[..., 0], case.k_pages[3, :, :, 0] = 1e30, -1e30
    case.k_pages[1, :, :, 0] = -1e30
    for out, lse in (case.run(backend), case.run(backend, return_lse=False)):
        assert out.eq(0).all() and not lse.isfinite().any()


@each_backend
def test_parts_merge_to_the_whole(backend):
    """Why it is so: a part must not make NaN of what the whole has."""
    case = make_case([3], [list(range(5))], kv_len=[20], sink_tokens=8)
    whole = with_weightless(case, 8).run(backend)
    sinks = case.run(backend, window=0)
    others = case.run(backend, sink_tokens=0, window_start=torch.tensor([8], dtype=torch.int32))
    assert sinks[1].eq(-math.inf).all() and others[1].isfinite().all()
    out, lse = vk.merge_states(*sinks, *others)
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])


@pytest.mark.parametrize("backend", backends_of("varlen_attention"))
@each_dtype
def test_windows_of_such_keys(dtype, backend):
    name, device = backend
    starts = torch.tensor([0, 9, 29], dtype=torch.int32)
    q, k, v = (torch.randn(29, 2, 80, generator=torch.Generator().manual_seed(i)) for i in range(3))
    q[..., 0], k[:9, :, 0] = q[..., 0].abs() + 1, -math.inf
    q, k, v, starts = (x.to(device) for x in (q.to(dtype), k.to(dtype), v.to(dtype), starts))
    got = vk.varlen_attention(
        q, k, v, starts, starts, max_seqlen_q=20, max_seqlen_k=20, backend=name
    ).cpu()
    assert got[:9].eq(0).all() and got[9:].isfinite().all() and got[9:].ne(0).any()


def test_the_definition_in_float64():
    q, k, v = (torch.ones(1, 1, n, 8, dtype=torch.float64) for n in (2, 3, 3))
    k[..., 0] = -math.inf
    for logits in (None, torch.zeros(1, 1)):
        out, lse = reference.attend(q, k, v, None, 1.0, logits)
        assert out.eq(0).all() and lse.eq(-math.inf).all()
