"""Ceilings are measured on this machine; the floor is the larger of moving and computing."""

from __future__ import annotations

import pytest
import torch

from vicostream_kernels.bench import roofline
from vicostream_kernels.bench.roofline import (
    Roofline,
    copy_bandwidth,
    matmul_rate,
    read_bandwidth,
)

CPU = torch.device("cpu")


@pytest.fixture
def known() -> Roofline:
    """10 GB/s from memory, 40 GB/s for copies of 64 KiB, 1 TFLOP/s."""
    roof = Roofline(CPU, 10e9, rates={torch.float32: 1e12})
    roof._cached[64 << 10] = 40e9
    return roof


def test_the_floor_is_the_larger_of_the_two_times(known):
    assert known.floor_us(10_000, 0, torch.float32, cold=True) == pytest.approx(1.0)
    assert known.floor_us(10_000, 5_000_000, torch.float32, cold=True) == pytest.approx(5.0)


def test_a_cached_working_set_has_the_ceiling_of_a_cached_copy(known):
    moved = 2 * (64 << 10)
    cold = known.floor_us(moved, 0, torch.float32, cold=True)
    assert known.floor_us(moved, 0, torch.float32, cold=False) == pytest.approx(cold / 4)


@pytest.mark.parametrize("read,ceiling", [(20e9, 20e9), (8e9, 10e9)])
def test_what_only_reads_has_the_faster_of_reading_and_copying(known, read, ceiling):
    known.reads[known.memory] = read
    reading = known.floor_us(10_000, 0, torch.float32, cold=True, reads=True)
    assert reading == pytest.approx(1e6 * 10_000 / ceiling)
    assert known.floor_us(10_000, 0, torch.float32, cold=True) == pytest.approx(1.0)


def test_reading_is_measured_once_for_each_size(known, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "vicostream_kernels.bench.roofline.read_bandwidth",
        lambda device, size, **_: sizes.append(size) or 50e9,
    )
    for cold in (True, False, True, False):
        assert known.bandwidth_at(128 << 10, cold=cold, reads=True) == 50e9
    assert sizes == [known.memory, 128 << 10]
    assert known.facts()["read_gb_s"] == {"131072": 50.0, str(known.memory): 50.0}


@pytest.mark.parametrize("rate,passes", [(5e9, "_to"), (20e9, "_pass")])
def test_a_ceiling_goes_the_faster_way_through_other_bytes_each_time(known, rate, passes):
    known.memory, moved = 256 << 20, 10_000
    known.reads[known.memory] = rate
    cold = known.ceiling(moved, cold=True, reads=True)
    assert getattr(cold, passes) is not None
    assert cold.scale == moved / (64 << 20)
    parts, floats = cold._from.shape
    assert parts == 4 and floats * 4 == (64 << 20) // (2 if passes == "_to" else 1)
    if passes == "_to":
        for done in range(1, 5):
            cold()
            assert int(cold._to[:, 0].sum()) == done
            assert cold._to[:, 0].eq(cold._to[:, -1]).all()
    warm = known.ceiling(moved, cold=False)
    assert warm.scale == 1.0 and warm._from.shape == (1, moved // 2 // 8 * 2)
    warm()
    assert warm._to.eq(1).all()


def test_measured_ceilings_are_physical():
    assert 1e6 < copy_bandwidth(CPU, 1 << 20, repeats=3) < 1e13
    assert 1e6 < read_bandwidth(CPU, 1 << 20, repeats=3) < 1e13
    assert 1e6 < matmul_rate(CPU, torch.float32, quick=True) < 1e15


def test_facts_name_what_was_measured(known):
    assert known.facts() == {
        "copy_gb_s": 10.0,
        "cached_copy_gb_s": {"65536": 40.0},
        "read_gb_s": {},
        "matmul_tflop_s": {"float32": 1.0},
    }


def test_rates_are_measured_once(known, monkeypatch):
    monkeypatch.setattr("vicostream_kernels.bench.roofline.matmul_rate", lambda *a, **k: 5e12)
    assert known.rate(torch.bfloat16) == known.rate(torch.bfloat16) == 5e12
    assert known.rate(torch.float32) == 1e12


def test_a_cpu_without_instructions_for_a_type_may_widen_it(known):
    known.rates[torch.bfloat16] = 1e9
    assert known.rate(torch.bfloat16) == 1e12 and known.own_rate(torch.bfloat16) == 1e9
    on_gpu = Roofline(torch.device("cuda"), 1e12, rates=dict(known.rates))
    assert on_gpu.rate(torch.bfloat16) == 1e9


def test_a_slow_product_is_not_measured_for_minutes(monkeypatch):
    clock, calls = [0.0], []

    def run():
        calls.append(1)
        clock[0] += 2.0

    monkeypatch.setattr(roofline.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(roofline.time, "perf_counter_ns", lambda: int(1e9 * clock[0]))
    assert roofline._seconds(run, CPU, 11) == 2.0
    assert len(calls) == 3
