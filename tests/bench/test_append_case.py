"""rope_append's cases: all providers compute the same thing; the counted bytes are true."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import registry
from vicostream_kernels.bench.check import check

CPU = torch.device("cpu")
CASES = registry.load()
NAMES = [
    "append/37t-4h-2g-64d/float32+raw+sum",
    "append/37t-4h-2g-64d/bfloat16+raw+sum",
    "append/1t-28h-4g-128d/bfloat16",
    "append/320t-16h-2g-128d/float32+raw+sum",
    "append/320t-16h-2g-128d/bfloat16",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_all_providers_are_right(name, seed):
    case = CASES[name]
    providers = [p for p in case.providers(CPU) if p.name != "torch:compile"]
    assert {"torch", "torch:given", "ours:reference"} <= {p.name for p in providers}
    verdicts = check(case, CPU, providers, seed)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts


def test_the_baselines_formulations_agree():
    from vicostream_kernels.bench.cases.append import _torch

    case = CASES["append/37t-4h-2g-64d/float32+raw+sum"]
    few, many = case.make(CPU, 0), case.make(CPU, 0)
    torch.testing.assert_close(_torch(few, passes=True), _torch(many, passes=False))
    torch.testing.assert_close(few["k_pages"], many["k_pages"], equal_nan=True)


def test_the_counted_bytes_are_one_read_or_write_of_each():
    case = CASES["append/320t-16h-2g-128d/bfloat16"]
    inputs = case.make(CPU, 0)
    read = sum(inputs[n].nbytes for n in ("q", "k", "v", "positions", "inv_freq", "slots"))
    written = inputs["q"].nbytes + inputs["k"].nbytes + inputs["v"].nbytes
    assert case.bytes == read + written


def test_the_pool_starts_unwritten_and_scattered():
    inputs = CASES["append/320t-16h-2g-128d/float32+raw+sum"].make(CPU, 3)
    for name in ("k_pages", "v_pages", "raw_k_pages"):
        assert inputs[name].isnan().all()
    pages = inputs["slots"][::64] // 64
    assert pages.tolist() != sorted(pages.tolist())
    assert inputs["slots"].unique().numel() == 320
