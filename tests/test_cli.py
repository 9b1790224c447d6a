"""The entry point, as the shell calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from pipeline_kit import pictures, write_video
from typer.testing import CliRunner

from vicostream_kernels import __version__, cli
from vicostream_kernels.backends import BACKENDS, WORDS

COMMAND = [sys.executable, "-c", "from vicostream_kernels.cli import main; main()"]
SMALL = [
    "--model",
    "tiny-random",
    "--set",
    "engine.pixels=6272",
    "--set",
    "engine.max_new_tokens=4",
]


def shell(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=300,
        **options,
    )  # fmt: skip


def test_a_run_from_the_shell(tmp_path):
    video = write_video(tmp_path / "a.mp4", pictures(20))
    done = shell("run", str(video), "--ask", "1 What is this?", "--report", str(tmp_path), *SMALL)
    assert done.returncode == 0, done.stderr
    assert "What is this?" in done.stdout and "frames/s" in done.stdout
    # Nothing but our own remarks: no warnings or progress bars of the libraries.
    assert all(line.startswith("vicostream: ") for line in done.stderr.splitlines()), done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["frames"]["processed"] == 20


def test_a_wrong_path_from_the_shell():
    done = shell("run", "missing.mp4")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "vicostream: error: missing.mp4: no such file\n"


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "plain"])
def test_a_stopped_service_writes_its_report(tmp_path, saved):
    """While the pipe is open and silent: a video that has not ended."""
    session = tmp_path / "session"
    video = write_video(tmp_path / "a.ts", pictures(60))
    pipe = tmp_path / "live.ts"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*COMMAND, "run", str(pipe), "--report", str(tmp_path / "report"), *SMALL,
         *(["--save", str(session)] if saved else [])],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        with open(pipe, "wb") as writer:
            writer.write(video.read_bytes())
            writer.flush()
            for line in process.stderr:
                if "nonsense" in line:
                    break
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130 and session.exists() == saved
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [error["what"] for error in report["errors"]] == ["interrupted"]


def test_usage_errors_have_exit_code_2():
    assert CliRunner().invoke(cli.app, ["run"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["run", "a.mp4", "--nope"]).exit_code == 2


def test_version_and_help():
    assert CliRunner().invoke(cli.app, ["--version"]).output.strip() == __version__
    text = CliRunner().invoke(cli.app, ["run", "--help"]).output
    for option in ("--model", "--preset", "--ask", "--fps", "--device", "--report", "--set"):
        assert option in text


def test_info_shows_every_word_and_the_reason_of_every_gap():
    done = CliRunner().invoke(cli.app, ["info"])
    assert done.exit_code == 0
    for word in WORDS:
        assert f"\n{word} " in done.output
    facts = json.loads(CliRunner().invoke(cli.app, ["info", "--json"]).output)
    for kind in ("cpu", "cuda"):
        for row in facts["ops"][kind]:
            assert set(row["backends"]) == set(BACKENDS)
            for backend, reason in row["backends"].items():
                if reason is not None:
                    said = reason.replace(row["op"], "it")
                    assert f"{backend}: {said}" in done.output


def test_bench_is_a_command():
    done = shell("bench", "--list")
    assert done.returncode == 0 and "append" in done.stdout


@pytest.mark.parametrize("module", ["transformers", "av", "matplotlib", "triton"])
def test_the_command_line_imports_heavy_things_late(torch_process, tmp_path, module):
    code = f"import vicostream_kernels.cli, sys; sys.exit({module!r} in sys.modules)"
    done = torch_process.run(code, tmp_path)
    assert done.returncode == 0, done.stderr
