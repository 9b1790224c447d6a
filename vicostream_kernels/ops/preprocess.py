"""preprocess: uint8 frames -> normalised patches in Qwen2.5-VL's order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vicostream_kernels import backends, checks
from vicostream_kernels.ops._registry import register

backends.declare(
    "preprocess",
    "preprocess_frames",
    triton="vicostream_kernels.triton_kernels.preprocess:preprocess_frames",
    cpu="vicostream_kernels.native.preprocess:preprocess_frames_cpu",
    reference="vicostream_kernels.reference.preprocess:preprocess_frames",
)

#: As in transformers: longer shapes would be squashed to one row of patches.
MAX_ASPECT = 200
_OP = "preprocess_frames"
_SCHEMA = (
    "preprocess_frames(Tensor frames, int height, int width, float[] mean, float[] std, "
    "int patch=14, int merge=2, int temporal=2, ScalarType dtype=float, "
    'str backend="auto") -> Tensor'
)


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The (height, width) a frame is resized to, exactly as Qwen2.5-VL's processors choose it.

    Both sides become multiples of ``factor``, the nearest ones where their product then lies in
    [min_pixels, max_pixels]; otherwise the frame is scaled to the bound, rounded down to multiples
    when it shrinks (at least one ``factor``) and up when it grows. So a growing frame may pass
    ``max_pixels``. 1 x 1 px works.

    Args:
        height, width: the frame's size in pixels, each at least 1.
        factor: patch size x merge size (28 in Qwen2.5-VL).
        min_pixels, max_pixels: bounds of the resized area in pixels, 1 <= min <= max.

    Raises:
        ValueError: a size or bound is out of range, or one side is more than 200 times the other.

    Source: ``smart_resize`` of transformers' Qwen2-VL processors.
    """
    for name, value in (("height", height), ("width", width), ("factor", factor)):
        checks.check_range("smart_resize", name, value, 1)
    checks.check_range("smart_resize", "min_pixels", min_pixels, 1)
    checks.check_range("smart_resize", "max_pixels", max_pixels, min_pixels)
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise ValueError(
            f"smart_resize: height={height}, width={width} has an aspect ratio of {aspect:.1f}, "
            f"allowed: at most {MAX_ASPECT}"
        )
    new_h, new_w = round(height / factor) * factor, round(width / factor) * factor
    if new_h * new_w > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_h = max(factor, math.floor(height / shrink / factor) * factor)
        new_w = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_h * new_w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_h = math.ceil(height * grow / factor) * factor
        new_w = math.ceil(width * grow / factor) * factor
    return new_h, new_w


def preprocess_frames(
    frames: torch.Tensor,
    *,
    min_pixels: int,
    max_pixels: int,
    mean: Sequence[float],
    std: Sequence[float],
    patch: int = 14,
    merge: int = 2,
    temporal: int = 2,
    resizes: int = 1,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Resizes RGB frames, normalises them and cuts them into patches in Qwen2.5-VL's order.

    1. Resize to ``smart_resize(H, W, patch * merge, min_pixels, max_pixels)``: bicubic (a = -0.5)
       with antialias, along the width and then the height; each pass ends in uint8 levels (rounded,
       clamped to [0, 255]), as Pillow and therefore transformers' Pillow processor have it. A frame
       that has the size already is not resampled.
    2. Value = (level / 255 - mean) / std, in float32.
    3. A last step that is short of ``temporal`` frames repeats its last frame.

    Every backend's levels lie within 2 of the definition's, and about 99 % are equal (about 95 % on
    noiseless ramps): an exact value next to a half rounds either way in fixed-point arithmetic.
    Each frame is treated alone.

    Args:
        frames: [F, H, W, 3] uint8 RGB, F >= 1, any strides.
        min_pixels, max_pixels: bounds of the resized area of one frame, in pixels.
        mean, std: three floats each, of values in [0, 1]; std > 0.
        patch: side of a patch in pixels.
        merge: patches along each side of a merged token; they stand next to each other in the rows.
        temporal: raw frames a step.
        resizes: how often the rule of ``smart_resize`` is applied to the size before the frames are
            resampled, once, to the result. Video loaders apply it and the processor does again,
            which changes the size where min_pixels is above the first result's area.
        dtype: float32, float16 or bfloat16.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        patches [T*h*w, 3*temporal*patch*patch] in ``dtype``: rows in the order (step, merged row,
        merged column, row in the merge, column in the merge), columns in the order (channel, frame
        of the step, y, x); and grid_thw = (T, h, w), steps and patches along height and width.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or range is wrong, or the frames' aspect
            ratio is above 200.
        BackendUnavailable: the backend asked for can't serve this; the message says what can.

    Source: Qwen2-VL (arXiv 2409.12191) and transformers' ``Qwen2VLImageProcessor`` and
    ``Qwen2VLVideoProcessor``.
    """
    checks.Dims(_OP).bind("frames", frames, "F H W 3", torch.uint8)
    _check_sizes(patch=patch, merge=merge, temporal=temporal, resizes=resizes)
    checks.check_choice(_OP, "dtype", dtype, checks.FLOAT_DTYPES)
    checks.check_choice(_OP, "backend", backend, ("auto", *backends.BACKENDS))
    height, width = frames.shape[1:3]
    for _ in range(resizes):
        height, width = smart_resize(height, width, patch * merge, min_pixels, max_pixels)
    patches = torch.ops.vicostream.preprocess_frames(
        frames,
        height,
        width,
        checks.float_list(_OP, "mean", mean),
        checks.float_list(_OP, "std", std),
        patch,
        merge,
        temporal,
        dtype,
        backend,
    )
    steps = -(-frames.shape[0] // temporal)
    return patches, (steps, height // patch, width // patch)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        checks.check_int(_OP, name, value)
        checks.check_range(_OP, name, value, 1)


def _check(frames, height, width, mean, std, patch, merge, temporal, dtype) -> None:
    checks.Dims(_OP).bind("frames", frames, "F H W 3", torch.uint8)
    if 0 in frames.shape:
        raise ValueError(
            f"{_OP}: frames has shape {tuple(frames.shape)}, allowed: at least one frame and pixel"
        )
    _check_sizes(patch=patch, merge=merge, temporal=temporal)
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % (patch * merge):
            raise ValueError(
                f"{_OP}: {name}={size} must be a positive multiple of patch*merge={patch * merge}"
            )
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(map(math.isfinite, values)):
            raise ValueError(f"{_OP}: {name}={list(values)}, allowed: three finite floats")
    if min(std) <= 0:
        raise ValueError(f"{_OP}: std={list(std)}, allowed: above 0")
    checks.check_choice(_OP, "dtype", dtype, checks.FLOAT_DTYPES)


def _run(
    frames, height, width, mean, std, patch=14, merge=2, temporal=2, dtype=torch.float32,
    backend="auto",
):  # fmt: skip
    _check(frames, height, width, mean, std, patch, merge, temporal, dtype)
    run = backends.resolve(_OP, backend, frames)
    return run(frames, height, width, mean, std, patch, merge, temporal, dtype)


def _fake(
    frames, height, width, mean, std, patch=14, merge=2, temporal=2, dtype=torch.float32,
    backend="auto",
):  # fmt: skip
    _check(frames, height, width, mean, std, patch, merge, temporal, dtype)
    steps = -(-frames.shape[0] // temporal)
    rows = steps * (height // patch) * (width // patch)
    return frames.new_empty((rows, 3 * temporal * patch * patch), dtype=dtype)


register(_SCHEMA, _run, _fake)
