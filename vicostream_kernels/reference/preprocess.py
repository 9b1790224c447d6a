"""The definition of ``preprocess_frames``: resize to uint8 levels, normalise, patchify."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vicostream_kernels.reference._precision import accumulate_dtype


def bicubic_weights(
    size_in: int, size_out: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """[size_out, size_in] weights of Pillow's bicubic filter (a = -0.5) with antialias.

    The filter is stretched by the scale when it shrinks; weights add up to 1 at the borders too.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)
    centre = (torch.arange(size_out, dtype=torch.float64, device=device) + 0.5) * scale
    pixel = torch.arange(size_in, dtype=torch.float64, device=device) + 0.5
    x = ((pixel - centre[:, None]) / stretch).abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    weight = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return (weight / weight.sum(1, keepdim=True)).to(dtype)


def resize_to_levels(
    frames: torch.Tensor, height: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Frames uint8 [F, H, W, 3] -> uint8 [F, height, width, 3]: the truth, computed in ``dtype``.

    As Pillow has it: along the width first, then along the height, and each of the two passes ends
    in a rounding (half up) and a clamp to [0, 255].
    """

    def levels(x: torch.Tensor) -> torch.Tensor:
        return (x + 0.5).floor().clamp(0, 255)

    across = bicubic_weights(frames.shape[2], width, dtype, frames.device)
    down = bicubic_weights(frames.shape[1], height, dtype, frames.device)
    planes = frames.permute(0, 3, 1, 2).to(dtype)
    return levels(down @ levels(planes @ across.T)).to(torch.uint8).permute(0, 2, 3, 1)


def resize_on_cpu(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """torch's fixed-point uint8 kernel: the same two passes with 16-bit weights, much faster."""
    planes = frames.permute(0, 3, 1, 2)
    resized = F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)


def _constant(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor made on the device: a copy from the host could not be graph-captured."""
    return torch.stack([torch.full((), v, dtype=dtype, device=device) for v in values])


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """What a level of each channel is multiplied by, and what is added then."""
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std)]


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
    """See ``vicostream_kernels.preprocess_frames``; height and width are those after the resize."""
    compute = accumulate_dtype(frames)
    if frames.shape[1:3] == (height, width):
        pixels = frames
    elif frames.device.type == "cpu" and compute == torch.float32:
        pixels = resize_on_cpu(frames, height, width)
    else:
        pixels = resize_to_levels(frames, height, width, compute)
    missing = -pixels.shape[0] % temporal
    if missing:
        pixels = torch.cat((pixels, pixels[-1:].expand(missing, -1, -1, -1)))

    merged_h, merged_w = height // (patch * merge), width // (patch * merge)
    raster = pixels.unflatten(0, (-1, temporal)).unflatten(2, (merged_h, merge, patch))
    raster = raster.unflatten(5, (merged_w, merge, patch))
    # [T, merged_h, merged_w, merge, merge, 3, temporal, patch, patch]
    ordered = raster.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)

    scale, shift = (_constant(v, compute, frames.device) for v in scale_and_shift(mean, std))
    out = torch.empty(ordered.shape, dtype=compute, device=frames.device)
    # One strided pass reads uint8 and writes patches; the shift then runs over dense memory.
    torch.mul(ordered, scale[:, None, None, None], out=out).add_(shift[:, None, None, None])
    return out.view(-1, 3 * temporal * patch * patch).to(dtype)
