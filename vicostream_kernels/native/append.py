"""rope_append in C++ (CPU) and CUDA C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vicostream_kernels.backends import native

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _strided(x: torch.Tensor | None, dims: int) -> tuple[int, list[int]]:
    if x is None:
        return 0, [0] * dims
    return x.data_ptr(), list(x.stride()[:dims])


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _args(
    module: Any,
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
    raw_k_pages: torch.Tensor | None,
    sum: torch.Tensor | None,
    count: torch.Tensor | None,
    kmin: torch.Tensor | None,
    kmax: torch.Tensor | None,
    summary_raw: bool,
    block_of_page: torch.Tensor | None,
) -> tuple[Any, tuple[torch.Tensor | None, ...]]:
    q, k, v, inv_freq = _dense(q), _dense(k), _dense(v), _dense(inv_freq)
    block_of_page = None if block_of_page is None else _dense(block_of_page)
    pages, page_size, kv_heads, d = k_pages.shape
    blocks = sum.shape[0] if sum is not None else kmin.shape[0] if kmin is not None else 0
    sub = kmin.shape[1] if kmin is not None else 1
    sections = (d // 2, 0) if mrope_section is None else tuple(mrope_section[:2])
    args = module.AppendArgs(
        dtype=_DTYPES[q.dtype],
        sizes=[q.shape[0], q.shape[1], kv_heads, pages, page_size, blocks, sub],
        head_dim=d,
        sections=sections,
        summary_raw=summary_raw,
        q=_strided(q, 2),
        k=_strided(k, 2),
        v=_strided(v, 2),
        q_out=_strided(q_out, 2),
        k_pages=_strided(k_pages, 3),
        v_pages=_strided(v_pages, 3),
        raw_k_pages=_strided(raw_k_pages, 3),
        positions=_strided(positions, 2),
        inv_freq=inv_freq.data_ptr(),
        slots=_strided(slots, 1),
        block_of_page=0 if block_of_page is None else block_of_page.data_ptr(),
        sum=_strided(sum, 2),
        count=0 if count is None else count.data_ptr(),
        kmin=_strided(kmin, 3),
        kmax=_strided(kmax, 3),
    )
    return args, (q, k, v, inv_freq, block_of_page)  # copies must outlive the call


def rope_append_cpu(*tensors: Any) -> None:
    """See ``vicostream_kernels.rope_append``; runs on ``torch.get_num_threads()`` threads."""
    module, _ = native()
    args, _kept = _args(module, *tensors)
    module.rope_append_cpu(args, torch.get_num_threads())


def rope_append_cuda(*tensors: Any) -> None:
    """See ``vicostream_kernels.rope_append``; launches on the current stream of q's device."""
    module, _ = native()
    device = tensors[0].device
    with torch.cuda.device(device):
        args, _kept = _args(module, *tensors)
        module.rope_append_cuda(args, torch.cuda.current_stream(device).cuda_stream)
