"""preprocess in Triton: one launch for the width where that changes, one for all the rest.

The function has the semantics of the raw op of `vicostream_kernels.ops.preprocess`, which holds the
contract and checks the arguments. Nothing here waits for the device, and nothing is copied to it.
"""

import ctypes
import math
from collections.abc import Sequence

import torch

from vicostream_kernels.triton_kernels._launch import cdiv, on, strides
from vicostream_kernels.triton_kernels._preprocess_patches import across_kernel, patches_kernel

# Rows and bytes of a program where the width changes: a thread has the same byte of all rows.
_ROWS, _ACROSS = 8, 128
# Bytes of a program that cuts patches.
_BLOCK = 256


def _filter(size_in: int, size_out: int) -> dict[str, float]:
    """How many pixels may have a weight, and what distances are multiplied by."""
    stretch = max(size_in / size_out, 1.0)
    return {"taps": 2 * math.ceil(2 * stretch) + 1, "shrink": _float32(1 / stretch)}


def _normalise(mean: Sequence[float], std: Sequence[float]) -> dict[str, float]:
    """What a level of each channel is multiplied by, and what is added then."""
    made = {}
    for name, m, s in zip(("red", "green", "blue"), mean, std):
        made |= {f"{name}_scale": _float32(1 / (255 * s)), f"{name}_shift": _float32(-m / s)}
    return made


def _float32(value: float) -> float:
    """What a kernel gets; the interpreter would compute in float64."""
    return ctypes.c_float(value).value


def preprocess_frames(
    frames: torch.Tensor,
    height: int,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    patch: int,
    merge: int,
    temporal: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Patches [T*h*w, 3*temporal*patch*patch] of frames uint8 [F, H, W, 3]; any strides."""
    count, height_in, width_in, _ = frames.shape
    levels = frames
    with on(frames):
        if width_in != width:
            levels = frames.new_empty((count, height_in, width, 3))
            tiles = cdiv(3 * width, _ACROSS)
            across_kernel[(cdiv(count * height_in, _ROWS) * tiles,)](
                frames_ptr=frames,
                out_ptr=levels,
                rows=count * height_in,
                height=height_in,
                width_in=width_in,
                width_out=width,
                tiles=tiles,
                **_filter(width_in, width),
                **strides(frames, "frames", "fhwc"),
                ROWS=_ROWS,
                BLOCK=_ACROSS,
                num_warps=4,
                enable_fp_fusion=True,
            )
        rows = cdiv(count, temporal) * (height // patch) * (width // patch)
        out = frames.new_empty((rows, 3 * temporal * patch * patch), dtype=dtype)
        parts = cdiv(3 * patch * patch, _BLOCK)
        patches_kernel[(rows * temporal * parts,)](
            levels_ptr=levels,
            out_ptr=out,
            frames=count,
            height_in=height_in,
            height_out=height,
            width=width,
            parts=parts,
            **_filter(height_in, height),
            **_normalise(mean, std),
            **strides(levels, "levels", "fhwc"),
            RESIZE=height_in != height,
            PATCH=patch,
            MERGE=merge,
            TEMPORAL=temporal,
            BLOCK=_BLOCK,
            num_warps=2,
            enable_fp_fusion=True,
        )
    return out
