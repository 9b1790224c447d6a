"""``make gpu-check``: everything that needs a GPU, in under ten minutes, into one file.

``python -m vicostream_kernels.bench.gpu_check --root CHECKOUT`` once the package is built: the
tests marked ``gpu``, compute-sanitizer's four tools over the native kernels (and over planted
faults, to know that they see), then the benchmark. The file ``bench/results/<gpu>-<commit>.json``
is rewritten after each step, so that a run that is cut off leaves what it had. With ``--only`` or
``--skip`` the steps that are not run keep what that file says of them.

Exit code 0: all passed; 1: something did not; 2: there is no GPU, no checkout or no such step.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels.bench import environment, gpu_tests
from vicostream_kernels.bench.gpu_plan import PLANTS, figures_path, plan, report_path
from vicostream_kernels.bench.gpu_verdicts import read_figures
from vicostream_kernels.bench.results import write_atomically
from vicostream_kernels.bench.steps import Outcome, Step, run_steps

SCHEMA = "vicostream-gpu-check/1"
#: What the document has of a step beside its outcome.
_FIGURES = ("benchmark", "tiers", "overlap")
_TESTS = ("pytest", "timer")


def run_figures(path: Path) -> int:
    """The steps tiers and overlap, by the name of the file: on the true 3B shapes."""
    from vicostream_kernels.models import load_model

    module = import_module(f"vicostream_kernels.bench.{path.stem}")
    model = load_model("3b-random", device=torch.device("cuda"))
    found = module.measure(model, **module.QUICK, progress=print)
    print(module.table(found))
    path.write_text(json.dumps(module.as_data(found)))
    return 0


def result_path(folder: Path, facts: dict[str, Any]) -> Path:
    """``<folder>/<gpu>-<commit>.json``; a tree with changes is ``-dirty``."""
    commit = (facts["commit"] or "nocommit")[:12] + ("-dirty" if facts["dirty"] else "")
    return folder / f"{environment.slug(facts['device_name'])}-{commit}.json"


def choose(steps: Sequence[Step], only: str, skip: str) -> list[Step]:
    """The steps that match ``only`` ("" is all) and not ``skip``: names or globs, with commas
    between. Raises ValueError for one that matches none."""

    def matching(patterns: str) -> set[str]:
        found: set[str] = set()
        for pattern in filter(None, patterns.split(",")):
            names = fnmatch.filter([step.name for step in steps], pattern)
            if not names:
                there = ", ".join(step.name for step in steps)
                raise ValueError(f"no step is named {pattern!r}; there are: {there}")
            found |= set(names)
        return found

    wanted = matching(only or "*") - matching(skip)
    return [step for step in steps if step.name in wanted]


def document_of(
    facts: dict[str, Any],
    steps: Sequence[Step],
    chosen: Sequence[Step],
    outcomes: Sequence[Outcome],
    earlier: dict[str, Any],
    *,
    work: Path,
    logs: Path,
) -> dict[str, Any]:
    """What is known so far, of steps that are not run what ``earlier`` has. Steps still to come
    count as ``skipped``, so as not passed."""
    names = {step.name for step in chosen}
    known = {row["name"]: row for row in earlier.get("steps", []) if row["name"] not in names}
    known |= {outcome.name: outcome.as_dict() for outcome in outcomes}
    rows = []
    for step in steps:
        why = "not reached" if step.name in names else "not asked for"
        rows.append(known.get(step.name) or Outcome(step.name, "skipped", why).as_dict())
    figures = {name: earlier.get(name) for name in _FIGURES}
    figures |= {n: read_figures(figures_path(work, n)) for n in _FIGURES if n in names}
    tests = dict(earlier.get("tests", {}))
    tests |= {n: gpu_tests.read(report_path(logs, n)).as_dict() for n in _TESTS if n in names}
    return {
        "schema": SCHEMA,
        "environment": facts,
        "passed": all(row["status"] == "passed" for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "steps": rows,
        "tests": tests,
        **figures,
    }


def check_all(
    steps: Sequence[Step], facts: dict[str, Any], *, root: Path, out: Path, logs: Path,
    work: Path, budget_s: float, chosen: Sequence[Step] | None = None,
) -> int:  # fmt: skip
    """Runs the chosen steps (None: all of them), rewrites ``out`` after each, prints a line for
    each; the exit code."""
    chosen = steps if chosen is None else chosen
    earlier = {} if len(chosen) == len(steps) else read_figures(out) or {}
    outcomes: list[Outcome] = []

    def write() -> dict[str, Any]:
        document = document_of(facts, steps, chosen, outcomes, earlier, work=work, logs=logs)
        write_atomically(out, json.dumps(document, indent=1) + "\n")
        return document

    document = write()
    try:
        for outcome in run_steps(chosen, budget_s=budget_s, logs=logs, root=root):
            outcomes.append(outcome)
            document = write()
            print(
                f"{outcome.status:8} {outcome.name:18} {outcome.seconds:6.1f} s  {outcome.reason}"
            )
            sys.stdout.flush()
    except KeyboardInterrupt:
        document = write()  # with what the step that was cut off has left
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
    add("--only", default="", help="steps to run, by name or glob, with commas between")
    add("--skip", default="", help="steps to leave out, likewise")
    add("--figures", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell's background has it; steps would inherit it, and overrun.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} finds no CUDA device here", file=sys.stderr)
        return 2
    if given.figures is not None:
        return run_figures(given.figures)
    root = given.root.resolve()
    if not (root / PLANTS).is_file():
        print(f"gpu-check: {root} is no checkout ({PLANTS} is not there)", file=sys.stderr)
        return 2
    started = time.monotonic()
    facts = environment.collect(torch.device("cuda"), root)
    if facts["commit"]:
        os.environ["VICO_COMMIT"] = facts["commit"] + ("-dirty" if facts["dirty"] else "")
    # SIGINT too: in the background of a shell it is ignored, by what is started here as well.
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.default_int_handler)
    logs = (given.logs or root / "out" / "gpu-check" / "logs").resolve()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        work = Path(folder)
        steps = plan(root, work, logs)
        try:
            chosen = choose(steps, given.only, given.skip)
        except ValueError as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return 2
        for step in chosen:
            for old in logs.glob(f"{step.name}.*"):
                old.unlink()
        return check_all(
            steps,
            facts,
            chosen=chosen,
            root=root,
            out=result_path((given.out or root / "bench" / "results").resolve(), facts),
            logs=logs,
            work=work,
            budget_s=given.budget - (time.monotonic() - started),
        )


if __name__ == "__main__":
    sys.exit(main())
