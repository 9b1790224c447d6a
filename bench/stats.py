"""Quantiles of samples, and the ratio of two paired series with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, the 20th and 80th percentile, and how many samples."""

    p20: float
    p50: float
    p80: float
    samples: int


@dataclass(frozen=True)
class Ratio:
    """Baseline time over provider time: above 1 the provider is faster. 95 % interval."""

    median: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        return not self.low <= 1.0 <= self.high


def timing(nanoseconds: Sequence[float]) -> Timing:
    if not len(nanoseconds):
        raise ValueError("timing needs at least one sample")
    p20, p50, p80 = np.quantile(np.asarray(nanoseconds, dtype=np.float64) / 1e3, (0.2, 0.5, 0.8))
    return Timing(float(p20), float(p50), float(p80), len(nanoseconds))


def paired_ratio(
    baseline: Sequence[float], provider: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> Ratio:
    """Median of the pairwise ratios; the interval is a percentile bootstrap over the pairs.

    Pairing cancels what drifts slowly (clock speed, other load): both halves of a pair saw the
    same moment. The seed is fixed, so the same samples give the same interval.
    """
    if len(baseline) != len(provider) or not len(baseline):
        raise ValueError(f"paired samples needed, got {len(baseline)} and {len(provider)}")
    ratios = np.asarray(baseline, dtype=np.float64) / np.asarray(provider, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(ratios), size=(resamples, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def geomean(values: Sequence[float]) -> float:
    """Geometric mean of positive numbers; NaN for none."""
    if not len(values):
        return float("nan")
    return float(np.exp(np.mean(np.log(np.asarray(values, dtype=np.float64)))))
