"""What pruning dropped, to look at: a video of the stream and a contact sheet of its chunks.

The patches of dropped tokens are dimmed. The video is written while the stream runs and the sheet
holds a few chunks, spread evenly over what has been seen, so that memory does not grow with it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from vicostream_kernels.pipeline.errors import PipelineError, one_line
from vicostream_kernels.pipeline.folders import writable_folder
from vicostream_kernels.pipeline.plots import save_picture
from vicostream_kernels.pipeline.stages import ChunkMask

VIDEO, SHEET = "pruned.mp4", "pruned.png"
#: Longest side of the video in pixels: larger frames are shrunk, small ones enlarged to be seen.
_LARGEST, _SMALLEST = 1280, 320
#: x264 wants even sides; a very flat picture gets bars.
_LEAST_SIDE = 16
_SHEET_ROWS, _SHEET_COLUMNS, _TILE = 12, 6, 224
_MARGIN, _GAP = 96, 6
_TIME_BASE = Fraction(1, 1000)
#: A dropped patch keeps its picture at this share of its brightness.
_DIMMED = (np.arange(256) * 0.28).astype(np.uint8)


class PruningFilm:
    """Draws ``pruned.mp4`` and ``pruned.png`` into a folder.

    ``watch`` takes what the prune stage decided and returns at once; ``draw`` writes what has been
    taken; ``close`` finishes both files. They appear under their names only then, and an earlier
    run's are gone when this one has seen no chunk.

    The canvas has the shape of the first frame; frames of another shape are fitted into it.

    Raises :class:`InputError` where the folder cannot be written, :class:`PipelineError` where this
    FFmpeg has no H.264 encoder, or drawing fails.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = writable_folder(folder, "--show-pruning")
        self._encoder = _encoder()
        self._waiting: deque[ChunkMask] = deque()
        self._video: _Video | None = None
        self._sheet = _Sheet()
        self._discarded = False
        self._partial = self.folder / f".{os.getpid()}.{VIDEO}"

    def watch(self, chunk: ChunkMask) -> None:
        """Takes a chunk; its frames must stay as they are until they are drawn."""
        if not self._discarded:
            self._waiting.append(chunk)

    def draw(self) -> None:
        """Draws all chunks that were taken."""
        while self._waiting:
            try:
                self._draw(self._waiting.popleft())
            except (OSError, ValueError) as error:  # PyAV's errors are either
                raise PipelineError(f"{self.folder / VIDEO}: {one_line(error)}") from error

    def close(self, title: str = "") -> tuple[str, str] | None:
        """Draws the rest and finishes the files; returns their paths, None without a chunk."""
        video, sheet = self.folder / VIDEO, self.folder / SHEET
        try:
            self.draw()
            if self._video is None or not self._sheet.rows:
                for old in (video, sheet):
                    old.unlink(missing_ok=True)
                return None
            self._video.close()
            self._sheet.write(sheet, title)
            os.replace(self._partial, video)
        except OSError as error:
            raise PipelineError(f"{self.folder}: {one_line(error)}") from error
        finally:
            self.discard()
        return str(video), str(sheet)

    def discard(self) -> None:
        """Gives up what is not finished."""
        if self._video is not None:
            self._video.abandon()
        self._video, self._discarded = None, True
        self._waiting.clear()
        self._partial.unlink(missing_ok=True)

    def _draw(self, chunk: ChunkMask) -> None:
        images, kept = chunk.source.images.cpu().numpy(), chunk.kept()
        if self._video is None:
            self._video = _Video(self._partial, self._encoder, images.shape[1:3])
        seconds = np.linspace(chunk.source.start_s, chunk.source.end_s, len(images))
        tiles, chosen = [], _spread(len(kept), _SHEET_COLUMNS)
        for i, (image, time_s) in enumerate(zip(images, seconds)):
            step, inside = divmod(i, chunk.frames_per_step)
            picture = self._video.fit(image, kept[step])
            self._video.add(picture, time_s)
            if step in chosen and inside == 0 and self._sheet.wants:
                tiles.append(_tile(picture))
        self._sheet.add(chunk.source.start_s, kept, tiles)


def dim(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """``image`` uint8 [H, W, 3] with the cells dimmed that ``kept`` bool [rows, columns] lacks."""
    height, width = image.shape[:2]
    row = np.arange(height) * kept.shape[0] // height
    column = np.arange(width) * kept.shape[1] // width
    return np.where(kept[row[:, None], column[None, :], None], image, _DIMMED[image])


class _Video:
    """An H.264 file that grows frame by frame."""

    def __init__(self, path: Path, encoder: str, size: tuple[int, int]) -> None:
        import av
        from av.video.reformatter import VideoReformatter

        self.height, self.width = canvas_size(*size)
        self._container = av.open(str(path), "w", format="mp4")
        stream = self._stream = self._container.add_stream(encoder, rate=30)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        # One thread: the model needs the others.
        stream.options = {"preset": "veryfast", "crf": "23", "threads": "1"}
        stream.codec_context.time_base = _TIME_BASE
        self._reformatter = VideoReformatter()
        self._last = -1

    def fit(self, image: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """``image`` with what was dropped dimmed, scaled into the canvas."""
        height, width = image.shape[:2]
        scale = min(self.height / height, self.width / width)
        inner = max(1, round(height * scale)), max(1, round(width * scale))
        scaled = dim(_scaled(image, *inner, self._reformatter), kept)
        if inner == (self.height, self.width):
            return scaled
        canvas = np.zeros((self.height, self.width, 3), np.uint8)
        top, left = (self.height - inner[0]) // 2, (self.width - inner[1]) // 2
        canvas[top : top + inner[0], left : left + inner[1]] = scaled
        return canvas

    def add(self, picture: np.ndarray, time_s: float) -> None:
        import av

        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        # Frames without times of their own still need an order.
        self._last = max(round(time_s / _TIME_BASE), self._last + 1)
        frame.pts, frame.time_base = self._last, _TIME_BASE
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        try:
            self._container.close()
        except (OSError, ValueError):
            pass  # what it could not write is thrown away


class _Sheet:
    """Rows of tiles, one chunk each: every n-th chunk, n doubled whenever the sheet is full."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, list[np.ndarray]]] = []
        self._every, self._chunks = 1, 0
        self._kept = self._seen = 0

    @property
    def wants(self) -> bool:
        """Whether the next chunk gets a row."""
        return self._chunks % self._every == 0

    def add(self, start_s: float, kept: np.ndarray, tiles: list[np.ndarray]) -> None:
        if self.wants:
            self.rows.append((start_s, float(kept.mean()), tiles))
        if len(self.rows) > _SHEET_ROWS:
            self.rows = self.rows[::2]
            self._every *= 2
        self._chunks += 1
        self._kept += int(kept.sum())
        self._seen += kept.size

    def write(self, path: Path, title: str) -> None:
        # The object interface: no global state, no window system.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        height, width = self.rows[0][2][0].shape[:2]
        columns = max(len(tiles) for _, _, tiles in self.rows)
        head = 40
        sheet = np.full(
            (
                head + len(self.rows) * (height + _GAP) + _GAP,
                max(_MARGIN + columns * (width + _GAP) + _GAP, 420),
                3,
            ),
            255,
            np.uint8,
        )
        labels = []
        for i, (start_s, share, tiles) in enumerate(self.rows):
            top = head + i * (height + _GAP)
            labels.append((top + height / 2, f"{start_s:.1f} s\nkept {share:.0%}"))
            for j, tile in enumerate(tiles):
                left = _MARGIN + j * (width + _GAP)
                sheet[top : top + height, left : left + width] = tile
        dpi = 100
        figure = Figure(figsize=(sheet.shape[1] / dpi, sheet.shape[0] / dpi), dpi=dpi)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.imshow(sheet, interpolation="nearest", aspect="auto")
        for middle, text in labels:
            axes.text(_MARGIN - 8, middle, text, ha="right", va="center", fontsize=8)
        said = f"{self._kept / self._seen:.0%} of the visual tokens kept; dimmed patches dropped"
        # A file name may hold bytes that are no text, and dollars that are no mathematics.
        title = title.encode(errors="replace").decode()
        axes.text(
            8, head / 2, f"{title}: {said}" if title else said, va="center", fontsize=10,
            parse_math=False,
        )  # fmt: skip
        save_picture(figure, path, dpi=dpi)


def canvas_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the video for frames of a size: even, neither tiny nor huge."""
    longest = max(height, width)
    scale = min(max(longest, _SMALLEST), _LARGEST) / longest
    sides = (max(_LEAST_SIDE, round(side * scale / 2) * 2) for side in (height, width))
    return next(sides), next(sides)


def _scaled(image: np.ndarray, height: int, width: int, reformatter: Any = None) -> np.ndarray:
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    if image.shape[:2] == (height, width):
        return image
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    shrinks = height * width < image.shape[0] * image.shape[1]
    return (
        (reformatter or VideoReformatter())
        .reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            interpolation=Interpolation.AREA if shrinks else Interpolation.POINT,
        )
        .to_ndarray()
    )


def _tile(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    scale = _TILE / max(height, width)
    return _scaled(picture, max(1, round(height * scale)), max(1, round(width * scale)))


def _spread(count: int, most: int) -> Sequence[int]:
    """At most ``most`` of ``range(count)``, evenly spread, the first among them."""
    taken = min(count, most)
    return [i * count // taken for i in range(taken)]


def _encoder() -> str:
    try:
        import av
    except ImportError as error:
        raise PipelineError(
            f"--show-pruning needs PyAV ({error}): pip install 'vicostream-kernels[pipeline]'"
        ) from error
    for name in ("libx264", "h264"):
        try:
            av.codec.Codec(name, "w")
        except ValueError:
            continue
        return name
    raise PipelineError("--show-pruning: this FFmpeg build has no H.264 encoder")
