"""The sample clip: the same for everybody, made once, with questions that it answers."""

from __future__ import annotations

import pytest

from vicostream_kernels.evaluation.streamqa import make_clip
from vicostream_kernels.pipeline import sample
from vicostream_kernels.pipeline.source import VideoSource


@pytest.fixture
def short(monkeypatch):
    """Eight seconds in place of a minute."""
    clip = make_clip(sample.SEED, 16, split="test")
    monkeypatch.setattr(sample, "_clip", lambda *, frames: clip)


def test_two_makings_are_the_same_file(tmp_path, short):
    sample.write_clip(tmp_path / "a.mp4")
    sample.write_clip(tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_it_is_made_once_and_left_whole(tmp_path, short, monkeypatch):
    made, write = [], sample.write_clip
    monkeypatch.setattr(sample, "write_clip", lambda path: made.append(path) or write(path))
    first = sample.sample_clip(tmp_path)
    assert sample.sample_clip(tmp_path) == first and len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    with VideoSource(str(first)) as source:
        assert (source.info.codec, source.info.width, source.info.height) == ("h264", 336, 336)
        assert len(list(source)) == 32 and not source.troubles


def test_a_failed_making_leaves_nothing(tmp_path, monkeypatch):
    def fail(path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(sample, "write_clip", fail)
    with pytest.raises(OSError, match="no space"):
        sample.sample_clip(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_questions_are_one_about_now_a_needle_and_a_count():
    questions = sample.questions()
    assert sorted(q.kind for q in questions) == ["count", "now", "past"]
    assert [q.time_s for q in questions] == sorted(q.time_s for q in questions)
    assert questions[-1].time_s < sample.STEPS / 2
    needle = next(q for q in questions if q.kind == "past")
    # Seen in the first fifth of the clip only, asked in the last half.
    assert needle.evidence[-1][1] <= 12 and needle.time_s > 30
    # They are questions about this clip: their evidence can be looked up again.
    assert set(questions) <= set(sample._clip(frames=False).questions)
