"""When a step of gpu-check has passed, and why not. An exit code alone proves nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vicostream_kernels.bench import gpu_tests, results
from vicostream_kernels.bench.steps import Finished

FOUND_CODE = 97  # compute-sanitizer's exit code for "errors found"; the driver uses none like it


def pytest_verdict(done: Finished, report: Path) -> str:
    """Passed means: exit code 0 and at least one test really ran."""
    tests = gpu_tests.read(report)
    if not tests.outcomes:
        return f"pytest ended with {done.code} and reported on no test"
    counts = tests.counts()
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    if done.code == 0:
        return "" if counts.get("passed") else f"no GPU test ran: {said}"
    bad, running = tests.bad(), tests.running
    more = [f"the first of them {bad[0]}"] if bad else []
    more += [f"it was in {', '.join(running[:4])}"] if running else []
    return "; ".join([f"pytest ended with {done.code}: {said}", *more])


def compiler_verdict(done: Finished) -> str:
    return "" if done.code == 0 else f"ended with {done.code}: {_complaint(done.output)}"


def driver_verdict(done: Finished) -> str:
    """The driver must have run at least one native kernel, and each must have been right."""
    said = r"^sanitizer_driver: (\d+) kernels, (\d+) faults$"  # once a process
    found = [(int(ran), int(bad)) for ran, bad in re.findall(said, done.output, re.M)]
    kernels, faults = sum(ran for ran, _ in found), sum(bad for _, bad in found)
    if done.code == 0 and kernels and not faults:
        return ""
    lines = [line for line in done.output.splitlines() if "FAULT" in line]
    lines += done.output.splitlines()[-1:] or ["it said nothing"]
    return f"the driver ended with {done.code}: {kernels} kernels, {faults} faults: {lines[0]}"


def sanitizer_verdict(done: Finished) -> str:
    """Passed means: the driver ran to its end under the tool, and the tool summed up no finding."""
    findings = summed_up(done.output)
    if findings is None:
        return f"ended with {done.code} and no summary: {_complaint(done.output)}"
    if findings or done.code:
        return f"{findings} findings, exit code {done.code}: {_complaint(done.output)}"
    return driver_verdict(done)


def plant_verdict(done: Finished) -> str:
    """A planted fault must be found; a tool that misses it proves nothing about our kernels."""
    if done.code != FOUND_CODE or not summed_up(done.output):
        said = _complaint(done.output)
        return f"the planted fault was not found (exit code {done.code}): {said}"
    return ""


def summed_up(output: str) -> int | None:
    """The findings of the tool's summary lines, one a process; None without one."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    return sum(map(int, found)) if found else None


def _complaint(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    lines = [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")]
    return (lines or output.strip().splitlines()[-1:] or ["no output"])[0][:200]


def benchmark_verdict(done: Finished, path: Path) -> str:
    """Passed means: rows there are, every case came to its end, every provider was right."""
    try:
        document = results.read_json(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"ended with {done.code} and left no results: {error}"
    wrong = sorted({f"{row.provider} on {row.case}" for row in document.rows if not row.match})
    wrong += sorted(f"{name} {why}" for name, why in document.failed.items())
    if wrong:
        return f"wrong results: {'; '.join(wrong[:5])}"
    if done.code != 0 or not document.rows:
        return f"ended with {done.code} and {len(document.rows)} rows"
    return ""


def figures_verdict(done: Finished, path: Path, of: Callable[[Any], str]) -> str:
    """Passed means: the figures are there, and nothing speaks against them."""
    figures = read_figures(path)
    if done.code != 0 or figures is None:
        return f"ended with {done.code}: {(done.output.strip().splitlines() or ['no output'])[-1]}"
    return of(figures)


def tiers_verdict(figures: Any) -> str:
    """Both figures are of history that really went down and came back."""
    ingest, fetch = figures.get("ingest", {}), figures.get("fetch", {})
    numbers = (ingest.get("moved_bytes", 0), ingest.get("ms", 0), fetch.get("bytes", 0))
    if min(numbers) <= 0 or fetch.get("tier") != "host":
        return f"no figures of what moved: {figures}"
    return ""


def overlap_verdict(figures: Any) -> str:
    """How large they are, the result says."""
    if min(figures.get("fps", 0), *figures.get("stages_ms", {"": 0}).values()) <= 0:
        return f"no figures: {figures}"
    return ""


def read_figures(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
