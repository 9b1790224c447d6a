"""The command: lists, runs, writes its files, and refuses what can't be served with exit code 2."""

from __future__ import annotations

import json

import pytest
import torch

from vicostream_kernels.bench import registry, runner
from vicostream_kernels.bench.roofline import Roofline

typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from vicostream_kernels.bench.cli import bench  # noqa: E402


@pytest.fixture
def call(toy, providers, monkeypatch):
    """Runs the command on two toy cases, one of them with a wrong provider."""
    right = toy("append/right", torch=providers["slow"], ours_cpu=providers["double"])
    wrong = toy(
        "append/wrong", smoke=False, torch=providers["double"], ours_cpu=providers["raises"]
    )
    cases = {case.name: case for case in (right, wrong)}
    monkeypatch.setattr(registry, "load", lambda: cases)
    monkeypatch.setattr(runner, "QUICK", runner.Budget(0.0, 2, 2))
    known = Roofline(torch.device("cpu"), 10e9, rates={torch.float32: 1e12})
    monkeypatch.setattr(Roofline, "measure", staticmethod(lambda device, quick: known))
    app = typer.Typer()
    app.command()(bench)

    def run(*arguments: str):
        return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})

    return run


def test_list(call):
    done = call("--list", "--device", "cpu")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "append/right",
        "append/wrong",
    ]
    assert "ours:cpu torch" in done.stdout or "torch ours:cpu" in done.stdout


def test_a_run_prints_a_table_and_writes_json_csv_and_a_plot(call, tmp_path):
    files = {kind: tmp_path / f"r.{kind}" for kind in ("json", "csv", "png")}
    done = call(
        "append/right", "--device", "cpu", "--quick", "--threads", "2",
        "--json", str(files["json"]), "--csv", str(files["csv"]), "--plot", str(files["png"]),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "append/right" in done.stdout and "geomean of 1 ratios, ours:cpu, warm" in done.stdout
    document = json.loads(files["json"].read_text())
    assert document["environment"]["threads"] == 2
    assert [row["cache"] for row in document["rows"]] == ["warm", "warm", "cold", "cold"]
    assert all(path.stat().st_size > 100 for path in files.values())


def test_a_case_is_shown_as_soon_as_it_is_done(call, monkeypatch):
    real = runner.run_case

    def interrupted(case, options, roofline):
        if case.name == "append/wrong":
            raise KeyboardInterrupt
        return real(case, options, roofline)

    monkeypatch.setattr(runner, "run_case", interrupted)
    result = call("append", "--quick", "--device", "cpu")
    assert result.exit_code == 130
    assert any(line.split()[:1] == ["ours:cpu"] for line in result.stdout.splitlines())


def test_what_is_left_out_last_is_in_the_json(call, tmp_path, monkeypatch):
    slow = lambda case, *_: "too slow" if case.name == "append/wrong" else ""  # noqa: E731
    monkeypatch.setattr(runner, "too_slow", slow)
    path = tmp_path / "r.json"
    result = call("append", "--quick", "--device", "cpu", "--json", str(path))
    assert result.exit_code == 0 and "left out: append/wrong: too slow" in result.stdout
    assert json.loads(path.read_text())["left_out"] == {"append/wrong": "too slow"}


def test_a_wrong_provider_is_exit_code_1_and_no_speed(call, tmp_path):
    done = call("append/wrong", "--device", "cpu", "--quick", "--json", str(tmp_path / "r.json"))
    assert done.exit_code == 1
    assert "WRONG, no speed shown: ours:cpu on append/wrong" in done.stdout
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["p50_us"] for row in rows if row["provider"] == "ours:cpu"] == [None, None]


def test_smoke_leaves_out_the_rest(call):
    done = call("--smoke", "--list", "--device", "cpu")
    assert done.exit_code == 0 and "append/wrong" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["apend"], "nearest: append"),
        (["--device", "tpu"], "'tpu' is not one of cpu, cuda"),
        (["--device", "cuda:99"], "not there"),
        (["--dtype", "int3", "--device", "cpu"], "dtype=int3"),
        (["--cache", "hot"], "not one of warm, cold, both"),
        (["--backend", "cuda", "--device", "cpu"], "no provider 'ours:cuda' on cpu"),
        (["--baseline", "jax", "--device", "cpu"], "no provider 'jax'"),
        (["--plot", "x.bmp", "--device", "cpu"], "must end in one of .png"),
        (["--json", "/", "--device", "cpu"], "'/' can't be written"),
        (["--csv", "/dev/null/y.csv", "--device", "cpu"], "can't be written"),
    ],
)
def test_what_can_not_be_served_is_one_line_and_exit_code_2(call, arguments, reason):
    done = call(*arguments)
    assert done.exit_code == 2
    assert reason in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout


def test_names_and_backends_narrow_the_run(call, tmp_path):
    out = tmp_path / "r.json"
    done = call(
        "*right", "--device", "cpu", "--quick", "--backend", "cpu", "--cache", "warm",
        "--json", str(out),
    )  # fmt: skip
    assert done.exit_code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["case"], row["provider"]) for row in rows] == [
        ("append/right", "torch"),
        ("append/right", "ours:cpu"),
    ]
