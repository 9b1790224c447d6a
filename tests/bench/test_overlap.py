"""vicostream bench overlap: the figures, and what makes them meaningless."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vicostream_kernels.bench import overlap
from vicostream_kernels.models import load_model

typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from vicostream_kernels.bench.cli import bench  # noqa: E402

app = typer.Typer()
app.command()(bench)
SMALL = {"turns": 3, "chunks": 3, "size": (56, 84)}


@pytest.fixture(scope="module")
def runner():
    return load_model("tiny-random")


def test_the_figures(runner):
    found = overlap.measure(runner, **SMALL)
    assert found.fps > 0 and found.ratio.low <= found.ratio.median <= found.ratio.high
    assert set(found.stages_ms) == {"preprocess", "encode", "prune", "prefill"}
    assert min(found.stages_ms.values()) > 0 and 1 < found.at_best <= 4
    assert overlap.as_data(found)["at_best"] == found.at_best


def test_other_bits_are_refused(runner, monkeypatch):
    from vicostream_kernels.pipeline.stages import Encode

    run, calls = Encode.run, []

    def wrong(self, chunk):
        calls.append(self)
        made = run(self, chunk)
        return replace(made, tokens=made.tokens + 1) if len(calls) == 5 else made

    monkeypatch.setattr(Encode, "run", wrong)
    with pytest.raises(overlap.WrongResult, match="bits of a serial run"):
        overlap.measure(runner, **SMALL)


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "QUICK", SMALL)
    path = tmp_path / "o.json"
    done = CliRunner().invoke(app, ["overlap", "--device", "cpu", "--quick", "--json", str(path)])
    assert done.exit_code == 0, done.output
    assert "frames/s overlapped" in done.output and "x at best" in done.output
    assert json.loads(path.read_text())["fps"] > 0


def test_a_picture_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["overlap", "--plot", str(tmp_path / "o.png")])
    assert done.exit_code == 2 and "overlap has no picture" in done.output
