"""PruneRule: how tokens are scored and which are kept, as one frozen value."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

REFERENCES = ("previous", "last_kept", "chunk_first", "frame_mean", "running_mean")
METRICS = ("cosine", "l1", "l2", "gaussian")
MAX_TERMS = 2
#: Values that a metric can take; a threshold outside them would keep all or nothing.
METRIC_RANGE = {
    "cosine": (-1.0, 1.0),
    "l1": (0.0, math.inf),
    "l2": (0.0, math.inf),
    "gaussian": (0.0, 5.0),
}
_CHOICES = {
    "keep": ("below", "above", "at_most", "at_least"),
    "scope": ("step", "chunk", "call"),
    "reduce": ("none", "any"),
    "always_keep": ("none", "first", "first_of_stream"),
    "history": ("step", "chunk"),
    "mask": ("and", "or"),
}


class Term(NamedTuple):
    """One weighted comparison of a token with its reference."""

    reference: str
    metric: str
    weight: float


@dataclass(frozen=True)
class PruneRule:
    """How ``prune_tokens`` scores tokens and which it keeps. Frozen, hashable, checked when made.

    The score of a token is ``sum(weight * metric(token, reference)) + external * external_score``.

    Attributes:
        reference: what a token at (step t, location n) is compared with; one name, or a tuple of up
            to two for a sum of weighted terms, or ``()`` for none. A token that has no reference
            (nothing came before it) scores NaN.
            "previous": location n at step t-1, kept or not, across calls where there is a state.
            "last_kept": the newest kept token at location n (needs a threshold, ``reduce="none"``).
            "chunk_first": location n at the first step of the chunk, which has none itself.
            "frame_mean": the mean token of step t.
            "running_mean": the mean of the means of all steps (chunks, by ``history``) of the
            stream up to and including this one. Means leave out tokens with NaN or inf.
        metric: one name, or a tuple as long as ``reference``. Similarities: "cosine"; "gaussian",
            ``sum(exp(-|a - b|^2 / 2^(k+1)) for k in -3..1)`` over L2-normalised tokens (0 to 5;
            frame_mean is then the mean of normalised tokens, running_mean the normalised mean of
            raw ones, as in STC, arXiv 2512.00891). Distances: "l1", the mean absolute difference
            over the channels; "l2", the root of the mean square difference.
            Cosine of two zero vectors is 1 (unchanged), of a zero and another 0; of equal vectors
            exactly 1.
        weights: a finite weight for each term; None is 1 each.
        external: weight of ``external_score``; 0 takes no external score.
        keep: "below" keeps scores < threshold, "at_most" <=, "above" >, "at_least" >=. With k or a
            ratio only the direction counts: the lowest or the highest.
        threshold, k, ratio, drop_ratio: at most one. Of the n tokens of a ``scope`` (or of a group
            in it) stay: ``k``; ``int(n * ratio)``; ``n - d`` with ``d = int(n * drop_ratio)``
            rounded down to a multiple of ``drop_multiple``. ``k`` may be a tuple: one number for
            each group. None of them (only with ``reference=()`` and ``external=0``) keeps all but
            what the external mask leaves out: ``PruneRule(reference=())`` keeps everything.
        scope: what k or a ratio counts over: every "step", "chunk" or the whole "call". A chunk
            is the T of a call, or one segment of the packed form.
        reduce: "any": where one step of a location is chosen, the whole column of the chunk stays.
        always_keep: "first" keeps step 0 of every chunk whole, "first_of_stream" only the very
            first step of a stream; such a step takes no part in ``reduce``.
        channels: share of channels that is compared: the ``max(1, int(D * channels))`` with the
            lowest variance over the chunk (ties to the lowest index).
        history: what "running_mean" averages: the mean of each "step" (causal), or of each "chunk".
        mask: "and" keeps only what ``external_mask`` has, "or" keeps that in addition.

    Order of the decision: tokens with NaN or inf (not looked for without a ``reference``),
    always-kept steps and the "or" mask must stay, unless the "and" mask leaves them out; a
    threshold, or the ranking in which those that must stay come first and count, chooses; NaN
    scores are kept by every threshold and come first in a ranking, with the infinite ones of their
    end; ties go to the lowest index. What the "and" mask leaves out is no candidate in a ranking,
    but counts in the n of a ratio. Then ``reduce``, in which always-kept steps take no part, nor do
    tokens that the "or" mask alone keeps (with k or a ratio: none that it keeps, as they take the
    first places). Last the "and" mask again: it leaves out anything.

    Raises:
        ValueError, TypeError: a field's value is not allowed; the message names it.

    Example, ViCoStream's chunk-intra rule (arXiv 2606.19849)::

        PruneRule(reference="previous", metric="cosine", keep="below", threshold=0.25,
                  reduce="any", always_keep="first")
    """

    reference: str | tuple[str, ...] = "previous"
    metric: str | tuple[str, ...] = "cosine"
    weights: tuple[float, ...] | None = None
    external: float = 0.0
    keep: Literal["below", "above", "at_most", "at_least"] = "below"
    threshold: float | None = None
    k: int | tuple[int, ...] | None = None
    ratio: float | None = None
    drop_ratio: float | None = None
    drop_multiple: int = 1
    scope: Literal["step", "chunk", "call"] = "step"
    reduce: Literal["none", "any"] = "none"
    always_keep: Literal["none", "first", "first_of_stream"] = "none"
    channels: float = 1.0
    history: Literal["step", "chunk"] = "step"
    mask: Literal["and", "or"] = "and"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            _choice(name, getattr(self, name), allowed)
        self._normalise()
        self._check_terms()
        self._check_decision()
        # Made once: the text is the argument of the raw op, and tracing must find it ready.
        object.__setattr__(self, "_text", self._encode())

    def _normalise(self) -> None:
        """Equal rules are equal values: lone names for one term, floats where numbers are meant."""
        references = _names("reference", self.reference)
        metrics = _names("metric", self.metric)
        if len(metrics) == 1:
            metrics *= max(1, len(references))
        weights = (
            None if self.weights is None else tuple(_number("weights", w) for w in self.weights)
        )
        if weights is not None and set(weights) <= {1.0} and len(weights) == len(references):
            weights = None
        same_metric = len(set(metrics)) == 1
        settled = {
            "reference": references[0] if len(references) == 1 else references,
            "metric": metrics[0]
            if same_metric and len(metrics) in (1, len(references))
            else metrics,
            "weights": weights,
        }
        for name in ("external", "threshold", "ratio", "drop_ratio", "channels"):
            value = getattr(self, name)
            settled[name] = None if value is None else _number(name, value)
        if isinstance(self.k, list):
            settled["k"] = tuple(self.k)
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def _check_terms(self) -> None:
        references, metrics = _names("reference", self.reference), _names("metric", self.metric)
        if len(references) > MAX_TERMS:
            raise ValueError(f"PruneRule: reference={self.reference!r} has more than two terms")
        for name in references:
            _choice("reference", name, REFERENCES)
        for name in metrics:
            _choice("metric", name, METRICS)
        if len(metrics) not in (1, len(references)):
            raise ValueError(
                f"PruneRule: metric={self.metric!r} must be one name, or one for each of the "
                f"{len(references)} references"
            )
        if self.weights is not None and len(self.weights) != len(references):
            raise ValueError(
                f"PruneRule: weights={self.weights!r} must hold one weight for each of the "
                f"{len(references)} references"
            )
        if self.weights is not None and 0 in self.weights:
            raise ValueError(f"PruneRule: weights={self.weights!r} holds a 0, allowed: any other")
        if not 0 < self.channels <= 1:
            raise ValueError(f"PruneRule: channels={self.channels} is outside (0, 1]")

    def _check_decision(self) -> None:
        given = [
            n for n in ("threshold", "k", "ratio", "drop_ratio") if getattr(self, n) is not None
        ]
        scored = bool(self.terms) or self.external != 0
        if len(given) > 1 or (scored and not given) or (given and not scored):
            raise ValueError(
                "PruneRule: a score needs exactly one of threshold, k, ratio, drop_ratio, and "
                f"these need a score; got {', '.join(given) or 'none of them'} with "
                f"reference={self.reference!r}, external={self.external}"
            )
        for name in ("ratio", "drop_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"PruneRule: {name}={value} is outside [0, 1]")
        counts = () if self.k is None else self.k if isinstance(self.k, tuple) else (self.k,)
        if self.k == () or any(type(c) is not int or c < 0 for c in counts):
            raise ValueError(
                f"PruneRule: k={self.k!r} must be a whole number >= 0, or a tuple of them"
            )
        if type(self.drop_multiple) is not int or self.drop_multiple < 1:
            raise ValueError(f"PruneRule: drop_multiple={self.drop_multiple!r} must be at least 1")
        low, high = self.score_range
        if self.threshold is not None and not low <= self.threshold <= high:
            raise ValueError(
                f"PruneRule: threshold={self.threshold} is outside [{low}, {high}], the values of "
                f"metric={self.metric!r}"
            )
        if "last_kept" in self.needs and (self.threshold is None or self.reduce != "none"):
            raise ValueError(
                'PruneRule: reference="last_kept" decides token after token: it needs a threshold '
                f'and reduce="none", got {given[0]} and reduce={self.reduce!r}'
            )

    @property
    def terms(self) -> tuple[Term, ...]:
        """The weighted comparisons, as ``(reference, metric, weight)``."""
        references, metrics = _names("reference", self.reference), _names("metric", self.metric)
        metrics = metrics * len(references) if len(metrics) == 1 else metrics
        weights = self.weights or (1.0,) * len(references)
        return tuple(Term(*term) for term in zip(references, metrics, weights))

    @property
    def score_range(self) -> tuple[float, float]:
        """The least and the greatest score that the terms allow."""
        if self.external:
            return -math.inf, math.inf
        low = high = 0.0
        for _, metric, weight in self.terms:
            ends = sorted(weight * end for end in METRIC_RANGE[metric])
            low, high = low + ends[0], high + ends[1]
        return low, high

    @property
    def keeps_low(self) -> bool:
        """Whether low scores are kept."""
        return self.keep in ("below", "at_most")

    @property
    def ranked(self) -> bool:
        """Whether a number of tokens decides, not a threshold."""
        return self.k is not None or self.ratio is not None or self.drop_ratio is not None

    @property
    def needs(self) -> frozenset[str]:
        """Which tensors of a :class:`PruneState` the rule reads besides ``steps``."""
        references = _names("reference", self.reference)
        names = {"last_kept"} & set(references)
        if "previous" in references and self.always_keep != "first":
            names.add("previous")
        if "running_mean" in references:
            names |= {"mean", "mean_count"}
        return frozenset(names)

    @property
    def causal(self) -> bool:
        """Whether steps fed one by one with a state give the bits of any larger calls.

        Other rules look at the chunk as a whole: for them chunks fed one by one give the bits of
        the packed form with the same chunks.
        """
        references = _names("reference", self.reference)
        return (
            self.reduce == "none"
            and (not self.ranked or self.scope == "step")
            and self.always_keep != "first"
            and (self.channels == 1.0 or not references)
            and "chunk_first" not in references
            and ("running_mean" not in references or self.history == "step")
        )

    def count(self, n: int) -> int:
        """How many of ``n`` tokens a ranked rule with one ``k`` or a ratio keeps."""
        if self.ratio is not None:
            return int(n * self.ratio)
        if self.drop_ratio is not None:
            return n - int(n * self.drop_ratio) // self.drop_multiple * self.drop_multiple
        if not isinstance(self.k, int):
            raise ValueError(f"PruneRule: k={self.k!r} is not one number for all")
        return min(self.k, n)

    def text(self) -> str:
        """The rule as one line for the raw op; ``PruneRule.parse`` reads it back."""
        return self._text

    def _encode(self) -> str:
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            items = value if isinstance(value, tuple) else (value,)
            # The comma after each item of a tuple tells () and (3,) from nothing and 3.
            said = "".join(f"{i}," for i in items) if isinstance(value, tuple) else str(items[0])
            parts.append(f"{field.name}={said}")
        return ";".join(parts)

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> PruneRule:
        """The rule that ``text()`` gave; raises ValueError on anything else."""
        known = {field.name for field in dataclasses.fields(PruneRule)}
        values = {}
        for part in filter(None, text.split(";")):
            name, equals, said = part.partition("=")
            if not equals or name not in known:
                raise ValueError(f"PruneRule: {part!r} in {text!r} is not field=value")
            if said.endswith(",") or not said:
                values[name] = tuple(_literal(item) for item in said.split(",")[:-1])
            else:
                values[name] = _literal(said)
        return PruneRule(**values)


def _names(field: str, value: str | tuple[str, ...]) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (tuple, list)) or any(not isinstance(n, str) for n in names):
        raise TypeError(f"PruneRule: {field}={value!r} must be a name or a tuple of names")
    return tuple(names)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"PruneRule: {name}={value!r} must be a number")
    if not math.isfinite(value):
        raise ValueError(f"PruneRule: {name}={value} must be finite")
    return float(value)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"PruneRule: {name}={value!r} is not one of {', '.join(map(repr, allowed))}"
        )


def _literal(text: str) -> str | int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None if text == "None" else text
