"""attention in Triton: sink + window over pages, packed windows, the merging of results.

The functions have the semantics of the raw ops of `vicostream_kernels.ops.attention`, which holds
the contract and checks the arguments. Nothing here waits for the device: grids are bounds that the
host knows, and programs without work leave.

`sink_window_attention` launches `index_kernel`, which finds the visible keys; then for streams of
more than FEW_QUERIES rows `prefill_kernel`, for the others `split_kernel` and `combine_kernel`.
Which of the two serves a stream is settled on the device by its own rows: its bits must not depend
on what else is in the call.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from vicostream_kernels.triton_kernels._attention_decode import (
    FEW_QUERIES,
    MAX_RUNS,
    MIN_RUN,
    combine_kernel,
    split_kernel,
)
from vicostream_kernels.triton_kernels._attention_index import GRANULE, index_kernel
from vicostream_kernels.triton_kernels._attention_prefill import prefill_kernel
from vicostream_kernels.triton_kernels._attention_varlen import merge_kernel, varlen_kernel
from vicostream_kernels.triton_kernels._launch import cdiv, on, power_of_2, strides

_LOG2_E = math.log2(math.e)
_INT32_MAX = 2**31 - 1


@cache
def _parts(head_dim: int, halves: bool) -> Mapping[str, int]:
    """How a head's channels are laid out: see `_attention_tile`."""
    if halves:
        half = head_dim // 2
        width = max(16, power_of_2(half))
        return {"HEAD_DIM": head_dim, "SPLIT": half, "PART_A": width, "PART_B": width}
    whole = max(16, power_of_2(head_dim))
    low = whole // 2
    high = max(16, power_of_2(head_dim - low))
    if head_dim <= low or low + high >= whole:
        return {"HEAD_DIM": head_dim, "SPLIT": head_dim, "PART_A": whole, "PART_B": 0}
    return {"HEAD_DIM": head_dim, "SPLIT": low, "PART_A": low, "PART_B": high}


def _config(rows: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "BLOCK_M": rows, "BLOCK_N": keys,
        "num_warps": warps, "num_stages": stages, "enable_fp_fusion": True,
    }  # fmt: skip


# Tiles and launches are fixed by class: the channels that the parts have together, the bytes of an
# element, and the kind of tensor cores, of which the newer two leave operands in shared memory and
# have much of it. Each is as large as the compile gate allows without a spill, by Triton 3.6 and
# 3.9, on every kind of device. A float32 product takes no tensor core.
#
# Keys are loaded from slots that are loaded themselves, and the stages are shared out between the
# two: with less than 5 a tile of keys is waited for as soon as it is asked for, and with 5 it is on
# its way while the one before is worked on. Where that has no registers, there are 2 or 3.
_AHEAD = 5
# Of registers, all that there are: ptxas would rather spill for one more program at a time.
_ALL = {"maxnreg": 255}


def _prefill_config(width: int, itemsize: int, turned: bool, cores: str) -> dict[str, int]:
    large = cores != "mma"
    if itemsize == 4:
        return _config(32 if width <= 64 else 16, 32, 8, 1) | _ALL
    if width > 128:
        if turned and not large:
            return _config(32, 32, 8, 2) | _ALL
        # parts of two widths take more registers
        keys = 16 if width < 256 and not large else 32
        return _config(64, keys, 8, _AHEAD if large and not turned else 2)
    if turned and not large:
        return _config(128, 32 if width <= 64 else 16, 8, 2) | _ALL
    config = _config(128, 32 if turned or not large else 64, 8, _AHEAD)
    return config | _ALL if turned and cores == "tcgen05" else config


def _decode_config(
    width: int, itemsize: int, turned: bool, cores: str, ragged: bool
) -> dict[str, int]:
    """``ragged``: a part is wider than its channels."""
    large = cores != "mma"
    if itemsize == 4:
        return _config(16, 32, 8 if width > 64 else 4, 1) | _ALL
    keys = 64 if large and width in (16, 32, 64, 128) else 32
    # Angles are twice as large as keys: of more stages, fewer programs fit beside each other.
    ahead = not turned and (width < 128 or (not ragged and (width == 128 or large)))
    config = _config(16, keys, 4, _AHEAD if ahead else 3)
    return config | _ALL if turned and width == 128 else config


def _varlen_config(width: int, itemsize: int, cores: str) -> dict[str, int]:
    """64 rows, as the ViT's windows have."""
    if itemsize == 4:
        return _config(32 if width <= 128 else 16, 32, 8, 1) | _ALL
    if width > 128:
        keys = 16 if width < 256 and cores == "mma" else 32
        return _config(64, keys, 8, 2 if cores == "wgmma" else 1)
    # 64 + 32: one more accumulator than four warps have registers for
    if width == 96 or (width == 128 and cores != "wgmma"):
        return _config(64, 32, 8, 2) | _ALL
    return _config(64, 64 if cores != "mma" and width <= 64 else 32, 4, 2)


def _scaled(q: torch.Tensor, sm_scale: float | None) -> tuple[torch.Tensor, float]:
    """Queries and the positive factor that makes their scores exponents of 2.

    The kernels look for the largest score before they scale it; a factor that is not positive goes
    to the queries.
    """
    scale = (q.shape[-1] ** -0.5 if sm_scale is None else sm_scale) * _LOG2_E
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


@cache
def _tensor_cores(device: torch.device) -> str:
    """What multiplies 16 bits: "mma", "wgmma" (9.x) or "tcgen05" (10.x and 11.x, not 12.x)."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(major, "mma")


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
    """Attention of q over the listed pages into out and lse.

    The arguments are those of the raw op `vicostream::sink_window_attention`, which has checked
    them; any strides. Runs on the current stream of their device. Raises ValueError for a table
    that lists 2^31 slots or more a stream.
    """
    rows, heads, head_dim = q.shape
    pages, page_size, kv_heads = k_pages.shape[:3]
    tables = page_table if page_table.dim() == 3 else page_table[:, None]
    streams, per_stream, length = tables.shape
    if rows * heads == 0:
        return
    if streams * length * pages == 0:
        out.zero_()
        if lse is not None:
            lse.fill_(-math.inf)
        return
    if length * page_size + rows > _INT32_MAX:
        raise ValueError(
            f"sink_window_attention: page_table lists {length} pages of {page_size} slots; with "
            f"{rows} query rows the triton backend takes at most {_INT32_MAX} logical positions"
        )

    # Sinks without a window are nothing special. What is compiled must not follow from the length
    # of the table, which other streams may settle: a window that hides nothing stays one.
    if window is not None:
        window = min(int(window), _INT32_MAX - rows)
    windowed = window is not None or window_start is not None
    sink_tokens = min(int(sink_tokens), length * page_size) if windowed else 0
    granules = cdiv(length * page_size, GRANULE)
    if window is not None:
        # Of a stream with n queries, window + n - 1 keys at most, at any alignment.
        seen = cdiv(sink_tokens, GRANULE) + cdiv(window + rows, GRANULE) + 1
        granules = min(granules, seen)
    capacity = granules * GRANULE
    q, scale = _scaled(q, sm_scale)
    groups = max(per_stream, kv_heads)
    parts = _parts(head_dim, halves=page_shift is not None)
    width = parts["PART_A"] + parts["PART_B"]
    cu_seqlens_q = cu_seqlens_q.contiguous()
    window_start = None if window_start is None else window_start.contiguous()
    sink_logits = None if sink_logits is None else sink_logits.contiguous()

    with on(q):
        device = {"device": q.device}
        totals = torch.empty(streams * per_stream, dtype=torch.int32, **device)
        slot_type = torch.int32 if pages * page_size <= _INT32_MAX else torch.int64
        slots = torch.empty(streams * per_stream, capacity, dtype=slot_type, **device)
        turns = angles = None
        angle_rows = min(length, capacity)
        if page_shift is not None:
            turns = torch.empty(streams * per_stream, capacity, dtype=torch.int32, **device)
            size = (streams * per_stream, angle_rows, head_dim)
            angles = torch.empty(size, dtype=torch.float32, **device)
        _index(
            tables, pages, page_size, kv_len, page_fill, cu_seqlens_q, rows, sink_tokens, window,
            window_start, page_shift, inv_freq, mrope_section, head_dim, totals, slots, turns,
            angles,
        )  # fmt: skip

        found = {
            "cu_seqlens_ptr": cu_seqlens_q,
            "window_start_ptr": window_start,
            "totals_ptr": totals,
            "streams": streams,
            "rows": rows,
            "sink_tokens": sink_tokens,
            "window": window,
            "TABLES": per_stream,
        }
        keys = {
            "q_ptr": q,
            "k_ptr": k_pages,
            "v_ptr": v_pages,
            "slots_ptr": slots,
            "turns_ptr": turns,
            "angles_ptr": angles,
            "angle_rows": angle_rows,
            "capacity": capacity,
            "kv_heads": kv_heads,
            "scale": scale,
            **strides(q, "q", "nhd"),
            **strides(k_pages, "k", "pbhd"),
            **strides(v_pages, "v", "pbhd"),
            "PAGE_SIZE": page_size,
            **_flat_pool(k_pages, v_pages),
            "GROUP": heads // groups,
            **parts,
        }
        results = {
            "out_ptr": out,
            "lse_ptr": lse,
            "sink_logits_ptr": sink_logits,
            "out_stride_n": out.stride(0),
            "out_stride_h": out.stride(1),
            "lse_stride_n": 0 if lse is None else lse.stride(0),
        }
        launch_class = (width, q.element_size(), page_shift is not None, _tensor_cores(q.device))
        if rows > FEW_QUERIES:
            config = _prefill_config(*launch_class)
            tiles = rows * (heads // groups) // config["BLOCK_M"] + streams + 1
            prefill_kernel[(tiles, groups)](
                few_queries=FEW_QUERIES, **found, **keys, **results, **config
            )

        config = _decode_config(*launch_class, ragged=width > head_dim)
        few = min(rows, FEW_QUERIES)
        by_row = rows <= streams * FEW_QUERIES
        partial_rows = rows if by_row else streams * FEW_QUERIES
        runs = min(MAX_RUNS, cdiv(granules, MIN_RUN))
        hint = few if max_seqlen_q is None else max(1, min(few, max_seqlen_q))
        row_tiles = cdiv(hint * (heads // groups), config["BLOCK_M"])
        shape = (partial_rows, heads, runs)
        partial = torch.empty(*shape, head_dim, dtype=torch.float32, **device)
        state = torch.empty(*shape, 2, dtype=torch.float32, **device)
        split_kernel[(streams * row_tiles * groups * runs,)](
            partial_ptr=partial, state_ptr=state, groups=groups, row_tiles=row_tiles, runs=runs,
            BY_ROW=by_row, **found, **keys, **config,
        )  # fmt: skip
        channels = min(32, power_of_2(head_dim))
        combine_kernel[(partial_rows * heads * cdiv(head_dim, channels),)](
            partial_ptr=partial, state_ptr=state, heads=heads, runs=runs, BY_ROW=by_row, **found,
            **results, HEAD_DIM=head_dim, CHANNELS=channels, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip


def _flat_pool(k_pages: torch.Tensor, v_pages: torch.Tensor) -> dict[str, int]:
    """Where slots of the pool are evenly spaced, as they usually are, pages of one slot: a key's
    address is one product then and not two, a quarter of the work beside a tile's products."""
    if any(x.stride(0) != x.shape[1] * x.stride(1) for x in (k_pages, v_pages)):
        return {}
    return {"PAGE_SIZE": 1, "k_stride_p": k_pages.stride(1), "v_stride_p": v_pages.stride(1)}


def _index(
    tables: torch.Tensor,
    pages: int,
    page_size: int,
    kv_len: torch.Tensor | None,
    page_fill: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    rows: int,
    sink_tokens: int,
    window: int | None,
    window_start: torch.Tensor | None,
    page_shift: torch.Tensor | None,
    inv_freq: torch.Tensor | None,
    mrope_section: Sequence[int] | None,
    head_dim: int,
    totals: torch.Tensor,
    slots: torch.Tensor,
    turns: torch.Tensor | None,
    angles: torch.Tensor | None,
) -> None:
    """Writes totals, slots, turns and angles: see `index_kernel`."""
    streams, per_stream, length = tables.shape
    half = head_dim // 2
    sections = (half, 0) if mrope_section is None else mrope_section
    shift_strides = (0, 0, 0, 0)
    if page_shift is not None:
        shifts = page_shift if page_shift.dim() == 4 else page_shift[:, None]
        shift_strides = shifts.stride()
    entries_of_program = 16
    grid = (streams * per_stream * cdiv(length, entries_of_program),)
    index_kernel[grid](
        table_ptr=tables,
        page_fill_ptr=None if page_fill is None else page_fill.contiguous(),
        kv_len_ptr=None if kv_len is None else kv_len.contiguous(),
        cu_seqlens_ptr=cu_seqlens_q,
        window_start_ptr=window_start,
        shift_ptr=page_shift,
        inv_freq_ptr=None if page_shift is None else inv_freq.contiguous(),
        totals_ptr=totals,
        slots_ptr=slots,
        turns_ptr=turns,
        angles_ptr=angles,
        per_stream=per_stream,
        length=length,
        pages=pages,
        rows=rows,
        sink_tokens=sink_tokens,
        window=window,
        capacity=slots.shape[1],
        angle_rows=length if angles is None else angles.shape[1],
        height_from=sections[0],
        width_from=sections[0] + sections[1],
        **strides(tables, "table", "sxl"),
        **{f"shift_stride_{axis}": value for axis, value in zip("sxla", shift_strides)},
        PAGE_SIZE=page_size,
        HALF=half,
        FREQUENCIES=power_of_2(half),
        ENTRIES=entries_of_program,
        SLOTS=min(64, power_of_2(page_size)),
        SCAN=1024,  # not by the length: a table that grows would be compiled for anew
        num_warps=4,
        enable_fp_fusion=True,
    )


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
    """Attention inside each packed window.

    The arguments are those of the raw op `vicostream::varlen_attention`, which has checked them.
    """
    rows, heads, head_dim = q.shape
    windows = cu_seqlens_q.shape[0] - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or windows == 0:
        return out.zero_()
    q, scale = _scaled(q, sm_scale)
    parts = _parts(head_dim, halves=False)
    width = parts["PART_A"] + parts["PART_B"]
    config = _varlen_config(width, q.element_size(), _tensor_cores(q.device))
    row_tiles = cdiv(max(1, min(max_seqlen_q, rows)), config["BLOCK_M"])
    with on(q):
        varlen_kernel[((windows + 1) * heads * row_tiles,)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=out,
            cu_seqlens_q_ptr=cu_seqlens_q.contiguous(),
            cu_seqlens_k_ptr=cu_seqlens_k.contiguous(),
            windows=windows,
            q_rows=rows,
            k_rows=k.shape[0],
            heads=heads,
            row_tiles=row_tiles,
            scale=scale,
            **strides(q, "q", "nhd"),
            **strides(k, "k", "nhd"),
            **strides(v, "v", "nhd"),
            out_stride_n=out.stride(0),
            out_stride_h=out.stride(1),
            **parts,
            **config,
        )
    return out


def merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention over two disjoint sets of keys, from the results over each.

    The arguments are those of the raw op `vicostream::merge_states`, which has checked them.
    """
    rows, heads, head_dim = out_a.shape
    out = torch.empty(out_a.shape, dtype=out_a.dtype, device=out_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=out_a.device)
    if lse.numel() == 0:
        return out, lse
    channels = power_of_2(head_dim)
    tile = max(1, 2048 // channels)
    with on(out_a):
        merge_kernel[(cdiv(rows * heads, tile),)](
            out_a_ptr=out_a,
            lse_a_ptr=lse_a,
            out_b_ptr=out_b,
            lse_b_ptr=lse_b,
            out_ptr=out,
            lse_ptr=lse,
            rows=rows,
            heads=heads,
            **strides(out_a, "out_a", "nhd"),
            **strides(lse_a, "lse_a", "nh"),
            **strides(out_b, "out_b", "nhd"),
            **strides(lse_b, "lse_b", "nh"),
            HEAD_DIM=head_dim,
            CHANNELS=channels,
            ROWS=tile,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, lse
