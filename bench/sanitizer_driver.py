"""Runs every native CUDA kernel once at a small size, for compute-sanitizer to watch.

``python -m vicostream_kernels.bench.sanitizer_driver``: the smoke cases of the registry with the
``cuda`` backend, and those of `native_cases`. Inputs are made and outputs judged on the CPU, so
that no kernel but ours runs.
Exit code 0: ran and right; 1: wrong or failed; 3: there is nothing to run, with the reason.

A kernel that loses the device ends the runs of its op; the other ops go on in another process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import torch

from vicostream_kernels import backends
from vicostream_kernels.bench import registry
from vicostream_kernels.bench.check import judge
from vicostream_kernels.bench.inputs import map_tensors, to_truth
from vicostream_kernels.bench.lost_device import first_line, why_lost
from vicostream_kernels.bench.native_cases import native_cases
from vicostream_kernels.bench.registry import Case, Provider

NOTHING_TO_RUN = 3
_PROVIDER = "ours:cuda"


def all_cases() -> list[Case]:
    return [*registry.load().values(), *native_cases()]


def work(cases: Sequence[Case], device: torch.device) -> list[tuple[Case, Provider]]:
    """The smoke cases that have a native CUDA kernel here, by op."""
    found = []
    for case in cases:
        if not case.smoke or device.type not in case.devices:
            continue
        found += [(case, p) for p in case.providers(device) if p.name == _PROVIDER]
    return sorted(found, key=lambda each: each[0].op)


def run_once(case: Case, provider: Provider, device: torch.device, seed: int = 7) -> str:
    """Runs and judges one case; a fault, or "" when it is right."""
    made = case.make(torch.device("cpu"), seed)
    try:
        inputs = map_tensors(made, lambda tensor: tensor.to(device, copy=True))
        result = provider.run(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        inputs, result = (map_tensors(x, lambda tensor: tensor.cpu()) for x in (inputs, result))
    except Exception as error:  # a finding, not the end of the run
        return f"raised {first_line(error)}"
    verdict = judge(
        case.outputs(inputs, result), case.reference(to_truth(made)), None, case.allowed, case.dtype
    )
    return verdict.reason


def run_all(todo: Sequence[tuple[Case, Provider]], device: torch.device) -> int:
    """Runs them, says how each went, and gives the exit code."""
    faults, lost, rest = 0, "", list(todo)
    while rest and not lost:
        case, provider = rest.pop(0)
        print(f"{case.op} {case.name} ...", flush=True)  # of one that hangs nothing else is seen
        fault = run_once(case, provider, device)
        print(f"{'FAULT' if fault else 'ran'} {case.op} {case.name} {fault}", flush=True)
        faults += bool(fault)
        lost = why_lost()
    print(f"sanitizer_driver: {len(todo) - len(rest)} kernels, {faults} faults", flush=True)
    if not lost:
        return 1 if faults else 0
    print(f"the device was lost: {lost}")
    for left, _ in rest:
        if left.op == case.op:
            print(f"not run {left.op} {left.name}", flush=True)
    others = dict.fromkeys(left.op for left, _ in rest if left.op != case.op)
    if others:
        subprocess.run([sys.executable, "-m", __spec__.name, "--ops", *others])
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sanitizer_driver")
    parser.add_argument("--ops", nargs="+", help="these alone")
    ops = parser.parse_args(arguments).ops
    if not torch.cuda.is_available():
        print("sanitizer_driver: torch finds no CUDA device")
        return NOTHING_TO_RUN
    device = torch.device("cuda")
    todo = work(all_cases(), device)
    todo = [(case, provider) for case, provider in todo if ops is None or case.op in ops]
    if not todo:
        reasons = {op: backends.why_not(op, "cuda", "cuda") for op in backends.OPS}
        print(f"sanitizer_driver: no smoke case has a native CUDA kernel here: {reasons}")
        return NOTHING_TO_RUN
    return run_all(todo, device)


if __name__ == "__main__":
    sys.exit(main())
