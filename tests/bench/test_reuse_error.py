"""vicostream bench reuse/error: the curve, its checks, table and picture."""

from __future__ import annotations

import json

import pytest
import torch

from vicostream_kernels.bench import reuse_error
from vicostream_kernels.models import load_model

typer = pytest.importorskip("typer")
from typer.testing import CliRunner  # noqa: E402

from vicostream_kernels.bench.cli import bench  # noqa: E402

app = typer.Typer()
app.command()(bench)
SMALL = {"size": (56, 84), "calls": 4, "ratios": (0.0, 0.25, 0.75, 1.0)}


@pytest.fixture(scope="module")
def runner():
    return load_model("tiny-random")


def test_errors_fall_to_nothing(runner):
    points = reuse_error.measure(runner, **SMALL)
    assert len(points) == 2 * 2 * 4
    for clip in reuse_error.CLIPS:
        for selection in ("layer", "shared"):
            own = [p for p in points if (p.clip, p.selection) == (clip, selection)]
            errors = [p.error for p in own]
            assert errors == sorted(errors, reverse=True) and errors[0] > 0.01 and errors[-1] == 0
            assert all(p.worst >= p.error for p in own)
            assert own[1].error < own[1].stale and len({round(p.stale, 9) for p in own[:3]}) == 1
            # One full call of four; one patch of 24 where the ratio is 0.
            shares = [0.25 + 0.75 * share for share in (1 / 24, 0.25, 0.75, 1)]
            assert [p.computed for p in own] == pytest.approx(shares)
    by_clip = {p.clip: p.error for p in points if p.ratio == 0.25 and p.selection == "layer"}
    assert by_clip["still camera"] < by_clip["pan"]


def test_clips_are_the_same_everywhere_and_move_as_they_say():
    still, pan = (reuse_error.make_clip(name, 6, 56, 84) for name in reuse_error.CLIPS)
    assert torch.equal(still, reuse_error.make_clip("still camera", 6, 56, 84))
    for frames, moves in ((still, False), (pan, True)):
        change = (frames[3].int() - frames[4].int()).abs().amax(-1)
        assert (float((change > 4).float().mean()) > 0.3) == moves


def test_a_full_call_that_is_not_the_plain_vit_is_refused(runner, monkeypatch):
    from vicostream_kernels.models import reuse

    right = reuse.vision_forward
    monkeypatch.setattr(reuse, "vision_forward", lambda *args: right(*args) + 1e-6)
    with pytest.raises(reuse_error.WrongResult, match="not the plain ViT's bits"):
        reuse_error.measure(runner, **SMALL)


def test_the_command(tmp_path, monkeypatch):
    whole = reuse_error.measure

    def small(runner, **given):
        return whole(runner, **{**given, **SMALL})

    monkeypatch.setattr(reuse_error, "measure", small)
    out = tmp_path / "curve.png"
    given = ["reuse/error", "--device", "cpu", "--plot", str(out), "--json"]
    got = CliRunner().invoke(app, [*given, str(tmp_path / "curve.json")])
    assert got.exit_code == 0, got.output
    assert out.read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "curve.json").read_text())
    assert {p["clip"] for p in data} == set(reuse_error.CLIPS)
    assert "still camera, layer" in got.output and "0.25" in got.output
    for wrong, said in (
        (["reuse/error", "append"], "runs on its own"),
        (["reuse/error", "--dtype", "int8"], "int8"),
        (["reuse/error", "--plot", "a.txt"], "must end in"),
        (["reuse/error", "--model", "nosuch"], "nosuch"),
    ):
        refused = CliRunner().invoke(app, wrong)
        assert refused.exit_code == 2 and said in refused.output
