"""Triton's interpreter in a process of its own, and its results back in this one, test by test.

Whether Triton interprets or compiles is settled when a kernel is decorated, so one process can do
only one of the two. `run` starts pytest with TRITON_INTERPRET=1 on some tests; there this module is
a plugin that writes each report to a file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ACTIVE = os.environ.get("TRITON_INTERPRET", "0") == "1"
_REPORT = "VICO_INTERPRETER_REPORT"
_TIMEOUT_S = 540


@dataclass(frozen=True)
class Outcome:
    """How one test went over there: "passed", "failed" or "skipped", and its report's text."""

    outcome: str
    text: str


@dataclass(frozen=True)
class Run:
    """One run of the interpreter process."""

    outcomes: dict[str, Outcome]
    output: str

    def replay(self, nodeid: str) -> None:
        """Passes, fails or skips the running test as the one named ``nodeid`` did."""
        got = self.outcomes.get(nodeid)
        if got is None:
            pytest.fail(f"its process did not report on it:\n{self.output}", False)
        if got.outcome == "skipped":
            pytest.skip(got.text)
        if got.outcome != "passed":
            pytest.fail(got.text, pytrace=False)


def run(targets: Sequence[str], *options: str, mode: dict[str, str] | None = None) -> Run:
    """Runs the tests at ``targets`` (paths or node ids from the repository's root).

    ``mode``: environment variables of that process, the interpreter's by default.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        report.touch()
        environment = os.environ | ({"TRITON_INTERPRET": "1"} if mode is None else mode)
        environment |= {
            # One thread: the interpreter is numpy on tiny arrays.
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT / "tests"),
            _REPORT: str(report),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "kit.interpreter"]
        command += ["-p", "no:cacheprovider", f"--rootdir={ROOT}", f"-c={ROOT / 'pyproject.toml'}"]
        command += [*options, *(str(ROOT / target) for target in targets)]
        # From the tests' folder: "-m" puts the working one first on the path, and the repository's
        # root would hide the installed package there.
        done = subprocess.run(
            command,
            cwd=ROOT / "tests",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT_S,
        )
        lines = [json.loads(line) for line in report.read_text().splitlines()]
    return Run({n: Outcome(outcome, text) for n, outcome, text in lines}, done.stdout)


def pytest_configure() -> None:
    """In the interpreter process: lets `for n in range(...)` take the kernels' own scalars."""
    if not ACTIVE:
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    # Until Triton 3.7 it converts arrays of one element, which numpy 2.4 refuses
    # (https://github.com/triton-lang/triton/issues/9171).
    interpreter._patch_lang_tensor = patch_with_index


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the interpreter process: one line for each test, and one more where its teardown fails."""
    path = os.environ.get(_REPORT)
    if path is None or (report.when != "call" and report.outcome == "passed"):
        return
    text = report.longreprtext
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    with open(path, "a") as file:
        file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")
