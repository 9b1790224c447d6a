"""``vicostream bench reuse/error``: how far features are from the plain ViT's, over the ratio.

Clips are made here, the same on every machine: a camera that stands still (sensor noise, an object
that moves) and one that pans. Each curve runs the encoder as a stream does, calls of eight frames,
and compares the merged features of the calls between full ones with the plain ViT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from vicostream_kernels.methods.rules import ReuseRule
from vicostream_kernels.ops.preprocess import preprocess_frames

RATIOS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
CLIPS = ("still camera", "pan")
_FRAMES_PER_CALL = 8


class WrongResult(RuntimeError):
    """What must equal the plain ViT bit for bit does not."""


@dataclass(frozen=True)
class Point:
    """One place of a curve; errors are ``|reused - plain| / |plain|`` of merged features.

    Attributes:
        clip, selection, ratio: what ran.
        error: over all steps of calls between full ones.
        worst: of the step with the largest.
        computed: share of patches (of all calls) whose Q, V, attention and MLP were computed.
        stale: the error of showing the reference's features for every step, for comparison.
    """

    clip: str
    selection: str
    ratio: float
    error: float
    worst: float
    computed: float
    stale: float


def make_clip(name: str, frames: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """uint8 [frames, height, width, 3]."""
    random = np.random.Generator(np.random.PCG64(seed))
    wide = width + 2 * frames
    total = np.zeros((height, wide, 3), dtype=np.int32)
    for cell, weight in ((30, 2), (10, 2), (3, 3)):  # edges everywhere, as in real video
        coarse = random.integers(40, 200, (height // cell + 1, wide // cell + 1, 3))
        total += weight * np.kron(coarse, np.ones((cell, cell, 1), dtype=np.int32))[:height, :wide]
    texture = total // 7
    side = height // 4
    made = []
    for i in range(frames):
        left = 2 * i if name == "pan" else 0
        image = texture[:, left : left + width].copy()
        x = (7 * i) % (width - side)
        y = (3 * i) % (height - side)
        image[y : y + side, x : x + side] = (220, 50, 40)
        image += random.integers(-1, 2, image.shape)
        made.append(image.clip(0, 255).astype(np.uint8))
    return torch.from_numpy(np.stack(made))


def measure(
    runner: Any,
    *,
    ratios: Sequence[float] = RATIOS,
    selections: Sequence[str] = ("layer", "shared"),
    clips: Sequence[str] = CLIPS,
    calls: int = 8,
    size: tuple[int, int] = (252, 420),
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """The curves; raises WrongResult where full calls, or ratio 1, are not the plain ViT's bits."""
    points = []
    for clip in clips:
        frames = make_clip(clip, calls * _FRAMES_PER_CALL, *size, seed=seed)
        parts = [_patches(runner, part) for part in frames.split(_FRAMES_PER_CALL)]
        plain = [runner.encode(*part) for part in parts]
        for selection in selections:
            for ratio in ratios:
                progress(f"{clip}, selection {selection}, ratio {ratio:g}")
                rule = ReuseRule(ratio=ratio, selection=selection, skip_tolerance=None)
                points.append(_point(runner, rule, clip, parts, plain))
    return points


def _patches(runner: Any, frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    pixels = frames.shape[1] * frames.shape[2]
    return preprocess_frames(
        frames.to(runner.device),
        min_pixels=pixels,
        max_pixels=pixels,
        mean=runner.image_mean,
        std=runner.image_std,
        patch=runner.patch_size,
        merge=runner.merge_size,
        temporal=runner.temporal_patch_size,
        dtype=runner.dtype,
    )


def _point(runner, rule: ReuseRule, clip: str, parts, plain) -> Point:
    state = runner.encoder_state(rule)
    squares = norms = worst = frozen = 0.0
    for (patches, grid), expected in zip(parts, plain):
        before = state.counts["full_calls"]
        got = runner.encode(patches, grid, state=state)
        if state.counts["full_calls"] > before:
            if not torch.equal(got, expected):
                raise WrongResult(
                    f"{clip}, ratio {rule.ratio:g}: a full call is not the plain ViT's bits"
                )
            if rule.ratio < 1:
                continue
        reference = state.tokens.double()
        for step, wanted in zip(got.double(), expected.double()):
            off, size = float((step - wanted).square().sum()), float(wanted.square().sum())
            squares, norms = squares + off, norms + size
            frozen += float((reference - wanted).square().sum())
            worst = max(worst, (off / size) ** 0.5)
    error = (squares / norms) ** 0.5
    if rule.ratio == 1 and error != 0.0:
        raise WrongResult(f"{clip}: ratio 1 differs from the plain ViT by {error:.1e}")
    computed = float(state.recomputed.double().mean()) / state.counts["patches"]
    stale = (frozen / norms) ** 0.5
    return Point(clip, rule.selection, rule.ratio, error, worst, computed, stale)


def table(points: Sequence[Point]) -> str:
    """One row a ratio, one column a clip and selection: the error, and the worst step's. The first
    row shows the reference's features instead."""
    curves = list(dict.fromkeys((p.clip, p.selection) for p in points))
    at = {(p.clip, p.selection, p.ratio): p for p in points}
    head = "".join(f"  {f'{clip}, {selection}':>22}" for clip, selection in curves)
    lines = ["  ratio  computed" + head]
    least = min(p.ratio for p in points)
    cells = "".join(f"  {100 * at[(*curve, least)].stale:20.2f} %" for curve in curves)
    lines.append("  stale     0.0 %" + cells)
    for ratio in dict.fromkeys(p.ratio for p in points):
        row = [at[(*curve, ratio)] for curve in curves]
        cells = "".join(f"  {f'{100 * p.error:.2f} % ({100 * p.worst:.2f})':>22}" for p in row)
        lines.append(f"  {ratio:5g}  {100 * row[0].computed:6.1f} %" + cells)
    return "\n".join(lines)


def as_data(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]
