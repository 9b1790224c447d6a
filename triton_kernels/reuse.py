"""reuse in Triton: the launches.

The functions have the semantics of the raw ops of `vicostream_kernels.ops.reuse`, which holds the
contract and checks the arguments. Nothing here waits for the device.
"""

import ctypes

import torch

from vicostream_kernels.triton_kernels._compact import list_kernel
from vicostream_kernels.triton_kernels._launch import cdiv, on, power_of_2, strides
from vicostream_kernels.triton_kernels._reuse_rows import gather_kernel, merge_kernel
from vicostream_kernels.triton_kernels._reuse_select import rank_kernel, similarity_kernel
from vicostream_kernels.triton_kernels._similarity import regular, sum_tiles

# Rows of a program that copies: one look through the index list serves them all.
_ROWS = 4
# Rows that a program ranks: few, so that those of a chunk occupy most of a GPU. Counted over all
# programs that takes a seventh more instructions than 64 rows each.
_TILE = 16


def _block(width: int) -> int:
    return min(512, max(16, power_of_2(width)))


def _shared(x: torch.Tensor, name: str, axes: str) -> dict[str, int]:
    """Strides of [F, ...], or of what all frames share, whose frame stride is 0."""
    if x.dim() == len(axes):
        return strides(x, name, axes)
    return {f"{name}_stride_{axes[0]}": 0} | strides(x, name, axes[1:])


def select_changed(
    feature: torch.Tensor,
    reference: torch.Tensor,
    k: int,
    threshold: float | None,
    capacity: int,
    metric: str,
    force: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """index [F, capacity] int32, count [F] int32, similarity [F, N] float32, in three launches.

    The arguments are those of the raw op `vicostream::select_changed`: feature [F,N,C], reference
    [N,C] or [F,N,C], force [N] or [F,N] bool; any strides, but what lies oddly is copied.
    """
    frames, places, width = feature.shape
    tiles = cdiv(places, _TILE)
    i32 = dict(dtype=torch.int32, device=feature.device)
    index, count = torch.empty((frames, capacity), **i32), torch.empty((frames,), **i32)
    similarity = torch.empty((frames, places), dtype=torch.float32, device=feature.device)
    values = torch.empty((frames, places), **i32)
    # Each of its own, aligned: kernels are compiled for the alignment of what they are given.
    listed, changed = (torch.empty((frames, tiles), **i32) for _ in range(2))
    force_strides = {"force_stride_f": 0, "force_stride_n": 0}
    if force is not None:
        force = force.view(torch.uint8)
        force_strides = _shared(force, "force", "fn")
    at_sums = sum_tiles(width, 8 if feature.element_size() == 2 else 4)
    with on(feature):
        feature, reference = regular(feature), regular(reference)
        similarity_kernel[(cdiv(places, at_sums["ROWS"]) * frames,)](
            feature_ptr=feature,
            reference_ptr=reference,
            similarity_ptr=similarity,
            frames=frames,
            places=places,
            width=width,
            **strides(feature, "feature", "fnc"),
            **_shared(reference, "reference", "fnc"),
            METRIC=metric,
            **at_sums,
        )
        rank_kernel[(frames * tiles,)](
            similarity_ptr=similarity,
            force_ptr=force,
            values_ptr=values,
            listed_ptr=listed,
            changed_ptr=changed,
            places=places,
            tiles=tiles,
            k=k,
            capacity=capacity,
            # As float32, which is what a kernel gets: the interpreter would take it as float64.
            threshold=0.0 if threshold is None else ctypes.c_float(threshold).value,
            **force_strides,
            HAS_THRESHOLD=threshold is not None,
            TILE=_TILE,
            OTHERS=64,
            num_warps=4,
            enable_fp_fusion=True,
        )
        list_kernel[(frames * tiles,)](
            values_ptr=values,
            listed_ptr=listed,
            changed_ptr=changed,
            out_ptr=index,
            count_ptr=count,
            length=places,
            tiles=tiles,
            capacity=capacity,
            TILE=_TILE,
            SCAN=64,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return index, count, similarity


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The listed rows [F, K, C] of x [F, N, C]; any strides. One launch."""
    frames, places, width = x.shape
    rows = index.shape[1]
    out = torch.empty((frames, rows, width), dtype=x.dtype, device=x.device)
    tiles = cdiv(rows, _ROWS)
    with on(x):
        gather_kernel[(frames * tiles,)](
            x_ptr=x,
            index_ptr=index,
            out_ptr=out,
            places=places,
            rows=rows,
            width=width,
            tiles=tiles,
            **strides(x, "x", "fnc"),
            **strides(index, "index", "fk"),
            ROWS=_ROWS,
            BLOCK=_block(width),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


def merge_rows(
    base: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """base [N, C] or [F, N, C] with listed rows replaced, plus residual; any strides."""
    frames, replaced, width = rows.shape
    places = base.shape[-2]
    out = torch.empty((frames, places, width), dtype=base.dtype, device=base.device)
    with on(base):
        merge_kernel[(cdiv(places, _ROWS) * frames,)](
            base_ptr=base,
            rows_ptr=rows,
            index_ptr=index,
            residual_ptr=residual,
            out_ptr=out,
            frames=frames,
            places=places,
            replaced=replaced,
            width=width,
            **_shared(base, "base", "fnc"),
            **strides(rows, "rows", "fkc"),
            **strides(index, "index", "fk"),
            **strides(residual, "residual", "fnc"),
            ROWS=_ROWS,
            BLOCK=_block(width),
            SCAN=128,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
