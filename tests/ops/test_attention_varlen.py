"""varlen_attention and merge_states against dense float64."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import dense, make_case

import vicostream_kernels as vk
from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_matches, assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad

each_varlen = pytest.mark.parametrize("backend", backends_of("varlen_attention"))
each_merge = pytest.mark.parametrize("backend", backends_of("merge_states"))
each_backend = pytest.mark.parametrize("backend", backends_of("sink_window_attention"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def starts_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def by_window(q, k, v, q_lengths, k_lengths, scale, dtype, scaled_query=False) -> torch.Tensor:
    """Window by window and head by head, in ``dtype``; ``scaled_query`` as in ``dense``."""
    out = torch.zeros(q.shape, dtype=dtype)
    a = b = 0
    for n, m in zip(q_lengths, k_lengths):
        for h in range(q.shape[1]) if n and m else ():
            query, key = q[a : a + n, h].to(dtype), k[b : b + m, h].to(dtype)
            scores = query * scale @ key.T if scaled_query else query @ key.T * scale
            out[a : a + n, h] = scores.softmax(-1) @ v[b : b + m, h].to(dtype)
        a, b = a + n, b + m
    return out


def torchs_own(*inputs) -> list[torch.Tensor]:
    return [by_window(*inputs, scaled_query=early) for early in (False, True)]


def run_varlen(backend, q, k, v, q_lengths, k_lengths, **options) -> torch.Tensor:
    name, device = backend
    options = {"max_seqlen_q": max(q_lengths, default=0), **options}
    options = {"max_seqlen_k": max(k_lengths, default=0), **options}
    inputs = [x.to(device) for x in (q, k, v, starts_of(q_lengths), starts_of(k_lengths))]
    return vk.varlen_attention(*inputs, **options, backend=name).cpu()


def make_varlen(q_lengths, k_lengths, heads=3, head_dim=80, dtype=torch.float32, padding=0):
    q = tensors.randn((sum(q_lengths) + padding, heads, head_dim), dtype, seed=1)
    keys = (sum(k_lengths) + padding, heads, head_dim)
    return q, tensors.randn(keys, dtype, seed=2), tensors.randn(keys, dtype, seed=3)


@each_varlen
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [
        ([64, 64, 64], [64, 64, 64]),
        ([64, 16, 64, 32, 16], [64, 16, 64, 32, 16]),
        ([5, 13, 0, 1], [64, 16, 7, 64]),  # reuse: fewer queries than keys
        ([3, 2, 4], [5, 0, 6]),
        ([203], [203]),
    ],
    ids=str,
)
def test_varlen(backend, dtype, q_lengths, k_lengths):
    q, k, v = make_varlen(q_lengths, k_lengths, dtype=dtype)
    got = run_varlen(backend, q, k, v, q_lengths, k_lengths)
    inputs = (q, k, v, q_lengths, k_lengths, 80**-0.5)
    assert_matches(got, by_window(*inputs, torch.float64), torchs_own(*inputs, dtype))


@each_varlen
@pytest.mark.parametrize("head_dim", (8, 24, 64, 80, 96, 128, 256))
def test_varlen_head_dims_and_scale(backend, head_dim):
    q_lengths, k_lengths = [9, 17], [17, 9]
    q, k, v = make_varlen(q_lengths, k_lengths, head_dim=head_dim)
    got = run_varlen(backend, q, k, v, q_lengths, k_lengths, sm_scale=0.3)
    inputs = (q, k, v, q_lengths, k_lengths, 0.3)
    assert_matches(got, by_window(*inputs, torch.float64), torchs_own(*inputs, torch.float32))


@each_varlen
@pytest.mark.parametrize("scale", (-0.4, 0.0))
def test_varlen_factor_that_is_not_positive(backend, scale):
    q, k, v = make_varlen([9, 17], [17, 9])
    got = run_varlen(backend, q, k, v, [9, 17], [17, 9], sm_scale=scale)
    inputs = (q, k, v, [9, 17], [17, 9], scale)
    assert_matches(got, by_window(*inputs, torch.float64), torchs_own(*inputs, torch.float32))


@each_varlen
def test_varlen_padding_empty_windows_and_nothing(backend):
    q, k, v = make_varlen([2, 0, 3], [4, 5, 0], padding=2)
    k[9:], v[9:] = math.nan, math.nan  # rows of no window
    out = run_varlen(backend, q, k, v, [2, 0, 3], [4, 5, 0])
    assert out[2:].eq(0).all() and out[:2].isfinite().all() and out[:2].ne(0).any()
    for lengths in ([], [0, 0]):
        assert run_varlen(backend, q, k, v, lengths, lengths).eq(0).all()
    nothing = make_varlen([0], [0])
    assert run_varlen(backend, *nothing, [0], [0]).shape == (0, 3, 80)


@each_varlen
def test_varlen_window_sees_only_its_own_keys(backend):
    lengths = [7, 64, 3]
    q, k, v = make_varlen(lengths, lengths)
    wanted = run_varlen(backend, q, k, v, lengths, lengths)
    k[7:71], v[7:71] = math.nan, math.inf
    got = run_varlen(backend, q, k, v, lengths, lengths)
    assert_same_bits(got[:7], wanted[:7])
    assert_same_bits(got[71:], wanted[71:])
    assert got[7:71].isnan().all()


@each_varlen
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_varlen_bits_do_not_depend_on_other_windows(backend, dtype):
    lengths = [64, 16, 64, 64, 200]
    q, k, v = make_varlen(lengths, lengths, dtype=dtype)
    together = run_varlen(backend, q, k, v, lengths, lengths, max_seqlen_q=1000)
    starts = starts_of(lengths).tolist()
    for w, length in enumerate(lengths):
        mine = slice(starts[w], starts[w + 1])
        alone = run_varlen(backend, q[mine], k[mine], v[mine], [length], [length])
        assert_same_bits(alone, together[mine], name=f"window {w}")


def test_varlen_opcheck_and_fullgraph():
    q, k, v = make_varlen([5, 2], [4, 6])
    args = (q, k, v, starts_of([5, 2]), starts_of([4, 6]), 5, 6)
    op = torch.ops.vicostream.varlen_attention.default
    check_op(op, args)
    check_fullgraph(torch.ops.vicostream.varlen_attention, *args)
    check_refuses_grad(op, args)


# ---- merge_states


def run_merge(backend, *args) -> tuple[torch.Tensor, torch.Tensor]:
    name, device = backend
    out, lse = vk.merge_states(*[x.to(device) for x in args], backend=name)
    return out.cpu(), lse.cpu()


@each_merge
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("gap", (0.0, 3.0, -200.0, 5000.0))
def test_merge_formula(backend, dtype, gap):
    shape = (7, 3, 24)
    out_a, out_b = tensors.randn(shape, dtype, seed=1), tensors.randn(shape, dtype, seed=2)
    lse_a, lse_b = tensors.randn(shape[:2], seed=3) + gap, tensors.randn(shape[:2], seed=4)
    out, lse = run_merge(backend, out_a, lse_a, out_b, lse_b)

    def formula(dtype):
        a, b = lse_a.to(dtype), lse_b.to(dtype)
        weights = torch.stack((a, b)).softmax(0)[..., None]
        total = torch.stack((a, b)).logsumexp(0)
        return weights[0] * out_a.to(dtype) + weights[1] * out_b.to(dtype), total

    true_out, true_lse = formula(torch.float64)
    own_out, own_lse = formula(torch.float32)
    assert_matches(out, true_out, own_out.to(dtype), name="out")
    assert_matches(lse, true_lse, own_lse, name="lse")
    assert out.dtype == dtype and lse.dtype == torch.float32


@each_merge
def test_merge_with_rows_that_saw_nothing(backend):
    out_a, out_b = tensors.randn((4, 2, 8), seed=1), tensors.randn((4, 2, 8), seed=2)
    lse_a, lse_b = tensors.randn((4, 2), seed=3), tensors.randn((4, 2), seed=4)
    lse_a[0], lse_b[1] = -math.inf, -math.inf
    lse_a[2], lse_b[2] = -math.inf, -math.inf
    out_a[0], out_b[1], out_a[2] = math.nan, math.inf, math.nan  # whatever they hold
    out, lse = run_merge(backend, out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out[0], out_b[0])
    torch.testing.assert_close(lse[0], lse_b[0])
    torch.testing.assert_close(out[1], out_a[1])
    torch.testing.assert_close(lse[1], lse_a[1])
    assert out[2].eq(0).all() and lse[2].eq(-math.inf).all()
    assert out[3].isfinite().all()
    empty = run_merge(backend, out_a[:0], lse_a[:0], out_b[:0], lse_b[:0])
    assert empty[0].shape == (0, 2, 8) and empty[1].shape == (0, 2)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("split", (0, 1, 5, 11, 14))
def test_merge_of_two_parts_is_the_whole(backend, dtype, split):
    """The keys before ``split`` and the others, both calls with the queries' own pages last."""
    logits = [0.5, -1.0, 2.0, 0.0]
    case = make_case([3], [[2, 0, 5, 1]], kv_len=[14], dtype=dtype, sink_logits=logits)
    starts = torch.tensor([split], dtype=torch.int32)
    tail = case.run(backend, window_start=starts)
    head = case.run(backend, sink_tokens=split, window=0, sink_logits=None)
    out, lse = run_merge(("reference", "cpu"), *head, *tail)
    seeing = tail[1].isfinite()  # a row that sees no key of the second part has no sink logit
    true_out, true_lse = dense(case, torch.float64)
    own_out, own_lse = dense(case, dtype)[0], dense(case, torch.float32)[1]
    assert seeing.all() == (split <= 11)
    assert_matches(out[seeing], true_out[seeing], own_out[seeing], factor=3.0, name="out")
    assert_matches(lse[seeing], true_lse[seeing], own_lse[seeing], factor=3.0, name="lse")


def test_merge_opcheck_and_fullgraph():
    args = (
        tensors.randn((3, 2, 8), seed=1),
        tensors.randn((3, 2), seed=2),
        tensors.randn((3, 2, 8), seed=3).transpose(0, 1).contiguous().transpose(0, 1),
        tensors.randn((3, 2), seed=4).T.contiguous().T,
    )
    op = torch.ops.vicostream.merge_states.default
    check_op(op, args)
    check_fullgraph(torch.ops.vicostream.merge_states, *args)
    check_refuses_grad(op, args)
    check_op(op, (*args[2:], *args[:2]))
