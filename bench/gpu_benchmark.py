"""The benchmark step of gpu-check: what matters most comes first, and no case ends the others.

``python -m vicostream_kernels.bench.gpu_benchmark FILE``. Several processes compile our kernels
into Triton's cache. Then one process times the cases; where a case ends it (a lost device, a crash,
a hang), another goes on with the next case. The file is rewritten after each.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from vicostream_kernels.bench import environment, registry, report, results, runner
from vicostream_kernels.bench.lost_device import first_line, why_lost
from vicostream_kernels.bench.registry import Case
from vicostream_kernels.bench.results import Document
from vicostream_kernels.bench.roofline import Roofline

#: What the goals are about, the first first; the others follow in the registry's order.
_FIRST = (
    "attention/decode-16s-*/bfloat16",
    "attention/decode-1q-*/bfloat16",
    "attention/decode-shifted-*/bfloat16",
    "attention/prefill-320q-*/bfloat16",
    "attention/prefill-2048q-*",
    "append/8192t-*/bfloat16*",
    "prune/chunk-intra/*/bfloat16",
    "prune/stc-*",
    "reuse/select_changed/*",
    "retrieve/*-4096n-*",
    "retrieve/*-262144n-*",
    "reuse/vit-3b/4x1s-*",
)
#: Its truth takes the host longer than all the rest.
_LAST = ("reuse/vit-3b/4x4s-*",)
#: They compile for longer than they are worth here: FlashInfer on a machine's first run, and
#: FlexAttention. ``vicostream bench --device cuda`` has both.
_LEFT_OUT = ("flashinfer", "torch:flex-in-order")
#: A case that takes longer hangs.
_MOST_SECONDS = 90
_COMPILERS = 12
_COMPILE_SECONDS = 75
_NOT_REACHED = "not reached"
_NOT_ENDED = "did not come to its end"


def chosen(cases: Sequence[Case]) -> list[Case]:
    """Those for a GPU, in the order they are timed. Not the smoke cases, which the tests and the
    driver run. The heavy ones in bf16 alone: the host makes and judges them."""
    kept = [case for case in runner.filter_cases(cases, torch.device("cuda")) if not case.smoke]
    kept = [case for case in kept if not case.heavy or case.dtype == torch.bfloat16]
    return sorted(kept, key=_place)


def _place(case: Case) -> int:
    for place, pattern in enumerate(_FIRST):
        if fnmatchcase(case.name, pattern):
            return place
    return len(_FIRST) + any(fnmatchcase(case.name, pattern) for pattern in _LAST)


def left(cases: Sequence[Case], document: Document) -> list[Case]:
    return [case for case in cases if document.left_out.get(case.name) == _NOT_REACHED]


def time_cases(path: Path, cases: Sequence[Case], asked: runner.Options) -> None:
    """Times what is left, until the device is lost."""
    document = results.read_json(path)
    document.environment = document.environment or environment.collect(asked.device)
    roofline = Roofline.measure(asked.device, quick=asked.quick)
    for case in left(cases, document):
        print(case.name, flush=True)
        del document.left_out[case.name]
        document.failed[case.name] = _NOT_ENDED
        results.write_json(document, path)
        faulthandler.dump_traceback_later(_MOST_SECONDS, exit=True)
        try:
            document.rows += runner.run_case(case, asked, roofline)
            del document.failed[case.name]
        except Exception as error:
            document.failed[case.name] = f"raised {first_line(error)}"
        faulthandler.cancel_dump_traceback_later()
        document.roofline = roofline.facts()
        results.write_json(document, path)
        if lost := why_lost():
            print(f"{case.name} lost the device: {lost}", flush=True)
            return


def time_all(path: Path, cases: Sequence[Case]) -> Document:
    """Times every case, in as many processes as that takes."""
    absent = dict.fromkeys(_LEFT_OUT, "takes longer to compile than this may take")
    absent |= {case.name: _NOT_REACHED for case in cases}
    document = Document({}, left_out=absent)
    results.write_json(document, path)
    before = None
    while (rest := len(left(cases, document))) and rest != before:
        before = rest
        code = subprocess.run(_command(path, "--time")).returncode
        document = results.read_json(path)
        for name, why in document.failed.items():
            if why == _NOT_ENDED:
                document.failed[name] = f"{why}: its process ended with {code}"
        results.write_json(document, path)
    return document


def compile_part(cases: Sequence[Case], part: int, asked: runner.Options) -> None:
    """Runs our kernels of every ``_COMPILERS``-th case once; what fails, the check will tell."""
    for case in cases[part::_COMPILERS]:
        try:
            inputs = case.make(asked.device, asked.seed)
            for provider in runner.choose_providers(case, asked)[0]:
                if provider.ours:
                    with torch.no_grad():
                        provider.run(inputs)
        except Exception as error:
            print(f"{case.name} raised {first_line(error)}", flush=True)
        if why_lost():
            return


def compile_ahead(path: Path) -> None:
    until = time.monotonic() + _COMPILE_SECONDS
    few = {**os.environ, "OMP_NUM_THREADS": "2"}
    parts = [
        subprocess.Popen(_command(path, "--compile", str(part)), env=few)
        for part in range(_COMPILERS)
    ]
    for part in parts:
        try:
            part.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            part.kill()


def _command(path: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", __spec__.name, str(path), *more]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-benchmark")
    parser.add_argument("path", type=Path)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    cases = chosen(list(registry.load().values()))
    asked = runner.Options(device=torch.device("cuda"), quick=True, leave_out=_LEFT_OUT)
    if given.time:
        time_cases(given.path, cases, asked)
        return 0
    if given.compile is not None:
        compile_part(cases, given.compile, asked)
        return 0
    started = time.monotonic()
    compile_ahead(given.path)
    print(f"compiled ahead in {time.monotonic() - started:.0f} s", flush=True)
    document = time_all(given.path, cases)
    report.print_report(document)
    return 0 if document.all_match else 1


if __name__ == "__main__":
    sys.exit(main())
