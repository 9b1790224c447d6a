"""Runs commands one after another within one time budget, and keeps what each said.

A step that overruns is ended with everything it started; later steps still get their turn.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TAIL_LINES = 40
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code, everything it printed, seconds."""

    code: int
    output: str
    seconds: float


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: unique.
        command: program and arguments.
        timeout_s: it is ended after this long, or when the budget is spent.
        verdict: ``(finished) -> reason``; "" means passed. Never trusts the exit code alone.
        least_s: seconds of the budget that earlier steps must leave for this one.
        needs: names of steps that must have passed.
        folder: where it runs; None is the caller's choice.
        environment: variables added to the caller's.
    """

    name: str
    command: Sequence[str]
    timeout_s: float
    verdict: Callable[[Finished], str]
    least_s: float = 5.0
    needs: tuple[str, ...] = ()
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


def run_steps(
    steps: Sequence[Step], *, budget_s: float, logs: Path, root: Path
) -> Iterator[Outcome]:
    """Yields one outcome per step, in order, as each ends."""
    deadline = time.monotonic() + budget_s
    status: dict[str, str] = {}
    for index, step in enumerate(steps):
        later = sum(other.least_s for other in steps[index + 1 :])
        left = deadline - time.monotonic()
        missing = [name for name in step.needs if status.get(name) != "passed"]
        if missing:
            outcome = Outcome(step.name, "skipped", f"needs {', '.join(missing)}")
        elif left < step.least_s / 2:  # a step ended late may eat into the next one's share
            outcome = Outcome(step.name, "skipped", f"only {max(left, 0):.0f} s of the budget left")
        else:
            seconds = min(step.timeout_s, left, max(step.least_s, left - later))
            outcome = run_step(step, seconds, logs, root)
        status[step.name] = outcome.status
        yield outcome


def run_step(step: Step, seconds: float, logs: Path, root: Path) -> Outcome:
    """Runs one step for at most ``seconds``; its whole output goes to ``logs/<name>.log``."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{step.name}.log"
    outcome = Outcome(step.name, "failed", command=list(step.command))
    started = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                step.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=step.folder or root,
                env={**os.environ, **step.environment},
                start_new_session=True,
            )
        except OSError as error:
            outcome.reason = f"can't be started: {error}"
            return outcome
        try:
            outcome.code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            outcome.status = "timeout"
        finally:
            _end_group(process)
    outcome.seconds = time.monotonic() - started
    output = log.read_text(errors="replace")
    outcome.tail = output.splitlines()[-_TAIL_LINES:]
    if outcome.status == "timeout":
        outcome.reason = f"ended after {seconds:.0f} s"
        return outcome
    outcome.reason = step.verdict(Finished(outcome.code or 0, output, outcome.seconds))
    outcome.status = "failed" if outcome.reason else "passed"
    return outcome


def _end_group(process: subprocess.Popen) -> None:
    """Ends the process and whatever it started: politely, then for good."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
