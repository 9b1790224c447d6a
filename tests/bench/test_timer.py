"""The CPU timer: turns, warm and cold input sets, the budget, and a difference it must see."""

from __future__ import annotations

import gc
import itertools
import platform
import subprocess
import sys
import time

import pytest
import torch

from vicostream_kernels.bench import timer
from vicostream_kernels.bench.inputs import allocated_bytes, clone, to_truth
from vicostream_kernels.bench.stats import paired_ratio
from vicostream_kernels.bench.timer import Budget, measure_cpu, rotation, turns

SHORT = Budget(seconds=0.05, least_rounds=6, most_rounds=12)


def test_turns_alternate_the_order():
    rounds = list(itertools.islice(turns(["a", "b", "c"]), 3))
    assert rounds == [("a", "b", "c"), ("c", "b", "a"), ("a", "b", "c")]


def test_a_slower_provider_is_seen_as_slower():
    runs = {"fast": lambda inputs: time.sleep(0.001), "slow": lambda inputs: time.sleep(0.004)}
    taken = measure_cpu(runs, {"x": torch.zeros(1)}, 8, cold=False, budget=SHORT).nanoseconds
    ratio = paired_ratio(taken["slow"], taken["fast"])
    assert ratio.median > 1.5 and ratio.significant
    assert min(taken["slow"]) >= 4e6 and min(taken["fast"]) >= 1e6


def test_short_calls_are_timed_in_groups_and_reported_per_call():
    calls = []
    runs = {"a": lambda inputs: calls.append(1)}
    budget = Budget(seconds=0.0, least_rounds=6, most_rounds=6)
    taken = measure_cpu(runs, {"x": torch.zeros(1)}, 8, cold=False, budget=budget).nanoseconds
    assert len(taken["a"]) == 6
    assert len(calls) > 6 * timer._MOST_CALLS
    assert max(taken["a"]) < 100_000


def test_warm_calls_share_one_input_set_and_cold_calls_rotate():
    x = torch.zeros(1000)
    seen: list[int] = []
    runs = {name: lambda inputs: seen.append(inputs["x"].data_ptr()) for name in ("a", "b")}
    measure_cpu(runs, {"x": x}, 4000, cold=False, budget=SHORT)
    assert set(seen) == {x.data_ptr()}
    seen.clear()
    done = measure_cpu(runs, {"x": x}, 4000, cold=True, budget=SHORT, cache_bytes=5000)
    assert done.method == "cold: 10 input sets" and len(set(seen)) == 10


@pytest.mark.parametrize("moved_bytes, untimed", [(1000, 4), (2500, 4), (4000, 3), (90_000, 1)])
@pytest.mark.parametrize("cold", [False, True])
def test_untimed_calls_go_through_twice_the_cache(moved_bytes, untimed, cold, monkeypatch):
    monkeypatch.setattr(timer, "_SHORTEST_NS", 1)  # one call a timed region
    calls = []
    budget = Budget(seconds=0.0, least_rounds=5, most_rounds=5, warm_up=0)
    monkeypatch.setattr(timer, "_warm_up", lambda run, inputs, least: 1)
    runs = {"a": lambda inputs: calls.append(1)}
    x = torch.zeros(10)
    measure_cpu(runs, {"x": x}, moved_bytes, cold=cold, budget=budget, cache_bytes=5000)
    assert len(calls) == 5 * (untimed + 1)


def test_heavy_cold_calls_rotate_too_and_bytes_may_be_none():
    seen = []
    runs = {name: lambda inputs: seen.append(inputs["x"].data_ptr()) for name in ("a", "b")}
    budget = Budget(seconds=0.0, least_rounds=5, most_rounds=5, warm_up=0, untimed=False)
    measure_cpu(runs, {"x": torch.zeros(1000)}, 4000, cold=True, budget=budget, cache_bytes=5000)
    assert len(set(seen[-10:])) == 10
    measure_cpu(runs, {"x": torch.zeros(1)}, 0, cold=False, budget=budget)


def test_long_calls_are_not_made_four_times_for_nothing(monkeypatch):
    monkeypatch.setattr(timer, "_UNTIMED_S", 0.001)
    calls = []
    runs = {"a": lambda inputs: (calls.append(1), time.sleep(0.002))}
    budget = Budget(seconds=0.0, least_rounds=5, most_rounds=5, warm_up=0)
    monkeypatch.setattr(timer, "_warm_up", lambda run, inputs, least: 1 << 40)
    measure_cpu(runs, {"x": torch.zeros(1)}, 4, cold=False, budget=budget)
    assert len(calls) == 5 * 2


def test_a_cold_call_never_follows_a_call_on_its_own_inputs():
    seen: list[int] = []
    runs = {"a": lambda inputs: seen.append(inputs["x"].data_ptr())}
    budget = Budget(seconds=0.0, least_rounds=8, most_rounds=8)
    measure_cpu(runs, {"x": torch.zeros(9)}, 36, cold=True, budget=budget, cache_bytes=40)
    rounds = [seen[-4 * i :][:4] for i in range(1, 9)]  # three untimed calls, then the timed one
    assert all(timed not in untimed for *untimed, timed in rounds)


def test_tiny_inputs_are_swept_out_of_the_cache_instead():
    done = measure_cpu(
        {"a": lambda inputs: None},
        {"x": torch.zeros(1)},
        4,
        cold=True,
        budget=Budget(0.0, 2, 2),
        cache_bytes=1 << 20,
    )
    assert done.method == "cold: swept" and len(done.nanoseconds["a"]) == 2


def test_rotation_touches_eight_times_the_cache_and_respects_the_memory_limit():
    inputs = {"x": torch.zeros(256)}
    sets = rotation(inputs, 1024, cache_bytes=1024, memory_bytes=1 << 20)
    assert sets is not None and len(sets) == 8
    assert len({s["x"].data_ptr() for s in sets}) == 8
    assert rotation(inputs, 1024, cache_bytes=1024, memory_bytes=4000) is None


def test_the_budget_bounds_the_rounds():
    def run(inputs):
        time.sleep(0.01)

    taken = measure_cpu({"a": run}, {}, 8, cold=False, budget=Budget(0.0, 3, 100)).nanoseconds
    assert len(taken["a"]) == 3


def test_no_garbage_collection_inside_and_as_before_after():
    states = []
    measure_cpu(
        {"a": lambda inputs: states.append(gc.isenabled())}, {}, 8, cold=False, budget=SHORT
    )
    assert not any(states) and gc.isenabled()


def test_last_level_cache_is_plausible():
    assert 1 << 20 <= timer.last_level_cache_bytes() <= 4 << 30


def test_clones_keep_strides_and_share_nothing():
    inputs = {"x": torch.randn(6, 4).t(), "n": 3, "parts": [torch.ones(2)]}
    copy = clone(inputs)
    assert copy["x"].stride() == inputs["x"].stride() and torch.equal(copy["x"], inputs["x"])
    assert copy["x"].data_ptr() != inputs["x"].data_ptr() and copy["n"] == 3
    assert copy["parts"][0].data_ptr() != inputs["parts"][0].data_ptr()
    assert allocated_bytes(inputs) == 6 * 4 * 4 + 8


def test_the_truth_starts_from_float64_copies():
    inputs = {"x": torch.ones(2, dtype=torch.bfloat16), "i": torch.ones(2, dtype=torch.int32)}
    truth = to_truth(inputs)
    assert truth["x"].dtype == torch.float64 and truth["i"].dtype == torch.int32
    truth["i"].zero_()
    assert inputs["i"].sum() == 2


@pytest.mark.parametrize("cold", [False, True])
def test_every_provider_gets_one_sample_a_round(cold):
    runs = {name: lambda inputs: None for name in "abc"}
    taken = measure_cpu(
        runs, {"x": torch.zeros(64)}, 256, cold=cold, budget=SHORT, cache_bytes=1024
    ).nanoseconds
    assert len({len(samples) for samples in taken.values()}) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a habit of glibc's")
def test_freed_outputs_stay_with_the_process():
    code = """
import resource
import numpy as np
from vicostream_kernels.bench.timer import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        outputs = [np.ones(6 << 20, np.uint8) for _ in range(5)]
        del outputs
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
keep_freed_memory()
faults()
print(first, faults())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given_back, kept = map(int, out.stdout.split())
    assert given_back > 10_000 and kept < 100
