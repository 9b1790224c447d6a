"""The cases of prune and reuse: every provider computes the same thing, also at full size."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import registry
from vicostream_kernels.bench.check import check

CPU = torch.device("cpu")
CASES = registry.load()
NAMES = [
    "prune/chunk-intra/3t-17n-72d/float32",
    "prune/chunk-intra/4t-135n-2048d/bfloat16",
    "prune/stc-gaussian/2t-24n-64d/float32",
    "reuse/select_changed/2f-19n-72c/bfloat16",
    "reuse/select_changed/4f-540n-1280c/float32",
    "reuse/gather_rows/2f-19n-72c/float32",
    "reuse/merge_rows/2f-19n-72c/bfloat16",
    "reuse/merge_rows/4f-540n-1280c/float32",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_all_providers_are_right(name, seed):
    case = CASES[name]
    providers = case.providers(CPU)
    assert {"torch", "ours:reference"} <= {p.name for p in providers}
    verdicts = check(case, CPU, providers, seed)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts


def test_the_scene_of_chunk_intra_drops_some_and_keeps_some():
    case = CASES["prune/chunk-intra/4t-135n-2048d/float32"]
    mask = case.reference(case.make(CPU, 0))["mask"]
    assert 0.3 < mask[1:].double().mean() < 0.8
