"""rope_append under pytest-benchmark; times with `pytest --benchmark-enable` on this file.

The times are of no use in the suite, so they are off there; the results are checked either way.
"""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import registry
from vicostream_kernels.bench.check import judge
from vicostream_kernels.bench.inputs import clone, to_truth

pytest.importorskip("pytest_benchmark")
CPU = torch.device("cpu")
CASE = registry.load()["append/37t-4h-2g-64d/float32+raw+sum"]


@pytest.mark.parametrize("provider", ["ours:cpu", "torch", "torch:given"])
def test_rope_append(benchmark, provider):
    run = {p.name: p.run for p in CASE.providers(CPU)}.get(provider)
    if run is None:
        pytest.skip(f"{provider} is not available here")
    made = CASE.make(CPU, 0)

    def setup():
        return (clone(made),), {}

    kept = []

    def once(inputs):
        kept[:] = [(inputs, run(inputs))]

    benchmark.pedantic(once, setup=setup, rounds=20, warmup_rounds=2)
    inputs, result = kept[0]
    truth = CASE.reference(to_truth(made))
    verdict = judge(CASE.outputs(inputs, result), truth, None, CASE.allowed, CASE.dtype)
    assert verdict.ok, verdict.reason
