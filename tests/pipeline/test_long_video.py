"""Streams of an hour and of ten thousand chunks, in a budget that holds a small part of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from pipeline_kit import pictures, small_engine, write_video

from vicostream_kernels.evaluation.streamqa import is_correct, make_clip
from vicostream_kernels.pipeline.run import RunOptions, run

MIB = 2**20


def clip(path, frames):
    """One frame a second; every second has its own shade in a corner."""
    images = np.concatenate([pictures(40)] * -(-frames // 40))[:frames].copy()
    images[:, :8, :8, 0] = (np.arange(frames) % 251)[:, None, None]
    return str(write_video(path, images, rate=1))


def report_of(folder, video, *questions, settings=(), **more):
    code = run(
        RunOptions(
            video=video,
            questions=questions,
            report=str(folder),
            settings=["engine.pixels=6272", "engine.max_new_tokens=4", *settings],
            **{"model": "tiny-random", **more},
        )
    )
    return code, json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("minutes, mib", [(6, 2), pytest.param(60, 8, marks=pytest.mark.slow)])
def test_a_long_clip_is_answered_from_its_first_minute(tmp_path, minutes, mib):
    """Shapes for a minute, then a grey wall: where was what? The model has learnt to look it up."""
    asked = make_clip(1, 120, questions=6, kinds=("past",), at="end")
    wall = np.full((60 * minutes * 4 - len(asked.frames), *asked.frames.shape[1:]), 128, np.uint8)
    video = write_video(
        tmp_path / "clip.mp4", np.concatenate([asked.frames, wall]), rate=4, options={"crf": "8"}
    )
    settings = [
        f"engine.history_bytes={mib}MiB", f"engine.spill_dir={tmp_path}", "engine.pixels=7056",
    ]  # fmt: skip
    code, report = report_of(
        tmp_path / "out", str(video), *(f"end {q.text}" for q in asked.questions),
        settings=settings, model="tiny",
    )  # fmt: skip
    assert code == 0 and report["errors"] == []
    for question, answer in zip(asked.questions, report["questions"]):
        assert is_correct(answer["answer"], question), (question, answer)
        first = [read for read in answer["reads"] if read["end_s"] < 60]
        for start, end in question.evidence[-1:]:  # none shows what was never there
            assert any(read["start_s"] <= end and start <= read["end_s"] for read in first)
    # The first question fetched some of them, which are in memory then.
    tiers = {read["tier"] for read in report["questions"][0]["reads"] if read["end_s"] < 60}
    assert tiers == {"disk"}


@pytest.mark.parametrize("minutes", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_long_clip_stays_in_its_budget(tmp_path, minutes):
    budget = 4 * MIB
    settings = [
        "engine.history_bytes=4MiB", "engine.window_chunks=2", "retrieve.k=6",
        "retrieve.force_first=3", f"engine.spill_dir={tmp_path}",
    ]  # fmt: skip
    video = clip(tmp_path / "clip.mp4", 60 * minutes)
    code, report = report_of(
        tmp_path / "out", video, "end What was in the first minute?", settings=settings
    )
    assert code == 0 and report["errors"] == []
    assert report["frames"] == {"read": 60 * minutes, "processed": 60 * minutes, "dropped": 0}
    (question,) = report["questions"]
    first = [read for read in question["reads"] if read["end_s"] < 60]
    assert [read["start_s"] for read in first][:3] == [0.0, 8.0, 16.0] and question["tokens"]
    assert {read["tier"] for read in first} == {"disk"}
    tiers = report["kv"]["tiers"]
    assert tiers["memory"]["bytes"] <= tiers["memory"]["budget"] == budget
    assert tiers["disk"]["bytes"] > (minutes - 5) * 100_000
    assert max(chunk["kv_bytes"] for chunk in report["chunks"]) <= budget
    assert report["forgotten"]["chunks"] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.mp4", "out"]


def test_a_run_goes_on_where_another_ended(tmp_path, monkeypatch):
    """One video in two files gives the answers of the whole."""
    images, settings = pictures(40), ["retrieve.k=2"]
    write = partial(write_video, rate=2, codec="ffv1", pixel_format="bgr0")
    whole, first, second = (str(tmp_path / f"{name}.mkv") for name in ("whole", "first", "second"))
    write(whole, images)
    write(first, images[:19])
    write(second, images[19:])
    session = str(tmp_path / "deep" / "session")
    asked = ("4 What?", "end What?")
    _, expected = report_of(tmp_path / "a", whole, *asked, settings=settings)
    code, report = report_of(tmp_path / "b", first, asked[0], settings=settings, save=session)
    assert code == 0 and report["frames"]["read"] == 19
    code, report = report_of(
        tmp_path / "c", second, "2 What?", asked[1], settings=settings, restore=session
    )
    assert code == 0
    assert report["frames"] == expected["frames"] and report["tokens"] == expected["tokens"]
    answers = [(q["time_s"], q["answer"], q["blocks"]) for q in report["questions"]]
    wanted = [(q["time_s"], q["answer"], q["blocks"]) for q in expected["questions"]]
    assert [answers[0], answers[-1]] == wanted and len(answers) == 3
    (tmp_path / "deep" / "session").write_bytes(b"nothing of the kind, but long enough")
    code, report = report_of(tmp_path / "d", second, settings=settings, restore=session)
    assert code == 2 and "cannot be restored: it is damaged" in report["errors"][0]["what"]


def test_frames_that_fps_left_out_are_counted_across_a_restore(tmp_path):
    write = partial(write_video, rate=10, codec="ffv1", pixel_format="bgr0")
    first, second = str(tmp_path / "first.mkv"), str(tmp_path / "second.mkv")
    write(first, pictures(40)[:20])
    write(second, pictures(40)[20:])
    session = str(tmp_path / "session")
    report_of(tmp_path / "a", first, fps=5, save=session)
    _, report = report_of(tmp_path / "b", second, fps=5, restore=session)
    assert report["frames"] == {"read": 40, "processed": 20, "dropped": 20}
    with small_engine("live") as made, made.restore(session) as stream:
        stream.ingest(pictures(6))
        assert stream.report()["frames"]["read"] == 26


PROGRAM = """
import json, sys
import torch
from vicostream_kernels import StreamEngine
from vicostream_kernels.pipeline.report import rss_bytes
torch.set_num_threads(1)
chunks, budget = map(int, sys.argv[1:])
changes = {"engine.history_bytes": budget, "engine.pixels": 6272, "engine.frames_per_chunk": 2,
           "engine.max_new_tokens": 4}
random = torch.Generator().manual_seed(0)
clip = torch.randint(0, 256, (64, 56, 112, 3), dtype=torch.uint8, generator=random)
with StreamEngine.from_pretrained("tiny-random", preset="vicostream", overrides=changes) as engine:
    with engine.open(fps=2) as stream:
        before = most = rss_bytes()
        for chunk in range(0, chunks, 32):
            stream.ingest(clip)
            most = max(most, rss_bytes())
        text = "".join(stream.ask("What was there?"))
        most = max(most, rss_bytes())
        report = stream.report()
        live = len(stream.history.cache.chunks)
print(json.dumps({"grown": most - before, "kv": report["kv"], "live": live,
                  "tiers": sorted({r["tier"] for r in report["questions"][0]["reads"]}),
                  "tokens": report["questions"][0]["tokens"]}))
"""


@pytest.mark.parametrize(
    "chunks, budget, start", [(192, 8 * MIB, 96 * MIB), pytest.param(10_016, 256 * MIB, 0,
    marks=pytest.mark.slow)],
)  # fmt: skip
def test_memory_stays_within_the_budget(chunks, budget, start):
    """Ten thousand chunks with 256 MiB: the process grows by no more than that and a tenth, with a
    preset that reads old chunks (`live`, the default, may leave them alone). The short run grants
    ``start`` besides: libraries that a first chunk loads."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(chunks), str(budget)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["live"] == chunks and found["tokens"] and "disk" in found["tiers"]
    assert found["kv"]["tiers"]["memory"]["bytes"] <= budget
    assert found["kv"]["tiers"]["disk"]["bytes"] > 0
    assert found["grown"] <= 1.1 * budget + start, found


@pytest.mark.slow
def test_blocks_that_move_down_do_not_slow_the_ingest():
    """Two streams in turn at the preset's own size, one of them sending a chunk down for each that
    comes: at most 5 % more time in all."""
    spent = {True: 0.0, False: 0.0}
    size = {"engine__window_chunks": 2, "engine__pixels": 90_000}
    with (
        small_engine(**size, engine__history_bytes=32 * MIB) as bounded,
        small_engine(**size) as free,
    ):
        with bounded.open(fps=2) as down, free.open(fps=2) as up:
            for stream in (down, up):
                for _ in range(8):
                    stream.ingest(pictures(40))
            assert down.report()["kv"]["tiers"]["disk"]["bytes"] > 0
            for turn in range(80):
                part = pictures(40)[8 * (turn % 5) : 8 * (turn % 5) + 8]
                for stream in (down, up) if turn % 2 else (up, down):
                    began = time.perf_counter()
                    stream.ingest(part)
                    spent[stream is down] += time.perf_counter() - began
    assert spent[True] <= 1.05 * spent[False], spent
