"""append: rotate q and k, write K and V to their pages, update the summaries of touched blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vicostream_kernels import backends, checks
from vicostream_kernels.ops._registry import register

backends.declare(
    "append",
    "rope_append",
    cuda="vicostream_kernels.native.append:rope_append_cuda",
    triton="vicostream_kernels.triton_kernels.append:rope_append",
    cpu="vicostream_kernels.native.append:rope_append_cpu",
    reference="vicostream_kernels.reference.append:rope_append",
)

_SCHEMA = (
    "rope_append(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor inv_freq, "
    "int[]? mrope_section, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots, Tensor(c!) q_out, "
    "Tensor(d!)? raw_k_pages=None, Tensor(e!)? sum=None, Tensor(f!)? count=None, "
    "Tensor(g!)? kmin=None, Tensor(h!)? kmax=None, bool summary_raw=False, "
    'Tensor? block_of_page=None, str backend="auto") -> ()'
)


@dataclass(frozen=True, eq=False)
class KeySummary:
    """Growing summaries of blocks of keys; ``rope_append`` updates the tensors in place.

    Give ``sum`` and ``count`` for the mean, ``kmin`` and ``kmax`` for the bound, or all four.

    Attributes:
        sum: [NB, G, d] float32, sums of the stored keys of each block; start at 0.
        count: [NB] int32, tokens in each sum; start at 0.
        kmin: [NB, sub, G, d] float32, elementwise minimum; start at +inf.
        kmax: [NB, sub, G, d] float32, elementwise maximum; start at -inf.
        source: "rotated" summarises keys as they stand in ``k_pages``, "raw" as in ``raw_k_pages``.

    The part of a token among the ``sub`` of its block is ``offset_in_page * sub // page_size``.
    """

    sum: torch.Tensor | None = None
    count: torch.Tensor | None = None
    kmin: torch.Tensor | None = None
    kmax: torch.Tensor | None = None
    source: str = "rotated"

    @staticmethod
    def empty(
        blocks: int,
        kv_heads: int,
        head_dim: int,
        *,
        kind: str = "mean",
        sub: int = 1,
        source: str = "rotated",
        device: torch.device | str = "cpu",
    ) -> KeySummary:
        """A summary of no keys yet; ``kind`` is "mean", "minmax" or "both"."""
        checks.check_choice("KeySummary", "kind", kind, ("mean", "minmax", "both"))
        made: dict[str, torch.Tensor] = {}
        floats = {"dtype": torch.float32, "device": device}  # whatever torch's default dtype is
        if kind != "minmax":
            made["sum"] = torch.zeros(blocks, kv_heads, head_dim, **floats)
            made["count"] = torch.zeros(blocks, dtype=torch.int32, device=device)
        if kind != "mean":
            shape = (blocks, sub, kv_heads, head_dim)
            made["kmin"] = torch.full(shape, torch.inf, **floats)
            made["kmax"] = torch.full(shape, -torch.inf, **floats)
        return KeySummary(**made, source=source)


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    mrope_section: Sequence[int] | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    *,
    raw_k_pages: torch.Tensor | None = None,
    summary: KeySummary | None = None,
    block_of_page: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotates q and k by their M-RoPE angles and appends k and v to a paged KV cache, in one pass.

    Args:
        q: [N, H, d] queries, float32, float16 or bfloat16; d a multiple of 8 up to 256.
        k: [N, G, d] keys, same dtype.
        v: [N, G, d] values, same dtype.
        positions: [3, N] int32, the (t, h, w) position ids of each token.
        inv_freq: [d/2] float32, rotary frequencies in radians per position.
        mrope_section: sizes of the (t, h, w) shares of the d/2 frequencies, as transformers has
            them; None is plain RoPE on row 0 of ``positions``.
        k_pages: [P, B, G, d], written in place: the rotated keys.
        v_pages: [P, B, G, d], written in place: the values.
        slots: [N] int32, ``page * B + offset`` of each token. Slots are unique; -1, or any slot
            outside the pool, leaves that token out of the pages (its query is rotated all the
            same).
        raw_k_pages: [P, B, G, d]?, written in place: the keys before rotation. What is written must
            not overlap the inputs or each other (looked for with VICO_CHECK=1).
        summary: KeySummary?, updated in place with the stored keys, tokens in order, so that
            feeding a block in pieces gives the bits of feeding it whole. Needs ``block_of_page``.
        block_of_page: [P] int32?, the summary row of each page; outside [0, NB) means none.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        q rotated, [N, H, d], in q's dtype, freshly allocated and contiguous.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or layout is wrong; nothing has
            been written.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.
        RuntimeError: an input requires grad (there is no backward).

    Source: rotate_half rotary embedding (RoFormer, arXiv 2104.09864, equation 34) with the
    multimodal sections of Qwen2-VL (arXiv 2409.12191, section 2.1). Angles are reduced in float64
    turns, so positions may grow for days of stream.
    """
    if not isinstance(summary, KeySummary | None):
        raise TypeError(
            f"rope_append: summary must be a KeySummary or None, got {type(summary).__name__}"
        )
    parts = summary if summary is not None else KeySummary()
    if summary is not None and summary.sum is None and summary.kmin is None:
        raise ValueError(
            "rope_append: summary has no tensors; KeySummary.empty(...) makes one that has"
        )
    checks.check_tensor("rope_append", "q", q)
    checks.check_choice("rope_append", "summary.source", parts.source, ("rotated", "raw"))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _rope_append(
        q,
        k,
        v,
        positions,
        inv_freq,
        checks.int_list("rope_append", "mrope_section", mrope_section),
        k_pages,
        v_pages,
        slots,
        q_out,
        raw_k_pages,
        parts.sum,
        parts.count,
        parts.kmin,
        parts.kmax,
        parts.source == "raw",
        block_of_page,
        backend,
    )
    return q_out


@checks.remember
def _check(
    q, k, v, positions, inv_freq, mrope_section, k_pages, v_pages, slots, q_out, raw_k_pages,
    sum, count, kmin, kmax, block_of_page,
) -> None:  # fmt: skip
    dims = checks.Dims("rope_append")
    dims.bind("q", q, "N H d", checks.FLOAT_DTYPES)
    d, device, dtype = dims["d"], q.device, q.dtype
    checks.check_head_dim("rope_append", d)
    dims.bind("k", k, "N G d", dtype, device)
    dims.bind("v", v, "N G d", dtype, device)
    dims.bind("positions", positions, "3 N", torch.int32, device)
    dims.sizes["d/2"] = d // 2
    dims.bind("inv_freq", inv_freq, "d/2", torch.float32, device)
    checks.check_mrope_section("rope_append", mrope_section, d // 2)
    dims.bind("k_pages", k_pages, "P B G d", dtype, device)
    dims.bind("v_pages", v_pages, "P B G d", dtype, device)
    dims.bind("slots", slots, "N", torch.int32, device)
    dims.bind("q_out", q_out, "N H d", dtype, device)
    if raw_k_pages is not None:
        dims.bind("raw_k_pages", raw_k_pages, "P B G d", dtype, device)
    if (sum is None) != (count is None) or (kmin is None) != (kmax is None):
        raise ValueError(
            "rope_append: a summary needs sum with count, kmin with kmax, or all four, "
            f"got {[n for n, t in zip(('sum', 'count', 'kmin', 'kmax'), (sum, count, kmin, kmax)) if t is not None]}"  # noqa: E501
        )
    has_summary = sum is not None or kmin is not None
    if has_summary != (block_of_page is not None):
        raise ValueError(
            "rope_append: summary and block_of_page go together, got "
            f"{'a summary only' if has_summary else 'block_of_page only'}"
        )
    if sum is not None:
        dims.bind("sum", sum, "NB G d", torch.float32, device)
        dims.bind("count", count, "NB", torch.int32, device)
    if kmin is not None:
        dims.bind("kmin", kmin, "NB sub G d", torch.float32, device)
        dims.bind("kmax", kmax, "NB sub G d", torch.float32, device)
    if block_of_page is not None:
        dims.bind("block_of_page", block_of_page, "P", torch.int32, device)
    checks.check_last_dim_dense(
        "rope_append", k_pages=k_pages, v_pages=v_pages, raw_k_pages=raw_k_pages, q_out=q_out,
        sum=sum, kmin=kmin, kmax=kmax, count=count,
    )  # fmt: skip
    if k_pages.shape[1] == 0:
        raise ValueError("rope_append: k_pages has page size 0, allowed: 1 or more")
    if dims["G"] == 0:
        raise ValueError("rope_append: k has 0 heads, allowed: 1 or more")
    if kmin is not None:
        checks.check_range("rope_append", "sub of kmin", dims["sub"], 1, k_pages.shape[1])


def _check_values(slots: torch.Tensor, pool: int) -> None:
    used = slots[slots != -1]
    wrong = used[(used < 0) | (used >= pool)]
    if wrong.numel():
        raise ValueError(
            f"rope_append: slots holds {int(wrong[0])}, allowed: -1 or [0, P*B={pool})"
        )
    if used.unique().numel() != used.numel():
        raise ValueError("rope_append: slots holds the same slot twice, allowed: each once, or -1")


def _run(
    q, k, v, positions, inv_freq, mrope_section, k_pages, v_pages, slots, q_out, raw_k_pages=None,
    sum=None, count=None, kmin=None, kmax=None, summary_raw=False, block_of_page=None,
    backend="auto",
) -> None:  # fmt: skip
    _check(
        q, k, v, positions, inv_freq, mrope_section, k_pages, v_pages, slots, q_out, raw_k_pages,
        sum, count, kmin, kmax, block_of_page,
    )  # fmt: skip
    checks.check_apart(
        "rope_append", k_pages=k_pages, v_pages=v_pages, raw_k_pages=raw_k_pages, sum=sum,
        kmin=kmin, kmax=kmax,
    )  # fmt: skip
    if checks.CHECK_VALUES:
        _check_values(slots, k_pages.shape[0] * k_pages.shape[1])
        checks.check_no_overlap(
            "rope_append",
            dict(
                k_pages=k_pages, v_pages=v_pages, q_out=q_out, raw_k_pages=raw_k_pages, sum=sum,
                count=count, kmin=kmin, kmax=kmax,
            ),
            dict(
                q=q, k=k, v=v, positions=positions, inv_freq=inv_freq, slots=slots,
                block_of_page=block_of_page,
            ),
        )  # fmt: skip
    backends.resolve("rope_append", backend, q)(
        q, k, v, positions, inv_freq, mrope_section, k_pages, v_pages, slots, q_out, raw_k_pages,
        sum, count, kmin, kmax, summary_raw, block_of_page,
    )  # fmt: skip


def _fake(
    q, k, v, positions, inv_freq, mrope_section, k_pages, v_pages, slots, q_out, raw_k_pages=None,
    sum=None, count=None, kmin=None, kmax=None, summary_raw=False, block_of_page=None,
    backend="auto",
) -> None:  # fmt: skip
    _check(
        q, k, v, positions, inv_freq, mrope_section, k_pages, v_pages, slots, q_out, raw_k_pages,
        sum, count, kmin, kmax, block_of_page,
    )  # fmt: skip


_rope_append = register(_SCHEMA, _run, _fake)
