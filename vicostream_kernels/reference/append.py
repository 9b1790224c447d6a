"""The definition of ``rope_append``: rotate q and k, write pages, update block summaries."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vicostream_kernels.reference._precision import accumulate_dtype


def rotary_angles(
    positions: torch.Tensor,
    inv_freq: torch.Tensor,
    mrope_section: Sequence[int] | None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [N, d/2] of each token's rotary angles.

    ``positions`` [3, N] are (t, h, w); frequency f uses the axis whose ``mrope_section`` holds f
    (Qwen2-VL, arXiv 2409.12191, section 2.1), or row 0 where there are no sections. The product of
    position and frequency is taken in float64 as turns and reduced by its nearest integer, so that
    the angle keeps its precision for days of stream.
    """
    half = inv_freq.numel()
    axis = torch.zeros(half, dtype=torch.long, device=positions.device)
    if mrope_section is not None:
        sizes = torch.tensor(mrope_section, device=positions.device)
        axis = torch.repeat_interleave(torch.arange(3, device=positions.device), sizes)
    turns_per_position = inv_freq.double() / (2 * torch.pi)
    turns = positions.double()[axis].T * turns_per_position
    angle = (turns - turns.round()) * (2 * torch.pi)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """rotate_half: pairs channel f with f + d/2. x [N, heads, d], cos and sin [N, d/2]."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
    """See ``vicostream_kernels.rope_append``; writes into its arguments."""
    dtype = accumulate_dtype(q)
    cos, sin = rotary_angles(positions, inv_freq, mrope_section, dtype)
    q_out.copy_(rotate(q, cos, sin))
    rotated = rotate(k, cos, sin).to(k_pages.dtype)

    pages, page_size = k_pages.shape[:2]
    written = ((slots >= 0) & (slots < pages * page_size)).nonzero().flatten()
    slot = slots[written].long()
    page, offset = slot // page_size, slot % page_size
    k_pages[page, offset] = rotated[written]
    v_pages[page, offset] = v[written].to(v_pages.dtype)
    if raw_k_pages is not None:
        raw_k_pages[page, offset] = k[written].to(raw_k_pages.dtype)
    if block_of_page is None:
        return

    stored = (k if summary_raw else rotated).to(k_pages.dtype)
    blocks = (sum if sum is not None else kmin).shape[0]
    for n, p, o in zip(written.tolist(), page.tolist(), offset.tolist()):
        row = int(block_of_page[p])
        if not 0 <= row < blocks:
            continue
        if sum is not None:
            sum[row] += stored[n].to(sum.dtype)
            count[row] += 1
        if kmin is not None:
            part = o * kmin.shape[1] // page_size
            kmin[row, part] = torch.minimum(kmin[row, part], stored[n].to(kmin.dtype))
            kmax[row, part] = torch.maximum(kmax[row, part], stored[n].to(kmax.dtype))
