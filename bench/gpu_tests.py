"""The tests for a GPU: in which files they are, which are first, and what their report says.

The plugin ``pytest_report`` writes the report; this reads it, and needs no pytest for that.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Variables for the plugin: the file of the report, and after how many seconds a test hangs.
REPORT, HANG = "VICO_TEST_REPORT", "VICO_TEST_HANG_S"
#: What a file with tests for a GPU has in it; the others need not be imported.
_SIGNS = re.compile(r"backends_of|each_backend|mark\.gpu")
#: They time the device, so nothing may run beside them.
ALONE = ("tests/bench/test_timer_cuda.py",)
#: Outcomes of a test, the worse ones later. Of one that failed and lost its process the failure.
_OUTCOMES = ("skipped", "passed", "crashed", "failed", "error")
_MOST_LISTED = 100
_MOST_TEXT = 2000


def files(root: Path) -> list[str]:
    """The files of a checkout that hold tests for a GPU, but for those that run alone."""
    found = [
        path.relative_to(root).as_posix()
        for path in sorted((root / "tests").rglob("test_*.py"))
        if _SIGNS.search(path.read_text(encoding="utf-8"))
    ]
    return [path for path in found if path not in ALONE]


def backend_of(nodeid: str) -> str:
    """``cuda``, ``triton`` or "", by the parameters in the name of a test."""
    parameters = nodeid.partition("[")[2].removesuffix("]").split("-")
    return next((name for name in ("triton", "cuda") if name in parameters), "")


def group_of(nodeid: str) -> str:
    """Tests that stand and fall together: of one file and one backend."""
    return f"{nodeid.partition('::')[0]} {backend_of(nodeid)}".strip()


def importance(nodeid: str) -> int:
    """Smaller is earlier: first what a machine without a GPU can tell least about."""
    path = nodeid.partition("::")[0]
    if backend_of(nodeid) == "cuda":
        return 0
    if path.startswith("tests/triton/"):
        return 1
    if not re.search(r"/(ops|methods)/", path):
        return 2  # the engine, the cache, the models
    return 4 if path.endswith("_properties.py") else 3


@dataclass
class Report:
    """What is known of a run of tests, also of one that was cut off."""

    outcomes: dict[str, str] = field(default_factory=dict)
    #: What those that did not pass said.
    texts: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    #: Tests that began and of which nothing more was heard.
    running: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        found = Counter(self.outcomes.values())
        return {what: found[what] for what in reversed(_OUTCOMES) if found[what]}

    def bad(self) -> list[str]:
        return [test for test, what in self.outcomes.items() if what not in ("passed", "skipped")]

    def as_dict(self) -> dict[str, Any]:
        """For the results file; long texts are cut, the report itself has them whole."""
        skipped = Counter(self.texts[t] for t, what in self.outcomes.items() if what == "skipped")
        slowest = sorted(self.seconds, key=lambda test: -self.seconds[test])[:20]
        return {
            "counts": self.counts(),
            "bad": [
                {"test": test, "outcome": self.outcomes[test], "text": _cut(self.texts[test])}
                for test in self.bad()[:_MOST_LISTED]
            ],
            "running": self.running,
            "skipped": {_cut(why): count for why, count in skipped.most_common(_MOST_LISTED)},
            "slowest": {test: round(self.seconds[test], 2) for test in slowest},
        }


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"...{text[-_MOST_TEXT:]}"


def read(path: Path) -> Report:
    """The report of a run so far; empty where there is none. A line cut short is left out."""
    report = Report()
    running: dict[str, None] = {}
    for line in _lines(path):
        test, outcome = line["test"], line["outcome"]
        if outcome == "started":
            running[test] = None
        elif outcome == "ended":
            running.pop(test, None)
        else:
            _add(report, test, line)
            if outcome == "crashed":
                running.pop(test, None)
    report.running = list(running)
    return report


def _add(report: Report, test: str, line: Mapping[str, Any]) -> None:
    report.seconds[test] = report.seconds.get(test, 0.0) + line["seconds"]
    known, outcome = report.outcomes.get(test), line["outcome"]
    # An error of the teardown after a failure is no news; one after a pass is.
    if known is None or _OUTCOMES.index(outcome) > _OUTCOMES.index(known):
        report.outcomes[test] = outcome
    if line["text"]:
        before = report.texts.get(test)
        report.texts[test] = f"{before}\n{line['text']}" if before else line["text"]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        written = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in written:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
