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
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kit import interpreter_pace

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
    """One run of the interpreter process; a test that it did not come out of has failed."""

    outcomes: dict[str, Outcome]
    output: str
    #: The tests that were found, before any was deselected.
    collected: frozenset[str] = field(default_factory=frozenset)

    def replay(self, nodeid: str) -> None:
        """Passes, fails or skips the running test as the one named ``nodeid`` did."""
        got = self.outcomes.get(nodeid)
        if got is None:
            pytest.fail(f"its process did not report on it:\n{self.output}", False)
        if got.outcome == "skipped":
            pytest.skip(got.text)
        if got.outcome != "passed":
            pytest.fail(got.text, pytrace=False)


def run(
    targets: Sequence[str],
    *options: str,
    mode: dict[str, str] | None = None,
    seconds: float | None = None,
) -> Run:
    """Runs the tests at ``targets`` (paths or node ids from the repository's root).

    ``mode``: environment variables of that process, the interpreter's by default.
    ``seconds``: that it may take, by default nine minutes.
    """
    seconds = _TIMEOUT_S if seconds is None else seconds
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
        try:
            done = subprocess.run(
                command,
                cwd=ROOT / "tests",
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=seconds,
            )
            # All passed, some failed, nothing selected: else pytest did not come to its end.
            cut = done.returncode not in (0, 1, 5)
            end = f"its process ended with {done.returncode}" if cut else None
            output = done.stdout
        except subprocess.TimeoutExpired as late:
            end = f"its process was stopped after {seconds} s"
            output = late.output or ""
            output = output.decode(errors="replace") if isinstance(output, bytes) else output
        lines = [json.loads(line) for line in report.read_text().splitlines()]
    return _read(lines, output, end)


def _read(lines: Sequence[Sequence[Any]], output: str, end: str | None) -> Run:
    """A run from the lines of its report; ``end`` says how it was cut off, if it was.

    Then the test that was running counts as failed, or the last one, if none was.
    """
    outcomes: dict[str, Outcome] = {}
    collected: list[str] = []
    last, began, took = None, 0.0, None
    for nodeid, outcome, more in lines:
        if outcome == "collected":
            collected.append(nodeid)
        elif outcome == "started":
            last, began, took = nodeid, more, None
        elif outcome == "ended":
            took = more - began
        else:
            outcomes[nodeid] = Outcome(outcome, more)
    if end is not None:
        place = f"in {last}, which began {time.time() - began:.0f} s before"
        if last is None:
            place = "before the first test"
        elif took is not None:
            place = f"after {last}, which took {took:.0f} s"
        output = f"{end}, {place}; {len(outcomes)} tests were done:\n{output}"
        if last is not None:
            outcomes[last] = Outcome("failed", output)
    return Run(outcomes, output, frozenset(collected))


def pytest_configure() -> None:
    """In the interpreter process: see `interpreter_pace`."""
    if not ACTIVE:
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    interpreter_pace.quicken(interpreter)


def _report(nodeid: str, outcome: str, more: Any = None) -> None:
    """In the interpreter process: a line of the report."""
    path = os.environ.get(_REPORT)
    if path is not None:
        with open(path, "a") as file:
            file.write(json.dumps([nodeid, outcome, more]) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _report(item.nodeid, "collected")


def pytest_runtest_logstart(nodeid: str) -> None:
    _report(nodeid, "started", time.time())


def pytest_runtest_logfinish(nodeid: str) -> None:
    _report(nodeid, "ended", time.time())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the interpreter process: one line for each test, and one more where its teardown fails."""
    if report.when != "call" and report.outcome == "passed":
        return
    text = report.longreprtext
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    _report(report.nodeid, report.outcome, text)
