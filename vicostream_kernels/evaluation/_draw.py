"""Pictures of a log: shapes over a textured, noisy background whose light drifts.

A cell is 28 x 28 px, one token of the model, so that a 3 x 3 board is a frame of 84 x 84 px. The
background carries a fixed gradient over the frame: a patch alone must show where it lies, since
the ids of rows and columns turn too slowly in a small head to tell neighbours apart.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from vicostream_kernels.evaluation._world import CELLS, SHAPES, SIDE, Log

CELL = 28
FRAME = SIDE * CELL
#: Drawing variants of each shape (size, place, tilt, brightness), and which split may use which.
VARIANTS = 32
SPLIT_VARIANTS = {"train": range(0, 24), "val": range(24, 28), "test": range(28, 32)}

_RGB = np.array(
    [
        (222, 38, 38),
        (38, 168, 58),
        (44, 76, 228),
        (238, 224, 48),
        (246, 142, 22),
        (152, 48, 192),
        (52, 212, 222),
        (246, 246, 246),
    ],
    np.float32,
)
_FINE = 4  # supersampling of the masks
_NOISE = 96  # pictures of noise that all clips take theirs from
_SIGMA = 0.03 * 255


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a shape is, in coordinates that run from -1 to 1 (y down)."""
    r, ax, ay = np.hypot(x, y), np.abs(x), np.abs(y)
    box = np.maximum(ax, ay)
    if shape == "circle":
        return r <= 0.95
    if shape == "ring":
        return (r <= 1) & (r >= 0.58)
    if shape == "square":
        return box <= 0.85
    if shape == "frame":
        return (box <= 0.95) & (box >= 0.55)
    if shape == "diamond":
        return ax + ay <= 1.05
    if shape == "triangle":
        return (y <= 0.8) & (2 * ax <= y + 1.1)
    if shape == "wedge":
        return (y >= -0.8) & (2 * ax <= 1.1 - y)
    if shape == "star":
        turn = np.mod(np.arctan2(x, -y) * 5 / (2 * np.pi) + 0.5, 1) - 0.5
        return r <= 1.05 - 1.15 * np.abs(turn)
    if shape == "plus":
        return (np.minimum(ax, ay) <= 0.3) & (box <= 0.95)
    if shape == "cross":
        return (np.abs(ax - ay) <= 0.38) & (box <= 0.9)
    if shape == "heart":
        u, v = 1.15 * x, -1.15 * y + 0.1
        return (u * u + v * v - 0.75) ** 3 <= 1.3 * u * u * v**3
    if shape == "moon":
        return (r <= 0.98) & (np.hypot(x - 0.5, y) >= 0.8)
    if shape == "bar":
        return (ay <= 0.34) & (ax <= 1)
    if shape == "pole":
        return (ax <= 0.34) & (ay <= 1)
    if shape == "stripes":
        return (box <= 0.95) & (np.mod(y + 0.95, 0.76) <= 0.38)
    if shape == "fence":
        return (box <= 0.95) & (np.mod(x + 0.95, 0.76) <= 0.38)
    if shape == "checker":
        return (box <= 0.95) & ((x > 0) == (y > 0))
    if shape == "ell":
        return (box <= 0.95) & ((x <= -0.4) | (y >= 0.4))
    if shape == "tee":
        return (box <= 0.95) & ((y <= -0.4) | (ax <= 0.28))
    if shape == "hourglass":
        return (ay <= 0.95) & (ax <= 0.12 + 0.85 * ay)
    if shape == "bowtie":
        return (ax <= 0.95) & (ay <= 0.12 + 0.85 * ax)
    if shape == "arch":
        return (box <= 0.95) & ((y <= -0.4) | (ax >= 0.5))
    if shape == "dots":
        return np.hypot(ax - 0.55, ay - 0.55) <= 0.4
    if shape == "target":
        return (r <= 0.38) | ((r <= 1) & (r >= 0.7))
    raise KeyError(shape)


@lru_cache(maxsize=1)
def masks() -> np.ndarray:
    """Opacity of every shape in every variant: float32 [24, 32, 28, 28]."""
    rng = np.random.Generator(np.random.PCG64(84))
    fine = (np.arange(CELL * _FINE) + 0.5) / _FINE - CELL / 2
    y, x = np.meshgrid(fine, fine, indexing="ij")
    out = np.empty((len(SHAPES), VARIANTS, CELL, CELL), np.float32)
    for s, shape in enumerate(SHAPES):
        for v in range(VARIANTS):
            radius = rng.uniform(8.8, 11.2)
            dx, dy = rng.uniform(-1.8, 1.8, 2)
            angle = rng.uniform(-0.14, 0.14)
            c, sn = np.cos(angle), np.sin(angle)
            u, w = (x - dx) / radius, (y - dy) / radius
            inside = _inside(shape, c * u + sn * w, c * w - sn * u)
            soft = inside.reshape(CELL, _FINE, CELL, _FINE).mean((1, 3))
            out[s, v] = soft * rng.uniform(0.86, 1.0)
    return out


@lru_cache(maxsize=1)
def _noise() -> np.ndarray:
    """Pixel noise: int16 [96, 84, 84, 3]."""
    rng = np.random.Generator(np.random.PCG64(28))
    return np.round(_SIGMA * rng.standard_normal((_NOISE, FRAME, FRAME, 3))).astype(np.int16)


def background(rng: np.random.Generator) -> np.ndarray:
    """Gradient, tint and texture of one clip: float32 [84, 84, 3]."""
    ramp = np.linspace(-1, 1, FRAME, dtype=np.float32)
    image = np.full((FRAME, FRAME, 3), 112, np.float32)
    image[..., 0] += 46 * ramp[None, :]
    image[..., 2] += 46 * ramp[:, None]
    image[..., 1] += 26 * ramp[None, :] * ramp[:, None]
    image += rng.uniform(-13, 13, 3).astype(np.float32)
    for cell, weight in ((21, 9.0), (7, 6.0)):
        coarse = rng.uniform(-weight, weight, (FRAME // cell, FRAME // cell, 3))
        image += np.kron(coarse, np.ones((cell, cell, 1))).astype(np.float32)
    return image


def light(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Slow drift of the brightness, up to 12 %: float32 [steps] around 1."""
    amplitude, period = rng.uniform(0.0, 0.12), rng.uniform(24, 96)
    turns = np.arange(steps) / period + rng.random()
    return (1 + amplitude * np.sin(2 * np.pi * turns)).astype(np.float32)


def draw(rng: np.random.Generator, log: Log, frames_per_step: int = 2) -> np.ndarray:
    """The frames of ``log``: uint8 [T * frames_per_step, 84, 84, 3] RGB.

    The frames of a step differ in their noise only.
    """
    steps = log.steps
    scene, bright = background(rng), light(rng, steps)
    # In 64ths, so that whole clips are drawn in int16: half the memory traffic of float32.
    bright = np.round(64 * bright).astype(np.int16)
    out = np.empty((steps * frames_per_step, FRAME, FRAME, 3), np.uint8)
    # The same noise turned to another side is other noise.
    flip = tuple(slice(None, None, int(way)) for way in rng.choice((-1, 1), 2))
    noise = _noise()[(slice(None), *flip)]
    picks = rng.integers(0, _NOISE, (steps, frames_per_step))
    for start in range(0, steps, 64):
        part = slice(start, min(start + 64, steps))
        image = _compose(scene, log, part)
        image *= bright[part, None, None, None]
        image >>= 6
        for k in range(frames_per_step):
            noisy = image + noise[picks[part, k]]
            np.clip(noisy, 0, 255, out=noisy)
            out[
                part.start * frames_per_step + k : part.stop * frames_per_step : frames_per_step
            ] = noisy
    return out


def _compose(scene: np.ndarray, log: Log, part: slice) -> np.ndarray:
    """Background and shapes of some steps, unlit: int16 [n, 84, 84, 3]."""
    shape = log.shape[part]
    step, cell = np.nonzero(shape >= 0)
    image = np.broadcast_to(np.round(scene).astype(np.int16), (len(shape), *scene.shape)).copy()
    if not step.size:
        return image
    tiles = scene.reshape(SIDE, CELL, SIDE, CELL, 3).swapaxes(1, 2).reshape(CELLS, CELL, CELL, 3)
    mask = masks()[shape[step, cell], log.variant[part][step, cell]][..., None]
    colour = _RGB[log.colour[part][step, cell]][:, None, None]
    under = tiles[cell]
    pasted = np.round(under + mask * (colour - under)).astype(np.int16)
    row, column = np.divmod(cell, SIDE)
    image.reshape(-1, SIDE, CELL, SIDE, CELL, 3)[step, row, :, column] = pasted
    return image
