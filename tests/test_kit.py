"""The checks of the kit can fail."""

from __future__ import annotations

import pytest
import torch

from kit import interpreter, tensors
from kit.compare import assert_matches, assert_same_bits
from kit.topk import assert_valid_topk


def test_poisoned_empties_follow_the_device_context():
    with torch.device("meta"):
        assert torch.empty(3).device.type == torch.empty_strided((3,), (1,)).device.type == "meta"


def test_empties_are_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.float16)).isnan().all()
    assert torch.zeros(2).new_empty(4).isnan().all()
    assert torch.empty(2, dtype=torch.int32).ne(0).all()


def test_inputs_have_gaps():
    x = tensors.randn((3, 4, 5))
    assert not x.is_contiguous() and x.stride(-1) == 1
    assert torch.equal(x, tensors.randn((3, 4, 5), gaps=False))
    assert x._base.isnan().any(), "the gaps hold NaN"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_assert_matches_accepts_a_rounded_truth_and_refuses_more(dtype):
    truth = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_matches(truth.to(dtype), truth)
    off = truth.clone()
    off[7] += 8 * torch.finfo(dtype).eps * truth.abs().max()
    with pytest.raises(AssertionError, match=r"error .* at \[7\]"):
        assert_matches(off.to(dtype), truth)


def test_assert_matches_allows_twice_the_error_of_torch():
    truth = torch.ones(10, dtype=torch.float64)
    assert_matches((truth + 1.9e-3).float(), truth, (truth + 1e-3).float())
    with pytest.raises(AssertionError, match="allowed"):
        assert_matches((truth + 2.1e-3).float(), truth, (truth + 1e-3).float())


def test_assert_matches_takes_the_worst_of_several_and_the_size_of_sums():
    truth = torch.ones(10, dtype=torch.float64)
    several = [truth.float(), (truth + 1e-3).float()]
    assert_matches((truth + 1.9e-3).float(), truth, several)
    with pytest.raises(AssertionError, match="allowed"):
        assert_matches((truth + 2.1e-3).float(), truth, several)
    eps = torch.finfo(torch.float32).eps
    for factor, passes in ((0.9, True), (1.1, False)):
        off = (truth + 2 * eps + factor * 2 * eps * 1000).float()
        if passes:
            assert_matches(off, truth, summed=1000.0)
            continue
        with pytest.raises(AssertionError, match="allowed"):
            assert_matches(off, truth, summed=1000.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_assert_matches_takes_no_measure_from_an_overflow_of_torch(bad):
    truth = torch.ones(10, dtype=torch.float64)
    overflown = truth.float()
    overflown[3] = bad
    assert_matches(truth.float(), truth, overflown)
    with pytest.raises(AssertionError, match="allowed"):
        assert_matches((truth + 1e-3).float(), truth, overflown)


def test_assert_matches_catches_a_bias_that_no_single_error_shows():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4096, dtype=torch.float64, generator=generator)
    biased = truth + 3e-4
    with pytest.raises(AssertionError, match="cosine"):
        assert_matches(biased.float(), truth, (truth + 1e-3).float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_assert_matches_wants_exact_anomalies(bad):
    truth = torch.zeros(4, dtype=torch.float64)
    truth[2] = bad
    assert_matches(truth.float(), truth)
    with pytest.raises(AssertionError):
        assert_matches(torch.zeros(4), truth)
    with pytest.raises(AssertionError):
        assert_matches(truth.float(), torch.zeros(4, dtype=torch.float64))


def test_assert_same_bits_names_the_place():
    x = torch.tensor([1.0, float("nan"), 3.0])
    assert_same_bits(x, x.clone())
    y = x.clone()
    y[2] = 4.0
    with pytest.raises(AssertionError, match=r"\(2,\)"):
        assert_same_bits(x, y)
    with pytest.raises(AssertionError):
        assert_same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_topk_check():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert_valid_topk(torch.tensor([1, 2, -1]), scores, 2)
    with pytest.raises(AssertionError, match="tie"):
        assert_valid_topk(torch.tensor([1, 3]), scores, 2)
    assert_valid_topk(torch.tensor([1, 3]), scores, 2, lowest_index_ties=False)
    for wrong in ([0, 1], [2, 1], [1], [1, 1], [-1, 1]):
        with pytest.raises(AssertionError):
            assert_valid_topk(torch.tensor(wrong), scores, 2)


@pytest.mark.parametrize("limit,end", [(540, "ended with 7"), (0.01, "was stopped after 0.01 s")])
def test_a_process_that_is_cut_off_says_where(limit, end, tmp_path, monkeypatch):
    monkeypatch.setattr(interpreter, "_TIMEOUT_S", limit)
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_one(): pass\ndef test_two(): os._exit(7)\ndef test_three(): pass\n"
    )
    ran = interpreter.run([str(tmp_path / "test_it.py")], mode={})
    assert f"its process {end}, " in ran.output
    if limit < 1:
        assert "before the first test; 0 tests were done" in ran.output and not ran.outcomes
        return
    found = {nodeid.rpartition("::")[2]: o for nodeid, o in ran.outcomes.items()}
    assert {name: o.outcome for name, o in found.items()} == {
        "test_one": "passed",
        "test_two": "failed",
    }
    assert "test_two, which began " in found["test_two"].text
    assert len(ran.collected) == 3


def test_a_process_that_is_cut_off_between_tests_fails_the_last_one():
    lines = [["a", "started", 3.0], ["a", "passed", ""], ["a", "ended", 5.0]]
    assert interpreter._read(lines, "", None).outcomes["a"].outcome == "passed"
    cut = interpreter._read(lines, "all", "it was stopped")
    assert cut.outcomes["a"].outcome == "failed"
    assert cut.output == "it was stopped, after a, which took 2 s; 1 tests were done:\nall"
