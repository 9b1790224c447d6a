"""append in Triton: the launches.

`rope_append` has the semantics of the raw op `vicostream::rope_append`; the contract, and the
checks of its arguments, are in `vicostream_kernels.ops.append`. Nothing here waits for the device.
"""

from collections.abc import Sequence

import torch

from vicostream_kernels.triton_kernels._append_rotate import rotate_kernel
from vicostream_kernels.triton_kernels._append_summary import summary_kernel
from vicostream_kernels.triton_kernels._launch import cdiv, on, power_of_2, strides


def _rotate_config(half: int, itemsize: int) -> tuple[int, int, int]:
    """(tokens of a program, heads of a program, warps).

    Two warps take as many tokens as give each thread one vector of 16 bytes per head, so that it
    computes the angles of that vector once; four heads then keep 8 loads per thread in flight for q
    and 16 for k and v, which is as much as fits into the registers without a spill in fp32.
    """
    warps = 2
    vectors = max(1, half * itemsize // 16)
    return max(1, 32 * warps // vectors), 4, warps


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
    q_out: torch.Tensor,
    raw_k_pages: torch.Tensor | None = None,
    sum: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    kmin: torch.Tensor | None = None,
    kmax: torch.Tensor | None = None,
    summary_raw: bool = False,
    block_of_page: torch.Tensor | None = None,
) -> None:
    """Rotates q and k by their positions, writes q_out and the pages, updates the summary.

    The arguments are those of the raw op `vicostream::rope_append`, which has checked them: q and
    q_out [N,H,d], k and v [N,G,d], positions [3,N] int32, inv_freq [d/2] fp32, pages [P,B,G,d],
    slots [N] int32, sum [NB,G,d] fp32, count [NB] int32, kmin and kmax [NB,sub,G,d] fp32,
    block_of_page [P] int32; any strides. Runs on the current stream of their device.
    """
    tokens, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    pages, page_size = k_pages.shape[:2]
    half = head_dim // 2
    sections = (half, 0) if mrope_section is None else mrope_section
    table = next((t for t in (sum, count, kmin) if t is not None), None)
    if table is None:
        block_of_page = None
    parts = 1 if kmin is None else kmin.shape[1]
    frequencies = power_of_2(half)
    tile, heads, warps = _rotate_config(frequencies, q.element_size())
    groups = cdiv(q_heads, heads) + cdiv(kv_heads, heads)
    if tokens == 0 or groups == 0:
        return

    with on(q):
        rows = key_offsets = None
        if block_of_page is not None:
            rows = torch.empty(tokens, dtype=torch.int32, device=q.device)
            key_offsets = torch.empty(tokens, dtype=torch.int64, device=q.device)
        rotate_kernel[(cdiv(tokens, tile) * groups,)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            positions_ptr=positions,
            inv_freq_ptr=inv_freq,
            slots_ptr=slots,
            q_out_ptr=q_out,
            k_pages_ptr=k_pages,
            v_pages_ptr=v_pages,
            raw_k_pages_ptr=raw_k_pages,
            block_of_page_ptr=block_of_page,
            rows_ptr=rows,
            key_offsets_ptr=key_offsets,
            tokens=tokens,
            q_heads=q_heads,
            kv_heads=kv_heads,
            height_from=sections[0],
            width_from=sections[0] + sections[1],
            page_size=page_size,
            slot_count=pages * page_size,
            blocks=0 if table is None else table.shape[0],
            parts=parts,
            **strides(q, "q", "nhd"),
            **strides(k, "k", "nhd"),
            **strides(v, "v", "nhd"),
            **strides(positions, "positions", "an"),
            **strides(inv_freq, "inv_freq", "f"),
            **strides(slots, "slots", "n"),
            **strides(q_out, "q_out", "nhd"),
            **strides(k_pages, "k_pages", "pbhd"),
            **strides(v_pages, "v_pages", "pbhd"),
            **strides(raw_k_pages, "raw_k_pages", "pbhd"),
            **strides(block_of_page, "block_of_page", "p"),
            SUMMARY_RAW=summary_raw,
            HALF=half,
            FREQUENCIES=frequencies,
            TOKENS=tile,
            HEADS=heads,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        if block_of_page is None:
            return
        keys = k if summary_raw else k_pages
        channels = min(32, power_of_2(head_dim))
        grid = (cdiv(tokens, 32), kv_heads * parts, cdiv(head_dim, channels))
        summary_kernel[grid](
            keys_ptr=keys,
            rows_ptr=rows,
            key_offsets_ptr=key_offsets,
            sum_ptr=sum,
            count_ptr=count,
            kmin_ptr=kmin,
            kmax_ptr=kmax,
            tokens=tokens,
            parts=parts,
            keys_stride_h=keys.stride(-2),
            keys_stride_d=keys.stride(-1),
            **strides(sum, "sum", "bhd"),
            **strides(count, "count", "b"),
            **strides(kmin, "kmin", "bshd"),
            **strides(kmax, "kmax", "bshd"),
            HEAD_DIM=head_dim,
            CHANNELS=channels,
            TILE=32,
            SCAN=256,
            UNROLL=32,
            num_warps=1,
            enable_fp_fusion=True,
        )
