"""The sample clip: made here, the same on every machine, so that the demo needs no download.

Three scenes of eight seconds each, 640 x 360 at 30 frames/s in H.264: one coloured shape moves over
a textured background, and a second one comes in half way. The background pans slowly, so most
patches change a little and few change a lot, as in real video.
"""

from __future__ import annotations

import math
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, RATE, SECONDS = 640, 360, 30, 24

#: (time in seconds, or None for the end, text) of the questions that the demo asks.
QUESTIONS = (
    (7.0, "What color is the circle?"),
    (15.0, "What moved before the square?"),
    (None, "Which shapes were there?"),
)

#: (shape, colour, the second shape, its colour) of each scene.
_SCENES = (
    ("circle", (220, 50, 40), "square", (40, 90, 220)),
    ("square", (40, 90, 220), "triangle", (50, 180, 70)),
    ("triangle", (50, 180, 70), "circle", (230, 200, 40)),
)
_VERSION = 1


def sample_clip(folder: str | os.PathLike[str] | None = None) -> Path:
    """The path of the sample clip, which is made when it is not there yet.

    ``folder`` is where it is kept; by default ``$XDG_CACHE_HOME/vicostream`` (``~/.cache``), or the
    temporary folder where that cannot be written.
    """
    home = Path(folder) if folder is not None else _cache_folder()
    path = home / f"vicostream-sample-v{_VERSION}.mp4"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        partial = home / f".{path.stem}-{os.getpid()}.mp4"
        try:
            write_clip(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def write_clip(path: str | os.PathLike[str], *, seconds: float = SECONDS, rate: int = RATE) -> None:
    """Encodes the first ``seconds`` of the clip as H.264 into ``path``."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        # One thread: x264 cuts slices by thread, and the clip must not depend on the machine.
        stream.options = {"preset": "veryfast", "crf": "23", "threads": "1", "g": str(2 * rate)}
        for index in range(int(seconds * rate)):
            image = frame_at(index / rate)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def frame_at(time_s: float) -> np.ndarray:
    """The clip's picture at a time: uint8 ``[360, 640, 3]``."""
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


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "vicostream"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / "vicostream"
