"""Reading videos: codecs, times, colours, and files in every bad state."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from pipeline_kit import pictures, write_video

from vicostream_kernels.pipeline.errors import InputError, PipelineError
from vicostream_kernels.pipeline.names import shown_name
from vicostream_kernels.pipeline.source import Frame, FrameGroups, VideoSource, upright

av = pytest.importorskip("av")


def read(path, **options):
    with VideoSource(str(path), **options) as source:
        return list(source), source


def write_silence(container, stream, count):
    for _ in range(count):
        silence = np.zeros((1, 1024), np.float32)
        samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        samples.sample_rate = 8000
        container.mux(stream.encode(samples))
    container.mux(stream.encode(None))


def noise(count, height=48, width=80):
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "options", "tolerance"),
    [
        ("a.mp4", "libx264", "yuv420p", {"crf": "10"}, 6),
        ("a.webm", "libvpx-vp9", "yuv420p", {"cpu-used": "8", "deadline": "realtime"}, 12),
        ("a.avi", "mpeg4", "yuv420p", {"qscale": "2"}, 12),
        ("a.ts", "libx264", "yuv420p", {"crf": "10"}, 6),
        ("a.mkv", "ffv1", "bgr0", {}, 0),
    ],
)
def test_codecs_give_every_frame_in_order(tmp_path, name, codec, pixel_format, options, tolerance):
    images = pictures(12)
    path = write_video(
        tmp_path / name, images, codec=codec, pixel_format=pixel_format, options=options
    )
    frames, source = read(path)
    assert [frame.index for frame in frames] == list(range(12))
    np.testing.assert_allclose([f.time_s for f in frames], np.arange(12) / 10, atol=2e-3)
    got = np.stack([frame.image for frame in frames])
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - images).mean() <= tolerance
    assert (source.frames_read, source.frames_taken, source.troubles) == (12, 12, [])
    assert (source.info.width, source.info.height, source.info.rate) == (80, 48, 10.0)


@pytest.mark.parametrize(("height", "width"), [(47, 81), (1, 1), (3, 200)])
def test_odd_sizes(tmp_path, height, width):
    images = noise(3, height, width)
    frames, _ = read(write_video(tmp_path / "a.mkv", images, codec="ffv1", pixel_format="bgr0"))
    assert np.array_equal(np.stack([frame.image for frame in frames]), images)


def test_a_single_frame(tmp_path):
    frames, source = read(write_video(tmp_path / "a.mp4", pictures(1)))
    assert len(frames) == 1 and frames[0].time_s == 0.0 and not source.troubles


VFR = [0, 10, 50, 400, 450, 1000, 1001, 1500, 1600, 3000]


def test_variable_frame_rate_keeps_its_times(tmp_path):
    path = write_video(tmp_path / "a.mkv", pictures(10), codec="ffv1", pixel_format="bgr0",
                       times_ms=VFR)  # fmt: skip
    frames, source = read(path)
    np.testing.assert_allclose([frame.time_s for frame in frames], np.array(VFR) / 1000)
    assert not source.troubles


@pytest.mark.parametrize(
    ("fps", "taken"),
    [(2, [0, 1000, 1500, 3000]), (1, [0, 1000, 3000]), (5, [0, 400, 1000, 1500, 1600, 3000])],
)
def test_fps_takes_frames_by_their_times_and_doubles_none(tmp_path, fps, taken):
    path = write_video(tmp_path / "a.mkv", pictures(10), codec="ffv1", pixel_format="bgr0",
                       times_ms=VFR)  # fmt: skip
    frames, source = read(path, fps=fps)
    np.testing.assert_allclose([frame.time_s for frame in frames], np.array(taken) / 1000)
    assert (source.frames_read, source.frames_taken) == (10, len(taken))


def test_fps_of_the_source_takes_every_frame(tmp_path):
    path = write_video(tmp_path / "a.mkv", pictures(31), codec="ffv1", pixel_format="bgr0", rate=30)
    assert len(read(path, fps=30)[0]) == 31  # Matroska rounds these times to milliseconds


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_fps_must_be_positive(fps):
    with pytest.raises(InputError, match="--fps"):
        VideoSource("any", fps=fps)


LIMITED, FULL = 1, 2
BT601, BT709 = 5, 1


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("color_range", [LIMITED, FULL])
@pytest.mark.parametrize("colorspace", [BT601, BT709])
def test_colours_follow_range_matrix_and_depth(tmp_path, pixel_format, color_range, colorspace):
    """Known YCbCr values, computed here from the standards' definition, must come back as RGB."""
    kr, kb = {BT601: (0.299, 0.114), BT709: (0.2126, 0.0722)}[colorspace]
    depth = 10 if "10" in pixel_format else 8
    one = 2 ** (depth - 8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixel_format
        stream.codec_context.color_range = color_range
        stream.codec_context.colorspace = colorspace
        for colour in colours:
            r, g, b = (c / 255 for c in colour)
            y = kr * r + (1 - kr - kb) * g + kb * b
            chroma = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
            if color_range == FULL:
                top = 256 * one - 1
                planes = [y * top] + [c * top + 128 * one for c in chroma]
            else:
                planes = [(16 + 219 * y) * one] + [(128 + 224 * c) * one for c in chroma]
            frame = av.VideoFrame(64, 48, pixel_format)
            frame.color_range, frame.colorspace = color_range, colorspace
            for plane, value in zip(frame.planes, planes):
                kind = np.uint8 if depth == 8 else np.uint16
                level = min(round(value), 256 * one - 1)
                count = plane.buffer_size // np.dtype(kind).itemsize
                plane.update(np.full(count, level, kind).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    frames, _ = read(path)
    for frame, colour in zip(frames, colours, strict=True):
        np.testing.assert_allclose(frame.image[24, 32].astype(int), colour, atol=3)


def test_a_size_change_midway_gives_each_frame_its_size(tmp_path):
    first = write_video(tmp_path / "1.h264", pictures(11))
    second = write_video(tmp_path / "2.h264", pictures(7, 80, 48))
    both = tmp_path / "both.h264"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    frames, source = read(both)
    assert [f.image.shape[:2] for f in frames] == [(48, 80)] * 11 + [(80, 48)] * 7
    assert not source.troubles


def test_times_never_run_backwards(tmp_path):
    first = write_video(tmp_path / "1.ts", pictures(11))
    joined = tmp_path / "both.ts"
    joined.write_bytes(first.read_bytes() * 2)
    times = [frame.time_s for frame in read(joined)[0]]
    assert len(times) == 22 and times == sorted(times)
    assert times[-1] == pytest.approx(2.1, abs=0.02)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_truncated_keeps_what_was_decoded_and_says_where(tmp_path, name):
    path = write_video(
        tmp_path / name, noise(40), container_options={"movflags": "faststart"}, options={"g": "5"}
    )
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    frames, source = read(path)
    assert 15 <= len(frames) < 30
    last = source.troubles[-1]
    assert "truncated" in last.what and "4.00 s" in last.what
    assert last.time_s == pytest.approx(frames[-1].time_s, abs=1e-3)


def test_damage_in_the_middle_keeps_both_sides(tmp_path):
    path = write_video(tmp_path / "a.avi", noise(40), codec="mpeg4", options={"g": "5"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    frames, source = read(path)
    assert 30 <= len(frames) <= 40
    assert source.troubles and 1.0 < source.troubles[0].time_s < 3.0


def test_a_whole_file_has_no_trouble_with_longer_sound(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 80, 48, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for image in pictures(5):
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        write_silence(container, sound, 30)
    frames, source = read(path)
    assert len(frames) == 5 and source.info.duration_s > 3 and not source.troubles


def test_sound_before_the_video_costs_no_frame(tmp_path):
    """The packet that has a decoder give up its last frames must be the video's own."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 80, 48, "yuv420p"
        for image in pictures(20):
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode(None))
        write_silence(container, sound, 10)
    frames, source = read(path, threads=4)
    assert len(frames) == 20 and not source.troubles


def test_what_is_no_video_says_so_in_one_line(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video\n" * 50)
    art = tmp_path / "text.txt"
    art.write_text("nor is this\n" * 50)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    sound = tmp_path / "sound.m4a"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        write_silence(container, stream, 3)
    frameless = tmp_path / "none.mkv"
    with av.open(str(frameless), "w") as container:
        video = container.add_stream("ffv1", rate=10)
        video.width, video.height, video.pix_fmt = 80, 48, "bgr0"
        write_silence(container, container.add_stream("aac", rate=8000), 3)
    header = write_video(tmp_path / "header.mkv", [], codec="ffv1", pixel_format="bgr0")
    cut = write_video(tmp_path / "cut.mp4", pictures(10))
    cut.write_bytes(cut.read_bytes()[:700])
    for path, said in {
        tmp_path / "missing.mp4": "no such file",
        tmp_path: "a folder",
        text: "not a video",
        art: "a text file",
        empty: "empty",
        sound: "no video stream",
        frameless: "no frame",
        header: "not a video",
        cut: "not a video that FFmpeg can read .* complete",
    }.items():
        with pytest.raises(InputError, match=said) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["2026-01-05T12:30:00.mp4", b"caf\xe9.mp4", "50%d done.mp4"])
def test_any_file_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.rename(write_video("a.mp4", pictures(3)), name)
    name = os.fsdecode(name)
    for given in (name, f"file:{name}"):
        frames, source = read(given)
        assert len(frames) == 3 and source.info.name == given


def test_unreadable(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", pictures(1))
    path.chmod(0)
    if os.geteuid() == 0:  # root reads everything
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="no permission"):
        read(path)


class Container:
    """A container whose reading stops after some packets."""

    def __init__(self, container, count, error):
        self._container, self._count, self._error = container, count, error

    def __getattr__(self, name):
        return getattr(self._container, name)

    def demux(self):
        for _, packet in zip(range(self._count), self._container.demux()):
            yield packet
        raise self._error


def cut_off(path, count, error, **options):
    with VideoSource(str(path), **options) as source:
        source._container = Container(source._container, count, error)
        return list(source), source


@pytest.mark.parametrize("threads", [1, 4])
def test_where_the_network_ends_the_decoder_gives_what_it_holds(tmp_path, threads):
    path = write_video(tmp_path / "a.ts", pictures(30))
    gone = av.error.ConnectionResetError(104, "Connection reset by peer")
    frames, source = cut_off(path, 20, gone, threads=threads)
    assert len(frames) == 20
    np.testing.assert_allclose([f.time_s for f in frames], np.arange(20) / 10, atol=2e-3)
    assert [t.what.split(" (")[0] for t in source.troubles] == [
        "reading stopped: Connection reset by peer"
    ]
    whole, _ = read(path)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(frames, whole))


def test_a_stalled_stream_says_for_how_long(tmp_path):
    path = write_video(tmp_path / "a.ts", pictures(10))
    _, source = cut_off(path, 5, av.error.ExitError(1414092869, "Immediate exit requested"))
    assert source.troubles[0].what.startswith("reading stopped: no data for 20 s (at ")


def test_many_damaged_places_are_counted_wherever_reading_ends(tmp_path):
    path = write_video(tmp_path / "a.ts", pictures(3))
    with VideoSource(str(path)) as source:
        next(iter(source))
        for _ in range(25):
            source._note("decode", "damaged")
        assert len(source.troubles) == 20
    assert [t.what for t in source.troubles[20:]] == ["5 more damaged places"]


SECRET = "rtsp://me:s3cret@camera:554/live"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (SECRET, "rtsp://***@camera:554/live"),
        ("rtsp://me:s3@cret@camera/live", "rtsp://***@camera/live"),
        ("rtsp://me:s3/cret@camera/live", "rtsp://***@camera/live"),
        ("rtsp://me:s3@cr/et@camera/live", "rtsp://***@camera/live"),
        ("rtsp://m[e:s3/cret@camera/live", "rtsp://***@camera/live"),
        ("rtsp://me@camera/live", "rtsp://***@camera/live"),
        ("http://camera:8080/@me", "http://camera:8080/@me"),
        ("http://[::1]:8080/@me", "http://[::1]:8080/@me"),
        ("http://cam/a?user=me&PWD=s3cret&fps=3", "http://cam/a?user=***&PWD=***&fps=3"),
        ("https://c/a.m3u8?access_token=s3#t=1", "https://c/a.m3u8?access_token=***#t=1"),
        ("https://c/a?Expires=9&X-Amz-Signature=s3", "https://c/a?Expires=9&X-Amz-Signature=***"),
        ("http://camera/keys?fps=3", "http://camera/keys?fps=3"),
        ("a.mp4?token=1", "a.mp4?token=1"),
        ("me@home.mp4", "me@home.mp4"),
        ("-", "standard input"),
    ],
)
def test_names_for_people_have_no_passwords(url, shown):
    assert shown_name(url) == shown


def test_no_error_tells_the_password(monkeypatch):
    for error, kind in (
        (av.error.HTTPUnauthorizedError(1, "Server returned 401", SECRET), InputError),
        (av.error.ConnectionRefusedError(111, "Connection refused", SECRET), PipelineError),
        (OSError(f"cannot open {SECRET}"), PipelineError),
    ):
        monkeypatch.setattr(av, "open", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(kind) as caught:
            VideoSource(SECRET)
        assert "s3cret" not in str(caught.value) and "***@camera" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    (("ts", "standard input 12 []\n"), ("mp4", "with -movflags +faststart\n")),
)
def test_standard_input_is_a_video_too(tmp_path, kind, said):
    noise = np.random.default_rng(0).integers(0, 255, (12, 160, 240, 3), dtype=np.uint8)
    path = write_video(tmp_path / f"a.{kind}", noise)  # more than FFmpeg can go back in a pipe
    code = (
        "from vicostream_kernels.pipeline.source import VideoSource\n"
        "source = VideoSource('-')\n"
        "print(source.info.name, len(list(source)), source.troubles)"
    )
    with open(path, "rb") as file:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=file, capture_output=True, text=True, timeout=120
        )
    assert (done.stdout + done.stderr).endswith(said), done.stderr


def test_a_path_means_what_the_system_means(tmp_path):
    """ ".." behind a link goes up from where the link leads."""
    (tmp_path / "there" / "below").mkdir(parents=True)
    write_video(tmp_path / "there" / "a.mp4", pictures(3))
    (tmp_path / "link").symlink_to(tmp_path / "there" / "below")
    with VideoSource(f"{tmp_path}/link/../a.mp4") as source:
        assert len(list(source)) == 3


def test_a_terminal_is_no_video(monkeypatch):
    monkeypatch.setattr(os, "isatty", lambda _: True)
    with pytest.raises(InputError, match="a terminal"):
        VideoSource("-")


def test_a_url_that_cannot_be_reached_is_a_failure_not_a_wrong_option():
    with pytest.raises(PipelineError, match="cannot be reached") as caught:
        VideoSource("http://127.0.0.1:9/a.mp4")
    assert caught.value.exit_code == 1
    with pytest.raises(InputError, match="knows no protocol 'nosuchscheme'"):
        VideoSource("nosuchscheme://a")


def test_phones_write_frames_sideways():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert upright(image, 0) is image
    turned = upright(image, -90)  # counterclockwise -90: a quarter turn to the right
    assert turned.shape == (4, 2, 3) and np.array_equal(turned[0, -1], image[0, 0])
    assert np.array_equal(upright(upright(image, 90), -90), image)
    assert np.array_equal(upright(image, 180), image[::-1, ::-1])


def test_a_file_that_a_thread_reads_stays_open(tmp_path):
    source = VideoSource(str(write_video(tmp_path / "a.mp4", pictures(12))))
    source.in_use = True
    source.close()
    assert len(list(source)) == 12
    source.in_use = False
    source.close()
    with pytest.raises(AssertionError, match="not open"):
        list(source)


def test_an_error_comes_after_the_frames_before_it():
    def failing():
        for index in range(5):
            yield Frame(np.zeros((2, 2, 3), np.uint8), index / 10, index)
        raise PipelineError("the network is gone")

    groups = FrameGroups(failing())
    assert [[f.index for f in groups.take(3, 9.0)] for _ in range(2)] == [[0, 1, 2], [3, 4]]
    for _ in range(2):
        with pytest.raises(PipelineError, match="network is gone"):
            groups.take(3, 9.0)
