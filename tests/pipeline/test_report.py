"""Traces, figures and the report: complete, valid, written whole or not at all."""

from __future__ import annotations

import json
import time

import pytest
import torch

from vicostream_kernels.pipeline import report as report_module
from vicostream_kernels.pipeline.errors import PipelineError
from vicostream_kernels.pipeline.plots import plot_report
from vicostream_kernels.pipeline.report import (
    SCHEMA_FILE,
    ChunkFigures,
    QuestionFigures,
    Recorder,
    percentiles,
)
from vicostream_kernels.pipeline.trace import Span, Trace, write_atomically

SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def validate(report):
    jsonschema = pytest.importorskip("jsonschema")  # not on every machine with a GPU
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(report)))


def filled_recorder(chunks=5):
    recorder = Recorder(model="tiny-random", preset="vicostream")
    for i in range(chunks):
        with recorder.trace.span("decode", host=True) as span:
            pass
        span.seconds = 0.002
        recorder.decoded(span)
        taken = {"preprocess": 0.001, "encode": 0.004, "prune": 0.001, "prefill": 0.002}
        stages = (Span(stage, i, seconds) for stage, seconds in taken.items())
        spans = [*recorder.take_decoded(), *stages]
        recorder.ingest_s += 0.008
        recorder.frames_ingested += 8
        recorder.chunk(ChunkFigures(i, i + 0.9, 8, 100, 25, 10 * i, 1000 * i, 5, spans))
    recorder.questions.append(
        QuestionFigures(2.0, "What?", "that", 12.0, 3, 9.0, [(0.0, 0.9)], "stop")
    )
    recorder.error("decode", "damaged", 3.0)
    return recorder


def test_peaks_of_memory_are_those_of_the_stream(monkeypatch):
    """Drawing pictures takes memory as well, after the stream has ended."""
    peaks = iter([100, 200, 300])
    monkeypatch.setattr(report_module, "peak_rss_bytes", lambda: next(peaks))
    recorder = Recorder(model="m", preset="p")
    assert recorder.report()["memory"]["peak_rss_bytes"] == 100
    recorder.end()
    recorder.end()
    assert [recorder.report()["memory"]["peak_rss_bytes"] for _ in range(2)] == [200, 200]


def test_time_that_several_take_at_once_counts_once():
    recorder = Recorder(model="m", preset="p")
    began = time.perf_counter()
    with recorder.taking_in():
        with recorder.taking_in():
            time.sleep(0.01)
        recorder.decoded(Span("decode", 0.0, 5.0))  # beside what is at work
    within = time.perf_counter() - began
    assert 0.01 <= recorder.ingest_s <= within
    before = recorder.ingest_s
    time.sleep(0.01)
    recorder.decoded(Span("decode", 0.0, 0.005))
    assert recorder.ingest_s == before + 0.005
    recorder.decoded(Span("decode", 0.0, 5.0))  # began while others were at work
    assert recorder.ingest_s < before + 1


def test_the_schema_is_one_and_every_field_is_explained():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for name in SCHEMA["required"]:
        field = SCHEMA["properties"][name]
        assert field.get("description") or field.get("const"), name
    wanted = (
        "schema versions device model preset config frames wall_s fps stages_ms tokens kv memory "
        "chunks questions errors"
    )
    assert set(wanted.split()) <= set(SCHEMA["required"])


@pytest.mark.parametrize("recorder", [Recorder(model="m", preset="p"), filled_recorder()])
def test_reports_are_valid(recorder):
    validate(recorder.report())


def test_a_report_that_lacks_a_field_is_not_valid():
    jsonschema = pytest.importorskip("jsonschema")
    report = filled_recorder().report()
    for path in (["kv"], ["frames", "read"], ["chunks", 0, "kept"], ["questions", 0, "ttft_ms"]):
        broken = json.loads(json.dumps(report))
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(jsonschema.ValidationError):
            validate(broken)


def test_figures_follow_from_what_was_measured():
    recorder = filled_recorder()
    recorder.frames_read = 50
    report = recorder.report()
    assert report["frames"] == {"read": 50, "processed": 40, "dropped": 10}
    assert report["tokens"] == {"seen": 500, "kept": 125}
    assert report["fps"]["ingest"] == pytest.approx(8 / 0.010, rel=0.05)
    assert report["fps"]["encode"] == pytest.approx(8 / 0.004)
    assert report["stages_ms"]["prefill"] == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert report["chunks"][0]["ms"] == pytest.approx(8.0)
    assert report["chunks"][0]["stages_ms"]["decode"] == pytest.approx(2.0)
    assert report["errors"] == [{"time_s": 3.0, "where": "decode", "what": "damaged"}]


def test_percentiles_are_those_of_numpy():
    import numpy as np

    values = list(np.random.default_rng(0).exponential(size=37))
    got = percentiles(values)
    assert list(got.values()) == pytest.approx(np.percentile(values, [50, 90, 99]), abs=1e-4)
    assert percentiles([3.0]) == {"p50": 3.0, "p90": 3.0, "p99": 3.0}
    with pytest.raises(ValueError):
        percentiles([])


def test_totals_are_exact_when_old_entries_are_dropped(monkeypatch):
    monkeypatch.setattr(report_module, "KEPT_ENTRIES", 3)
    report = filled_recorder(chunks=10).report()
    assert len(report["chunks"]) == 3 and report["tokens"]["seen"] == 1000
    assert report["frames"]["processed"] == 80


def test_the_trace_has_one_track_a_stage(tmp_path):
    trace = Trace()
    for _ in range(3):
        with trace.span("encode", chunk=1):
            time.sleep(0.002)
        with trace.span("prefill"):
            pass
    with pytest.raises(RuntimeError), trace.span("prefill"):
        raise RuntimeError
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert len(spans) == 7 and sorted(names.values()) == ["encode", "prefill"]
    for span in spans:
        assert names[span["tid"]] == span["name"] and span["ts"] >= 0 and span["dur"] >= 0
        assert span["dur"] >= 2000 or span["name"] == "prefill"
    assert spans[0]["args"] == {"chunk": 1}
    ends = [span["ts"] + span["dur"] for span in spans]
    assert all(later["ts"] >= end - 1 for end, later in zip(ends, spans[1:]))


def test_a_trace_is_bounded():
    trace = Trace(capacity=10)
    for _ in range(50):
        with trace.span("encode"):
            pass
    assert len(trace.spans) == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_spans_on_a_gpu_are_the_time_of_its_work():
    device = torch.device("cuda")
    trace = Trace(device)
    x = torch.randn(4096, 4096, device=device)
    for _ in range(100):
        with trace.span("encode"):
            x = x @ x / 4096
    trace.settle(wait=True)
    assert all(span.seconds > 0 for span in trace.spans)
    starts = [span.start_s for span in trace.spans]
    assert starts == sorted(starts)


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "report.json"
    write_atomically(target, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "new")
    assert target.read_text() == "old" and [p.name for p in target.parent.iterdir()] == [
        target.name
    ]


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PipelineError, match="cannot be written"):
        filled_recorder().write(tmp_path / "file")


def test_written_files_hold_what_the_report_says(tmp_path):
    recorder = filled_recorder()
    recorder.config = {"limit": float("inf")}
    recorder.write(tmp_path)
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    validate(read)
    assert read["config"] == {"limit": None} and read["questions"][0]["answer"] == "that"


@pytest.mark.parametrize("chunks", [0, 1, 40])
def test_the_plot_draws_any_run(tmp_path, chunks):
    plot_report(filled_recorder(chunks).report(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_answer_is_judged_by_its_word():
    figures = QuestionFigures(1.0, "What?", answer=" Red. ")
    figures.judge("red")
    assert figures.right is True
    figures.judge("blue")
    assert (figures.right, figures.expected) == (False, "blue")
