"""The examples run as they are; what they compute is what they say."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE = FOLDER / "streaming_generate.py"


def test_streaming_generate(monkeypatch, capsys) -> None:
    options = ["--turns", "4", "--new-tokens", "9", "--window", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of names that transformers gives up
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    turns = capsys.readouterr().out.strip().splitlines()
    seen = [int(re.search(r"(\d+) tokens seen", line)[1]) for line in turns]
    assert seen == [(len("Tell me one thing about the number 0.") + 9) * i for i in (1, 2, 3, 4)]
    assert len({re.search(r"[\d.]+ MiB", line)[0] for line in turns}) == 1


def turned(x: torch.Tensor, ids: torch.Tensor, base: float = 1e4) -> torch.Tensor:
    """[n, H, d] rotated by the angles of ``ids``, in float64."""
    half = x.shape[-1] // 2
    turns = ids.double()[:, None] * base ** (-torch.arange(half).double() / half)
    cos, sin = turns.cos()[:, None], turns.sin()[:, None]
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def test_own_engine(monkeypatch, capsys) -> None:
    spec = importlib.util.spec_from_file_location("own_engine", FOLDER / "own_engine.py")
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    given = []
    rows_of = engine.rows_of
    monkeypatch.setattr(engine, "rows_of", lambda *args: given.append(rows_of(*args)) or given[-1])
    answer, chosen = engine.stream(chunks=12, k=4)

    *chunks, (q, key, value) = given
    groups = engine.HEADS // engine.KV_HEADS
    means = torch.stack([k.double().mean(0) for _, k, _ in chunks]).repeat_interleave(groups, 1)
    scores = (means * q.double().mean(0)).sum((1, 2))
    assert chosen.tolist() == sorted(scores.topk(4).indices.tolist())

    at, n = sum(len(k) for _, k, _ in chunks), len(q)
    k_read = torch.cat([chunks[c][1] for c in chosen] + [key])
    v_read = torch.cat([chunks[c][2] for c in chosen] + [value]).double()
    ids = torch.arange(at + n - len(k_read), at + n)
    k_read = turned(k_read, ids).repeat_interleave(groups, 1)
    logits = torch.einsum("qhd,khd->hqk", turned(q, ids[-n:]), k_read) / engine.HEAD_DIM**0.5
    hidden = torch.arange(len(ids)) > torch.arange(len(ids) - n, len(ids))[:, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = torch.einsum("hqk,khd->qhd", weights, v_read.repeat_interleave(groups, 1))
    torch.testing.assert_close(answer.double(), wanted, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(sys, "argv", ["own_engine.py", "--chunks", "9", "--k", "2"])
    engine.main()
    assert re.match(r"read chunks \[\d, \d\] of 9; answer \[16, 8, 64\]", capsys.readouterr().out)
