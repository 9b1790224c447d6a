"""The retrieval cases: all providers compute the same thing; the counted bytes are true."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import registry
from vicostream_kernels.bench.check import check

CPU = torch.device("cpu")
CASES = {name: case for name, case in registry.load().items() if case.word == "retrieve"}


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.smoke or case.op == "select_pages"]
)
def test_all_providers_are_right(name):
    case = CASES[name]
    providers = case.providers(CPU)
    assert {"torch", "ours:reference"} <= {p.name for p in providers}
    verdicts = check(case, CPU, providers, seed=1)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smoke])
def test_the_counted_bytes_are_one_read_or_write_of_each(name):
    case = CASES[name]
    inputs = case.make(CPU, 0)
    moved = sum(x.nbytes for x in inputs.values() if isinstance(x, torch.Tensor))
    result = case.providers(CPU)[0].run(inputs)
    made = (result,) if isinstance(result, torch.Tensor) else result
    moved += sum(x.nbytes for x in made)
    if "block_pages" in inputs:  # only the chosen rows of the table are read
        blocks, width = inputs["block_pages"].shape[1:]
        chosen = case.axes["chosen"] if case.op == "select_pages" else case.axes["k"]
        moved += 4 * width * (chosen - blocks)
    assert case.bytes == moved
