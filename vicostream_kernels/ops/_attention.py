"""The raw attention ops: schemas, argument checks, fakes, dispatch (contracts: attention.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vicostream_kernels import backends, checks
from vicostream_kernels.native.attention import not_decode
from vicostream_kernels.ops._registry import register

for _name in ("sink_window_attention", "varlen_attention", "merge_states"):
    _options = {"cpu": f"vicostream_kernels.native.attention:{_name}_cpu"}
    if _name == "sink_window_attention":
        _options["cuda"] = f"vicostream_kernels.native.attention:{_name}_cuda"
        # auto stays with Triton's decode until a GPU has shown which is the faster one.
        _options["on_request"] = "cuda"
    backends.declare(
        "attention",
        _name,
        triton=f"vicostream_kernels.triton_kernels.attention:{_name}",
        reference=f"vicostream_kernels.reference.attention:{_name}",
        **_options,
    )


def _check_scale(op: str, sm_scale: float | None) -> None:
    if sm_scale is not None and not math.isfinite(sm_scale):
        raise ValueError(f"{op}: sm_scale={sm_scale} must be finite, or None for d**-0.5")


def _check_cu_seqlens(op: str, name: str, cu: torch.Tensor, rows: int) -> None:
    """Reads device data: runs with VICO_CHECK=1 only."""
    starts = cu.tolist()
    if starts[0] != 0 or starts[-1] > rows or any(b < a for a, b in zip(starts, starts[1:])):
        raise ValueError(
            f"{op}: {name}={starts} must start at 0, never fall and end at or below {rows} rows"
        )


def _check_outside(op: str, name: str, x: torch.Tensor, low: int, high: int) -> None:
    """Reads device data: runs with VICO_CHECK=1 only."""
    wrong = x[(x < low) | (x > high)]
    if wrong.numel():
        raise ValueError(f"{op}: {name} holds {int(wrong[0])}, allowed: {low} to {high}")


# ---------------------------------------------------------------- sink_window_attention

_SINK_WINDOW = "sink_window_attention"


@checks.remember
def _check_sink_window(
    q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse, kv_len, page_fill, sink_tokens,
    window, window_start, sm_scale, sink_logits, page_shift, inv_freq, mrope_section, max_seqlen_q,
) -> None:  # fmt: skip
    op = _SINK_WINDOW
    dims = checks.Dims(op)
    dims.bind("q", q, "Q H d", checks.FLOAT_DTYPES)
    heads, d, device, dtype = dims["H"], dims["d"], q.device, q.dtype
    checks.check_head_dim(op, d)
    dims.bind("k_pages", k_pages, "P B G d", dtype, device)
    dims.bind("v_pages", v_pages, "P B G d", dtype, device)
    kv_heads = dims["G"]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"{op}: q has {heads} heads, expected a multiple of the {kv_heads} KV heads"
        )
    if dims["B"] == 0:
        raise ValueError(f"{op}: k_pages has page size 0, allowed: 1 or more")
    per_head = page_table.dim() == 3
    dims.bind("page_table", page_table, "S X L" if per_head else "S L", torch.int32, device)
    if per_head and dims["X"] not in (kv_heads, heads):
        raise ValueError(
            f"{op}: page_table has shape {tuple(page_table.shape)}, expected [S, L], "
            f"[S, {kv_heads}, L] (one table a KV head) or [S, {heads}, L] (one a query head)"
        )
    dims.sizes["S+1"] = dims["S"] + 1
    dims.bind("cu_seqlens_q", cu_seqlens_q, "S+1", torch.int32, device)
    if (kv_len is None) == (page_fill is None):
        raise ValueError(
            f"{op}: exactly one of kv_len and page_fill must be given, "
            f"got {'neither' if kv_len is None else 'both'}"
        )
    if kv_len is not None:
        dims.bind("kv_len", kv_len, "S", torch.int32, device)
        if per_head:
            raise ValueError(
                f"{op}: kv_len goes with a [S, L] page_table; per-head tables need page_fill"
            )
    if page_fill is not None:
        dims.bind("page_fill", page_fill, "P", torch.int32, device)
    checks.check_range(op, "sink_tokens", sink_tokens, low=0)
    if window is not None:
        checks.check_range(op, "window", window, low=0)
    if window_start is not None:
        dims.bind("window_start", window_start, "S", torch.int32, device)
    _check_scale(op, sm_scale)
    if sink_logits is not None:
        dims.bind("sink_logits", sink_logits, "H", checks.FLOAT_DTYPES, device)
    if page_shift is not None:
        spec = "S X L 3" if per_head else "S L 3"
        dims.bind("page_shift", page_shift, spec, torch.int32, device)
        if inv_freq is None:
            raise ValueError(f"{op}: page_shift needs inv_freq [d/2], got None")
    dims.sizes["d/2"] = d // 2
    if inv_freq is not None:
        dims.bind("inv_freq", inv_freq, "d/2", torch.float32, device)
    checks.check_mrope_section(op, mrope_section, d // 2)
    if max_seqlen_q is not None:
        checks.check_range(op, "max_seqlen_q", max_seqlen_q, low=0)
    dims.bind("out", out, "Q H d", dtype, device)
    if lse is not None:
        dims.bind("lse", lse, "Q H", torch.float32, device)
    checks.check_last_dim_dense(op, out=out, lse=lse)


def _check_sink_window_values(q, k_pages, page_table, cu_seqlens_q, kv_len, page_fill) -> None:
    """What a stream with queries reaches: captured graphs leave the tables of others as they were,
    and what stands in a table beyond ``kv_len``."""
    op, (pages, page_size) = _SINK_WINDOW, k_pages.shape[:2]
    _check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    streams = (cu_seqlens_q.diff() > 0).nonzero().flatten()
    table = page_table[streams]
    listed = (table >= 0) & (table < pages)
    if page_fill is not None:
        _check_outside(op, "page_table", table, -1, pages - 1)
        fill = page_fill[table[listed].long()]
        _check_outside(op, "page_fill of a listed page", fill, 0, page_size)
        return
    length = kv_len[streams]
    before = (listed.cumsum(-1) - listed.long()) * page_size
    _check_outside(op, "page_table", table[before < length[:, None]], -1, pages - 1)
    room = (listed.sum(-1) * page_size).tolist()
    for s, given, most in zip(streams.tolist(), length.tolist(), room):
        if not 0 <= given <= most:
            raise ValueError(
                f"{op}: kv_len[{s}]={given}, allowed: 0 to {most}, what the listed pages hold"
            )


@checks.remember
def _serve_sink_window(*args: Any) -> tuple[Callable[..., None], Callable[..., None] | None]:
    """What serves calls like this one: with all arguments, and what is prepared for them."""
    *given, backend = args
    _check_sink_window(*given)
    q, max_seqlen_q = given[0], given[-1]
    refused = not_decode(q.shape[0], max_seqlen_q)
    run = backends.resolve(_SINK_WINDOW, backend, q, refused)
    prepare = getattr(run, "prepare", None)
    return run, prepare and prepare(*given)


def _run_sink_window(
    q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse=None, kv_len=None, page_fill=None,
    sink_tokens=0, window=None, window_start=None, sm_scale=None, sink_logits=None,
    page_shift=None, inv_freq=None, mrope_section=None, max_seqlen_q=None, backend="auto",
) -> None:  # fmt: skip
    args = (
        q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse, kv_len, page_fill, sink_tokens,
        window, window_start, sm_scale, sink_logits, page_shift, inv_freq, mrope_section,
        max_seqlen_q,
    )  # fmt: skip
    run, prepared = _serve_sink_window(*args, backend)
    if checks.CHECK_VALUES:
        _check_sink_window_values(q, k_pages, page_table, cu_seqlens_q, kv_len, page_fill)
        checks.check_no_overlap(
            _SINK_WINDOW,
            dict(out=out, lse=lse),
            dict(
                q=q,
                k_pages=k_pages,
                v_pages=v_pages,
                page_table=page_table,
                kv_len=kv_len,
                cu_seqlens_q=cu_seqlens_q,
                page_fill=page_fill,
                page_shift=page_shift,
            ),
        )
    if prepared is None:
        return run(*args)
    prepared(
        q, k_pages, v_pages, page_table, cu_seqlens_q, kv_len, page_fill, window_start, sink_logits,
        page_shift, inv_freq, out, lse,
    )  # fmt: skip


def _fake_sink_window(
    q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse=None, kv_len=None, page_fill=None,
    sink_tokens=0, window=None, window_start=None, sm_scale=None, sink_logits=None,
    page_shift=None, inv_freq=None, mrope_section=None, max_seqlen_q=None, backend="auto",
) -> None:  # fmt: skip
    _check_sink_window(
        q, k_pages, v_pages, page_table, cu_seqlens_q, out, lse, kv_len, page_fill, sink_tokens,
        window, window_start, sm_scale, sink_logits, page_shift, inv_freq, mrope_section,
        max_seqlen_q,
    )  # fmt: skip


sink_window_attention = register(
    "sink_window_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, "
    "Tensor cu_seqlens_q, Tensor(a!) out, Tensor(b!)? lse=None, Tensor? kv_len=None, "
    "Tensor? page_fill=None, SymInt sink_tokens=0, SymInt? window=None, "
    "Tensor? window_start=None, float? sm_scale=None, Tensor? sink_logits=None, "
    "Tensor? page_shift=None, Tensor? inv_freq=None, int[]? mrope_section=None, "
    'SymInt? max_seqlen_q=None, str backend="auto") -> ()',
    _run_sink_window,
    _fake_sink_window,
)

# ---------------------------------------------------------------- varlen_attention


@checks.remember
def _check_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale
) -> None:  # fmt: skip
    op = "varlen_attention"
    dims = checks.Dims(op)
    dims.bind("q", q, "Nq H d", checks.FLOAT_DTYPES)
    checks.check_head_dim(op, dims["d"])
    dims.bind("k", k, "Nk H d", q.dtype, q.device)
    dims.bind("v", v, "Nk H d", q.dtype, q.device)
    dims.bind("cu_seqlens_q", cu_seqlens_q, "W+1", torch.int32, q.device)
    dims.bind("cu_seqlens_k", cu_seqlens_k, "W+1", torch.int32, q.device)
    if dims["W+1"] == 0:
        raise ValueError(f"{op}: cu_seqlens_q is empty, allowed: W+1 entries for W >= 0 windows")
    checks.check_range(op, "max_seqlen_q", max_seqlen_q, low=0)
    checks.check_range(op, "max_seqlen_k", max_seqlen_k, low=0)
    _check_scale(op, sm_scale)


@checks.remember
def _serve_varlen(*args: Any) -> Callable[..., torch.Tensor]:
    """What serves calls like this one; takes the tensors only."""
    *given, backend = args
    _check_varlen(*given)
    return backends.prepared("varlen_attention", backend, given[0], given[:5], *given[5:])


def _run_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale=None, backend="auto"
):  # fmt: skip
    tensors = (q, k, v, cu_seqlens_q, cu_seqlens_k)
    run = _serve_varlen(*tensors, max_seqlen_q, max_seqlen_k, sm_scale, backend)
    if checks.CHECK_VALUES:
        for name, cu, rows, most in (
            ("q", cu_seqlens_q, q.shape[0], max_seqlen_q),
            ("k", cu_seqlens_k, k.shape[0], max_seqlen_k),
        ):
            _check_cu_seqlens("varlen_attention", f"cu_seqlens_{name}", cu, rows)
            longest = int(cu.diff().max()) if cu.numel() > 1 else 0
            if longest > most:
                raise ValueError(
                    f"varlen_attention: max_seqlen_{name}={most} is below the longest window, "
                    f"{longest}"
                )
    return run(*tensors)


def _fake_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale=None, backend="auto"
):  # fmt: skip
    _check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


varlen_attention = register(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float? sm_scale=None, "
    'str backend="auto") -> Tensor',
    _run_varlen,
    _fake_varlen,
)

# ---------------------------------------------------------------- merge_states


@checks.remember
def _check_merge(out_a, lse_a, out_b, lse_b) -> None:
    dims = checks.Dims("merge_states")
    dims.bind("out_a", out_a, "Q H d", checks.FLOAT_DTYPES)
    dims.bind("lse_a", lse_a, "Q H", torch.float32, out_a.device)
    dims.bind("out_b", out_b, "Q H d", out_a.dtype, out_a.device)
    dims.bind("lse_b", lse_b, "Q H", torch.float32, out_a.device)


def _run_merge(out_a, lse_a, out_b, lse_b, backend="auto"):
    _check_merge(out_a, lse_a, out_b, lse_b)
    return backends.resolve("merge_states", backend, out_a)(out_a, lse_a, out_b, lse_b)


def _fake_merge(out_a, lse_a, out_b, lse_b, backend="auto"):
    _check_merge(out_a, lse_a, out_b, lse_b)
    return (
        torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device),
        torch.empty(lse_a.shape, dtype=lse_a.dtype, device=lse_a.device),
    )


merge_states = register(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, "
    'str backend="auto") -> (Tensor, Tensor)',
    _run_merge,
    _fake_merge,
)
