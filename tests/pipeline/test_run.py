"""The command: what it says, what it writes and how it ends, for good and bad input."""

from __future__ import annotations

import io
import json
import os
import re
import signal

import numpy as np
import pytest
from pipeline_kit import SMALL, pictures, tiny_runner, write_video

from vicostream_kernels.models import errors as model_errors
from vicostream_kernels.pipeline import run as run_module
from vicostream_kernels.pipeline.belt import Belt
from vicostream_kernels.pipeline.errors import PipelineError
from vicostream_kernels.pipeline.report import SCHEMA_FILE, QuestionFigures
from vicostream_kernels.pipeline.run import RunOptions, run
from vicostream_kernels.pipeline.screen import Screen, clock, mib
from vicostream_kernels.pipeline.session import Encode, Stream

jsonschema = pytest.importorskip("jsonschema")

SMALL_SET = [f"{key}={value}" for key, value in SMALL.items()]


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "video.mp4", pictures(40))


@pytest.fixture
def loads_at_once(monkeypatch):
    """The one tiny-random of the tests in place of a new one for each run."""

    def load(name, **_):
        if name != "tiny-random":
            raise model_errors.ModelNotFound(f"{name}: no such model")
        return tiny_runner()

    monkeypatch.setattr("vicostream_kernels.models.load_model", load)


class Outcome:
    def __init__(self, tmp_path, video, *questions, settings=(), **options):
        self.folder = tmp_path / "report"
        out, err = io.StringIO(), io.StringIO()
        self.code = run(
            RunOptions(
                video=str(video),
                questions=questions,
                settings=[*SMALL_SET, *settings],
                report=str(self.folder),
                **{"model": "tiny-random", **options},
            ),
            Screen(out, err),
        )
        self.out, self.err = out.getvalue(), err.getvalue()
        self.lines = [line for line in self.err.splitlines() if "error:" in line]

    @property
    def report(self):
        report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
        schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator(schema).validate(report)
        return report


pytestmark = pytest.mark.usefixtures("loads_at_once")


def test_a_run_answers_and_reports(tmp_path, video):
    outcome = Outcome(tmp_path, video, "end What happened?", "1.5 What is this?", "0:02 And now?")
    assert outcome.code == 0 and not outcome.lines
    report = outcome.report
    assert report["frames"] == {"read": 40, "processed": 40, "dropped": 0}
    assert [q["time_s"] for q in report["questions"]] == [1.5, 2.0, 3.9]
    # Chunks end at 0.7, 1.5 and, as a question is asked there, at 2.0; then at 2.8, 3.6, 3.9.
    assert [len(q["blocks"]) for q in report["questions"]] == [2, 3, 6]
    assert report["source"]["codec"] == "h264" and report["errors"] == []
    assert set(report["stages_ms"]) == {"decode", "preprocess", "encode", "prune", "prefill"}
    assert report["config"]["engine"]["pixels"] == SMALL["engine.pixels"]
    assert report["kv"]["pages"] > 0 and report["fps"]["ingest"] > 0
    for name in ("trace.json", "stream.png"):
        assert (outcome.folder / name).stat().st_size > 1000
    trace = json.loads((outcome.folder / "trace.json").read_text())
    tracks = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert {"decode", "preprocess", "encode", "prune", "prefill", "retrieve", "answer"} <= tracks
    shown = re.sub(r"\s+", " ", outcome.out)
    assert "[00:01.5] What is this? >" in shown and "frames/s, decode included" in shown
    assert "nonsense" in outcome.err


@pytest.mark.parametrize("preset", ["full-history", "streaming-llm"])
def test_every_preset_runs(tmp_path, video, preset):
    outcome = Outcome(tmp_path, video, "end What?", preset=preset)
    assert outcome.code == 0 and outcome.report["preset"] == preset
    assert outcome.report["questions"][0]["answer"]


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "size"),
    [
        ("a.webm", "libvpx-vp9", "yuv420p", (48, 80)),
        ("a.avi", "mpeg4", "yuv420p", (50, 82)),
        ("a.mkv", "ffv1", "bgr0", (47, 81)),
        ("tiny.mkv", "ffv1", "bgr0", (1, 1)),
        ("deep.mkv", "libx265", "yuv420p10le", (48, 80)),
    ],
)
def test_codecs_and_odd_sizes(tmp_path, name, codec, pixel_format, size):
    images = np.random.default_rng(0).integers(0, 255, (11, *size, 3), dtype=np.uint8)
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(
        tmp_path / name, images, codec=codec, pixel_format=pixel_format, options=options
    )
    outcome = Outcome(tmp_path, path, "end What?")
    assert (outcome.code, outcome.lines) == (0, [])
    assert [c["frames"] for c in outcome.report["chunks"]] == [8, 3]


@pytest.mark.parametrize("count", [1, 7, 9])
def test_few_and_odd_frames(tmp_path, count):
    path = write_video(tmp_path / "a.mp4", pictures(count))
    outcome = Outcome(tmp_path, path, "0 First?", "end Last?")
    assert outcome.code == 0 and outcome.report["frames"]["processed"] == count
    first, last = outcome.report["questions"]
    # The first frame is a chunk: the first question sees it.
    assert first["blocks"] == [[0.0, 0.0]] and len(last["blocks"]) == 1 + -(-(count - 1) // 8)


def test_variable_rate_and_fps(tmp_path):
    times = [0, 10, 50, 400, 450, 1000, 1001, 1500, 1600, 3000]
    path = write_video(
        tmp_path / "a.mkv", pictures(10), codec="ffv1", pixel_format="bgr0", times_ms=times
    )
    outcome = Outcome(tmp_path, path, "1.55 What?")
    assert "after the last frame" not in outcome.err  # a gap is not the end
    whole = outcome.report
    assert [(c["start_s"], c["end_s"]) for c in whole["chunks"]] == [(0.0, 1.5), (1.6, 3.0)]
    assert len(whole["questions"][0]["blocks"]) == 1
    sampled = Outcome(tmp_path, path, fps=2).report
    assert sampled["frames"] == {"read": 10, "processed": 4, "dropped": 6}
    assert (whole["source"]["fps"], sampled["source"]["fps"]) == (None, 2)


def test_a_size_change_midway(tmp_path):
    first = write_video(tmp_path / "1.h264", pictures(11))
    second = write_video(tmp_path / "2.h264", pictures(6, 80, 48))
    both = tmp_path / "both.h264"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    outcome = Outcome(tmp_path, both, "end What?")
    assert outcome.code == 0
    assert [c["frames"] for c in outcome.report["chunks"]] == [8, 3, 6]


def test_questions_outside_the_video(tmp_path, video):
    outcome = Outcome(tmp_path, video, "-3 Before?", "0 At the start?", "99 After?")
    assert outcome.code == 0
    before, start, after = outcome.report["questions"]
    assert before["blocks"] == [] and before["answer"] and start["blocks"] == [[0.0, 0.0]]
    assert len(after["blocks"]) == 6 and after["time_s"] == 99.0
    assert "99 s is after the last frame (3.900 s)" in outcome.err


def test_truncated_keeps_what_was_done(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 80, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", noise, options={"g": "5"})
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    outcome = Outcome(tmp_path, path, "1 Early?", "end Late?")
    assert outcome.code == 1 and len(outcome.lines) == 1 and "truncated" in outcome.lines[0]
    report = outcome.report
    assert 15 <= report["frames"]["processed"] < 30 and len(report["questions"]) == 2
    assert [error["where"] for error in report["errors"]] == ["demux"]
    assert report["errors"][0]["time_s"] > 1


def wrong(tmp_path, video):
    text = tmp_path / "text.mp4"
    text.write_text("no video\n" * 100)
    folder = tmp_path / "model"
    folder.mkdir()
    return [
        ({"video": tmp_path / "missing.mp4"}, "no such file"),
        ({"video": text}, "not a video"),
        ({"video": tmp_path}, "a folder"),
        ({"preset": "vicostrem"}, "did you mean 'vicostream'"),
        ({"settings": ["prune.treshold=0.2"]}, "did you mean 'prune.threshold'"),
        ({"settings": ["prune.threshold"]}, "give key=value"),
        ({"settings": ["prune.threshold=much"]}, "prune.threshold='much'"),
        ({"settings": ["reuse=none", "prune.external=1"]}, "external"),
        ({"questions": ["What?"]}, "'What\\?' is not a time"),
        ({"questions": ["3"]}, "the question after the time is empty"),
        ({"questions": ["3 " + "why " * 2000]}, "tokens, allowed: 1024"),
        ({"questions": [os.fsdecode(b"3 caf\xe9?")]}, "not UTF-8"),
        ({"model": "nosuchmodel"}, "nosuchmodel"),
        ({"device": "cuda:99"}, "--device='cuda:99': this machine has"),
        ({"device": "mps"}, "give cpu, cuda"),
        ({"device": "gpu!"}, "give cpu, cuda"),
        ({"fps": -1.0}, "--fps -1.0"),
        ({"save": str(tmp_path)}, "--save .*it is a folder"),
        ({"restore": str(tmp_path / "none"), "model": "nosuchmodel"}, "none: no such file"),
    ]


def test_what_the_user_got_wrong_is_one_line_and_exit_code_2(tmp_path, video):
    for given, said in wrong(tmp_path, video):
        questions = given.pop("questions", ["end What?"])
        path = given.pop("video", video)
        outcome = Outcome(tmp_path, path, *questions, **given)
        assert outcome.code == 2, outcome.err
        assert len(outcome.lines) == 1 and re.search(said, outcome.lines[0]), outcome.err
        assert "Traceback" not in outcome.err
        report = outcome.report
        assert len(report["errors"]) == 1 and report["errors"][0]["what"] in outcome.lines[0]
        assert report["chunks"] == [] and report["questions"] == []


def test_a_report_folder_that_cannot_be_made_is_found_before_the_work(tmp_path, video):
    (tmp_path / "file").write_text("in the way")
    err = io.StringIO()
    options = RunOptions(video=str(video), model="tiny-random", report=str(tmp_path / "file"))
    assert run(options, Screen(io.StringIO(), err)) == 2
    (line,) = err.getvalue().splitlines()
    assert line.startswith("vicostream: error: --report")


@pytest.mark.parametrize("option", ["report", "explain", "show_pruning", "save"])
def test_an_empty_name_is_not_the_current_folder(tmp_path, video, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, err = list(tmp_path.iterdir()), io.StringIO()
    options = RunOptions(video=str(video), model="tiny-random", **{option: ""})
    assert run(options, Screen(io.StringIO(), err)) == 2
    (line,) = err.getvalue().splitlines()
    assert f"--{option.replace('_', '-')} '': give a f" in line
    assert list(tmp_path.iterdir()) == before


def test_a_folder_that_takes_no_file_is_found_before_the_work(tmp_path, video, monkeypatch):
    """Root may do everything, also on a read-only disk."""

    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    outcome = Outcome(tmp_path, video)
    assert outcome.code == 2 and len(outcome.lines) == 1 and "cannot be written" in outcome.lines[0]
    assert not list(outcome.folder.iterdir())


def test_no_password_is_shown_or_written(tmp_path, capsys):
    outcome = Outcome(tmp_path, "http://me:s3cret@127.0.0.1:9/a.ts", debug=True)
    assert outcome.code == 1 and "http://***@127.0.0.1:9/a.ts" in outcome.lines[0]
    written = (outcome.folder / "report.json").read_text()
    shown = outcome.err + outcome.out + "".join(capsys.readouterr())
    assert "Traceback" in shown and "s3cret" not in shown + written


def test_a_question_sees_every_frame_up_to_its_time(tmp_path, video):
    """At one frame a second a chunk takes eight to fill."""
    outcome = Outcome(tmp_path, video, "1.5 What?", "2 And now?", fps=1)
    assert [q["blocks"] for q in outcome.report["questions"]] == [
        [[0.0, 1.0]], [[0.0, 1.0], [2.0, 2.0]]
    ]  # fmt: skip
    assert [c["frames"] for c in outcome.report["chunks"]] == [2, 1, 1]


def test_a_video_without_a_stated_end_is_told_of_memory(tmp_path, video):
    endless = write_video(tmp_path / "a.h264", pictures(9))
    said = "memory grows with it"
    assert said in Outcome(tmp_path, endless).err
    for quiet in (
        Outcome(tmp_path, video),
        Outcome(tmp_path, endless, settings=["engine.max_pages=400"]),
        Outcome(tmp_path, endless, settings=["engine.history_bytes=256MiB"]),
        Outcome(tmp_path, endless, preset="streaming-llm"),
    ):
        assert quiet.code == 0 and said not in quiet.err, quiet.err


def test_where_nobody_watches_a_line_tells_now_and_then(tmp_path, video, monkeypatch):
    assert " frames/s  " not in Outcome(tmp_path, video).err
    monkeypatch.setattr("vicostream_kernels.pipeline.screen.EVERY_S", 0.0)
    lines = [line for line in Outcome(tmp_path, video).err.splitlines() if " frames/s  " in line]
    assert len(lines) == 6 and lines[0].startswith("vicostream: at 00:00.7  ")  # 5 and the flush


def test_damage_is_told_when_it_is_found(tmp_path, video, monkeypatch):
    frames = run_module.VideoSource.__iter__

    def damaged(self):
        for frame in frames(self):
            yield frame
            self._note("decode", "damaged data skipped")

    monkeypatch.setattr(run_module.VideoSource, "__iter__", damaged)
    both = io.StringIO()
    options = RunOptions(str(video), model="tiny-random", questions=["1 What?"], settings=SMALL_SET)
    assert run(options, Screen(both, both)) == 1
    shown = both.getvalue()
    assert shown.index("skipped (at 0.000 s)") < shown.index("What?")
    assert shown.count("damaged data skipped") == 20
    assert shown.index("What?") < shown.index("20 more damaged places")


def test_a_file_name_that_is_no_text_has_a_report(tmp_path, video):
    name = video.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9 $\\x$.mp4"))
    outcome = Outcome(tmp_path, name, "end What?", show_pruning=str(tmp_path / "shown"))
    assert (outcome.code, outcome.lines) == (0, [])
    assert outcome.report["source"]["name"] == str(name)


def test_a_failure_midway_keeps_what_was_done(tmp_path, video):
    outcome = Outcome(
        tmp_path, video, "1 Early?", "end Late?", settings=["engine.max_pages=16", "prune=none"]
    )
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert "pages" in outcome.lines[0] and "What would help" in outcome.lines[0]
    report = outcome.report
    assert 0 < report["frames"]["processed"] < 40
    assert [q["text"] for q in report["questions"]] == ["Early?"]
    cause, unasked = report["errors"]
    assert cause["where"] == "ingest" and cause["time_s"] > 0
    assert (unasked["where"], unasked["what"]) == ("answer", "not asked: Late?")


def test_a_question_that_fails_does_not_end_the_stream(tmp_path, video, monkeypatch):
    ask = Stream.ask

    def sometimes(self, text, time_s=None, **options):
        if text == "Broken?":
            raise RuntimeError("no luck")
        return ask(self, text, time_s, **options)

    monkeypatch.setattr(Stream, "ask", sometimes)
    outcome = Outcome(tmp_path, video, "1 Broken?", "end Whole?")
    assert outcome.code == 1
    assert outcome.lines == ["vicostream: error: RuntimeError: no luck"]
    report = outcome.report
    assert report["frames"]["processed"] == 40
    assert [question["text"] for question in report["questions"]] == ["Whole?"]
    assert [error["where"] for error in report["errors"]] == ["answer"]


def test_a_closed_pipe_ends_the_run_with_one_line(tmp_path, video, monkeypatch):
    def closed(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(Screen, "piece", closed)
    outcome = Outcome(tmp_path, video, "1 Early?", "2 Late?", "end Never?")
    assert outcome.code == 1
    assert outcome.lines == ["vicostream: error: stopped: nobody reads the output any more"]
    report = outcome.report
    assert 0 < report["frames"]["processed"] < 40
    assert [error["what"] for error in report["errors"]][1:] == [
        "not asked: Late?", "not asked: Never?"
    ]  # fmt: skip


def test_where_nobody_reads_errors_there_still_is_a_report(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    options = RunOptions("missing.mp4", report=str(tmp_path), debug=True)
    assert run(options, Screen(io.StringIO(), Closed())) == 2
    errors = json.loads((tmp_path / "report.json").read_text())["errors"]
    assert [error["what"] for error in errors] == ["missing.mp4: no such file"]


def test_an_interrupt_waits_for_the_report_to_be_whole(tmp_path, video, monkeypatch):
    write = run_module.Recorder.write

    def interrupted(self, folder):
        signal.raise_signal(signal.SIGINT)
        return write(self, folder)

    monkeypatch.setattr(run_module.Recorder, "write", interrupted)
    options = RunOptions("missing.mp4", report=str(tmp_path))
    assert run(options, Screen(io.StringIO(), io.StringIO())) == run_module.INTERRUPTED
    assert json.loads((tmp_path / "report.json").read_text())["errors"]


def test_debug_shows_the_traceback(tmp_path, capsys):
    Outcome(tmp_path, tmp_path / "missing.mp4", debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_writes_the_report(tmp_path, video, monkeypatch):
    ingest = Stream.ingest

    def interrupted(self, frames, times_s=None):
        if self.time_s > 1:
            raise KeyboardInterrupt
        return ingest(self, frames, times_s)

    monkeypatch.setattr(Stream, "ingest", interrupted)
    outcome = Outcome(tmp_path, video, "end What?")
    assert outcome.code == 130 and outcome.lines == ["vicostream: error: interrupted"]
    assert outcome.report["frames"]["processed"] == 16

    frames = run_module.VideoSource.__iter__

    def damaged(self):
        self._note("decode", "damaged data skipped")
        yield from frames(self)

    monkeypatch.setattr(run_module.VideoSource, "__iter__", damaged)
    outcome = Outcome(tmp_path, video)
    assert outcome.code == 130 and "damaged data skipped (at 0.000 s)" in outcome.lines[0]
    assert [error["where"] for error in outcome.report["errors"]] == ["decode", "ingest"]


@pytest.fixture
def signalled(monkeypatch):
    """Ctrl-C, so many times, while the chunk that begins at 0.8 s is in work."""
    count, encode = [1], Encode.run

    def interrupted(self, chunk):
        if chunk.source.start_s == 0.8:
            for _ in range(count[0]):
                signal.raise_signal(signal.SIGINT)
        return encode(self, chunk)

    monkeypatch.setattr(Encode, "run", interrupted)
    return count


def test_an_interrupt_lets_the_chunk_be_done_and_saves(tmp_path, video, signalled):
    path, before = tmp_path / "session", signal.getsignal(signal.SIGINT)
    outcome = Outcome(tmp_path, video, "end What?", save=str(path))
    assert outcome.code == 130 and outcome.lines == ["vicostream: error: interrupted"]
    assert "the chunk in work is done first" in outcome.err and "saved the session" in outcome.err
    assert outcome.report["frames"]["processed"] == 16
    assert "frames    16 read, 16 processed" in outcome.out  # the figures are shown all the same
    assert signal.getsignal(signal.SIGINT) is before
    signalled[0] = 0
    again = Outcome(tmp_path, video, "end What?", restore=str(path))
    assert again.code == 0 and again.report["frames"]["processed"] == 16 + 40


def test_a_second_interrupt_leaves_at_once(tmp_path, video, signalled):
    signalled[0] = 2
    path = tmp_path / "session"
    outcome = Outcome(
        tmp_path, video, "end What?", save=str(path), show_pruning=str(tmp_path / "shown")
    )
    assert outcome.code == 130 and outcome.lines == ["vicostream: error: interrupted"]
    assert not path.exists() and not list((tmp_path / "shown").iterdir())
    assert outcome.report["frames"]["processed"] == 8
    assert sorted(p.name for p in outcome.folder.iterdir()) == ["report.json", "trace.json"]


def test_without_a_session_to_save_an_interrupt_waits_for_nothing(tmp_path, video, signalled):
    outcome = Outcome(tmp_path, video)
    assert outcome.code == 130 and outcome.report["frames"]["processed"] == 8


def test_an_interrupt_in_the_midst_of_an_answer_saves(tmp_path, video, monkeypatch):
    piece = Screen.piece

    def interrupted(self, text):
        signal.raise_signal(signal.SIGINT)
        piece(self, text)

    monkeypatch.setattr(Screen, "piece", interrupted)
    path = tmp_path / "session"
    outcome = Outcome(tmp_path, video, "1 What?", save=str(path))
    assert outcome.code == 130 and path.exists() and len(outcome.lines) == 1


def test_a_source_that_fails_leaves_a_session(tmp_path, video, monkeypatch):
    frames = run_module.VideoSource.__iter__

    def ending(self):
        for _, frame in zip(range(20), frames(self)):
            yield frame
        raise PipelineError("the network is gone")

    monkeypatch.setattr(run_module.VideoSource, "__iter__", ending)
    path = tmp_path / "session"
    outcome = Outcome(tmp_path, video, save=str(path))
    assert outcome.code == 1 and outcome.lines == ["vicostream: error: the network is gone"]
    assert path.exists() and outcome.report["errors"][0]["where"] == "video"

    def full(*_):
        raise PipelineError("the session cannot be saved: No space left on device")

    monkeypatch.setattr(Stream, "save", full)
    outcome = Outcome(tmp_path, video, save=str(tmp_path / "other"))
    assert outcome.code == 1
    assert [error["where"] for error in outcome.report["errors"]] == ["save", "video"]


def test_a_bug_is_a_failure_and_not_the_users_fault(tmp_path, video, monkeypatch):
    def broken(*_):
        raise ValueError("shapes differ")

    monkeypatch.setattr("vicostream_kernels.pipeline.stages.Prefill.run", broken)
    outcome = Outcome(tmp_path, video)
    assert outcome.code == 1 and outcome.lines == ["vicostream: error: shapes differ"]
    assert outcome.report["errors"][0]["where"] == "ingest"


def test_the_sample_has_questions_of_its_own(tmp_path, monkeypatch):
    from vicostream_kernels.pipeline import sample

    monkeypatch.setattr(sample, "write_clip", lambda path: write_video(path, pictures(30)))
    outcome = Outcome(tmp_path, "sample")
    assert outcome.code == 0 and outcome.report["frames"]["read"] == 30
    known = sample.questions()
    for asked, question in zip(outcome.report["questions"], known):
        assert (asked["text"], asked["expected"]) == (question.text, question.answer)
        assert asked["right"] is False  # random weights
    assert outcome.out.count(": WRONG") == 3 and "answers   0 of 3 right" in outcome.out
    assert f"expected {known[0].answer}: WRONG" in outcome.out


def test_an_answer_is_judged_by_its_word():
    figures = QuestionFigures(1.0, "What?", answer=" Red. ")
    figures.judge("red")
    assert figures.right is True
    figures.judge("blue")
    assert (figures.right, figures.expected) == (False, "blue")


def test_control_characters_do_not_reach_the_terminal():
    out = io.StringIO()
    Screen(out, io.StringIO()).piece("a\x1b[2J\x07\x9bé\tb\nc")
    assert out.getvalue() == "a␛[2J␇\ufffdé\tb\n    c"


def test_live_progress_on_a_terminal(tmp_path, video):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    err, out = Terminal(), io.StringIO()
    options = RunOptions(str(video), model="tiny-random", questions=["1 What?"], settings=SMALL_SET)
    assert run(options, Screen(out, err)) == 0
    assert "frames/s" in err.getvalue() and "KV" in err.getvalue()
    assert "[00:01.0] What?" in out.getvalue()


def test_what_fails_does_not_take_the_progress_away():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    err = Terminal()
    screen = Screen(io.StringIO(), err)
    screen.start(10.0, "a.mp4")
    try:
        screen.question(1.0, "What?")
        screen.unanswered()
        screen.error("[bold]no luck[/bold]")
        assert screen._progress.live.is_started
        assert "vicostream: error: [bold]no luck[/bold]" in err.getvalue()
    finally:
        screen.stop()


def test_numbers_as_people_read_them():
    assert [clock(t) for t in (0, 65.25, 3600, -1.5, 59.99)] == [
        "00:00.0",
        "01:05.2",
        "1:00:00.0",
        "-00:01.5",
        "01:00.0",
    ]
    assert (mib(2**20), mib(3 * 2**29)) == ("1.0 MiB", "1.50 GiB")


def test_settings_are_split_at_the_first_sign():
    assert run_module.parse_settings(["a.b = c=d "]) == {"a.b": "c=d"}


# -- stages that fail beside each other ---------------------------------------------------------


def said(outcome):
    return [(error["where"], error["what"], error["time_s"]) for error in outcome.report["errors"]]


OVERLAP = ["engine.overlap=true"]
BROKEN = ("ingest", "Broken: no such kernel")


@pytest.mark.parametrize(
    ("leaves", "code", "first"),
    [
        (KeyboardInterrupt(), 130, ("video", "interrupted")),
        (PipelineError("the network is gone"), 1, ("video", "the network is gone")),
    ],
    ids=["interrupt", "source"],
)
def test_a_run_that_ends_reports_it_beside_what_ended_it(
    broken_encoder, tmp_path, video, monkeypatch, leaves, code, first
):  # fmt: skip
    broken_encoder.at = 0.8
    frames, ingest = run_module.VideoSource.__iter__, Stream.ingest

    def ingested(self, *arguments):
        done = ingest(self, *arguments)
        if self.time_s > 0.8:
            broken_encoder.has_failed(self)
        return done

    def ending(self):
        for frame in frames(self):
            if frame.time_s > 1.59:
                raise leaves
            yield frame

    monkeypatch.setattr(Stream, "ingest", ingested)
    monkeypatch.setattr(run_module.VideoSource, "__iter__", ending)
    outcome = Outcome(tmp_path, video, "end Late?", settings=OVERLAP)
    assert outcome.code == code
    assert said(outcome) == [
        (*first, 1.5), (*BROKEN, 0.8), ("answer", "not asked: Late?", None)
    ]  # fmt: skip


def test_an_error_has_the_time_of_its_chunk(broken_encoder, tmp_path, video, monkeypatch):
    broken_encoder.at = 0.8
    broken_encoder.may.clear()
    ingest = Stream.ingest

    def later(self, frames, times):
        if times[0] > 2:
            broken_encoder.may.set()
        return ingest(self, frames, times)

    monkeypatch.setattr(Stream, "ingest", later)
    outcome = Outcome(tmp_path, video, settings=OVERLAP)
    assert outcome.code == 1 and said(outcome) == [(*BROKEN, 0.8)]


def test_in_turn_an_error_has_the_time_of_its_chunk_too(broken_encoder, tmp_path, video):
    """A question cuts the batch: the chunk began before it."""
    broken_encoder.at = 0.8
    outcome = Outcome(tmp_path, video, "1.2 What?")
    assert outcome.code == 1
    assert said(outcome) == [(*BROKEN, 0.8), ("answer", "not asked: What?", 1.2)]


def test_a_question_that_hears_of_it_was_not_asked(broken_encoder, tmp_path, video, monkeypatch):
    broken_encoder.may.clear()
    flush = Stream.flush

    def hearing(self):
        broken_encoder.may.set()
        return flush(self)

    monkeypatch.setattr(Stream, "flush", hearing)
    outcome = Outcome(tmp_path, video, "1.5 Early?", "end Late?", settings=OVERLAP)
    assert outcome.code == 1 and said(outcome) == [
        (*BROKEN, 0.0),
        ("answer", "not asked: Early?", 1.5),
        ("answer", "not asked: Late?", None),
    ]
    assert outcome.report["questions"] == []


def test_a_save_that_hears_of_it_saves_nothing(broken_encoder, tmp_path, video):
    broken_encoder.at = 3.2
    path = tmp_path / "session"
    outcome = Outcome(tmp_path, video, settings=OVERLAP, save=str(path))
    assert outcome.code == 1 and said(outcome) == [(*BROKEN, 3.2)] and not path.exists()


def test_an_interrupt_while_a_question_waits_for_its_chunks(tmp_path, video, monkeypatch):
    settle = Belt.settle

    def interrupted(self):
        settle(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Belt, "settle", interrupted)
    outcome = Outcome(tmp_path, video, "1.5 Early?", settings=OVERLAP)
    assert outcome.code == 130 and outcome.report["questions"] == []
    assert said(outcome) == [
        ("answer", "interrupted", 1.5), ("answer", "not asked: Early?", 1.5)
    ]  # fmt: skip
