"""preprocess_frames: frames to patches, against torch's resize and one strided multiplication."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from vicostream_kernels import backends, preprocess_frames
from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider, case
from vicostream_kernels.ops.preprocess import smart_resize
from vicostream_kernels.reference import preprocess as truth
from vicostream_kernels.reference._precision import accumulate_in

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PATCH, _MERGE, _TEMPORAL = 14, 2, 2


def _make(
    device: torch.device, seed: int, *, frames: int, height: int, width: int, pixels: int
) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (frames, height, width, 3), generator=random).to(torch.uint8)
    size = smart_resize(height, width, _PATCH * _MERGE, pixels, pixels)
    made = {"frames": pictures.to(device), "pixels": pixels, "size": size}
    if device.type == "cuda":  # no bits to compare with: levels may lie two from the definition's
        exact = truth.resize_to_levels(pictures, *size, torch.float64)
        levels = truth.preprocess_frames(
            exact, *size, (0, 0, 0), (1 / 255,) * 3, _PATCH, _MERGE, _TEMPORAL, torch.float32
        )
        made["levels"] = levels.round().to(device)
    return made


def _ours(inputs: Inputs, *, dtype: torch.dtype, backend: str) -> torch.Tensor:
    pixels = inputs["pixels"]
    return preprocess_frames(
        inputs["frames"], min_pixels=pixels, max_pixels=pixels, mean=_MEAN, std=_STD, dtype=dtype,
        backend=backend,
    )[0]  # fmt: skip


def _torch(inputs: Inputs, *, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU the definition as it stands, torch's uint8 kernel and one strided pass; on a GPU
    torch's resize of float planes (one rounding in place of two) before that pass."""
    frames, size = inputs["frames"], inputs["size"]
    if frames.is_cuda and frames.shape[1:3] != size:
        planes = frames.permute(0, 3, 1, 2).float()
        planes = F.interpolate(planes, size=size, mode="bicubic", antialias=True)
        frames = planes.round_().clamp_(0, 255).permute(0, 2, 3, 1)
    return truth.preprocess_frames(frames, *size, _MEAN, _STD, _PATCH, _MERGE, _TEMPORAL, dtype)


def _levels(inputs: Inputs) -> Outputs:
    """In float64 from the levels that torch's fixed-point resize gives: ours must be those."""
    if "levels" in inputs:
        return dict.fromkeys(("too far", "too often"), torch.zeros((), dtype=torch.int64))
    frames, size = inputs["frames"].cpu(), inputs["size"]
    if frames.shape[1:3] != size:
        frames = truth.resize_on_cpu(frames, *size)
    with accumulate_in(torch.float64):
        args = (*size, _MEAN, _STD, _PATCH, _MERGE, _TEMPORAL, torch.float64)
        return {"patches": truth.preprocess_frames(frames, *args)}


def _providers(device: torch.device, *, dtype: torch.dtype) -> list[Provider]:
    made = [
        Provider(f"ours:{name}", partial(_ours, dtype=dtype, backend=name), name == "reference")
        for name in backends.served_by("preprocess_frames", device.type)
    ]
    return [*made, Provider("torch", partial(_torch, dtype=dtype))]


def _outputs(inputs: Inputs, result: Any) -> Outputs:
    if "levels" not in inputs:
        return {"patches": result}
    mean, std = (torch.tensor(v, device=result.device)[:, None] for v in (_MEAN, _STD))
    levels = (result.float().unflatten(1, (3, -1)) * std + mean) * 255
    off = (levels.round() - inputs["levels"].unflatten(1, (3, -1))).abs()
    # What is not a number is too far; half of all levels off by one is not rounding any more.
    often = (off != 0).double().mean() > 0.5
    return {"too far": (~(off <= 2)).sum(), "too often": often.long()}


def _case(
    frames: int, height: int, width: int, pixels: int, dtype: torch.dtype, *, smoke: bool = False
) -> Case:
    size = smart_resize(height, width, _PATCH * _MERGE, pixels, pixels)
    values = -(-frames // _TEMPORAL) * _TEMPORAL * size[0] * size[1] * 3
    name = str(dtype).removeprefix("torch.")
    return Case(
        name=f"preprocess/{frames}f-{height}x{width}/{name}",
        word="preprocess",
        op="preprocess_frames",
        axes=dict(frames=frames, height=height, width=width, pixels=size[0] * size[1]),
        dtype=dtype,
        bytes=frames * height * width * 3 + values * dtype.itemsize,
        flops=2 * values,
        make=partial(_make, frames=frames, height=height, width=width, pixels=pixels),
        providers=partial(_providers, dtype=dtype),
        reference=_levels,
        outputs=_outputs,
        smoke=smoke,
    )


@case
def cases() -> Iterator[Case]:
    """ViCoStream's chunk of eight frames at 90,000 px, from three sources."""
    yield _case(3, 40, 60, 28 * 56, torch.float32, smoke=True)
    for height, width in ((252, 420), (360, 640), (1080, 1920)):
        yield _case(8, height, width, 252 * 420, torch.float32)
