"""``vicostream eval streamqa``: what it measures, keeps, shows, and refuses."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import pytest
from pipeline_kit import tiny_runner
from typer.testing import CliRunner

from vicostream_kernels.cli import app
from vicostream_kernels.evaluation import study
from vicostream_kernels.evaluation.arms import Arm, expand, parse_sweep
from vicostream_kernels.evaluation.console import Console
from vicostream_kernels.evaluation.measure import ClipSet, ask_clip, summarize
from vicostream_kernels.evaluation.qa_run import QAOptions, run_streamqa
from vicostream_kernels.evaluation.streamqa import KINDS
from vicostream_kernels.models import load_model, named
from vicostream_kernels.pipeline.engine import StreamEngine
from vicostream_kernels.pipeline.session import Stream

FEW = ClipSet(clips=2, steps=12, questions=5)
SMALL = ("engine.pixels=6272",)


@pytest.fixture(autouse=True)
def loads_at_once(monkeypatch):
    def load(name, **_):
        if name not in ("tiny-random", "tiny", "tiny-full"):
            raise ValueError(f"{name}: no such model")
        return tiny_runner()

    monkeypatch.setattr("vicostream_kernels.models.load_model", load)


@pytest.fixture
def asked(monkeypatch):
    """(question, its time, the newest frame's time) of every question."""
    calls, ask = [], Stream.ask

    def spy(stream, text, time_s=None, **options):
        calls.append((text, time_s, stream.time_s))
        return ask(stream, text, time_s, **options)

    monkeypatch.setattr(Stream, "ask", spy)
    return calls


class Outcome:
    def __init__(self, tmp_path, **options):
        self.folder = tmp_path / "out"
        out, err = io.StringIO(), io.StringIO()
        options = {"model": "tiny-random", "settings": SMALL, "clips": FEW, **options}
        self.code = run_streamqa(QAOptions(out=str(self.folder), **options), Console(out, err))
        self.out, self.err = out.getvalue(), err.getvalue()

    @property
    def results(self):
        return json.loads((self.folder / "results.json").read_text(encoding="utf-8"))

    @property
    def rows(self):
        with (self.folder / "results.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def test_one_arm(tmp_path, asked):
    done = Outcome(tmp_path)
    assert done.code == 0, done.err
    (row,) = done.rows
    (line,) = done.results["figures"]["sweep"].values()
    assert sum(line[0]["kinds"][kind]["asked"] for kind in KINDS) == len(asked) == 10
    assert {"past_accuracy", "past_low", "past_high", "past_constant_share", "kept", "kv_bytes",
            "frames_per_s", "ttft_ms", "now_right", "past_miss_asked"} <= set(row)  # fmt: skip
    assert "best constant answer" in done.out and "tiny-random live" in done.out
    # Every question with each frame up to its time, and with none after it.
    assert all(0 < at - newest < 0.25 for _, at, newest in asked)


def test_a_sweep_measures_every_combination_and_only_what_is_missing(tmp_path, asked, monkeypatch):
    sweeps = ("retrieve.k=1,2", "selector=rule,random")
    first = Outcome(tmp_path, sweeps=sweeps)
    assert first.code == 0, first.err
    assert [row["name"] for row in first.rows] == [
        f"retrieve.k={k} selector={s}" for k in (1, 2) for s in ("rule", "random")
    ]
    assert [float(row["blocks"]) <= int(row["overrides"].split("k=")[1]) for row in first.rows]
    count = len(asked)
    assert count == 40
    again = Outcome(tmp_path, sweeps=sweeps)
    assert len(asked) == count and again.results == first.results
    Outcome(tmp_path, sweeps=("retrieve.k=2,3",))
    assert len(asked) == count + 10
    more = ClipSet(clips=3, steps=12, questions=5)
    Outcome(tmp_path, clips=more, sweeps=("retrieve.k=2",))
    assert len(asked) == count + 15
    Outcome(tmp_path, sweeps=("retrieve.k=2",), fresh=True)
    assert len(asked) == count + 25
    # Other code may give other results.
    monkeypatch.setattr("vicostream_kernels.evaluation.qa_run._code", lambda: "changed")
    Outcome(tmp_path, sweeps=("retrieve.k=2",))
    assert len(asked) == count + 35


def test_an_interrupted_run_goes_on(tmp_path, asked, monkeypatch):
    ask = Stream.ask

    def interrupted(stream, text, time_s=None, **options):
        if len(asked) == 7:
            raise KeyboardInterrupt
        return ask(stream, text, time_s, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "ask", interrupted)
        done = Outcome(tmp_path)
    assert done.code == 130 and "goes on from here" in done.err
    assert Outcome(tmp_path).code == 0
    assert len(asked) == 7 + 5  # the clip that was cut short is asked again, the first is not


def test_keeping_at_random_and_accuracy_by_hit(tmp_path):
    done = Outcome(tmp_path, preset="full-history", sweeps=("keep=0.25,0.5",))
    assert [float(row["kept"]) for row in done.rows] == [0.25, 0.5]
    arm = Arm("tiny-random", "live", {"engine.pixels": 6272}, selector="oracle")
    with StreamEngine(tiny_runner(), arm.method()) as engine:
        result = ask_clip(engine, arm, FEW.make(0), 0)
    seen = [row["hit"] for row in result["questions"] if row["kind"] == "past"]
    assert seen and all(hit in (True, None) for hit in seen)
    summary = summarize(arm, [result])
    assert summary["past_miss"]["asked"] == 0
    assert summary["past_hit"]["asked"] == sum(hit is True for hit in seen)


def test_the_figures(tmp_path):
    folder = tmp_path / "figures"
    done = Outcome(tmp_path, sweeps=("keep=0.5,1",), plot=str(folder))
    assert done.code == 0 and (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    studies = ("window", "models", "live", "plane")
    one = ClipSet(clips=1, steps=8, questions=5)
    done = Outcome(tmp_path, studies=studies, clips=one, plot=str(folder), untuned="tiny-random")
    assert done.code == 0, done.err
    assert {p.stem for p in folder.iterdir()} == {"sweep", *studies}
    assert {row["figure"] for row in done.rows} == set(studies)


def test_every_study_names_methods_that_exist():
    for name in study.names():
        lines = study.study(name, "tiny", "tiny-full")
        assert lines and all(arm.method() for arms in lines.values() for arm in arms)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"preset": "lives"}, "did you mean 'live'"),
        ({"clips": ClipSet(kinds=("past", "why"))}, "kinds=.*allowed: now, past, count"),
        ({"clips": ClipSet(steps=3)}, "steps=3 must be at least one chunk, 4"),
        ({"clips": ClipSet(clips=0)}, "at least 1 of each"),
        ({"clips": ClipSet(split="dev")}, "split='dev'"),
        ({"sweeps": ("retrieve.k",)}, "give key=value,value"),
        ({"sweeps": ("retrieve.kk=1",)}, "unknown key"),
        ({"sweeps": ("selector=best",)}, "one of rule, oracle, random"),
        ({"sweeps": ("keep=much",)}, "give a share such as 0.5"),
        ({"sweeps": ("keep=0",)}, "a share above 0"),
        ({"preset": "full-history", "sweeps": ("selector=oracle",)}, "a method with retrieve"),
        ({"studies": ("speed",)}, "study 'speed': one of dropping"),
        ({"model": "nowhere"}, "nowhere: no such model"),
        ({"device": "tpu"}, "give cpu, cuda"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_before_anything_runs(tmp_path, asked, options, message):
    done = Outcome(tmp_path, **options)
    assert done.code == 2 and not asked
    assert len(done.err.splitlines()) == 1
    assert re.search(message, done.err), done.err


def test_a_checkpoint_without_a_chat_template_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("vicostream_kernels.models.load_model", load_model)
    folder = tmp_path / "base"
    shutil.copytree(named.FOLDERS["tiny"], folder)
    (folder / "chat_template.jinja").unlink()
    asked = ["eval", "streamqa", "--model", str(folder), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*asked, "--clips", "1"])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert "has no chat template (chat_template.jinja is missing): take an Instruct" in line


def test_clips_shorter_than_the_method_s_chunk_are_asked_about(tmp_path, asked):
    clips = ClipSet(clips=1, steps=4, questions=5)
    done = Outcome(tmp_path, settings=(*SMALL, "engine.frames_per_chunk=64"), clips=clips)
    assert done.code == 0 and len(asked) >= 4


def test_sweeps_are_parsed_and_combined():
    assert parse_sweep(" a.b = 1, 2 ") == ("a.b", ("1", "2"))
    arms = expand(Arm("m", "live"), [("retrieve.k", ("1", "2")), ("model", ("x",))])
    assert [(arm.model, arm.method().retrieve.k, arm.name) for arm in arms] == [
        ("x", 1, "retrieve.k=1 model=x"), ("x", 2, "retrieve.k=2 model=x"),
    ]  # fmt: skip
