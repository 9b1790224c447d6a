"""Reading a video: uint8 RGB frames with their times, whatever state the file is in.

Colours follow what the stream says about itself: limited and full range, BT.601, BT.709 and BT.2020
matrices, 8 bits and more. A stream that says nothing about its matrix is taken as BT.601, as
FFmpeg and the libraries that the models were trained with do. HDR transfer curves are not mapped.

Times count in seconds from the first frame and never run backwards, so that a stream that was cut
and joined, or has no timestamps at all, still has an order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vicostream_kernels.pipeline.errors import InputError, Trouble
from vicostream_kernels.pipeline.names import shown_name
from vicostream_kernels.pipeline.opening import open_video, reason

if TYPE_CHECKING:
    import numpy as np

#: Containers whose header states a duration that a whole file really has.
_INDEXED = {"mov", "mp4", "matroska", "webm", "avi", "flv"}
#: A file that ends this much before its stated end has lost something.
_MISSING_S = 0.5
#: Timestamps are rounded by containers (Matroska to 1 ms): a tick may come this much early.
_TICK_SLACK_S = 5e-4
_MAX_TROUBLES = 20
#: swscale: bilinear with full chroma interpolation. Without it white in 10 bits becomes 253.
_SWS_FLAGS = 2 | 0x2000 | 0x4000
_FULL_RANGE = 2


@dataclass(frozen=True)
class Frame:
    """``image`` uint8 ``[H, W, 3]`` RGB, ``time_s`` from the first frame, ``index`` as decoded."""

    image: np.ndarray
    time_s: float
    index: int


@dataclass(frozen=True)
class VideoInfo:
    """What the container says about its video stream; None where it says nothing."""

    name: str
    container: str
    codec: str
    pixel_format: str | None
    width: int
    height: int
    rate: float | None
    duration_s: float | None


class VideoSource:
    """A video file, a URL, or standard input (``-``), opened for one pass.

    ``fps`` bounds the frames taken per second of video time; None takes every frame. Frames are
    taken by their timestamps and never doubled, so a slower or variable source keeps its own times.
    ``threads`` decode (default: the cores this process may use, at most 8). A pipe is read until it
    ends or it is ``enough``. ``form`` and ``options`` are an input format of FFmpeg's and its
    options (``opening.open_video``).

    Iterating yields :class:`Frame`. What is damaged is skipped and noted in ``troubles`` at once;
    frames before and after are kept. Of many places the first are noted, and when the source ends
    or is closed how many more there were. ``frames_read`` counts decoded frames, ``frames_taken``
    the yielded.
    Raises :class:`InputError` where there is nothing to read, :class:`PipelineError` where the
    network or the decoder library fails.
    """

    def __init__(
        self,
        video: str,
        *,
        fps: float | None = None,
        threads: int | None = None,
        enough: Callable[[], bool] = lambda: False,
        form: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        if fps is not None and not 0 < fps < float("inf"):
            raise InputError(f"--fps {fps}: must be a positive number of frames per second")
        self.fps = fps
        self.troubles: list[Trouble] = []
        self.frames_read = 0
        self.frames_taken = 0
        #: Whether a thread is reading: then :meth:`close` leaves the file to the end of the
        #: process, FFmpeg must keep what it reads.
        self.in_use = False
        self._damaged = 0  # places that are not noted yet
        self._last_s = self._end_s = 0.0  # of the newest frame; of all packets
        self._container, self._pipe = open_video(video, enough, form, options)
        try:
            self._stream = _video_stream(self._container, shown_name(video))
            self._stream.thread_type = "AUTO"
            self._stream.codec_context.thread_count = threads or min(8, _cores())
        except BaseException:
            self._container.close()
            raise
        self.info = _describe(shown_name(video), self._container, self._stream)

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reading on raises."""
        self._note_the_rest()
        if not self.in_use:
            self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()
        clock = _Clock(self.info.rate)
        sampler = _Sampler(self.fps)
        for frame in self._decoded():
            time_s = self._last_s = clock.time(frame)
            if getattr(frame, "is_corrupt", False):
                self._note("decode", "a damaged frame was kept as decoded")
            index = self.frames_read
            self.frames_read += 1
            if sampler.takes(time_s):
                self.frames_taken += 1
                yield Frame(_rgb(frame, reformatter), time_s, index)
        self._note_the_rest()
        self._check_end()

    def _decoded(self) -> Iterator[Any]:
        """Frames as FFmpeg decodes them, up to the end or to where reading stops."""
        import av

        for packet in self._packets():
            try:
                frames = self._stream.codec_context.decode(packet)
            except av.error.FFmpegError as error:
                self._note("decode", f"damaged data skipped: {reason(error)}")
            else:
                yield from frames

    def _packets(self) -> Iterator[Any]:
        """Packets of the video. The last one is empty: the decoder gives up the frames that its
        threads hold."""
        import av

        try:
            for packet in self._container.demux():
                self._end_s = max(self._end_s, _packet_end(packet))
                if packet.stream.index == self._stream.index:  # an empty one is numbered 0
                    yield packet
        except av.error.FFmpegError as error:
            self._note("demux", f"reading stopped: {reason(error)}")
            last = av.Packet()
            last.time_base = self._stream.time_base
            yield last
        if self._pipe is not None:
            self._pipe.check()

    def _note(self, where: str, what: str) -> None:
        if len(self.troubles) < _MAX_TROUBLES:
            what = f"{what} (at {self._last_s:.3f} s)"
            self.troubles.append(Trouble(round(self._last_s, 3), where, what))
        else:
            self._damaged += 1

    def _note_the_rest(self) -> None:
        if self._damaged:
            what = f"{self._damaged} more damaged places"
            self.troubles.append(Trouble(round(self._last_s, 3), "decode", what))
            self._damaged = 0

    def _check_end(self) -> None:
        if not self.frames_read:
            why = f" ({self.troubles[0].what})" if self.troubles else ""
            if self._pipe is not None and "mp4" in self._container.format.name:
                why += (
                    "; an MP4 whose index stands at its end cannot come through a pipe: give the "
                    "file, or write it with -movflags +faststart"
                )
            raise InputError(f"{self.info.name}: the video stream has no frame to decode{why}")
        stated, formats = self.info.duration_s, set(self.info.container.split(","))
        if stated is None or not formats & _INDEXED:
            return
        start = (self._container.start_time or 0) / 1e6
        missing = stated - (self._end_s - start)
        if missing > _MISSING_S:
            what = f"the file ends {missing:.2f} s before the {stated:.2f} s that its header states"
            self.troubles.append(Trouble(round(self._last_s, 3), "demux", f"truncated: {what}"))


class FrameGroups:
    """Reads frames in groups that a chunk can take: one size, none after a given time. None among
    ``frames`` means that there is none yet. An error comes after the frames before it."""

    def __init__(self, frames: Iterator[Frame | None]) -> None:
        self._frames = frames
        self._next: Frame | None = None
        self._error: Exception | None = None
        self.ended = False

    def take(
        self, size: int, limit_s: float, enough: Callable[[], bool] = lambda: False
    ) -> list[Frame]:
        """Up to ``size`` frames at or before ``limit_s``. None means that the next frame is later,
        that the video has ended (``ended``), or that it was ``enough``."""
        group: list[Frame] = []
        if self._error is not None:
            raise self._error
        while len(group) < size and not enough():
            if self._next is None:
                try:
                    self._next = next(self._frames)
                except StopIteration:
                    self.ended = True
                    break
                except Exception as error:
                    if not group:
                        raise
                    self._error = error
                    break
            frame = self._next
            if frame is None:
                continue
            if frame.time_s > limit_s or (group and frame.image.shape != group[0].image.shape):
                break
            group.append(frame)
            self._next = None
        return group


def stack(group: list[Frame]) -> np.ndarray:
    """The pictures of a group: uint8 ``[F, H, W, 3]``."""
    import numpy as np

    return np.stack([frame.image for frame in group])


class _Clock:
    """Seconds from the first frame, never backwards; frames without a timestamp follow the rate."""

    def __init__(self, rate: float | None) -> None:
        self._step = 1.0 / rate if rate else 1.0 / 25.0
        self._shift: float | None = None
        self.now = 0.0

    def time(self, frame: Any) -> float:
        if frame.pts is None or frame.time_base is None:
            self.now = 0.0 if self._shift is None else self.now + self._step
            self._shift = self._shift or 0.0
            return self.now
        stamp = float(frame.pts * frame.time_base)
        if self._shift is None:
            self._shift = -stamp
        if stamp + self._shift < self.now:
            self._shift = self.now + self._step - stamp
        self.now = stamp + self._shift
        return self.now


class _Sampler:
    """Takes the first frame of each tick of 1 / fps seconds."""

    def __init__(self, fps: float | None) -> None:
        self._fps = fps
        self._tick = -1

    def takes(self, time_s: float) -> bool:
        if self._fps is None:
            return True
        tick = int((time_s + _TICK_SLACK_S) * self._fps)
        if tick <= self._tick:
            return False
        self._tick = tick
        return True


def _video_stream(container: Any, video: str) -> Any:
    # Cover art in an audio file is a video stream to FFmpeg, not to anybody else.
    streams = [s for s in container.streams.video if not _attached_picture(s)]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise InputError(f"{video}: no video stream in this file (it has: {', '.join(kinds)})")
    stream = max(streams, key=lambda s: (s.width or 0) * (s.height or 0))
    if stream.codec_context is None:
        raise InputError(f"{video}: this FFmpeg build has no decoder for its video codec")
    return stream


def _attached_picture(stream: Any) -> bool:
    disposition = getattr(stream, "disposition", None)
    return disposition is not None and "attached_pic" in str(disposition)


def _describe(video: str, container: Any, stream: Any) -> VideoInfo:
    rate = stream.average_rate or stream.guessed_rate
    # Not codec_context.pix_fmt: older PyAV crashes where the format is unknown.
    pixels = stream.codec_context.format
    return VideoInfo(
        name=video,
        container=container.format.name,
        codec=stream.codec_context.name,
        pixel_format=None if pixels is None else pixels.name,
        width=stream.width or 0,
        height=stream.height or 0,
        rate=float(rate) if rate else None,
        duration_s=container.duration / 1e6 if container.duration else None,
    )


def _packet_end(packet: Any) -> float:
    stamp = packet.pts if packet.pts is not None else packet.dts
    if stamp is None or packet.time_base is None:
        return 0.0
    return float((stamp + (packet.duration or 0)) * packet.time_base)


def _rgb(frame: Any, reformatter: Any) -> np.ndarray:
    """A decoded frame as RGB with its own range and matrix, turned upright."""
    converted = reformatter.reformat(
        frame, format="rgb24", interpolation=_SWS_FLAGS, dst_color_range=_FULL_RANGE, threads=1
    )
    return upright(converted.to_ndarray(), getattr(frame, "rotation", 0) or 0)


def upright(image: np.ndarray, rotation: int) -> np.ndarray:
    """``image`` turned by the rotation (degrees, counterclockwise) that a phone wrote beside it."""
    import numpy as np

    quarter_turns = round(rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
