"""The steps of gpu-check: what runs, for how long at most, and what later steps are sure of.

Without a figure from a GPU the times are estimates. They leave the tests most: those need close to
a thousand Triton kernels, each compiled for 1.8 s, on every core.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from vicostream_kernels.bench import gpu_tests, gpu_verdicts
from vicostream_kernels.bench.sanitizer_driver import NOTHING_TO_RUN
from vicostream_kernels.bench.steps import Step

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLANTS = Path("tests/bench/sanitizer_plants.cu")
_PACKAGE = "vicostream_kernels.bench"
#: Every allocation its own cudaMalloc: inside a cached block an overrun would stay in bounds.
_SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
#: pytest without the checkout's root on sys.path, wherever its script is installed.
_PYTEST = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main())"
)
#: A test may compile some twenty kernels beside fifteen other processes; what takes longer hangs.
_HANG_S = 120
_MOST_RESTARTS = 100


def plan(root: Path, work: Path, logs: Path, python: str = sys.executable) -> list[Step]:
    """The steps, in order; ``work`` is a folder for what they hand on, ``logs`` for what stays."""
    steps = [
        tests_step(
            "pytest", gpu_tests.files(root), workers(), logs, python, timeout_s=330, least_s=200
        ),
        tests_step("timer", gpu_tests.ALONE, (), logs, python, timeout_s=60, least_s=15),
    ]
    driver = (python, "-m", f"{_PACKAGE}.sanitizer_driver")
    inside = dict(folder=work)  # not the checkout: it would hide the installed package
    steps.append(Step("driver", driver, 60, gpu_verdicts.driver_verdict, 20, **inside))
    sanitizer = find_program("compute-sanitizer")
    for tool in TOOLS:
        steps.append(
            Step(
                tool,
                (*sanitize(sanitizer, tool), *driver),
                timeout_s=150,
                verdict=gpu_verdicts.sanitizer_verdict,
                least_s=90,
                unless={"driver": NOTHING_TO_RUN},
                beside="sanitizer",
                environment=_SANITIZED,
                **inside,
            )
        )
    binary = work / "sanitizer_plants"
    compiler = (find_program("nvcc"), "-arch=native", "-o", str(binary), str(root / PLANTS))
    steps.append(Step("plants", compiler, 60, gpu_verdicts.compiler_verdict, 12))
    for tool in TOOLS:
        steps.append(
            Step(
                f"plants-{tool}",
                (*sanitize(sanitizer, tool), str(binary), tool),
                timeout_s=30,
                verdict=gpu_verdicts.plant_verdict,
                least_s=8,
                needs=("plants",),
                beside="plants",
            )
        )
    bench = figures_path(work, "benchmark")
    steps.append(
        Step(
            "benchmark",
            (python, "-m", f"{_PACKAGE}.gpu_benchmark", str(bench)),
            timeout_s=300,
            verdict=partial(gpu_verdicts.benchmark_verdict, path=bench),
            least_s=90,
            **inside,
        )
    )
    for name, of, timeout_s, least_s in (
        ("tiers", gpu_verdicts.tiers_verdict, 120, 45),
        ("overlap", gpu_verdicts.overlap_verdict, 90, 30),
    ):
        path = figures_path(work, name)
        command = (python, "-m", f"{_PACKAGE}.gpu_check", "--figures", str(path))
        verdict = partial(gpu_verdicts.figures_verdict, path=path, of=of)
        steps.append(Step(name, command, timeout_s, verdict, least_s, **inside))
    return steps


def tests_step(
    name: str,
    files: Sequence[str],
    options: Sequence[str],
    logs: Path,
    python: str,
    *,
    timeout_s: float,
    least_s: float,
    hang_s: int = _HANG_S,
) -> Step:
    report = report_path(logs, name)
    return Step(
        name,
        (python, "-c", _PYTEST, "-m", "gpu and not slow", "-q", "-p", "no:cacheprovider",
         "-p", f"{_PACKAGE}.pytest_report", "--continue-on-collection-errors", *options, *files),
        timeout_s=timeout_s,
        verdict=partial(gpu_verdicts.pytest_verdict, report=report),
        least_s=least_s,
        environment={
            gpu_tests.REPORT: str(report),
            gpu_tests.HANG: str(hang_s),
            # Threads that spin while they wait would take the cores that compile.
            "OMP_WAIT_POLICY": "passive",
        },
    )  # fmt: skip


def report_path(logs: Path, name: str) -> Path:
    """Where the tests of a step are reported on, each as it ends."""
    return logs / f"{name}.jsonl"


def figures_path(work: Path, name: str) -> Path:
    """Where the figures of a step are while the check runs."""
    return work / f"{name}.json"


def workers() -> tuple[str, ...]:
    """Options for pytest in several processes, where pytest-xdist is installed.

    A fresh machine has no Triton cache: one process would compile for longer than the whole check
    may take.
    """
    if find_spec("xdist") is None:
        return ()
    count = min(16, os.cpu_count() or 1)
    return ("-n", str(count), f"--max-worker-restart={_MOST_RESTARTS}")


def find_program(name: str) -> str:
    """A CUDA tool on the PATH or in the usual place; its bare name when it is nowhere."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") or name


def sanitize(program: str, tool: str) -> tuple[str, ...]:
    """Calls of the CUDA API that fail are left alone: torch tries some out as it starts."""
    return (
        program, "--tool", tool, "--error-exitcode", str(gpu_verdicts.FOUND_CODE),
        "--print-limit", "20", "--report-api-errors", "no", "--target-processes", "all",
    )  # fmt: skip
