"""sink_window_attention, varlen_attention and merge_states in C++ (CPU), decode in CUDA C++.

Prefill and windows run in C++ too, not on torch's SDPA over gathered pages: measured on one thread
of a Zen 4 (320 queries x 1,600 keys, 16 / 2 heads, d 128), SDPA takes 1.4 times as long in float32
and 2.5 times in bfloat16; it multiplies masked tiles and reads K and V once per query head. On two
threads of a Xeon with AMX, which both use, it takes 1.3 and 1.4 times as long. docs/ops.md has the
same for the ViT's windows.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch

from vicostream_kernels.backends import native
from vicostream_kernels.native._stream import current_stream

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NO_WINDOW = (1 << 63) - 1
#: The kernels count positions in int32 and round up to granules (csrc/include/vico/decode.h).
_MOST_POSITIONS = 2**31 - 1 - 128


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _stride(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


@lru_cache(maxsize=1024)
def _layout(
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    pool_shape: tuple[int, ...],
    table_shape: tuple[int, ...],
    mrope_section: tuple[int, ...] | None,
    sink_tokens: int,
    window: int | None,
    sm_scale: float | None,
    strides: tuple[tuple[int, ...] | None, ...],
    vectors: tuple[int, ...],
) -> Any:
    """Sizes and strides as C++ keeps them; made once for each layout a model uses."""
    queries, heads, d = q_shape
    pages, page_size, kv_heads, _ = pool_shape
    q, out, lse, k_pages, v_pages, page_table, page_shift = strides
    if len(table_shape) == 2:  # one table for all heads
        table_shape = (table_shape[0], 1, table_shape[1])
        page_table = (page_table[0], 0, page_table[1])
        page_shift = page_shift and (page_shift[0], 0, *page_shift[1:])
    return native()[0].AttentionLayout(
        _DTYPES[dtype],
        (queries, heads, kv_heads, pages, page_size, *table_shape),
        d,
        (d // 2, 0) if mrope_section is None else mrope_section[:2],
        min(sink_tokens, _NO_WINDOW),
        _NO_WINDOW if window is None else min(window, _NO_WINDOW),
        d**-0.5 if sm_scale is None else sm_scale,
        q[:2],
        out[:2],
        lse or (0, 0),
        k_pages[:3],
        v_pages[:3],
        page_table,
        page_shift or (0, 0, 0, 0),
        vectors,
    )


def _prepare(
    q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse, kv_len, page_fill, sink_tokens, window,
    window_start, sm_scale, sink_logits, page_shift, inv_freq, mrope_section,
) -> tuple[Any, tuple[int, ...], tuple[torch.Tensor | None, ...]]:  # fmt: skip
    """The layout, the addresses, and the tensors that must outlive the call."""
    q, k_pages, v_pages = _dense(q), _dense(k_pages), _dense(v_pages)
    if sink_logits is not None:
        sink_logits = sink_logits.float().contiguous()
    if page_shift is not None:
        inv_freq = _dense(inv_freq)
    layout = _layout(
        q.dtype,
        q.shape,
        k_pages.shape,
        page_table.shape,
        None if mrope_section is None else tuple(mrope_section),
        sink_tokens,
        window,
        sm_scale,
        (
            q.stride(), out.stride(), None if lse is None else lse.stride(), k_pages.stride(),
            v_pages.stride(), page_table.stride(),
            None if page_shift is None else page_shift.stride(),
        ),
        (cu_seqlens_q.stride(0), _stride(kv_len), _stride(page_fill), _stride(window_start)),
    )  # fmt: skip
    addresses = (
        q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), page_table.data_ptr(),
        cu_seqlens_q.data_ptr(), _address(kv_len), _address(page_fill), _address(window_start),
        _address(sink_logits), _address(page_shift), _address(inv_freq), out.data_ptr(),
        _address(lse),
    )  # fmt: skip
    return layout, addresses, (q, k_pages, v_pages, sink_logits, inv_freq)


def sink_window_attention_cpu(
    q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse=None, kv_len=None, page_fill=None,
    sink_tokens=0, window=None, window_start=None, sm_scale=None, sink_logits=None,
    page_shift=None, inv_freq=None, mrope_section=None, max_seqlen_q=None,
) -> None:  # fmt: skip
    """See ``vicostream_kernels.sink_window_attention``; ``torch.get_num_threads()`` threads."""
    layout, addresses, _kept = _prepare(
        q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse, kv_len, page_fill, sink_tokens,
        window, window_start, sm_scale, sink_logits, page_shift, inv_freq, mrope_section,
    )  # fmt: skip
    native()[0].sink_window_attention_cpu(layout, addresses, torch.get_num_threads())


def _prepare_sink_window(
    q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse, kv_len, page_fill, sink_tokens, window,
    window_start, sm_scale, sink_logits, page_shift, inv_freq, mrope_section, max_seqlen_q,
) -> Any:  # fmt: skip
    """The same for all calls with tensors laid out like these, which takes the tensors in the order
    of ``_prepare``'s addresses. None: where one must be copied."""
    rows = (q, k_pages, v_pages, *(() if page_shift is None else (inv_freq,)))
    if any(_dense(x) is not x for x in rows):
        return None
    if sink_logits is not None and sink_logits.float().contiguous() is not sink_logits:
        return None
    layout, _addresses, _kept = _prepare(
        q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse, kv_len, page_fill, sink_tokens,
        window, window_start, sm_scale, sink_logits, page_shift, inv_freq, mrope_section,
    )  # fmt: skip
    attend = native()[0].sink_window_attention_cpu

    def run(*tensors: torch.Tensor | None) -> None:
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        attend(layout, addresses, torch.get_num_threads())

    return run


sink_window_attention_cpu.prepare = _prepare_sink_window


#: Query rows of a stream that the CUDA kernels are made for; with more they would read the keys
#: once for every 16 rows of a KV head.
DECODE_ROWS = 16


def not_decode(rows: int, max_seqlen_q: int | None) -> str | None:
    """Why the CUDA kernels don't take a call with so many query rows, or None where they do."""
    if min(rows, rows if max_seqlen_q is None else max_seqlen_q) <= DECODE_ROWS:
        return None
    return (
        f"the cuda kernels serve decode: q of at most {DECODE_ROWS} rows, "
        f"or max_seqlen_q <= {DECODE_ROWS}"
    )


def sink_window_attention_cuda(
    q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse=None, kv_len=None, page_fill=None,
    sink_tokens=0, window=None, window_start=None, sm_scale=None, sink_logits=None,
    page_shift=None, inv_freq=None, mrope_section=None, max_seqlen_q=None,
) -> None:  # fmt: skip
    """See ``vicostream_kernels.sink_window_attention``; on the current stream of q's device.

    Any number of rows gives right results; ``not_decode`` says for how many it is meant. Raises
    ValueError for tables and rows that reach 2^31 logical positions.
    """
    rows, heads = q.shape[:2]
    if rows * heads == 0:
        return
    if page_table.numel() == 0 or k_pages.shape[0] == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return
    positions = page_table.shape[-1] * k_pages.shape[1] + rows
    if max(positions, rows * heads) > _MOST_POSITIONS:
        raise ValueError(
            f"sink_window_attention: page_table lists {page_table.shape[-1]} pages of "
            f"{k_pages.shape[1]} slots; with {rows} query rows of {heads} heads the cuda backend "
            f"takes at most {_MOST_POSITIONS} logical positions"
        )
    with current_stream(q.device) as stream:
        layout, addresses, _kept = _prepare(
            q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse, kv_len, page_fill,
            sink_tokens, window, window_start, sm_scale, sink_logits, page_shift, inv_freq,
            mrope_section,
        )  # fmt: skip
        module = native()[0]
        size = module.sink_window_attention_workspace(layout)
        workspace = torch.empty(size, dtype=torch.float32, device=q.device)
        hint = rows if max_seqlen_q is None else max_seqlen_q
        module.sink_window_attention_cuda(layout, addresses, workspace.data_ptr(), hint, stream)


@lru_cache(maxsize=1024)
def _varlen_layout(
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    keys: int,
    windows: int,
    sm_scale: float | None,
    *strides: tuple[int, ...],
) -> Any:
    queries, heads, d = q_shape
    q, k, v, out, vectors = (stride[:2] for stride in strides)
    scale = d**-0.5 if sm_scale is None else sm_scale
    sizes = (queries, keys, heads, windows)
    return native()[0].VarlenLayout(_DTYPES[dtype], sizes, d, scale, q, k, v, out, vectors)


def varlen_attention_cpu(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale=None
) -> torch.Tensor:  # fmt: skip
    """See ``vicostream_kernels.varlen_attention``; ``torch.get_num_threads()`` threads."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    out = torch.empty(q.shape, dtype=q.dtype)
    layout = _varlen_layout(
        q.dtype, q.shape, k.shape[0], cu_seqlens_q.shape[0] - 1, sm_scale, q.stride(), k.stride(),
        v.stride(), out.stride(), (cu_seqlens_q.stride(0), cu_seqlens_k.stride(0)),
    )  # fmt: skip
    addresses = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cu_seqlens_q.data_ptr(),
        cu_seqlens_k.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    native()[0].varlen_attention_cpu(layout, addresses, torch.get_num_threads())
    return out


def _prepare_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale
) -> Any:  # fmt: skip
    """The same for all calls with tensors laid out like these; None: where one must be copied."""
    if any(_dense(x) is not x for x in (q, k, v)):
        return None
    like = torch.empty(q.shape, dtype=q.dtype)
    layout = _varlen_layout(
        q.dtype, q.shape, k.shape[0], cu_seqlens_q.shape[0] - 1, sm_scale, q.stride(), k.stride(),
        v.stride(), like.stride(), (cu_seqlens_q.stride(0), cu_seqlens_k.stride(0)),
    )  # fmt: skip
    attend = native()[0].varlen_attention_cpu

    def run(q, k, v, cu_seqlens_q, cu_seqlens_k):
        out = torch.empty(q.shape, dtype=q.dtype)
        addresses = (
            q.data_ptr(), k.data_ptr(), v.data_ptr(), cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        attend(layout, addresses, torch.get_num_threads())
        return out

    return run


varlen_attention_cpu.prepare = _prepare_varlen


def merge_states_cpu(out_a, lse_a, out_b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.merge_states``; ``torch.get_num_threads()`` threads."""
    inputs = out_a, lse_a, out_b, lse_b = [x.contiguous() for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a)
    addresses = tuple(x.data_ptr() for x in (*inputs, out, lse))
    native()[0].merge_states_cpu(
        _DTYPES[out_a.dtype], lse_a.numel(), out_a.shape[-1], addresses, torch.get_num_threads()
    )
    return out, lse
