"""A plugin of pytest that keeps what each test said, whatever happens to the run.

Each process of pytest writes a test's report at once to the file that ``VICO_TEST_REPORT`` names.
One that has lost its device ends after the test that lost it, one that hangs in a test after
``VICO_TEST_HANG_S`` seconds, with the stacks of its threads; pytest-xdist starts another.
"""

from __future__ import annotations

import faulthandler
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vicostream_kernels.bench.gpu_tests import HANG, REPORT, group_of, importance
from vicostream_kernels.bench.lost_device import why_lost

#: When so many tests of a group have lost the device, the others are skipped: each costs a new
#: process, and the time belongs to the other kernels.
_MOST_LOSSES = 3
_MOST_TEXT = 20_000


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get(REPORT)
    if path:
        hang_s = float(os.environ[HANG])
        config.pluginmanager.register(_Recorder(config, Path(path), hang_s))


class _Recorder:
    def __init__(self, config: pytest.Config, path: Path, hang_s: float) -> None:
        self._config, self._path, self._hang_s = config, path, hang_s
        #: A line for each lost device: the group of the test.
        self._losses = path.with_suffix(".lost")
        worker = getattr(config, "workerinput", {"workerid": "main"})["workerid"]
        self._stacks = self._stacks_of(worker).open("w")

    def _stacks_of(self, worker: str) -> Path:
        """Where a process leaves its stacks when it hangs."""
        return self._path.with_suffix(f".{worker}.stacks")

    def _only_passes_on(self) -> bool:
        """With pytest-xdist the first process hears of what the others have written down."""
        return self._config.pluginmanager.has_plugin("dsession")

    def _write(self, test: str, outcome: str, **more: Any) -> None:
        _append(self._path, json.dumps({"test": test, "outcome": outcome, **more}))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: importance(item.nodeid))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self._only_passes_on():
            self._write(nodeid, "started", at=time.time())

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if not self._only_passes_on():
            self._write(nodeid, "ended")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        crashed = report.when == "???"  # of a process that died no other one can tell
        if self._only_passes_on() and not crashed:
            return
        outcome = report.outcome
        if crashed:
            outcome = "crashed"
        elif report.when != "call":
            if report.passed:
                return
            outcome = "error" if report.failed else outcome
        text = report.longreprtext
        if crashed:
            text += f"\n{self._stacks_of(report.node.gateway.id).read_text()}"
        if report.skipped and isinstance(report.longrepr, tuple):
            text = report.longrepr[2]
        seconds = getattr(report, "duration", 0.0)
        self._write(report.nodeid, outcome, seconds=seconds, text=text[-_MOST_TEXT:])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not hasattr(self._config, "workerinput"):  # they all find the same
            text = report.longreprtext[-_MOST_TEXT:]
            self._write(report.nodeid, "error", seconds=0.0, text=text)

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        group = group_of(item.nodeid)
        losses = self._losses.read_text().splitlines() if self._losses.exists() else []
        if losses.count(group) >= _MOST_LOSSES:
            pytest.skip(f"not run: {_MOST_LOSSES} tests of {group} have lost the device")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """What a kernel did that nothing waited for is this test's fault, not the next one's."""
        result = yield
        if lost := why_lost():
            pytest.fail(f"the device was lost: {lost}", pytrace=False)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        # A process that waits for the device can't be interrupted, and where what waits holds the
        # interpreter's lock, no other thread of Python runs.
        faulthandler.dump_traceback_later(self._hang_s, exit=True, file=self._stacks)
        result = yield
        faulthandler.cancel_dump_traceback_later()
        if why_lost():
            _append(self._losses, group_of(item.nodeid))
            if hasattr(self._config, "workerinput"):
                os._exit(1)
            item.session.shouldstop = "the device was lost"
        return result


def _append(path: Path, line: str) -> None:
    """In one write, so that lines of several processes do not mix."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())
