"""The cases of attention: every provider computes the same thing, shifted pages included."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import registry
from vicostream_kernels.bench.cases import attention
from vicostream_kernels.bench.check import check

CPU = torch.device("cpu")
CASES = registry.load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, queries, streams", [("decode", 1, 2), ("prefill", 37, 1)])
@pytest.mark.parametrize("shifted", [False, True])
def test_all_providers_are_right(kind, queries, streams, shifted, dtype):
    case = attention._paged_case(
        kind, queries, 150, 8, 2, 64, dtype, streams=streams, shifted=shifted
    )
    assert ("-shifted" in case.name) == shifted
    providers = case.providers(CPU)
    assert {"ours:cpu", "ours:reference", "torch:sdpa", "torch:sdpa-rows", "torch:matmul"} == {
        p.name for p in providers
    }
    verdicts = check(case, CPU, providers, 0)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts


def test_what_pages_have_moved_by_is_seen():
    """Else every provider could leave it out."""
    plain = attention._paged_case("decode", 1, 150, 8, 2, 64, torch.float32)
    shifted = attention._paged_case("decode", 1, 150, 8, 2, 64, torch.float32, shifted=True)
    here, there = (c.reference(c.make(CPU, 0))["out"] for c in (plain, shifted))
    assert (here - there).norm() > 0.05 * here.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_long_prefills_providers_are_right():
    case = attention._long_case(40, 150, 8, 2, 64)
    assert case.devices == ("cuda",)
    providers = case.providers(CPU)
    assert {p.name for p in providers} == {
        "ours:cpu", "ours:reference", "torch:sdpa-in-order", "torch:flex-in-order"
    }  # fmt: skip
    verdicts = check(case, CPU, providers, 0)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts


def test_the_sizes_that_goals_name_are_there():
    names = [f"attention/{case}" for case in (
        "decode-1q-13000k-16h-2g-128d/bfloat16", "decode-16s-1q-13000k-16h-2g-128d/bfloat16",
        "decode-shifted-1q-13000k-16h-2g-128d/bfloat16", "prefill-320q-1600k-16h-2g-128d/float32",
        "prefill-shifted-320q-1600k-16h-2g-128d/bfloat16",
        "prefill-2048q-16384k-16h-2g-128d/bfloat16",
    )]  # fmt: skip
    assert set(names) <= set(CASES)
