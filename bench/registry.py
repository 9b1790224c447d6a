"""What a benchmark case is, and how the command line finds one.

A case lives in ``bench/cases/<word>.py`` beside its word's other cases. It says how to make inputs,
what the work costs at least (bytes, flops), which providers do that work, and what the truth is.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
Outputs = dict[str, torch.Tensor]

#: Relative RMS error that any provider may have against the float64 truth: a few rounding steps.
RELATIVE_CEILING = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}


class UnknownCase(ValueError):
    """No case has this name; the message gives the nearest ones."""


@dataclass(frozen=True)
class Provider:
    """One way to do a case's work.

    Attributes:
        name: ``ours:<backend>`` for this package's own, else what it is made of, as ``torch``.
        run: does the work on inputs in place and returns what ``Case.outputs`` needs.
        optional: runs only when asked for by name (slow to start, or of no interest in a table).
        note: what a reader of the table must know, as "cos and sin are given".

    The first call on a set of inputs may prepare what later calls on it use: the check and every
    timer call a provider before they time it.
    """

    name: str
    run: Callable[[Inputs], Any]
    optional: bool = False
    note: str = ""

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours:")

    @property
    def package(self) -> str:
        return package_of(self.name)


def package_of(provider: str) -> str:
    """What it is made of, by its name: ``torch:sdpa`` -> ``torch``."""
    return provider.partition(":")[0]


@dataclass(frozen=True)
class Tolerance:
    """When a provider's output counts as right, against the float64 truth.

    Attributes:
        relative: ceiling for ``||out - truth|| / ||truth||`` of every provider.
        factor: largest absolute error allowed, as a multiple of the yardstick's (the case's
            baseline) in the same dtype.
        floor: added to that, in units of the dtype's epsilon times the largest true magnitude.
    """

    relative: float
    factor: float = 2.0
    floor: float = 2.0

    @staticmethod
    def of(dtype: torch.dtype) -> Tolerance:
        return Tolerance(RELATIVE_CEILING[dtype])


@dataclass(frozen=True)
class Case:
    """One benchmark: an op at one size.

    Attributes:
        name: unique, starts with the word: ``append/320t-16h-2g-128d/float32``.
        word: the design's word (append, attention, ...).
        op: the op measured, as ``rope_append``.
        axes: sizes and switches by name, for tables and plots.
        dtype: of the main inputs.
        bytes: the fewest bytes that must move: each input read once, each output written once.
        flops: floating-point operations that must be done.
        make: ``(device, seed) -> inputs``; fresh random values, memory to be written holds NaN.
        providers: ``(device) -> providers`` that can run there; asks ``backends`` for ours.
        reference: ``(inputs) -> outputs`` in float64 on the CPU, without touching its inputs.
        outputs: ``(inputs, result) -> outputs``: what a provider returned and what it wrote.
        baseline: the provider that ratios and the error yardstick refer to.
        smoke: small enough for tests and for compute-sanitizer.
        reads: it writes next to nothing: its ceiling is the bandwidth of reading alone.
        heavy: a call takes seconds on a CPU: few rounds there, and one cache state everywhere.
        devices: device types the case makes sense on.
        absent: ``(device) -> {package: reason}``: packages whose providers are not among
            ``providers(device)``, though elsewhere they are.
    """

    name: str
    word: str
    op: str
    axes: Mapping[str, int | str | bool]
    dtype: torch.dtype
    bytes: int
    flops: int
    make: Callable[[torch.device, int], Inputs]
    providers: Callable[[torch.device], Sequence[Provider]]
    reference: Callable[[Inputs], Outputs]
    outputs: Callable[[Inputs, Any], Outputs]
    baseline: str = "torch"
    smoke: bool = False
    reads: bool = False
    heavy: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    tolerance: Tolerance | None = field(default=None)
    absent: Callable[[torch.device], Mapping[str, str]] = field(default=lambda device: {})

    def __post_init__(self) -> None:
        if not self.name.startswith(self.word + "/"):
            raise ValueError(f"case {self.name!r} must be named {self.word}/...")
        if self.bytes <= 0 or self.flops < 0:
            raise ValueError(f"case {self.name!r}: bytes={self.bytes}, flops={self.flops}")

    @property
    def allowed(self) -> Tolerance:
        return self.tolerance or Tolerance.of(self.dtype)


CASES: dict[str, Case] = {}


def add(case: Case) -> Case:
    """Registers a case; a second one under the same name raises ValueError."""
    if case.name in CASES:
        raise ValueError(f"a case named {case.name!r} is registered already")
    CASES[case.name] = case
    return case


def case(make_cases: Callable[[], Iterable[Case]]) -> Callable[[], Iterable[Case]]:
    """Decorator: registers every case that the function yields."""
    for one in make_cases():
        add(one)
    return make_cases


def load() -> dict[str, Case]:
    """Imports every module of ``bench/cases`` and returns all cases by name."""
    from vicostream_kernels.bench import cases

    for module in pkgutil.iter_modules(cases.__path__, cases.__name__ + "."):
        importlib.import_module(module.name)
    return CASES


def select(patterns: Sequence[str], cases: Mapping[str, Case]) -> list[Case]:
    """Cases that match any pattern: a word, an op, a whole name, a glob or a regular expression.

    Raises UnknownCase, with the nearest names, for a pattern that matches nothing.
    """
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        matched = {name: c for name, c in cases.items() if _matches(pattern, c)}
        if not matched:
            raise UnknownCase(_unknown(pattern, cases))
        chosen.update(matched)
    order = list(cases)
    return sorted(chosen.values(), key=lambda c: order.index(c.name))


def _matches(pattern: str, case: Case) -> bool:
    if pattern in (case.word, case.op, case.name) or fnmatch.fnmatchcase(case.name, pattern):
        return True
    try:
        return re.fullmatch(pattern, case.name) is not None
    except re.error:
        return False


def _unknown(pattern: str, cases: Mapping[str, Case]) -> str:
    words = sorted({c.word for c in cases.values()} | {c.op for c in cases.values()})
    near = difflib.get_close_matches(pattern, [*words, *cases], n=3, cutoff=0.4)
    hint = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(words) or 'none'}"
    return f"no benchmark case matches {pattern!r}; {hint} (--list shows all)"
