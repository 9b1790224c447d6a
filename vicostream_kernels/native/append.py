"""rope_append in C++ (CPU) and CUDA C++."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from vicostream_kernels._huge_pages import in_large_pages
from vicostream_kernels.backends import native
from vicostream_kernels.native._stream import current_stream

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NONE = (0, 0, 0)
_OUTPUT = 9  # among the arguments: q_out


@lru_cache(maxsize=1024)
def _layout(
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    head_dim: int,
    sections: tuple[int, int],
    summary_raw: bool,
    *strides: tuple[int, ...],
) -> Any:
    """Sizes and strides as C++ keeps them; made once for each layout a model uses."""
    dims = (2, 2, 2, 2, 3, 3, 3, 2, 1, 2, 3, 3)
    cut = [stride[:n] for stride, n in zip(strides, dims)]
    return native()[0].AppendLayout(_DTYPES[dtype], sizes, head_dim, sections, summary_raw, *cut)


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _stride(x: torch.Tensor | None) -> tuple[int, ...]:
    return _NONE if x is None else x.stride()


def _prepare(
    q, k, v, positions, inv_freq, mrope_section, k_pages, v_pages, slots, q_out, raw_k_pages,
    sum, count, kmin, kmax, summary_raw, block_of_page,
) -> tuple[Any, tuple[int, ...], tuple[torch.Tensor | None, ...]]:  # fmt: skip
    """The layout, the addresses, and the tensors that must outlive the call."""
    kept = q, k, v, inv_freq, block_of_page = (
        _dense(q),
        _dense(k),
        _dense(v),
        _dense(inv_freq),
        None if block_of_page is None else _dense(block_of_page),
    )
    pages, page_size, kv_heads, d = k_pages.shape
    bounds = kmin.shape if kmin is not None else (0, 1)
    blocks = sum.shape[0] if sum is not None else bounds[0]
    layout = _layout(
        q.dtype,
        (q.shape[0], q.shape[1], kv_heads, pages, page_size, blocks, bounds[1]),
        d,
        (d // 2, 0) if mrope_section is None else tuple(mrope_section[:2]),
        summary_raw,
        q.stride(), k.stride(), v.stride(), q_out.stride(), k_pages.stride(), v_pages.stride(),
        _stride(raw_k_pages), positions.stride(), slots.stride(), _stride(sum), _stride(kmin),
        _stride(kmax),
    )  # fmt: skip
    addresses = (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), positions.data_ptr(), inv_freq.data_ptr(),
        slots.data_ptr(), _address(block_of_page), q_out.data_ptr(), k_pages.data_ptr(),
        v_pages.data_ptr(), _address(raw_k_pages), _address(sum), _address(count), _address(kmin),
        _address(kmax),
    )  # fmt: skip
    return layout, addresses, kept


def rope_append_cpu(*args: Any) -> None:
    """See ``vicostream_kernels.rope_append``; runs on ``torch.get_num_threads()`` threads."""
    layout, addresses, _kept = _prepare(*args)
    in_large_pages(args[_OUTPUT])
    native()[0].rope_append_cpu(layout, addresses, torch.get_num_threads())


def rope_append_cuda(*args: Any) -> None:
    """See ``vicostream_kernels.rope_append``; launches on the current stream of q's device."""
    with current_stream(args[0].device) as stream:
        layout, addresses, _kept = _prepare(*args)
        native()[0].rope_append_cuda(layout, addresses, stream)
