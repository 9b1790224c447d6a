"""Reuse in the engine: presets, keys, the report, several streams, frames that stand still."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pipeline_kit import pictures, small_engine, tiny_runner, write_video

from vicostream_kernels import methods
from vicostream_kernels.pipeline.report import SCHEMA_FILE

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def tokens_of(engine, *clips):
    """The encoder's tokens of some streams, whose chunks arrive in turn; the reports."""
    seen = [[] for _ in clips]
    streams = [engine.open() for _ in clips]
    for stream, own in zip(streams, seen):
        encode = stream._encode.run

        def run(chunk, encode=encode, own=own):
            own.append(encode(chunk))
            return own[-1]

        stream._encode.run = run
    for at in range(0, max(map(len, clips)), 8):
        for stream, clip in zip(streams, clips):
            stream.ingest(clip[at : at + 8])
    reports = []
    for stream in streams:
        stream.flush()
        reports.append(stream.report())
        stream.close()
    return [[chunk.tokens for chunk in own] for own in seen], reports


@pytest.mark.parametrize("preset", ["stc", "vicostream+stc"])
def test_presets_reuse(preset):
    method = methods.get(preset)
    assert (method.reuse.ratio, method.reuse.interval, method.reuse.metric) == (0.25, 4, "cosine")
    with small_engine(preset) as engine:
        _, (report,) = tokens_of(engine, pictures(24))
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(report)))
    reuse, chunks = report["reuse"], len(report["chunks"])
    assert (reuse["calls"], reuse["steps"]) == (chunks, 12)
    assert reuse["full_calls"] == -(-chunks // 4) and len(reuse["layers"]) == 3
    assert report["config"]["reuse"]["ratio"] == 0.25
    for layer in reuse["layers"]:
        assert layer["reused"] > 0
    assert 0 < report["tokens"]["kept"] <= report["tokens"]["seen"]


def test_keys_reuse_in_any_preset():
    """What the issue's command line says: --set reuse.ratio=0.25 --set reuse.interval=4."""
    with small_engine(reuse__ratio=0.25, reuse__interval=4) as engine:
        tokens, (report,) = tokens_of(engine, pictures(40))
    places = tokens[0][0].shape[1] * 4
    skipped, full = report["reuse"]["skipped_steps"], report["reuse"]["full_calls"]
    assert (report["reuse"]["calls"], full, skipped) == (5, 2, 0)
    expected = {
        "recomputed": 2 * 4 * places + 3 * 4 * int(places * 0.25),
        "reused": 3 * 4 * (places - int(places * 0.25)),
    }
    assert report["reuse"]["layers"] == [expected] * 3


def test_ratio_one_gives_the_bits_of_no_reuse():
    with small_engine() as engine:
        (plain,), (report,) = tokens_of(engine, pictures(20))
    assert report["reuse"] is None
    with small_engine(reuse__ratio=1, reuse__skip_tolerance="none") as engine:
        (reused,), _ = tokens_of(engine, pictures(20))
    assert all(torch.equal(a, b) for a, b in zip(plain, reused, strict=True))


def test_frames_that_stand_still_are_not_encoded():
    still = np.repeat(pictures(9)[8:], 24, 0)
    clip = np.concatenate((pictures(8), still))
    with small_engine(reuse__interval=2) as engine:
        (tokens,), (report,) = tokens_of(engine, clip)
    # The first chunk is full and moves; the third is full and becomes the reference that holds.
    assert (report["reuse"]["steps"], report["reuse"]["skipped_steps"]) == (16, 4)
    assert all(torch.equal(step, tokens[2][-1]) for step in tokens[3])
    with small_engine() as engine:
        (plain,), _ = tokens_of(engine, clip)
    torch.testing.assert_close(tokens[3], plain[3], rtol=1e-4, atol=1e-4)


def test_streams_of_one_engine_do_not_mix():
    clips = pictures(24), pictures(24, start=50)
    alone = []
    for clip in clips:
        with small_engine("vicostream+stc") as engine:
            (own,), _ = tokens_of(engine, clip)
        alone.append(own)
    with small_engine("vicostream+stc") as engine:
        together, reports = tokens_of(engine, *clips)
    for own, wanted in zip(together, alone):
        assert all(torch.equal(a, b) for a, b in zip(own, wanted, strict=True))
    assert [report["reuse"]["calls"] for report in reports] == [3, 3]


def test_a_new_frame_size_starts_anew():
    with small_engine("vicostream+stc") as engine, engine.open() as stream:
        for height, width in ((48, 80), (80, 48), (48, 80)):
            stream.ingest(pictures(8, height, width))
        assert stream.report()["reuse"]["full_calls"] == 3
        assert stream.report()["reuse"]["layers"][0]["reused"] == 0


def test_answers_come_with_reuse(tmp_path):
    """From the file to the answer, as the command runs it."""
    from typer.testing import CliRunner

    from vicostream_kernels.cli import app

    pytest.importorskip("av")
    video = write_video(tmp_path / "clip.mp4", pictures(16), rate=4)
    got = CliRunner().invoke(
        app,
        ["run", str(video), "--model", "tiny-random",
         "--preset", "stc", "--set", "reuse.interval=3", "--set",
         "engine.pixels=12544", "--set", "prune.k=4", "--ask", "end What?", "--fps", "4",
         "--report", str(tmp_path / "out")],
    )  # fmt: skip
    assert got.exit_code == 0, got.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert report["reuse"]["calls"] == len(report["chunks"]) == 8
    assert report["reuse"]["full_calls"] == 3 and report["questions"][0]["tokens"] > 0


def test_the_runner_holds_nothing_of_a_stream():
    before = dict(vars(tiny_runner()))
    with small_engine("vicostream+stc") as engine:
        tokens_of(engine, pictures(16))
    assert vars(tiny_runner()) == before
