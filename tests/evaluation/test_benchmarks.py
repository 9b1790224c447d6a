"""StreamingBench and OVO-Bench, on fixtures in exactly the layouts that they are published in."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from pipeline_kit import pictures, tiny_runner, write_video

from vicostream_kernels.evaluation import ovobench, qa_run, run, streamingbench
from vicostream_kernels.evaluation.benchmark import LayoutError
from vicostream_kernels.evaluation.console import Console
from vicostream_kernels.evaluation.run import BenchmarkOptions, _Benchmark, run_benchmark
from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.session import Stream

SMALL = ("engine.pixels=6272", "engine.max_new_tokens=2")
SECONDS = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Twelve seconds at 2 frames/s."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    return write_video(path, pictures(2 * SECONDS), rate=2)


@pytest.fixture(autouse=True)
def loads_at_once(monkeypatch):
    monkeypatch.setattr("vicostream_kernels.models.load_model", lambda name, **_: tiny_runner())


def place(clip, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(clip.read_bytes())


def choice(task, stamp, answer, options=("one", "two", "three", "four")):
    return {
        "task_type": task,
        "question": f"What is it at {stamp}?",
        "time_stamp": stamp,
        "answer": answer,
        "options": list(options),
        "required_ability": "working memory",
    }


def entry(video, *questions):
    return {
        "time": "[0:00:00 - 0:00:10]",
        "questions": list(questions),
        "video_categories": "test",
        "video_path": f"./videos/{video}.mp4",
    }


ALERT = {
    "task_type": "Proactive Output",
    "question": 'When the circle comes, output "circle".',
    "time_stamp": "00:00:04",
    "ground_truth_time_stamp": "00:00:06",
    "ground_truth_output": "circle",
}


@pytest.fixture
def repository(tmp_path, clip):
    """The layout after the repository's own preparation."""
    home = tmp_path / "StreamingBench" / "src" / "data"
    for name in ("sample_1_real", "sample_7_sqa", "sample_3_proactive"):
        place(clip, home / "videos" / f"{name}.mp4")
    files = {
        "real": [
            entry("sample_1_real", choice("Counting", "00:00:05", "A")),
            entry(
                "sample_1_real", choice("Counting", "0:00:09", "B"), choice("Clips", "00:03", "C")
            ),
            entry("sample_2_real", choice("Clips", "00:00:05", "D")),
        ],
        "sqa": [
            [
                entry("sample_7_sqa", choice("Sequential", "00:00:04", "A")),
                entry("sample_7_sqa", choice("Sequential", "00:00:08", "B")),
            ]
        ],
        "proactive": [entry("sample_3_proactive", ALERT)],
        "proactive_50": [entry("sample_3_proactive", ALERT)],
    }
    for name, rows in files.items():
        (home / f"questions_{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "StreamingBench"


@pytest.fixture
def dataset(tmp_path, clip):
    """The layout of the dataset's archives, unpacked: tables, and sample_N/video.mp4 for each."""
    root = tmp_path / "hub"
    place(clip, root / "Real-Time Visual Understanding_1-50" / "sample_1" / "video.mp4")
    place(clip, root / "Emotion Recognition" / "sample_1" / "video.mp4")
    place(clip, root / "__MACOSX" / "Scene Understanding" / "sample_2" / "video.mp4")
    tables = {
        "Real_Time_Visual_Understanding": "Real-Time Visual Understanding_sample_1_1",
        "Omni_Source_Understanding": "Scene Understanding_sample_2_1",
    }
    columns = ("task_type", "question", "time_stamp", "answer", "options")
    for name, question_id in tables.items():
        row = {"question_id": question_id, "frames_required": "single"}
        row |= {k: str(choice("Counting", "00:00:05", "B")[k]) for k in columns}
        text = io.StringIO()
        writer = csv.DictWriter(text, list(row))
        writer.writeheader()
        writer.writerow(row)
        path = root / "StreamingBench" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.getvalue(), encoding="utf-8")
    return root


@pytest.fixture
def ovo(tmp_path, clip):
    data = tmp_path / "OVO-Bench" / "data"
    place(clip, data / "src_videos" / "COIN" / "a.mp4")
    place(clip, data / "chunked_videos" / "5.mp4")

    def test(at, **fields):
        return {"realtime": at, **fields}

    entries = [
        {"id": 0, "task": "EPM", "video": "COIN/a.mp4", "realtime": 5.5, "question": "What was it?",
         "answer": "b", "options": ["a", "b"], "gt": 1},
        {"id": 1, "task": "OCR", "video": "COIN/a.mp4", "realtime": 7, "question": "What is it?",
         "answer": "a", "options": ["a", "b", "c", "d", "e"], "gt": 0},
        {"id": 2, "task": "REC", "video": "COIN/a.mp4", "activity": "jumping", "start_times": [1],
         "end_times": [2], "test_info": [test(3, count=1), test(8.0, count=2)]},
        {"id": 3, "task": "SSR", "video": "COIN/a.mp4", "tutorial": "x", "all_steps": ["y"],
         "start_time": [1], "end_time": [2], "test_info": [test(2, step="y", type=1)]},
        {"id": 4, "task": "CRR", "video": "COIN/gone.mp4", "question": "Why?", "answer": "z",
         "ask_time": 2, "clue_time": 3, "test_info": [test(2, type=0), test(4, type=1)]},
        {"id": 5, "task": "ASI", "video": "COIN/cut.mp4", "realtime": 6, "question": "And then?",
         "answer": "b", "options": ["a", "b", "c"], "gt": 2},
    ]  # fmt: skip
    (data / "ovo_bench_new.json").write_text(json.dumps(entries), encoding="utf-8")
    return tmp_path / "OVO-Bench"


class Outcome:
    def __init__(self, tmp_path, benchmark, data, *, out="out", **options):
        self.folder = tmp_path / out
        out_text, err = io.StringIO(), io.StringIO()
        self.code = run_benchmark(
            BenchmarkOptions(
                benchmark=benchmark,
                data=str(data),
                model="tiny-random",
                settings=options.pop("settings", SMALL),
                out=str(self.folder),
                **options,
            ),
            Console(out_text, err),
        )
        self.out, self.err = out_text.getvalue(), err.getvalue()

    @property
    def results(self):
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

    @property
    def rows(self):
        lines = (self.folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["id"]: row for row in map(json.loads, lines)}

    def task(self, name):
        return next(task for task in self.results["tasks"] if task["task"] == name)


@pytest.fixture
def asked(monkeypatch):
    """What the model was asked: (text, time, the newest frame it had, frames so far)."""
    calls, ask = [], Stream.ask

    def spy(stream, text, time_s=None, **options):
        recorder = stream.recorder
        calls.append((text, time_s, stream.time_s, recorder.frames_processed))
        return ask(stream, text, time_s, **options)

    monkeypatch.setattr(Stream, "ask", spy)
    return calls


def test_streamingbench_from_the_repository(tmp_path, repository, asked):
    done = Outcome(tmp_path, "streamingbench", repository)
    assert (
        done.code == 1 and "1 questions lost: ./videos/sample_2_real.mp4: no such video" in done.err
    )
    assert [t["questions"] for t in done.results["tasks"]] == [2, 2, 2, 1]
    assert (done.task("Clips")["asked"], done.task("Clips")["lost"]) == (1, 1)
    assert {"real/0", "real/1", "real/2", "sqa/0", "sqa/1", "proactive/0"} == set(done.rows)
    assert "Counting" in done.out and "by its time" not in done.err
    times = {text.splitlines()[1]: (at, newest, frames) for text, at, newest, frames in asked[:3]}
    # Asked in the order of time, each with every frame up to its second and none after it.
    assert times == {
        "Question: What is it at 00:03?": (3.0, 3.0, 4),
        "Question: What is it at 00:00:05?": (5.0, 5.0, 6),
        "Question: What is it at 0:00:09?": (9.0, 9.0, 10),
    }


def test_a_later_question_of_a_sequence_knows_the_earlier_ones(repository):
    first, second = streamingbench.read(repository, ["sqa"])
    assert "00:00:04" not in first.prompt.split("Question:")[0]
    assert "00:00:04: What is it at 00:00:04? A. one B. two C. three D. four -> A" in second.prompt


def test_an_alert_is_asked_every_second_until_it_is_answered(tmp_path, repository, monkeypatch):
    said = []

    def answers(self, stream, prompt, when):
        said.append((when, stream.time_s, prompt.splitlines()[-1]))
        return ("Yes." if "yes or no" in prompt and when >= 7 else "circle"), None

    monkeypatch.setattr("vicostream_kernels.evaluation.run._Benchmark._answer", answers)
    done = Outcome(tmp_path, "streamingbench", repository, only=["proactive"])
    assert [when for when, _, _ in said] == [5, 6, 7, 7]
    assert all(when == newest for when, newest, _ in said)
    row = done.rows["proactive/0"]
    assert (row["time_s"], row["on_time"], row["right"]) == (7, True, True)
    # Never said: given up four seconds after it was due, and wrong.
    monkeypatch.setattr(
        "vicostream_kernels.evaluation.run._Benchmark._answer", lambda *_: ("no", None)
    )
    row = Outcome(tmp_path, "streamingbench", repository, only=["proactive"], out="2").rows
    assert row["proactive/0"]["time_s"] == 10 and not row["proactive/0"]["right"]


def test_streamingbench_from_the_dataset(tmp_path, dataset):
    items = streamingbench.read(dataset)
    assert [item.group for item in items] == ["real", "omni"]
    assert items[0].path.parts[-3:-1] == ("Real-Time Visual Understanding_1-50", "sample_1")
    # sample_2 of Scene Understanding is not there; another category's must not take its place.
    assert items[1].path is None
    done = Outcome(tmp_path, "streamingbench", dataset, only=["real"])
    assert done.code == 0 and done.task("Counting")["asked"] == 1


def test_ovobench(tmp_path, ovo, asked):
    done = Outcome(tmp_path, "ovobench", ovo)
    assert done.code == 1 and "2 questions lost: COIN/gone.mp4: no such video" in done.err
    assert set(done.rows) == {"0", "1", "2_0", "2_1", "3_0", "5"}
    assert [(t["group"], t["task"], t["asked"]) for t in done.results["tasks"]] == [
        ("backward", "EPM", 1), ("realtime", "OCR", 1), ("forward", "REC", 2),
        ("forward", "SSR", 1), ("forward", "CRR", 0), ("backward", "ASI", 1),
    ]  # fmt: skip
    assert (done.rows["0"]["truth"], done.rows["2_1"]["truth"], done.rows["3_0"]["truth"]) == (
        "B", "2", "Yes",
    )  # fmt: skip
    assert [at for _, at, _, _ in asked] == [2, 3, 5.5, 7, 8, 6]
    assert all(newest <= at < newest + 1 for _, at, newest, _ in asked)


def test_a_limited_context_shows_only_that_much(tmp_path, ovo, asked):
    Outcome(tmp_path, "ovobench", ovo, context_s=3.0, only=["OCR", "EPM"])
    assert sorted((at, newest, frames) for _, at, newest, frames in asked) == [
        (5.5, 5.0, 3), (7.0, 7.0, 3),
    ]  # fmt: skip


def test_scores_are_averaged_as_the_benchmarks_do(tmp_path, ovo, repository, monkeypatch):
    said = {"0": "B", "1": "B", "2_0": "1", "2_1": "5", "3_0": "Yes", "5": "the answer is C"}
    answers = iter([said[i] for i in ("3_0", "2_0", "0", "1", "2_1", "5")])
    monkeypatch.setattr(
        "vicostream_kernels.evaluation.run._Benchmark._answer", lambda *_: (next(answers), None)
    )
    done = Outcome(tmp_path, "ovobench", ovo)
    accuracy = {t["task"]: t["accuracy"] for t in done.results["tasks"]}
    assert accuracy == {"EPM": 1, "OCR": 0, "REC": 0.5, "SSR": 1, "CRR": None, "ASI": 1}
    assert done.results["averages"] == {
        "backward": 1, "realtime": 0, "forward": 0.75, "total": pytest.approx(1.75 / 3),
    }  # fmt: skip
    monkeypatch.setattr(
        "vicostream_kernels.evaluation.run._Benchmark._answer",
        lambda *_: ("The answer is A", None),
    )
    done = Outcome(tmp_path, "streamingbench", repository, out="2", only=["real"])
    # By StreamingBench's own rule, the first character, such an answer is wrong.
    assert done.task("Counting")["accuracy"] == 0 and done.task("Counting")["by_letter"] == 0.5
    assert done.results["averages"] == {"real": 0}


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, ovo, asked, monkeypatch):
    ask = Stream.ask

    def interrupted(stream, text, time_s=None, **options):
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(stream, text, time_s, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "ask", interrupted)
        assert Outcome(tmp_path, "ovobench", ovo).code == 130
    assert len(asked) == 3
    journal = tmp_path / "out" / "answers.jsonl"
    journal.write_text(journal.read_text() + '{"id": "half a li', encoding="utf-8")
    done = Outcome(tmp_path, "ovobench", ovo)
    assert len(asked) == 6 and len(done.rows) == 6 and "3 questions were answered" in done.err
    again = Outcome(tmp_path, "ovobench", ovo)
    assert len(asked) == 6 and again.results["tasks"] == done.results["tasks"]
    other = Outcome(tmp_path, "ovobench", ovo, settings=(*SMALL, "retrieve.k=1"))
    assert other.code == 2 and "results made with another method" in other.err
    # Nothing was left to measure, and what the parts before measured is still there.
    assert again.results["frames_per_s"] == done.results["frames_per_s"] > 0
    assert again.results["peak_kv_bytes"] == done.results["peak_kv_bytes"] > 0


def test_answers_of_other_code_questions_or_devices_are_not_taken(tmp_path, ovo, monkeypatch):
    monkeypatch.setattr(_Benchmark, "_answer", lambda *_: ("B", None))
    assert Outcome(tmp_path, "ovobench", ovo, only=["OCR"]).code == 0
    # The same method by other words is the same run.
    words = (*SMALL, "engine.max_question_tokens=8192")
    assert Outcome(tmp_path, "ovobench", ovo, only=["OCR"], settings=words).code == 0
    with monkeypatch.context() as patch:
        patch.setattr("vicostream_kernels.evaluation.run._code", lambda: "changed")
        other = Outcome(tmp_path, "ovobench", ovo, only=["OCR"])
    assert other.code == 2 and "made with another code;" in other.err
    with monkeypatch.context() as patch:
        patch.setattr(
            "vicostream_kernels.evaluation.run.parse_device", lambda _: torch.device("meta")
        )
        other = Outcome(tmp_path, "ovobench", ovo, only=["OCR"])
    assert other.code == 2 and "made with another device, dtype;" in other.err
    path = ovo / "data" / "ovo_bench_new.json"
    path.write_text(path.read_text().replace("What is it?", "What was it?"))
    other = Outcome(tmp_path, "ovobench", ovo, only=["OCR"])
    assert other.code == 2 and "made with another annotations;" in other.err


def test_this_code_counts_where_it_makes_answers():
    assert "run.py" not in run._SHOWING and "run.py" in qa_run._SHOWING
    assert run._code() != qa_run._code()


def test_an_unreadable_video_is_counted_and_the_others_go_on(tmp_path, ovo):
    (ovo / "data" / "chunked_videos" / "5.mp4").write_bytes(b"not a video" * 100)
    done = Outcome(tmp_path, "ovobench", ovo, only=["ASI", "OCR"])
    assert done.code == 1 and "1 questions lost: COIN/cut.mp4: " in done.err
    assert done.task("ASI")["lost"] == 1 and done.task("OCR")["asked"] == 1
    assert "not a video that FFmpeg can read" in done.results["lost"][0]["why"]
    assert done.task("ASI")["of_all"] == 0


def test_a_question_after_the_end_of_the_video_is_marked(tmp_path, ovo):
    path = ovo / "data" / "ovo_bench_new.json"
    entries = json.loads(path.read_text())
    entries[1]["realtime"] = 40
    path.write_text(json.dumps(entries))
    done = Outcome(tmp_path, "ovobench", ovo, only=["OCR"])
    assert done.rows["1"]["late_s"] == 29 and "1 questions came after" in done.err


@pytest.mark.parametrize(
    "read, name", [(streamingbench.read, "StreamingBench"), (ovobench.read, "OVO-Bench")]
)
def test_another_layout_says_what_was_expected_and_found(tmp_path, read, name):
    (tmp_path / "clips").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        LayoutError, match=rf"not the layout of {name}. Expected .*found clips/, notes"
    ):
        read(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"task": "XYZ"}, "expected a task among EPM.*found 'XYZ'"),
        ({"gt": 9}, "expected gt below 2, found 9"),
        ({"realtime": "soon"}, "expected a time such as 00:01:30, found 'soon'"),
    ],
)
def test_a_wrong_field_is_named_with_its_place(ovo, change, message):
    path = ovo / "data" / "ovo_bench_new.json"
    entries = json.loads(path.read_text())
    entries[0] |= change
    path.write_text(json.dumps(entries))
    with pytest.raises(LayoutError, match=f"entry 0: {message}"):
        ovobench.read(ovo)


def test_a_missing_field_is_named(repository):
    path = repository / "src" / "data" / "questions_real.json"
    rows = json.loads(path.read_text())
    del rows[0]["questions"][0]["answer"]
    path.write_text(json.dumps(rows))
    with pytest.raises(LayoutError, match="entry 0, question 0: expected answer; found task_type"):
        streamingbench.read(repository)


def test_unknown_subsets_presets_and_settings(tmp_path, ovo):
    for options, message in (
        ({"only": ["EPN"]}, "unknown task, known here: EPM"),
        ({"preset": "vicostrem"}, "did you mean 'vicostream'"),
        ({"settings": ["retrieve.kk=1"]}, "unknown key"),
        ({"fps": 0.0}, "--fps 0.0"),
        ({"context_s": -1.0}, "--context -1.0"),
    ):
        done = Outcome(tmp_path, "ovobench", ovo, **options)
        assert done.code == 2 and message in done.err, done.err
