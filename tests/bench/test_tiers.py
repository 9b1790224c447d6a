"""vicostream bench tiers: both figures, and what makes them meaningless."""

from __future__ import annotations

import json

import pytest

from vicostream_kernels.bench import tiers
from vicostream_kernels.models import load_model

typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from vicostream_kernels.bench.cli import bench  # noqa: E402

app = typer.Typer()
app.command()(bench)
SMALL = {"turns": 2, "chunks": 4, "questions": 4, "size": (56, 84)}


@pytest.fixture(scope="module")
def runner():
    return load_model("tiny-random")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(tiers, "CHOSEN", 4)
    monkeypatch.setattr(tiers, "HELD", 10)


def test_both_figures(runner):
    ingest, fetch = tiers.measure(runner, **SMALL)
    assert ingest.moved_bytes > 0 and ingest.ms > 0 and ingest.ratio.low <= ingest.ratio.high
    assert fetch.tier == "disk" and fetch.ttft_ms > 0 and fetch.floor_ms > 0
    per_token = 2 * runner.layers * runner.kv_heads * runner.head_dim * 4
    assert fetch.bytes % per_token == 0 and fetch.bytes >= 4 * 9 * per_token
    assert 1 <= fetch.questions < 4, "those that had to make room do not count"
    assert fetch.over_floor == fetch.added_ms / fetch.floor_ms


def test_another_answer_from_below_is_refused(runner, monkeypatch):
    from vicostream_kernels._spill_file import SpillFolder

    read = SpillFolder.read

    def wrong(self, record, into):
        first, *rest = into
        read(self, record, [first, *rest])
        first[0] ^= 1

    monkeypatch.setattr(SpillFolder, "read", wrong)
    with pytest.raises(tiers.WrongResult, match="not what they were in memory"):
        tiers.measure(runner, **SMALL)


def test_history_that_never_moves_is_refused(runner, monkeypatch):
    monkeypatch.setattr(tiers._Side, "below", lambda self: 0)
    with pytest.raises(tiers.WrongResult, match="bytes left memory while"):
        tiers.measure(runner, **{**SMALL, "questions": 1})


def test_the_command(tmp_path, monkeypatch):
    whole = tiers.measure
    monkeypatch.setattr(
        tiers, "measure", lambda runner, **given: whole(runner, **{**given, **SMALL})
    )
    out = tmp_path / "tiers.json"
    got = CliRunner().invoke(app, ["tiers", "--device", "cpu", "--json", str(out)])
    assert got.exit_code == 0, got.output
    data = json.loads(out.read_text())
    assert set(data) == {"ingest", "fetch"} and data["fetch"]["over_floor"] > 0
    assert "ms a chunk" in got.output and "time to first token" in got.output
    got = CliRunner().invoke(app, ["tiers", "--plot", "a.png"])
    assert got.exit_code == 2 and "no picture" in got.output
    got = CliRunner().invoke(app, ["tiers", "--csv", "a.csv", "--smoke", "--cache", "cold"])
    assert got.exit_code == 2 and "takes no --csv, --cache, --smoke" in got.output
