"""The gate in front of every speed: right results pass, each kind of wrong one is stopped."""

from __future__ import annotations

import re

import pytest
import torch

from vicostream_kernels.bench import check as checking
from vicostream_kernels.bench.check import check, judge
from vicostream_kernels.bench.registry import Tolerance

CPU = torch.device("cpu")
ALLOWED = Tolerance(relative=1e-4)


def verdict_of(toy, providers, name, label="ours_cpu"):
    case = toy(torch=providers["double"], **{label: providers[name]})
    verdicts = check(case, CPU, case.providers(CPU), seed=1)
    assert verdicts["torch"].ok
    return verdicts[label.replace("_", ":")]


def test_a_right_provider_passes(toy, providers):
    assert verdict_of(toy, providers, "double").ok


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("off_by_little", "doubled: relative error"),
        ("writes_too_far", "written: 7 of 231 elements differ in being NaN"),
        ("leaves_a_hole", "doubled: 7 of 231 elements differ in being NaN"),
        ("raises", "raised RuntimeError: no such kernel"),
    ],
)
def test_a_wrong_provider_is_stopped_with_the_reason(toy, providers, name, reason):
    verdict = verdict_of(toy, providers, name)
    assert not verdict.ok and verdict.reason.startswith(reason)
    assert "second line" not in verdict.reason


def test_a_failing_baseline_is_a_finding_of_its_own(toy, providers):
    case = toy(torch=providers["raises"], ours_cpu=providers["double"])
    verdicts = check(case, CPU, case.providers(CPU), seed=1)
    assert not verdicts["torch"].ok and verdicts["ours:cpu"].ok


def test_after_a_lost_device_nobody_else_is_blamed(toy, providers, monkeypatch):
    """Nor is what others made before lost, though the inputs can't be read any more."""
    lost = []

    def loses(inputs):
        lost.append(True)
        raise RuntimeError("CUDA error: an illegal memory access")

    def to_truth(made, convert=checking.to_truth):
        assert not lost
        return convert(made)

    monkeypatch.setattr(checking, "why_lost", lambda: "lost" if lost else "")
    monkeypatch.setattr(checking, "to_truth", to_truth)
    double = providers["double"]
    case = toy(torch=double, ours_cuda=loses, ours_triton=double)
    verdicts = check(case, CPU, case.providers(CPU), seed=1)
    assert verdicts["torch"].ok
    assert (
        verdicts["ours:cuda"].reason == "raised RuntimeError: CUDA error: an illegal memory access"
    )
    assert verdicts["ours:triton"].reason == "not run: ours:cuda lost the device"


def test_providers_do_not_see_each_others_writes(toy, providers):
    case = toy(other=providers["writes_too_far"], torch=providers["double"])
    verdicts = check(case, CPU, case.providers(CPU), seed=1)
    assert verdicts["torch"].ok and not verdicts["other"].ok


def test_the_error_may_be_twice_the_yardsticks_and_a_floor_but_no_more():
    truth = {"x": torch.ones(100, dtype=torch.float64)}
    yardstick = {"x": torch.ones(100) + 1e-5}
    near, far = {"x": torch.ones(100) + 1.9e-5}, {"x": torch.ones(100) + 4e-5}
    assert judge(near, truth, yardstick, ALLOWED, torch.float32).ok
    verdict = judge(far, truth, yardstick, ALLOWED, torch.float32)
    assert not verdict.ok and "largest error" in verdict.reason
    assert judge(far, truth, None, ALLOWED, torch.float32).ok


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        (torch.ones(4), "shape"),
        (torch.tensor([1.0, torch.nan, 1.0]), "NaN"),
        (torch.tensor([torch.inf, 1.0, 1.0]), r"\+inf"),
    ],
)
def test_shapes_and_anomalies_match_exactly(out, reason):
    truth = {"x": torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)}
    verdict = judge({"x": out}, truth, None, ALLOWED, torch.float32)
    assert not verdict.ok
    assert re.search(reason, verdict.reason)


def test_integers_match_exactly():
    truth = {"count": torch.tensor([3, 4])}
    right, wrong = {"count": torch.tensor([3, 4]).int()}, {"count": torch.tensor([3, 5]).int()}
    assert judge(right, truth, None, ALLOWED, torch.float32).ok
    assert "1 of 2 integers differ" in judge(wrong, truth, None, ALLOWED, torch.float32).reason


def test_a_missing_output_is_named():
    verdict = judge({}, {"x": torch.ones(1)}, None, ALLOWED, torch.float32)
    assert not verdict.ok and "expected ['x']" in verdict.reason


def test_zero_truth_needs_zero_output():
    truth = {"x": torch.zeros(3, dtype=torch.float64)}
    assert judge({"x": torch.zeros(3)}, truth, None, ALLOWED, torch.float32).ok
    assert not judge({"x": torch.full((3,), 1e-30)}, truth, None, ALLOWED, torch.float32).ok
