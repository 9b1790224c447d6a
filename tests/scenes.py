"""Moving pictures for tests: a coloured shape moves over a textured background.

Three scenes of eight seconds each, 640 x 360: one shape goes round, and a second one comes in half
way. The background pans slowly, so most patches change a little and few change a lot, as in video.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

WIDTH, HEIGHT, SECONDS = 640, 360, 24

#: (shape, colour, the second shape, its colour) of each scene.
_SCENES = (
    ("circle", (220, 50, 40), "square", (40, 90, 220)),
    ("square", (40, 90, 220), "triangle", (50, 180, 70)),
    ("triangle", (50, 180, 70), "circle", (230, 200, 40)),
)


def frame_at(time_s: float) -> np.ndarray:
    """The picture at a time: uint8 ``[360, 640, 3]``."""
    texture = _texture()
    scene, into = divmod(time_s, SECONDS / len(_SCENES))
    first, first_colour, second, second_colour = _SCENES[int(scene) % len(_SCENES)]
    pan = int(time_s * 12) % (texture.shape[1] - WIDTH)
    image = texture[:, pan : pan + WIDTH].copy()
    angle = 2 * math.pi * into / 8
    _draw(image, first, first_colour, (320 + 200 * math.cos(angle), 180 + 90 * math.sin(angle)))
    if into >= 4:
        _draw(image, second, second_colour, (100 + 110 * (into - 4), 90))
    return image


def _draw(image: np.ndarray, shape: str, colour: tuple[int, int, int], centre: tuple) -> None:
    """Fills a shape of about 90 px around ``centre``; the part outside the picture is cut off."""
    half = 45
    left, top = int(centre[0]) - half, int(centre[1]) - half
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + 2 * half, WIDTH), min(top + 2 * half, HEIGHT)
    if x0 >= x1 or y0 >= y1:
        return
    y, x = np.mgrid[y0 - top : y1 - top, x0 - left : x1 - left] - half
    inside = {
        "circle": x * x + y * y <= half * half,
        "square": np.maximum(abs(x), abs(y)) <= half - 6,
        "triangle": (y <= half - 8) & (2 * abs(x) <= y + half),
    }[shape]
    image[y0:y1, x0:x1][inside] = colour


@lru_cache(maxsize=1)
def _texture() -> np.ndarray:
    """A wide soft texture from integers alone, so that every machine draws the same."""
    rng = np.random.Generator(np.random.PCG64(2606))
    height, width = HEIGHT, WIDTH + 320
    total = np.zeros((height, width, 3), dtype=np.int32)
    for cell, weight in ((120, 4), (40, 2), (8, 1)):
        coarse = rng.integers(60, 170, (height // cell + 2, width // cell + 2, 3), dtype=np.int32)
        total += weight * _enlarge(coarse, cell)[:height, :width]
    return (total // 7).astype(np.uint8)


def _enlarge(coarse: np.ndarray, cell: int) -> np.ndarray:
    """Bilinear enlargement by ``cell`` in integers: [h, w, 3] -> [(h-1)*cell, (w-1)*cell, 3]."""
    ramp = np.arange(cell, dtype=np.int32)
    rows = coarse[:-1, None] * (cell - ramp)[None, :, None, None]
    rows = rows + coarse[1:, None] * ramp[None, :, None, None]
    rows = rows.reshape(-1, *coarse.shape[1:])
    columns = rows[:, :-1, None] * (cell - ramp)[None, None, :, None]
    columns = columns + rows[:, 1:, None] * ramp[None, None, :, None]
    return columns.reshape(rows.shape[0], -1, 3) // (cell * cell)
