"""Quantiles, paired ratios with their interval, geometric mean: against numbers known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vicostream_kernels.bench.stats import geomean, paired_ratio, timing


def test_timing_is_in_microseconds_per_call():
    result = timing([1000.0 * i for i in range(1, 12)])
    assert (result.p20, result.p50, result.p80, result.samples) == (3.0, 6.0, 9.0, 11)


def test_pairing_cancels_a_drift_that_both_saw():
    drift = np.linspace(1, 50, 60)
    ratio = paired_ratio(200 * drift, 100 * drift)
    assert ratio.median == ratio.low == ratio.high == pytest.approx(2.0)
    assert ratio.significant


def test_equal_providers_are_not_significantly_different():
    random = np.random.default_rng(3)
    ratio = paired_ratio(random.lognormal(0, 0.2, 200), random.lognormal(0, 0.2, 200))
    assert ratio.low < 1 < ratio.high and not ratio.significant
    assert ratio.high - ratio.low < 0.2


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    random = np.random.default_rng(5)
    covered = 0
    for seed in range(200):
        base = random.lognormal(math.log(1.5), 0.3, 41)
        ratio = paired_ratio(base, random.lognormal(0, 0.3, 41), resamples=300, seed=seed)
        covered += ratio.low <= 1.5 <= ratio.high
    assert covered >= 180


def test_geomean():
    assert geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geomean([]))


@pytest.mark.parametrize("pair", [([], []), ([1.0], [1.0, 2.0])])
def test_unpaired_samples_are_refused(pair):
    with pytest.raises(ValueError, match="paired samples"):
        paired_ratio(*pair)


def test_timing_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        timing([])
