"""The definitions of ``sink_window_attention``, ``varlen_attention`` and ``merge_states``.

They read the sequence lengths on the host, so on a GPU they synchronise; other backends must not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vicostream_kernels.reference._precision import accumulate_dtype
from vicostream_kernels.reference.append import rotary_angles, rotate


def sink_window_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
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
) -> None:
    """See ``vicostream_kernels.sink_window_attention``; writes ``out`` and ``lse``.

    One stream, and one table of it, at a time: what else is in the call can't change its bits.
    """
    dtype = accumulate_dtype(q)
    rows, heads, d = q.shape
    kv_heads = k_pages.shape[2]
    scale = d**-0.5 if sm_scale is None else sm_scale
    tables = page_table if page_table.dim() == 3 else page_table[:, None]
    shifts = None if page_shift is None else page_shift.reshape(*tables.shape, 3)
    streams, per_stream, _ = tables.shape
    # Each table serves so many query heads, and reads so many KV heads (several may read one).
    q_share, kv_share = heads // per_stream, max(1, kv_heads // per_stream)
    starts = cu_seqlens_q.clamp(0, rows).tolist()
    lengths = [None] * streams if kv_len is None else kv_len.tolist()
    first_seen = [0] * streams if window_start is None else window_start.tolist()

    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
    for s in range(streams):
        mine = slice(starts[s], starts[s + 1])
        queries = mine.stop - mine.start
        if queries <= 0:
            continue
        for x in range(per_stream):
            q_heads = slice(x * q_share, (x + 1) * q_share)
            first_kv = x * kv_heads // per_stream
            kv_share_heads = slice(first_kv, first_kv + kv_share)
            entry, offset = _slots_in_order(tables[s, x], k_pages, lengths[s], page_fill)
            logical = torch.arange(entry.numel(), device=q.device)
            first_query = entry.numel() - queries

            # Only keys that some query may see are read; then the rule itself, query by query.
            lowest = first_seen[s]
            if window is not None:
                lowest = max(lowest, first_query - window + 1)
            kept = ((logical < sink_tokens) | (logical >= lowest)).nonzero().flatten()
            entry, offset, j = entry[kept], offset[kept], logical[kept]
            visible = None
            if queries > 1:
                i = torch.arange(first_query, first_query + queries, device=q.device)[:, None]
                visible = j <= i
                if window is not None:
                    visible &= (j < sink_tokens) | (j > i - window)

            page = tables[s, x][entry].long()
            k = k_pages[:, :, kv_share_heads][page, offset].to(dtype)
            v = v_pages[:, :, kv_share_heads][page, offset].to(dtype)
            if shifts is not None:
                cos, sin = rotary_angles(shifts[s, x].T, inv_freq, mrope_section, dtype)
                k = rotate(k, cos[entry], sin[entry])

            # [G, R, n, d]: R query heads share one KV head. A fresh copy of q is aligned the same
            # wherever the stream lies in the call, so its bits are the same too.
            grouped = q[mine, q_heads].unflatten(1, (kv_share, -1)).permute(1, 2, 0, 3)
            result, log_sum = attend(
                grouped.to(dtype, copy=True, memory_format=torch.contiguous_format),
                k.permute(1, 0, 2)[:, None],
                v.permute(1, 0, 2)[:, None],
                visible,
                scale,
                None if sink_logits is None else sink_logits[q_heads].unflatten(0, (kv_share, -1)),
                need_lse=lse is not None,
            )
            out[mine, q_heads] = result.permute(2, 0, 1, 3).flatten(1, 2).to(out.dtype)
            if lse is not None:
                lse[mine, q_heads] = log_sum.permute(2, 0, 1).flatten(1).to(lse.dtype)


def _slots_in_order(
    table: torch.Tensor,
    k_pages: torch.Tensor,
    length: int | None,
    page_fill: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logical KV sequence of one table [L]: of each token its table entry and page offset."""
    pages, page_size = k_pages.shape[:2]
    listed = ((table >= 0) & (table < pages)).nonzero().flatten()
    if page_fill is not None:
        fill = page_fill[table[listed].long()]
    else:
        fill = length - page_size * torch.arange(listed.numel(), device=table.device)
    filled = torch.arange(page_size, device=table.device) < fill[:, None]
    which, offset = filled.nonzero(as_tuple=True)
    return listed[which], offset


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    sink_logits: torch.Tensor | None = None,
    need_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention of q [A, R, n, d] on k, v [A, R or 1, m, d] under ``visible`` [n, m]?.

    ``sink_logits`` [A, R] stand in the denominator. Returns out [A, R, n, d] and the natural-log
    LSE [A, R, n] (None unless asked for); rows that see no key, or only scores of -inf, give 0 and
    -inf.
    """
    if k.shape[-2] == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:-1], -math.inf) if need_lse else None
    # torch's fused kernel computes the same, faster, for the plain case. It lets NaN or infinity
    # through from keys that a row does not see (0 * inf), and what it gives a row whose scores are
    # all -inf differs from one of its kernels to the next: hence the condition, of finite scores
    # and values, and the fill.
    plain = q.dtype == torch.float32 and not need_lse and sink_logits is None
    if plain and torch.isfinite(q.shape[-1] * scale * _largest(q) * _largest(k) + v.sum()):
        shape = (*q.shape[:2], *k.shape[2:])
        out = F.scaled_dot_product_attention(
            q, k.expand(shape), v.expand(shape), attn_mask=visible, scale=scale
        )
        if visible is None:
            return out, None
        # ~visible.any(-1), but vectorised: a tenth of the whole otherwise
        blind = visible.view(torch.uint8).amax(-1) == 0
        return out.masked_fill(blind[:, None], 0.0), None

    scores = (q * scale) @ k.mT
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    top = scores.amax(-1, keepdim=True)
    # A score of -inf weighs nothing, whether a key is hidden or its product is that: a row of no
    # other scores has no weights (0 / 0), and merges with one of its other keys as if it had none.
    blind = top.squeeze(-1) == -math.inf
    if sink_logits is not None:
        sink_logits = sink_logits.to(q.dtype)[..., None, None]
        top = torch.maximum(top, sink_logits)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + (sink_logits - top).exp()
    out = _weigh(weights, v, visible) / total
    log_sum = (top + total.log()).squeeze(-1)
    out = out.masked_fill(blind[..., None], 0.0)
    log_sum = log_sum.masked_fill(blind, -math.inf)
    return out, log_sum if need_lse else None


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest absolute value; NaN where there is one."""
    return torch.linalg.vector_norm(x, math.inf)


def _weigh(weights: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """weights @ v, where a value that a row does not see has no effect, be it NaN or infinite."""
    if torch.isfinite(v).all():
        return weights @ v
    out = weights @ torch.where(torch.isfinite(v), v, 0.0)
    seen = torch.ones_like(weights) if visible is None else visible.to(weights.dtype)
    high, low = seen @ (v == math.inf).to(v.dtype) > 0, seen @ (v == -math.inf).to(v.dtype) > 0
    lost = (seen @ v.isnan().to(v.dtype) > 0) | (high & low)
    out = out.masked_fill(high, math.inf).masked_fill(low, -math.inf)
    return out.masked_fill(lost, math.nan)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    sm_scale: float | None = None,
) -> torch.Tensor:
    """See ``vicostream_kernels.varlen_attention``. Windows of equal lengths form one batch."""
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    q_starts = cu_seqlens_q.clamp(0, q.shape[0]).tolist()
    k_starts = cu_seqlens_k.clamp(0, k.shape[0]).tolist()
    alike = defaultdict(list)
    for w in range(len(q_starts) - 1):
        lengths = (q_starts[w + 1] - q_starts[w], k_starts[w + 1] - k_starts[w])
        alike[lengths].append((q_starts[w], k_starts[w]))

    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for (queries, keys), starts in alike.items():
        if queries <= 0 or keys <= 0:
            continue
        first_q, first_k = torch.tensor(starts, device=q.device).T
        q_rows = first_q[:, None] + torch.arange(queries, device=q.device)
        k_rows = first_k[:, None] + torch.arange(keys, device=q.device)
        per_window = [x.to(dtype).transpose(1, 2) for x in (q[q_rows], k[k_rows], v[k_rows])]
        result, _ = attend(*per_window, None, scale, need_lse=False)
        out[q_rows] = result.transpose(1, 2).to(out.dtype)
    return out


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``vicostream_kernels.merge_states``."""
    dtype = accumulate_dtype(out_a)
    a, b = lse_a.to(dtype), lse_b.to(dtype)
    lse = torch.logaddexp(a, b).contiguous()
    out = torch.zeros(out_a.shape, dtype=dtype, device=out_a.device)
    for part, part_lse in ((out_a, a), (out_b, b)):
        share = (part_lse - lse).exp()[..., None]
        nothing = (part_lse == -math.inf)[..., None]
        out = out + (share * part.to(dtype)).masked_fill(nothing, 0.0)
    return out.to(out_a.dtype), lse.to(lse_a.dtype)
