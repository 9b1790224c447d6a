"""The example runs as it is, and its memory stays where it was."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "streaming_generate.py"


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
