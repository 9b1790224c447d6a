"""--explain: the relevance of every chunk to a question, drawn when it has been answered."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from pipeline_kit import SMALL, pictures, small_engine, tiny_runner, write_video

from vicostream_kernels.pipeline.explain import picture_name, plot_relevance
from vicostream_kernels.pipeline.report import BlockRead, QuestionFigures, Recorder
from vicostream_kernels.pipeline.run import RunOptions, run
from vicostream_kernels.pipeline.screen import Screen


@pytest.fixture(autouse=True)
def loads_at_once(monkeypatch):
    monkeypatch.setattr("vicostream_kernels.models.load_model", lambda *_, **__: tiny_runner())


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "video.mp4", pictures(40))


def outcome_of(tmp_path, video, *questions, settings=(), **options):
    """(exit code, what was said, the report)."""
    said, folder = io.StringIO(), tmp_path / "report"
    settings = [*(f"{key}={value}" for key, value in SMALL.items()), *settings]
    code = run(
        RunOptions(
            video=str(video), questions=questions, settings=settings, report=str(folder), **options
        ),
        Screen(io.StringIO(), said),
    )
    return code, said.getvalue(), json.loads((folder / "report.json").read_text(encoding="utf-8"))


def colours(path):
    """How many pixels of the picture are in the colour of what was read."""
    from matplotlib.image import imread

    image = (imread(path)[..., :3] * 255).round().astype(int)
    assert image.shape[0] > 200 and image.shape[1] > 400
    return int((np.abs(image - (0xEE, 0x66, 0x77)).sum(-1) <= 6).sum())


def test_what_was_read_is_marked(tmp_path):
    chunks = [
        BlockRead(i, i + 0.9, 0.1 * i if i != 4 else math.nan, 0.0, "device") for i in range(12)
    ]
    counts = []
    for read in (0, 1, 6):
        chosen = [replace(c, share=0.5) for c in chunks[:read]]
        figures = QuestionFigures(9.0, "What costs $5 {or} \\more$?\nSay it. " * 9)
        figures.relevance = chosen + chunks[read:]
        path = tmp_path / "deep" / picture_name(read)
        plot_relevance(figures, path)
        counts.append(colours(path))
        assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    assert counts[0] < counts[1] < counts[2]
    with pytest.raises(ValueError, match="no chunks to choose from"):
        plot_relevance(QuestionFigures(1.0, "What?"), tmp_path / "none.png")


def test_all_candidates_are_noted_when_that_is_wanted():
    """And only then: a stream of hours need not keep them."""
    recorder = Recorder(model="tiny-random", preset="vicostream")
    with small_engine(retrieve__k=2) as made, made.open(recorder=recorder) as stream:
        stream.ingest(pictures(40))
        quiet = stream.ask("What?", max_new_tokens=1)
        recorder.explain = True
        loud = stream.ask("What?", max_new_tokens=1)
        chunks = [(c.start_s, c.end_s) for c in stream.history.chunks()]
        assert quiet.figures.relevance == []
        seen = loud.figures.relevance
        assert [(r.start_s, r.end_s) for r in seen] == chunks
        best = sorted(sorted(seen, key=lambda r: -r.score)[:2], key=lambda r: r.start_s)
        assert [r for r in seen if r.share] == best == loud.figures.reads
        assert "relevance" not in stream.report()["questions"][1]


def test_a_script_that_the_font_lacks_is_no_warning(tmp_path, video, recwarn):
    path = video.rename(tmp_path / "\u4f60.mp4")
    options = {"explain": str(tmp_path / "explained"), "show_pruning": str(tmp_path / "shown")}
    code, _, _ = outcome_of(tmp_path, path, "end \u4f60\u597d?", **options)
    assert code == 0 and (tmp_path / "explained" / picture_name(1)).exists()
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_the_command_draws_each_question(tmp_path, video):
    folder = tmp_path / "why"
    code, _, report = outcome_of(
        tmp_path, video, "2 What?", "-1 Nothing yet?", "end Where?", preset="rekv",
        explain=str(folder), settings=["retrieve.k=2", "engine.max_new_tokens=2"],
    )  # fmt: skip
    assert code == 0
    # Nothing could be read before the first chunk: no picture.
    assert sorted(p.name for p in folder.iterdir()) == [picture_name(1), picture_name(2)]
    assert all(colours(path) for path in folder.iterdir())
    assert [len(q["reads"]) > 0 for q in report["questions"]] == [False, True, True]
    for question in report["questions"]:
        assert [[r["start_s"], r["end_s"]] for r in question["reads"]] == question["blocks"]


def test_what_cannot_be_explained(tmp_path, video):
    code, said, _ = outcome_of(tmp_path, video, preset="full-history", explain=str(tmp_path / "w"))
    assert code == 2 and "retrieves nothing" in said
    (tmp_path / "file").write_text("")
    code, said, _ = outcome_of(tmp_path, video, explain=str(tmp_path / "file" / "w"))
    assert code == 2 and "--explain" in said


def test_a_picture_that_cannot_be_written_does_not_end_the_stream(tmp_path, video, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vicostream_kernels.pipeline.explain.save_picture", full)
    code, said, report = outcome_of(
        tmp_path, video, "1 What?", "2 Where?", explain=str(tmp_path / "why"),
        settings=["engine.max_new_tokens=2"],
    )  # fmt: skip
    assert code == 1 and said.count("No space left") == 2
    assert [q["finish"] for q in report["questions"]] == ["length"] * 2
    assert len(report["chunks"]) == 7  # the questions end two of them
