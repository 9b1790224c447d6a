"""Runs commands one after another within one time budget, and keeps what each said.

A step that overruns is ended with everything it started; later steps still get their turn.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

_TAIL_LINES = 40
#: How a step that overruns is ended, and the seconds it has after each. The first is Ctrl-C, on
#: which pytest, the benchmark and compute-sanitizer say what they have.
_ENDINGS = ((signal.SIGINT, 15.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0))
_POLL_S = 0.05


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code (None: it was ended), everything it printed, seconds."""

    code: int | None
    output: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: unique.
        command: program and arguments.
        timeout_s: it is ended after this long, or when the budget is spent.
        verdict: ``(finished) -> reason``; "" means passed. Never trusts the exit code alone. Of a
            step that was ended it says what is known so far.
        least_s: seconds of the budget that earlier steps must leave for this one.
        needs: names of steps that must have passed.
        unless: by the name of an earlier step, the exit code that leaves nothing to do here.
        beside: neighbours of the same word run at the same time.
        folder: where it runs; None is the caller's choice.
        environment: variables added to the caller's.
    """

    name: str
    command: Sequence[str]
    timeout_s: float
    verdict: Callable[[Finished], str]
    least_s: float = 5.0
    needs: tuple[str, ...] = ()
    unless: Mapping[str, int] = field(default_factory=dict)
    beside: str = ""
    folder: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """``status`` is passed, failed, timeout or skipped; ``reason`` says why it is not passed."""

    name: str
    status: str
    reason: str = ""
    code: int | None = None
    seconds: float = 0.0
    command: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self), seconds=round(self.seconds, 2))


def together(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in order, those that run at the same time in one list."""
    return [list(group) for _, group in groupby(steps, key=lambda step: step.beside or step.name)]


def reserved(steps: Sequence[Step]) -> float:
    """Seconds that these steps must be left."""
    return sum(max(step.least_s for step in group) for group in together(steps))


def run_steps(
    steps: Sequence[Step], *, budget_s: float, logs: Path, root: Path
) -> Iterator[Outcome]:
    """Yields one outcome per step, as each ends."""
    deadline = time.monotonic() + budget_s
    done: dict[str, Outcome] = {}
    groups = together(steps)
    for index, group in enumerate(groups):
        later = reserved([step for other in groups[index + 1 :] for step in other])
        running: list[_Running] = []
        try:
            for step in group:
                left = deadline - time.monotonic()
                reason = _why_not(step, done, left)
                if reason:
                    done[step.name] = Outcome(step.name, "skipped", reason)
                    yield done[step.name]
                else:
                    seconds = min(step.timeout_s, left, max(step.least_s, left - later))
                    running.append(_Running(step, seconds, logs, root))
            while running:
                for one in [one for one in running if one.is_over()]:
                    running.remove(one)
                    done[one.step.name] = one.outcome()
                    yield done[one.step.name]
                time.sleep(_POLL_S)
        finally:
            for one in running:
                one.kill()


def _why_not(step: Step, done: Mapping[str, Outcome], left: float) -> str:
    missing = [name for name in step.needs if name not in done or done[name].status != "passed"]
    if missing:
        return f"needs {', '.join(missing)}"
    for name, code in step.unless.items():
        if name in done and done[name].code == code:
            return f"nothing to do: {done[name].reason}"
    if left < step.least_s / 2:  # a step ended late may eat into the next one's share
        return f"only {max(left, 0):.0f} s of the budget left"
    return ""


class _Running:
    """A step's process; its whole output goes to ``logs/<name>.log``."""

    def __init__(self, step: Step, seconds: float, logs: Path, root: Path) -> None:
        self.step, self._seconds = step, seconds
        self._endings = list(_ENDINGS)
        self._fault = ""
        self._process: subprocess.Popen | None = None
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{step.name}.log"
        self._started = time.monotonic()
        self._until = self._started + seconds
        with self._log.open("wb") as file:
            try:
                self._process = subprocess.Popen(
                    step.command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=step.folder or root,
                    # what was printed before an end by force must be in the log
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
                    start_new_session=True,
                )
            except OSError as error:
                self._fault = f"can't be started: {error}"

    @property
    def _overran(self) -> bool:
        return len(self._endings) < len(_ENDINGS)

    def is_over(self) -> bool:
        """Ends it, more firmly each time, once its time is up; in the end it is let go."""
        if self._process is None or self._process.poll() is not None:
            return True
        if time.monotonic() > self._until:
            if not self._endings:
                return True  # a process that waits inside a driver can't be killed
            kind, grace = self._endings.pop(0)
            self._signal(kind)
            self._until = time.monotonic() + grace
        return False

    def outcome(self) -> Outcome:
        """To be asked for once it is over; whatever it started ends with it."""
        step = self.step
        if self._process is None:
            return Outcome(step.name, "failed", self._fault, command=list(step.command))
        self._signal(signal.SIGKILL)
        code = None if self._overran else self._process.returncode
        seconds = time.monotonic() - self._started
        output = self._log.read_text(errors="replace")
        reason = step.verdict(Finished(code, output, seconds))
        status = "failed" if reason else "passed"
        if self._overran:
            status = "timeout"
            reason = f"ended after {self._seconds:.0f} s{reason and ': '}{reason}"
        tail = output.splitlines()[-_TAIL_LINES:]
        return Outcome(step.name, status, reason, code, seconds, list(step.command), tail)

    def kill(self) -> None:
        if self._process is not None:
            self._signal(signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=3)

    def _signal(self, kind: signal.Signals) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, kind)
