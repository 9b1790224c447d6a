"""Opening a video with FFmpeg: what cannot be read says why, in one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from vicostream_kernels.pipeline.errors import InputError, PipelineError, one_line
from vicostream_kernels.pipeline.names import STDIN, shown_name, without_secrets
from vicostream_kernels.pipeline.piped import Piped, is_pipe

_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")
_NETWORK_TIMEOUT_S = 20.0
#: FFmpeg opens text as ANSI art; nobody who passes such a file means that.
_NOT_VIDEO = {"tty", "ansi", "bin", "idf", "xbin", "adf"}


def open_video(
    video: str,
    enough: Callable[[], bool],
    form: str | None = None,
    options: Mapping[str, str] | None = None,
) -> tuple[Any, Piped | None]:
    """A PyAV container of a file, a URL, a pipe, or standard input (``-``), and the pipe, whose
    ``check`` is to be called where reading ends. A pipe ends early once it is ``enough``.

    With ``form``, the name of one of FFmpeg's input formats, ``video`` may be whatever that format
    takes, a camera for instance. ``options`` are FFmpeg's, of the format and the protocol.

    Raises :class:`InputError` where there is no video to read, :class:`PipelineError` where the
    network fails or PyAV is not there.
    """
    try:
        import av
    except ImportError as error:
        raise PipelineError(
            f"reading a video needs PyAV ({error}): pip install 'vicostream-kernels[pipeline]'"
        ) from error
    if form is not None:
        _check_format(form)
    name, url = shown_name(video), _URL.match(video)
    place = _place(video, enough, form)
    pipe = place if isinstance(place, Piped) else None
    try:
        container = av.open(
            place,
            format=form,
            options=dict(options or {}),
            timeout=(_NETWORK_TIMEOUT_S,) * 2 if url else None,
        )
    except (av.error.FileNotFoundError, av.error.HTTPClientError) as error:
        raise InputError(f"{name}: cannot be opened: {reason(error)}") from error
    except av.error.ProtocolNotFoundError as error:
        protocol = url[1] if url else video
        raise InputError(f"{name}: this FFmpeg build knows no protocol {protocol!r}") from error
    except av.error.InvalidDataError as error:
        if pipe is not None:
            pipe.check()
        raise InputError(
            f"{name}: not a video that FFmpeg can read ({reason(error)}); "
            "is it complete, and of the type that its name says?"
        ) from error
    except av.error.PermissionError as error:
        raise InputError(f"{name}: no permission to read it") from error
    except (av.error.FFmpegError, OSError) as error:
        if not url:
            raise InputError(f"{name}: damaged, or not a video ({reason(error)})") from error
        perhaps = f" (with --input-option {', '.join(options)})" if options else ""
        raise PipelineError(f"{name}: cannot be reached: {reason(error)}{perhaps}") from error
    if container.format.name in _NOT_VIDEO:
        container.close()
        raise InputError(f"{name}: a text file, not a video")
    return container, pipe


def reason(error: BaseException) -> str:
    """FFmpeg's message without the numbers and the path that PyAV puts around it."""
    import av

    if isinstance(error, av.error.ExitError):  # what PyAV makes of its own timeout
        return f"no data for {_NETWORK_TIMEOUT_S:g} s"
    return getattr(error, "strerror", None) or without_secrets(one_line(error))


def _place(video: str, enough: Callable[[], bool], form: str | None) -> str | Piped:
    """What PyAV is told to open."""
    if _URL.match(video) or (form is not None and _is_no_file(video)):
        return video
    if video == STDIN:
        if os.isatty(0):
            raise InputError("standard input is a terminal: pipe a video into it")
        return Piped(0, enough)
    _check_file(video)
    path = video.removeprefix("file:")
    if is_pipe(path):
        return Piped(path, enough)
    # FFmpeg takes what stands before a colon for a protocol: "12:30.mp4" would have 12.
    return os.path.join(os.getcwd(), path)


def _is_no_file(video: str) -> bool:
    """Whether a format is to make something of it: a device, or a name that only it knows."""
    path = video.removeprefix("file:")
    if video == STDIN:
        return False
    return not os.path.exists(path) or not (
        os.path.isfile(path) or os.path.isdir(path) or is_pipe(path)
    )


def _check_format(form: str) -> None:
    import av

    try:
        av.format.ContainerFormat(form, "r")
    except ValueError as error:
        raise InputError(f"--input-format {form}: this FFmpeg build has no such format") from error


def _check_file(video: str) -> None:
    """The cases in which FFmpeg's own message would not say what is wrong."""
    path = video.removeprefix("file:")
    if not os.path.exists(path):
        raise InputError(f"{video}: no such file")
    if os.path.isdir(path):
        raise InputError(f"{video}: a folder, not a video file")
    if not os.access(path, os.R_OK):
        raise InputError(f"{video}: no permission to read it")
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise InputError(f"{video}: the file is empty")
