"""``make gpu-check``: everything that needs a GPU, in under ten minutes, into one file.

``python -m vicostream_kernels.bench.gpu_check --root CHECKOUT`` once the package is built: the
tests marked ``gpu``, compute-sanitizer's four tools over the native kernels (and over planted
faults, to know that they see), then the benchmark. The file ``bench/results/<gpu>-<commit>.json``
is rewritten after each step, so that a run that is cut off leaves what it had.

Exit code 0: all passed; 1: something did not; 2: there is no GPU, or this is no checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels.bench import environment, registry, report, results, runner
from vicostream_kernels.bench.results import write_atomically
from vicostream_kernels.bench.steps import Finished, Outcome, Step, run_steps

SCHEMA = "vicostream-gpu-check/1"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_FOUND_CODE = 97  # compute-sanitizer's exit code for "errors found"; the driver uses none like it
_PLANTS = Path("tests/bench/sanitizer_plants.cu")
#: Every allocation its own cudaMalloc: inside a cached block an overrun would stay in bounds.
_SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
#: pytest without the checkout's root on sys.path, wherever its script is installed.
_PYTEST = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; "
    "import pytest; sys.exit(pytest.console_main())"
)


def plan(root: Path, work: Path, python: str = sys.executable) -> list[Step]:
    """The steps, in order; ``work`` is a folder for what they hand on."""
    junit, bench = work / "pytest.xml", work / "bench.json"
    driver = (python, "-m", "vicostream_kernels.bench.sanitizer_driver")
    steps = [
        Step(
            "pytest",
            (python, "-c", _PYTEST, "-m", "gpu and not slow", "-q", "-p", "no:cacheprovider",
             "--continue-on-collection-errors", *workers(),
             f"--junitxml={junit}", "tests"),
            timeout_s=300,
            least_s=60,
            verdict=lambda done: pytest_verdict(done, junit),
        ),
        Step("driver", driver, timeout_s=60, least_s=20, verdict=driver_verdict, folder=work),
    ]  # fmt: skip
    sanitizer = find_program("compute-sanitizer")
    for tool in TOOLS:
        steps.append(
            Step(
                tool,
                (*sanitize(sanitizer, tool), *driver),
                timeout_s=120,
                least_s=30,
                needs=("driver",),
                folder=work,  # not the checkout: it would hide the installed package
                verdict=sanitizer_verdict,
                environment=_SANITIZED,
            )
        )
    binary = work / "sanitizer_plants"
    steps.append(
        Step(
            "plants",
            (find_program("nvcc"), "-arch=native", "-o", str(binary), str(root / _PLANTS)),
            timeout_s=60,
            least_s=15,
            verdict=lambda done: f"nvcc ended with {done.code}" if done.code else "",
        )
    )
    for tool in TOOLS:
        steps.append(
            Step(
                f"plants-{tool}",
                (*sanitize(sanitizer, tool), str(binary), tool),
                timeout_s=30,
                needs=("plants",),
                verdict=plant_verdict,
            )
        )
    steps.append(
        Step(
            "benchmark",
            (python, "-m", "vicostream_kernels.bench.gpu_check", "--benchmark", str(bench)),
            timeout_s=240,
            least_s=90,
            folder=work,
            verdict=lambda done: benchmark_verdict(done, bench),
        )
    )
    for name, verdict, timeout_s, least_s in (
        ("tiers", tiers_verdict, 120, 60),
        ("overlap", overlap_verdict, 90, 45),
    ):
        path = figures_path(bench, name)
        steps.append(
            Step(
                name,
                (python, "-m", "vicostream_kernels.bench.gpu_check", "--figures", str(path)),
                timeout_s=timeout_s,
                least_s=least_s,
                folder=work,
                verdict=partial(figures_verdict, path=path, of=verdict),
            )
        )
    return steps


def figures_path(bench: Path, name: str) -> Path:
    """Where the figures of ``bench tiers`` or ``bench overlap`` are while the check runs."""
    return bench.with_name(f"{name}.json")


def workers() -> tuple[str, ...]:
    """Options for pytest in several processes, where pytest-xdist is installed.

    A fresh machine has no Triton cache, and the tests need close to a thousand of its kernels: one
    process would compile for longer than the whole check may take.
    """
    if find_spec("xdist") is None:
        return ()
    return ("-n", str(min(16, os.cpu_count() or 1)))


def find_program(name: str) -> str:
    """A CUDA tool on the PATH or in the usual place; its bare name when it is nowhere."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") or name


def sanitize(program: str, tool: str) -> tuple[str, ...]:
    return (
        program, "--tool", tool, "--error-exitcode", str(_FOUND_CODE), "--print-limit", "20",
    )  # fmt: skip


def pytest_verdict(done: Finished, junit: Path) -> str:
    """Passed means: exit code 0 and at least one test really ran."""
    counts = junit_counts(junit)
    if counts is None:
        return f"pytest ended with {done.code} and wrote no report"
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    if done.code:
        return f"pytest ended with {done.code}: {said}"
    return "" if counts["passed"] else f"no GPU test ran: {said}"


def junit_counts(path: Path) -> dict[str, int] | None:
    try:
        suites = ElementTree.parse(path).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return None
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for key in total:
            total[key] += int(suite.get(key, 0))
    passed = total["tests"] - total["failures"] - total["errors"] - total["skipped"]
    return {
        "passed": passed,
        "failed": total["failures"],
        "errors": total["errors"],
        "skipped": total["skipped"],
    }


def driver_verdict(done: Finished) -> str:
    """The driver must have run at least one native kernel, and each must have been right."""
    found = re.search(r"^sanitizer_driver: (\d+) kernels, (\d+) faults$", done.output, re.M)
    if found is None or done.code or int(found[1]) == 0 or int(found[2]):
        lines = [line for line in done.output.splitlines() if "sanitizer_driver" in line]
        return f"the driver ended with {done.code}: {(lines or ['it said nothing'])[-1]}"
    return ""


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
    if done.code != _FOUND_CODE or not summed_up(done.output):
        said = _complaint(done.output)
        return f"the planted fault was not found (exit code {done.code}): {said}"
    return ""


def summed_up(output: str) -> int | None:
    """The number in the tool's last summary line, None without one."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    return int(found[-1]) if found else None


def _complaint(output: str) -> str:
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    lines = [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")]
    return (lines or output.strip().splitlines()[-1:] or ["no output"])[0][:200]


def benchmark_verdict(done: Finished, path: Path) -> str:
    """Passed means: rows there are, and every provider was right."""
    try:
        document = results.read_json(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"ended with {done.code} and left no results: {error}"
    wrong = sorted({f"{row.provider} on {row.case}" for row in document.rows if not row.match})
    if wrong:
        return f"wrong results: {'; '.join(wrong[:5])}"
    if done.code or not document.rows:
        return f"ended with {done.code} and {len(document.rows)} rows"
    return ""


def figures_verdict(done: Finished, path: Path, of: Callable[[Any], str]) -> str:
    """Passed means: the figures are there, and nothing speaks against them."""
    figures = read_figures(path)
    if done.code or figures is None:
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


def run_figures(path: Path) -> int:
    """The steps tiers and overlap, by the name of the file: on the true 3B shapes."""
    from vicostream_kernels.models import load_model

    module = import_module(f"vicostream_kernels.bench.{path.stem}")
    model = load_model("3b-random", device=torch.device("cuda"))
    found = module.measure(model, **module.QUICK, progress=print)
    print(module.table(found))
    path.write_text(json.dumps(module.as_data(found)))
    return 0


def run_benchmark(path: Path) -> int:
    """The benchmark step: the cases on the GPU, written after each one. The heavy ones in bf16
    alone: they are made and judged on the host, which takes longer than all the rest. Nothing
    beside FlashInfer: a machine's first run compiles its kernels for longer than this may take."""
    options = runner.Options(device=torch.device("cuda"), quick=True, leave_out=("flashinfer",))
    cases = runner.filter_cases(list(registry.load().values()), options.device)
    cases = [case for case in cases if not case.heavy or case.dtype == torch.bfloat16]
    document = runner.run(
        cases, options, progress=print, each=lambda document: results.write_json(document, path)
    )
    report.print_report(document)
    return 0 if document.all_match else 1


def result_path(folder: Path, facts: dict[str, Any]) -> Path:
    """``<folder>/<gpu>-<commit>.json``; a tree with changes is ``-dirty``."""
    commit = (facts["commit"] or "nocommit")[:12] + ("-dirty" if facts["dirty"] else "")
    return folder / f"{environment.slug(facts['device_name'])}-{commit}.json"


def document_of(
    facts: dict[str, Any], outcomes: Sequence[Outcome], steps: Sequence[Step], bench: Path
) -> dict[str, Any]:
    """What is known so far; steps still to come count as ``skipped``, so as not passed."""
    known = {outcome.name: outcome for outcome in outcomes}
    rows = [known.get(s.name) or Outcome(s.name, "skipped", "not reached") for s in steps]
    return {
        "schema": SCHEMA,
        "environment": facts,
        "passed": all(row.status == "passed" for row in rows),
        "seconds": round(sum(row.seconds for row in rows), 1),
        "steps": [row.as_dict() for row in rows],
        "benchmark": read_figures(bench),
        "tiers": read_figures(figures_path(bench, "tiers")),
        "overlap": read_figures(figures_path(bench, "overlap")),
    }


def check_all(
    steps: Sequence[Step], facts: dict[str, Any], *, root: Path, out: Path, logs: Path,
    bench: Path, budget_s: float,
) -> int:  # fmt: skip
    """Runs the steps, rewrites ``out`` after each, prints a line for each; the exit code."""
    outcomes: list[Outcome] = []

    def write() -> dict[str, Any]:
        document = document_of(facts, outcomes, steps, bench)
        write_atomically(out, json.dumps(document, indent=1) + "\n")
        return document

    document = write()
    try:
        for outcome in run_steps(steps, budget_s=budget_s, logs=logs, root=root):
            outcomes.append(outcome)
            document = write()
            print(
                f"{outcome.status:8} {outcome.name:18} {outcome.seconds:6.1f} s  {outcome.reason}"
            )
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; the file holds what was done")
    print(f"{'all passed' if document['passed'] else 'NOT all passed'}: {out}")
    return 0 if document["passed"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--root", type=Path, default=Path.cwd(), help="the checkout (default: here)")
    add("--out", type=Path, help="folder for the results file (default: ROOT/bench/results)")
    add("--logs", type=Path, help="folder for what steps print (default: ROOT/out/gpu-check/logs)")
    add("--budget", type=float, default=570.0, help="seconds for everything")
    add("--benchmark", type=Path, help=argparse.SUPPRESS)
    add("--figures", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} finds no CUDA device here", file=sys.stderr)
        return 2
    if given.benchmark is not None:
        return run_benchmark(given.benchmark)
    if given.figures is not None:
        return run_figures(given.figures)
    root = given.root.resolve()
    if not (root / _PLANTS).is_file():
        print(f"gpu-check: {root} is no checkout ({_PLANTS} is not there)", file=sys.stderr)
        return 2
    started = time.monotonic()
    facts = environment.collect(torch.device("cuda"), root)
    if facts["commit"]:
        os.environ["VICO_COMMIT"] = facts["commit"] + ("-dirty" if facts["dirty"] else "")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        return check_all(
            plan(root, Path(work)),
            facts,
            root=root,
            out=result_path(given.out or root / "bench" / "results", facts),
            logs=given.logs or root / "out" / "gpu-check" / "logs",
            bench=Path(work) / "bench.json",
            budget_s=given.budget - (time.monotonic() - started),
        )


if __name__ == "__main__":
    sys.exit(main())
