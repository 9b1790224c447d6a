"""The command: what it says, what it writes and how it ends, for good and bad input."""

from __future__ import annotations

import io
import json
import os
import re

import numpy as np
import pytest
import torch
from pipeline_kit import SMALL, pictures, write_video
from run_kit import SMALL_SET, Outcome

from vicostream_kernels.models import load_model
from vicostream_kernels.pipeline import run as run_module
from vicostream_kernels.pipeline.run import RunOptions, run
from vicostream_kernels.pipeline.screen import Screen
from vicostream_kernels.pipeline.session import Stream

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


def test_a_run_in_bfloat16(tmp_path, video, monkeypatch):
    monkeypatch.setattr("vicostream_kernels.models.load_model", load_model)
    outcome = Outcome(tmp_path, video, "end What?", dtype="bfloat16")
    assert outcome.code == 0 and outcome.report["model"]["dtype"] == "bfloat16"
    assert outcome.report["questions"][0]["answer"]


def test_a_gpu_that_nobody_uses_is_told_of(tmp_path, video, monkeypatch):
    assert "has a GPU" not in Outcome(tmp_path, video).err or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Abacus")
    assert "has a GPU (NVIDIA Abacus): --device cuda" in Outcome(tmp_path, video).err


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
        ({"dtype": "fp8"}, "--dtype 'fp8': give float32, bfloat16, float16"),
        ({"fps": -1.0}, "--fps -1.0"),
        ({"max_lag": 0.0}, "--max-lag 0.0: must be"),
        ({"max_lag": float("nan")}, "--max-lag nan: must be"),
        ({"interactive": True, "video": "-"}, "--interactive: standard input is the video"),
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


@pytest.mark.parametrize(("history", "said"), [("all", 1), ("window", 0)])
def test_history_that_goes_is_told_once(tmp_path, video, history, said):
    settings = ["engine.max_pages=16", "engine.window_chunks=1", "retrieve=none", "prune=none"]
    settings.append(f"engine.history={history}")
    outcome = Outcome(tmp_path, video, settings=settings)
    assert outcome.code == 0, outcome.err
    told = "no room for more history: the oldest is forgotten"
    assert outcome.err.count(told) == said
    if said:
        assert outcome.report["forgotten"]["chunks"] > 1


@pytest.mark.parametrize(("k", "said"), [(30, 1), (2, 0)])
def test_room_for_what_a_question_reads_is_asked_for_before_it_fails(tmp_path, video, k, said):
    settings = ["engine.history_bytes=1MiB", "engine.window_chunks=1", "prune=none"]
    settings += [f"retrieve.k={k}", "engine.frames_per_chunk=2"]
    outcome = Outcome(tmp_path, video, "end What?", settings=settings)
    told = f"a question that reads {k} chunks (retrieve.k) needs about"
    assert outcome.err.count(told) == said
    assert (outcome.code, "OutOfPages: fetch" in outcome.err) == (said, bool(said)), outcome.err
    if said:
        (enough,) = re.findall(r"it will fail. (\d+MiB) would do", outcome.err)
        settings[0] = f"engine.history_bytes={enough}"
        outcome = Outcome(tmp_path, video, "end What?", settings=settings)
        assert outcome.code == 0 and told not in outcome.err


def test_a_session_that_forgot_before_does_not_say_so_again(tmp_path, video):
    small = ["engine.max_pages=16", "engine.window_chunks=1", "retrieve=none", "prune=none"]
    saved = str(tmp_path / "session")
    before = Outcome(tmp_path, video, settings=small, save=saved)
    assert before.err.count("no room for more history") == 1
    roomy = [*small, "engine.max_pages=4000"]
    after = Outcome(tmp_path, video, settings=roomy, restore=saved)
    assert after.code == 0 and "no room" not in after.err
    assert after.report["forgotten"] == before.report["forgotten"]


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


def test_debug_shows_the_traceback(tmp_path, capsys):
    Outcome(tmp_path, tmp_path / "missing.mp4", debug=True)
    assert "Traceback" in capsys.readouterr().err


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


def test_settings_are_split_at_the_first_sign():
    assert run_module.parse_settings(["a.b = c=d "]) == {"a.b": "c=d"}


def test_live_progress_on_a_terminal(tmp_path, video):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    err, out = Terminal(), io.StringIO()
    options = RunOptions(str(video), model="tiny-random", questions=["1 What?"], settings=SMALL_SET)
    assert run(options, Screen(out, err)) == 0
    assert "frames/s" in err.getvalue() and "KV" in err.getvalue()
    assert "[00:01.0] What?" in out.getvalue()
