"""The sample clip: the same for everybody, and made once."""

from __future__ import annotations

import numpy as np

from vicostream_kernels.pipeline.sample import (
    QUESTIONS,
    RATE,
    SECONDS,
    frame_at,
    sample_clip,
    write_clip,
)
from vicostream_kernels.pipeline.source import VideoSource


def test_two_makings_are_the_same_file(tmp_path):
    write_clip(tmp_path / "a.mp4", seconds=1)
    write_clip(tmp_path / "b.mp4", seconds=1)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_it_is_made_once_and_left_whole(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        "vicostream_kernels.pipeline.sample.write_clip",
        lambda path: made.append(path) or write_clip(path, seconds=0.5),
    )
    first = sample_clip(tmp_path)
    assert sample_clip(tmp_path) == first and len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    with VideoSource(str(first)) as source:
        assert (source.info.codec, source.info.width, source.info.height) == ("h264", 640, 360)
        assert len(list(source)) == RATE // 2 and not source.troubles


def test_a_failed_making_leaves_nothing(tmp_path, monkeypatch):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("vicostream_kernels.pipeline.sample.write_clip", fail)
    try:
        sample_clip(tmp_path)
    except OSError:
        pass
    assert list(tmp_path.iterdir()) == []


def test_something_moves_over_a_background_that_nearly_stands():
    before, after = frame_at(2.0).astype(int), frame_at(2.0 + 1 / RATE).astype(int)
    changed = np.abs(after - before).max(-1)
    assert 0.001 < (changed > 60).mean() < 0.05
    assert len(np.unique(before.reshape(-1, 3), axis=0)) > 1000


def test_the_questions_lie_inside():
    assert all(text and (time is None or 0 < time < SECONDS) for time, text in QUESTIONS)
