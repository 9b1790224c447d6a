"""What a run is told besides its video: system message, sampling, options of FFmpeg's."""

from __future__ import annotations

import json
import os

import pytest
import torch
from run_kit import Outcome
from typer.testing import CliRunner

from vicostream_kernels.cli import app
from vicostream_kernels.pipeline import opening
from vicostream_kernels.pipeline import options as options_module
from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.options import parse_sampler
from vicostream_kernels.pipeline.piped import Piped
from vicostream_kernels.pipeline.source import VideoSource

pytestmark = pytest.mark.usefixtures("loads_at_once")


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ([], {}),
        (["temperature=0.7", "seed=3"], {"temperature": 0.7, "seed": 3, "do_sample": True}),
        (["repetition_penalty=1.2"], {"repetition_penalty": 1.2}),
        (["temperature=0"], {"do_sample": False}),
        (["top_k=5", "do_sample=False"], {"top_k": 5, "do_sample": False}),
        (["top_p=None"], {"top_p": None, "do_sample": True}),
        (["suppress_tokens=[1, 2]"], {"suppress_tokens": [1, 2]}),
    ],
)
def test_what_a_sampler_is_told(given, fields):
    assert parse_sampler(given) == fields


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["temperature=hot"], "--sampler temperature=hot: give a number"),
        (["temperature=1e400"], "--sampler temperature=1e400: give a number"),
        (["top_k=" + "[" * 100_000], r"--sampler top_k=\[+: give a number"),
        (["seed=1.5"], "--sampler seed=1.5: give an int"),
        (["seed=none"], "--sampler seed=None: give an int"),
        (["do_sample=1"], "--sampler do_sample=1: give true or false"),
        (["temperature=0", "do_sample=true"], "temperature=0 draws nothing"),
        (["max_new_tokens=1"], "--sampler: max_new_tokens is not how .* engine.max_new_tokens"),
        (["eos_token_id=5"], "--sampler: unknown field 'eos_token_id'"),
        (["config=1"], "--sampler: unknown field 'config'"),
    ],
)
def test_what_no_sampler_takes_is_said_before_a_model_is_loaded(given, said):
    with pytest.raises(InputError, match=said):
        parse_sampler(given)


def answers(outcome):
    assert outcome.code == 0, outcome.err
    return [question["answer"] for question in outcome.report["questions"]]


def test_tokens_are_drawn_as_told_and_one_seed_draws_the_same(tmp_path, video):
    asked = ["end What?", "end And then?"]
    greedy = answers(Outcome(tmp_path, video, *asked))
    told = ["temperature=5", "seed=1"]
    drawn = [answers(Outcome(tmp_path, video, *asked, sampler=told)) for _ in range(2)]
    assert drawn[0] == drawn[1] != greedy
    other = Outcome(tmp_path, video, *asked, sampler=["temperature=5", "seed=2"])
    assert answers(other) != drawn[0]
    fields = {"temperature": 5, "seed": 2, "do_sample": True}
    assert other.report["config"]["sampler"] == fields


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(sampler=["temprature=1"]), "unknown field 'temprature', did you mean 'temperature'"),
        (dict(sampler=["top_p=3", "do_sample=true"]), "top_p"),
        (dict(sampler=["num_beams=4"]), "num_beams=4 is not supported"),
        (dict(system="Be brief.", restore=__file__), "--system: the session"),
        (dict(input_format="nope"), "--input-format nope: this FFmpeg build has no such format"),
        (dict(input_options=["tcp"]), "--input-option 'tcp': give key=value, as in rtsp_transport"),
        (dict(input_options=["headers: secret"]), "--input-option 'headers': give key=value"),
        (dict(sampler=["seed=99999999999999999999"]), "seed=99999999999999999999 must be an int"),
        (dict(system="\udcff"), "holds bytes that are not UTF-8 text"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, video, options, said):
    outcome = Outcome(tmp_path, video, **options)
    assert outcome.code == 2 and len(outcome.lines) == 1 and said in outcome.lines[0]
    assert "secret" not in outcome.err + json.dumps(outcome.report)


def test_the_command_hands_on_what_it_is_told(tmp_path, video):
    command = ["run", str(video), "--model", "tiny-random", "--report", str(tmp_path / "report")]
    command += ["--system", "Be brief.", "--sampler", "top_k=5", "--sampler", "seed=7"]
    command += ["--input-format", "mov", "--input-option", "ignore_editlist=1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "report" / "report.json").read_text())["config"]
    assert config["sampler"] == {"top_k": 5, "seed": 7, "do_sample": True}
    assert (config["system"], config["input_format"]) == ("Be brief.", "mov")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_stays_one_with_a_format(tmp_path):
    """So that what waits for it hears signals."""
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)  # or who opens it to read would wait
    try:
        place = opening._place(str(tmp_path / "pipe"), lambda: True, "h264")
        assert isinstance(place, Piped) and place.read(1) == b""
    finally:
        os.close(writer)
    with pytest.raises(InputError, match="a folder, not a video"):
        opening._place(str(tmp_path), lambda: False, "h264")
    assert opening._place("video=Camera", lambda: False, "dshow") == "video=Camera"


def test_bfloat16_is_told_of_where_it_would_help(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    large, small = torch.nn.Linear(1200, 1000), torch.nn.Linear(10, 10)
    monkeypatch.setattr(options_module, "_LARGE_PARAMETERS", 1_000_000)
    assert "--dtype bfloat16" in options_module.dtype_hint(large, None)
    for model, dtype in (
        (small, None),
        (large, torch.float32),
        (torch.nn.Linear(1200, 1000, dtype=torch.bfloat16), None),
        (torch.nn.Linear(1200, 1000, device="meta"), None),
    ):
        assert options_module.dtype_hint(model, dtype) is None
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert options_module.dtype_hint(large, None) is None


def test_a_system_message_stands_in_place_of_the_templates_own(tmp_path, video):
    own = Outcome(tmp_path, video, "end What?").report
    longer = Outcome(tmp_path, video, "end What?", system="You watch a door. " * 20).report
    added = longer["kv"]["bytes"] - own["kv"]["bytes"]
    assert added >= 20 * own["kv"]["bytes"] // own["kv"]["pages"] // own["kv"]["page_size"]


def test_a_format_takes_what_is_no_file_and_its_options():
    pattern = "testsrc=size=64x48:rate=10:duration=1"
    try:
        source = VideoSource(pattern, form="lavfi", options={"nonsense": "1"})
    except InputError as error:
        pytest.skip(f"this PyAV has no test patterns: {error}")
    with source:
        assert [frame.image.shape for frame in source] == [(48, 64, 3)] * 10


def test_options_reach_the_format(tmp_path):
    """A raw picture has no header: only its options say what size it is."""
    path = tmp_path / "raw.rgb"
    path.write_bytes(bytes(range(192)) * 2)
    options = {"pixel_format": "rgb24", "video_size": "8x8", "framerate": "5"}
    with VideoSource(str(path), form="rawvideo", options=options) as source:
        frames = list(source)
    assert [frame.time_s for frame in frames] == [0.0, 0.2]
    assert frames[1].image.reshape(-1).tolist() == list(range(192))
