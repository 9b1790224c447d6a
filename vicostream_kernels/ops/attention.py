"""attention: sink + window over paged KV, attention inside packed windows, merging of results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vicostream_kernels import checks
from vicostream_kernels.ops import _attention


def sink_window_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    kv_len: torch.Tensor | None = None,
    page_fill: torch.Tensor | None = None,
    sink_tokens: int = 0,
    window: int | None = None,
    window_start: torch.Tensor | None = None,
    sm_scale: float | None = None,
    sink_logits: torch.Tensor | None = None,
    page_shift: torch.Tensor | None = None,
    inv_freq: torch.Tensor | None = None,
    mrope_section: Sequence[int] | None = None,
    max_seqlen_q: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Causal attention over the listed pages of each stream, kept sink tokens and a window.

    S streams, Q query rows packed over the streams, H query heads, G KV heads (H a multiple of G),
    d head dim, P physical pages of B slots, L table entries a stream.

    The logical KV sequence of a stream is the valid slots of its listed pages, in table order;
    its queries are the last logical positions. The query at logical position i sees j iff::

        j <= i and (j < sink_tokens or (j > i - window and j >= window_start))

    where an absent term does not restrict. Chunk windows, retrieved blocks and evictions are page
    lists: put only the visible pages in ``page_table``. To split the keys over two calls for
    ``merge_states``, end both lists with the queries' own pages: ``sink_tokens=n, window=0`` sees
    the first n tokens only, ``window_start=n`` the others only.

    Args:
        q: [Q, H, d] float32, float16 or bfloat16; d a multiple of 8 up to 256. Rotated already.
        k_pages: [P, B, G, d], same dtype; the keys, rotated at the position they were written with.
        v_pages: [P, B, G, d], same dtype.
        page_table: int32 physical page ids, [S, L]: one list a stream; or [S, G, L], [S, H, L]: one
            list a KV head or a query head, each with a logical sequence of its own. -1 and ids
            outside [0, P) contribute nothing, wherever they stand. A page may be listed by several
            streams, and twice by one.
        cu_seqlens_q: [S+1] int32, first query row of each stream, starting at 0. A stream may have
            no rows. Rows at and beyond cu_seqlens_q[S] (padding) give 0 and LSE -inf.
        kv_len: [S] int32, logical tokens of each stream: the valid listed pages are full but the
            last that it reaches; pages beyond are not read. Not with per-head tables. A length
            beyond the listed pages counts as all of them.
        page_fill: [P] int32, valid slots of each physical page, the first ones; any page may be
            partial or empty. Exactly one of ``kv_len`` and ``page_fill`` must be given.
        sink_tokens: logical tokens at the start that every query sees whatever the window.
        window: tokens a query sees up to and with itself; 0 leaves the sink tokens only.
        window_start: [S] int32, first logical token of the window; sink tokens stay visible.
        sm_scale: factor of the scores, d**-0.5 by default.
        sink_logits: [H] float, a learned logit in each row's denominator (no token stands for it).
        page_shift: [*page_table.shape, 3] int32, the (t, h, w) positions by which the page of each
            entry has moved since its keys were written: a key stored at p acts as at p + shift.
            Rotated on load in float32 from the stored key. One physical page may be listed with
            different shifts. Needs ``inv_freq``.
        inv_freq: [d/2] float32, rotary frequencies in radians per position (for ``page_shift``).
        mrope_section: (t, h, w) shares of the d/2 frequencies, summing to d/2; None is plain RoPE
            by the t shift.
        max_seqlen_q: a hint for the launch, the longest stream's query rows; never changes results.
        out: [Q, H, d]?, written instead of a new tensor; dense in its last dimension. Must not
            overlap the inputs.
        return_lse: also return the log-sum-exp of each row's scores, for ``merge_states``.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        out [Q, H, d] in q's dtype; with ``return_lse`` also lse [Q, H] float32, natural log, the
        sink logit included. Rows that see no key, or whose scores are all -inf, give 0 and -inf,
        also with a sink logit. Slots that are not listed or not filled have no effect, be they NaN.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or layout is wrong; nothing has
            been written. With VICO_CHECK=1 also page ids, fills and lengths that are out of range.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: sink tokens and window, StreamingLLM (arXiv 2309.17453, section 3.2); softmax in one
    pass with LSE, FlashAttention-2 (arXiv 2307.08691); page tables, PagedAttention (arXiv
    2309.06180); learned sink logits, gpt-oss (arXiv 2508.10925).
    """
    checks.check_tensor("sink_window_attention", "q", q)
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    _attention.sink_window_attention(
        q,
        k_pages,
        v_pages,
        page_table,
        cu_seqlens_q,
        result,
        lse,
        kv_len,
        page_fill,
        sink_tokens,
        window,
        window_start,
        sm_scale,
        sink_logits,
        page_shift,
        inv_freq,
        checks.int_list("sink_window_attention", "mrope_section", mrope_section),
        max_seqlen_q,
        backend,
    )
    return result if lse is None else (result, lse)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sm_scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention without a mask inside each of W windows packed one after another (the ViT's).

    Args:
        q: [Nq, H, d] float32, float16 or bfloat16; d a multiple of 8 up to 256.
        k: [Nk, H, d], same dtype and heads; Nk may differ from Nq (fewer queries than keys when
            features are reused).
        v: [Nk, H, d], same dtype.
        cu_seqlens_q: [W+1] int32, first query row of each window, starting at 0. Rows at and
            beyond cu_seqlens_q[W] give 0.
        cu_seqlens_k: [W+1] int32, first key row of each window. A window without keys gives 0, as
            does a row whose scores are all -inf.
        max_seqlen_q: at least the longest window's query rows (rows of a window beyond it may be
            left 0 or computed).
        max_seqlen_k: at least the longest window's keys.
        sm_scale: factor of the scores, d**-0.5 by default.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        out [Nq, H, d] in q's dtype, freshly allocated and contiguous.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong. With VICO_CHECK=1 also
            lengths that fall, leave the rows or exceed the maxima.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: window attention of Qwen2.5-VL's ViT (arXiv 2502.13923, section 2.1.1).
    """
    return _attention.varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale, backend
    )


def merge_states(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over two disjoint sets of keys, from the results over each.

    Args:
        out_a: [Q, H, d] float32, float16 or bfloat16, normalised output over the first set.
        lse_a: [Q, H] float32, its natural-log log-sum-exp; -inf: that row saw nothing in this set
            (whatever ``out_a`` then holds).
        out_b: [Q, H, d], same dtype, over the second set.
        lse_b: [Q, H] float32.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    A sink logit belongs to one of the two calls only, one in which every row sees a key.

    Returns:
        out [Q, H, d] in out_a's dtype and lse [Q, H] float32, of the union; rows that saw nothing
        in both give 0 and -inf.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or device is wrong.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: online softmax (Milakov and Gimelshein, arXiv 1805.02867), as FlashInfer's cascade
    merge (arXiv 2501.01005, section 2.2).
    """
    return _attention.merge_states(out_a, lse_a, out_b, lse_b, backend)
