"""Check, time, rows: wrong providers get no speed, ratios are against the baseline asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vicostream_kernels.bench import runner
from vicostream_kernels.bench.report import summary_lines
from vicostream_kernels.bench.results import Document
from vicostream_kernels.bench.roofline import Roofline
from vicostream_kernels.bench.runner import NothingToRun, Options, run, run_case

CPU = torch.device("cpu")
ROOF = Roofline(CPU, 10e9, rates={torch.float32: 1e12})


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(runner, "QUICK", runner.Budget(0.0, 4, 4))


def rows_of(case, **options):
    chosen = {"caches": ("warm",), **options}
    rows = run_case(case, Options(CPU, quick=True, **chosen), ROOF)
    return {row.provider: row for row in rows}


def test_a_right_provider_gets_times_rates_and_a_ratio(toy, providers):
    rows = rows_of(toy(torch=providers["slow"], ours_cpu=providers["double"]))
    ours = rows["ours:cpu"]
    assert ours.match and ours.ratio > 2 and ours.significant
    assert ours.ratio_low <= ours.ratio <= ours.ratio_high
    assert ours.p20_us <= ours.p50_us <= ours.p80_us and ours.samples == 4
    assert ours.gb_s == pytest.approx(2 * 33 * 7 * 4 / ours.p50_us / 1e3)
    assert ours.tflop_s == pytest.approx(33 * 7 / ours.p50_us / 1e6)
    assert rows["torch"].ratio == 1.0 and rows["torch"].p50_us > 2000


def test_the_floor_is_what_memory_takes_in_the_same_rounds(toy, providers, monkeypatch):
    taken = {"torch": [8e3, 4e3, 2e3], "ours:cpu": [4e3, 2e3, 1e3], "ceiling": [8e3, 4e3, 2e3]}

    def measured(runs, *_, **__):
        assert list(runs) == list(taken)
        return runner.Samples({name: list(ns) for name, ns in taken.items()}, "made up")

    monkeypatch.setattr(runner, "measure_cpu", measured)
    case = toy(torch=providers["double"], ours_cpu=providers["double"])
    moved, fast = 2 * 33 * 7 * 4, Roofline(CPU, 10e9, rates={torch.float32: 1e18})
    for cache, at_once in (("warm", 4096), ("cold", 64 << 20)):
        options = Options(CPU, quick=True, caches=(cache,))
        rows = {row.provider: row for row in run_case(case, options, fast)}
        assert set(rows) == {"torch", "ours:cpu"}, "the ceiling is no provider"
        scale = moved / at_once
        assert rows["ours:cpu"].floor_pct == pytest.approx(100 * 2 * scale)
        assert rows["torch"].floor_pct == pytest.approx(100 * scale)
        assert rows["torch"].floor_us == pytest.approx(4 * scale)
    slow = Roofline(CPU, 10e9, rates={torch.float32: 33 * 7 / 3e-6})  # 3 us for the case
    rows = run_case(case, Options(CPU, quick=True, caches=("cold",)), slow)
    assert [row.floor_us for row in rows] == pytest.approx([3.0, 3.0])
    assert rows[1].floor_pct == pytest.approx(100 * 3 / 2)


@pytest.mark.parametrize("wrong", ["off_by_little", "writes_too_far", "raises"])
def test_a_wrong_provider_gets_no_speed(toy, providers, wrong):
    row = rows_of(toy(torch=providers["double"], ours_cpu=providers[wrong]))["ours:cpu"]
    assert not row.match and row.reason
    assert row.p50_us is row.ratio is row.gb_s is row.floor_pct is None


def test_with_a_wrong_baseline_nothing_gets_a_speed(toy, providers):
    rows = rows_of(toy(torch=providers["off_by_little"], ours_cpu=providers["double"]))
    assert rows["ours:cpu"].match and "baseline 'torch' failed" in rows["ours:cpu"].reason
    assert all(row.p50_us is None for row in rows.values())


def test_another_baseline_changes_the_ratios_only(toy, providers):
    case = toy(torch=providers["double"], other=providers["slow"], ours_cpu=providers["double"])
    rows = rows_of(case, baseline="other", providers=("ours:cpu",))
    assert set(rows) == {"other", "ours:cpu"}
    assert rows["ours:cpu"].baseline == "other" and rows["ours:cpu"].ratio > 2


def test_optional_providers_run_only_when_named(toy, providers):
    case = toy(torch=providers["double"], extra=providers["double"], optional=("extra",))
    assert set(rows_of(case)) == {"torch"}
    assert set(rows_of(case, providers=("extra",))) == {"torch", "extra"}


def test_unknown_providers_name_what_there_is(toy, providers):
    with pytest.raises(NothingToRun, match="no provider 'ours:cuda' on cpu; there are: torch"):
        rows_of(toy(torch=providers["double"]), providers=("ours:cuda",))


def test_warm_and_cold_are_rows_of_their_own(toy, providers):
    case = toy(torch=providers["double"])
    rows = run_case(case, Options(CPU, quick=True), ROOF)
    assert [row.cache for row in rows] == ["warm", "cold"]
    assert rows[1].method.startswith("cold")


def test_run_hands_over_the_document_after_each_case(toy, providers, monkeypatch):
    monkeypatch.setattr(Roofline, "measure", staticmethod(lambda device, quick: ROOF))
    cases = [toy("append/a", torch=providers["double"]), toy("append/b", torch=providers["double"])]
    sizes = []
    options = Options(CPU, quick=True, caches=("warm",))
    document = run(cases, options, each=lambda d: sizes.append(len(d.rows)))
    assert sizes == [1, 2] and document.all_match
    assert document.environment["threads"] == torch.get_num_threads()
    assert document.roofline["copy_gb_s"] == 10.0


def test_nothing_at_all_is_not_a_match():
    assert not Document({}).all_match


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    with runner.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_cases_are_filtered_by_device_and_dtype(toy, providers):
    cases = [toy(torch=providers["double"])]
    assert runner.filter_cases(cases, CPU, "float32") == cases
    with pytest.raises(NothingToRun, match=r"dtype=int8 \(dtypes there: float32\)"):
        runner.filter_cases(cases, CPU, "int8")
    with pytest.raises(NothingToRun, match="device=cuda"):
        runner.filter_cases(cases, torch.device("cuda"))


@pytest.mark.parametrize("text", ["gpu", "cuda:x", "cuda:97", "", "cpu:0"])
def test_a_device_that_is_not_there_is_refused(text):
    with pytest.raises(ValueError, match="device"):
        runner.parse_device(text)


@pytest.mark.parametrize("left_out", ["flex", "flex:in-order"])
def test_providers_are_left_out_by_package_or_name_unless_asked_for(toy, providers, left_out):
    case = toy(**{"torch": providers["double"], "flex:in-order": providers["double"]})

    def chosen(**options):
        made = Options(CPU, leave_out=(left_out,), **options)
        return [p.name for p in runner.choose_providers(case, made)[0]]

    assert chosen() == ["torch"]
    assert chosen(providers=("flex:in-order",)) == ["torch", "flex:in-order"]


def test_a_backend_name_means_our_provider():
    names = runner.provider_names("cpu, torch,ours:triton,")
    assert names == ("ours:cpu", "torch", "ours:triton")


def test_a_case_that_would_take_minutes_is_left_out_and_said_so(toy, providers, monkeypatch):
    case = replace(toy(torch=providers["double"]), heavy=True)
    slow = Roofline(CPU, 10e9, rates={torch.float32: case.flops / 100.0})
    monkeypatch.setattr(Roofline, "measure", staticmethod(lambda device, quick: slow))
    document = run([case], Options(CPU, quick=True))
    assert document.rows == [] and "would take 100 s" in document.left_out[case.name]
    assert any(line.startswith(f"left out: {case.name}") for line in summary_lines(document))
    for fine, roof in ((replace(case, heavy=False), slow), (case, ROOF)):
        assert runner.too_slow(fine, Options(CPU), roof) == ""
