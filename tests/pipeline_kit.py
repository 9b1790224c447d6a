"""Videos in every state, and small engines: what the tests of the pipeline are made of."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
from scenes import frame_at

from vicostream_kernels import methods
from vicostream_kernels.models import load_model
from vicostream_kernels.pipeline.engine import StreamEngine

#: Four tokens a row at most: a chunk takes milliseconds.
SMALL = {"engine.pixels": 56 * 112, "engine.max_new_tokens": 8}


def forked(holds: Callable[[], bool], most_s: int) -> int:
    """A child process that ends with 0 where it holds; killed when it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from 3.12 on threads are told of the danger
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(most_s)
            os._exit(0 if holds() else 2)
        finally:
            os._exit(1)
    return child


@lru_cache(maxsize=1)
def tiny_runner():
    return load_model("tiny-random")


def small_engine(preset: str = "vicostream", **overrides) -> StreamEngine:
    """An engine around the one tiny-random; overrides with ``__`` for the dot."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return StreamEngine(tiny_runner(), methods.get(preset, {**SMALL, **dotted}))


@lru_cache(maxsize=32)
def pictures(count: int, height: int = 48, width: int = 80, *, start: int = 0) -> np.ndarray:
    """uint8 ``[count, height, width, 3]`` of ``scenes``, one every 0.4 s; read only."""
    step_y, step_x = 360 // height, 640 // width
    frames = [frame_at((start + i) * 0.4)[::step_y, ::step_x] for i in range(count)]
    return np.stack([f[:height, :width] for f in frames])


def write_video(
    path: Path | str,
    images: Sequence[np.ndarray] | np.ndarray,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rate: int = 10,
    times_ms: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    color_range: int | None = None,
    colorspace: int | None = None,
) -> Path:
    """Encodes ``images`` (uint8 RGB, one size); without any, the file has a header only."""
    import av  # not there on a machine that runs the GPU tests alone

    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        height, width = images[0].shape[:2] if len(images) else (48, 80)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.options = options or {}
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if color_range is not None:
            stream.codec_context.color_range = color_range
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if not len(images):
            container.start_encoding()
            return Path(path)
        for index, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            if color_range is not None or colorspace is not None:
                frame = frame.reformat(
                    format=pixel_format, dst_colorspace=colorspace, dst_color_range=color_range
                )
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return Path(path)
