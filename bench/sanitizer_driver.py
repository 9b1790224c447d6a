"""Runs every native CUDA kernel once at a small size, for compute-sanitizer to watch.

``python -m vicostream_kernels.bench.sanitizer_driver``: the smoke cases of the registry with the
``cuda`` backend. Inputs are made and outputs judged on the CPU, so that no kernel but ours runs.
Exit code 0: ran and right; 1: wrong or failed; 3: there is nothing to run, with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from vicostream_kernels import backends
from vicostream_kernels.bench import registry
from vicostream_kernels.bench.check import judge
from vicostream_kernels.bench.inputs import map_tensors, to_truth
from vicostream_kernels.bench.registry import Case, Provider

_PROVIDER = "ours:cuda"


def work(cases: Sequence[Case], device: torch.device) -> list[tuple[Case, Provider]]:
    """The smoke cases that have a native CUDA kernel here."""
    found = []
    for case in cases:
        if not case.smoke or device.type not in case.devices:
            continue
        found += [(case, p) for p in case.providers(device) if p.name == _PROVIDER]
    return found


def run_once(case: Case, provider: Provider, device: torch.device, seed: int = 7) -> str:
    """Runs and judges one case; a fault, or "" when it is right."""
    made = case.make(torch.device("cpu"), seed)
    inputs = map_tensors(made, lambda tensor: tensor.to(device, copy=True))
    result = provider.run(inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    inputs, result = (map_tensors(x, lambda tensor: tensor.cpu()) for x in (inputs, result))
    verdict = judge(
        case.outputs(inputs, result), case.reference(to_truth(made)), None, case.allowed, case.dtype
    )
    return verdict.reason


def main() -> int:
    if not torch.cuda.is_available():
        print("sanitizer_driver: torch finds no CUDA device")
        return 3
    device = torch.device("cuda")
    todo = work(list(registry.load().values()), device)
    if not todo:
        reasons = {op: backends.why_not(op, "cuda", "cuda") for op in backends.OPS}
        print(f"sanitizer_driver: no smoke case has a native CUDA kernel here: {reasons}")
        return 3
    faults = 0
    for case, provider in todo:
        fault = run_once(case, provider, device)
        print(f"{'FAULT' if fault else 'ran'} {case.op} {case.name} {fault}", flush=True)
        faults += bool(fault)
    print(f"sanitizer_driver: {len(todo)} kernels, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
