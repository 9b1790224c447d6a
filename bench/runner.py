"""Runs cases: check, then time in turn, then rows. The command line and ``gpu_check`` call this."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vicostream_kernels.backends import BACKENDS
from vicostream_kernels.bench import environment
from vicostream_kernels.bench.check import Verdict, check
from vicostream_kernels.bench.lost_device import why_lost
from vicostream_kernels.bench.registry import Case, Inputs, Provider, package_of
from vicostream_kernels.bench.results import Document, Row
from vicostream_kernels.bench.roofline import Roofline
from vicostream_kernels.bench.stats import Ratio, paired_ratio, timing
from vicostream_kernels.bench.timer import FULL, HEAVY, QUICK, Budget, Samples, measure_cpu


class NothingToRun(ValueError):
    """What was asked for leaves no case or no provider; the message says what there is."""


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        device: where.
        providers: names to run beside the baseline; () is every one that is not optional.
        baseline: the provider ratios refer to; "" is each case's own.
        caches: "warm", "cold" or both.
        graphs: on CUDA, replay graphs (kernel time) instead of timing eager calls.
        quick: shorter measurements with wider intervals.
        seed: of the random inputs; the checked and the timed inputs differ.
        leave_out: providers, or packages of such, that run only when asked for by name.
    """

    device: torch.device
    providers: tuple[str, ...] = ()
    baseline: str = ""
    caches: tuple[str, ...] = ("warm", "cold")
    graphs: bool = True
    quick: bool = False
    seed: int = 0
    leave_out: tuple[str, ...] = ()

    @property
    def budget(self) -> Budget:
        return QUICK if self.quick else FULL


@contextmanager
def threads(count: int | None):
    """``torch.set_num_threads(count)`` inside; None leaves it alone. Our CPU code follows it."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def filter_cases(cases: Sequence[Case], device: torch.device, dtype: str = "") -> list[Case]:
    """Cases for this device, and of this dtype when one is named. Raises NothingToRun."""
    kept = [
        case
        for case in cases
        if device.type in case.devices and dtype in ("", str(case.dtype).removeprefix("torch."))
    ]
    if not kept:
        have = sorted({str(c.dtype).removeprefix("torch.") for c in cases})
        raise NothingToRun(
            f"no case is left for device={device.type}, dtype={dtype or 'any'} "
            f"(dtypes there: {', '.join(have) or 'none'})"
        )
    return kept


def choose_providers(case: Case, options: Options) -> tuple[list[Provider], str]:
    """The providers to run, the baseline first, and the baseline's name. Raises NothingToRun."""
    available = {p.name: p for p in case.providers(options.device)}
    baseline = options.baseline or case.baseline
    for name in (baseline, case.baseline, *options.providers):
        if name not in available:
            reason = case.absent(options.device).get(package_of(name))
            raise NothingToRun(
                f"{case.name} has no provider {name!r} on {options.device.type}"
                f"{f' ({reason})' if reason else ''}; there are: {', '.join(available)}"
            )
    wanted = options.providers or [
        p.name
        for p in available.values()
        if not p.optional and not {p.name, p.package} & set(options.leave_out)
    ]
    names = dict.fromkeys((baseline, *wanted))
    return [available[name] for name in names], baseline


def absent(cases: Sequence[Case], options: Options) -> dict[str, str]:
    """Packages that none of the cases can be seen beside on this GPU, and why not.

    Nothing where providers were asked for by name. Nor on a CPU, where nobody misses them.
    """
    if options.providers or options.device.type == "cpu":
        return {}
    there = {p.package for case in cases for p in case.providers(options.device)}
    found: dict[str, str] = {}
    for case in cases:
        found |= case.absent(options.device)
    return {name: why for name, why in found.items() if name not in {*there, *options.leave_out}}


def run(
    cases: Sequence[Case],
    options: Options,
    *,
    progress: Callable[[str], None] = lambda line: None,
    each: Callable[[Document], None] = lambda document: None,
) -> Document:
    """Runs every case; ``each`` sees the document after each one, so that a stop loses nothing."""
    for case in cases:
        choose_providers(case, options)
    progress(f"measuring the ceilings of {environment.device_name(options.device)}")
    roofline = Roofline.measure(options.device, quick=options.quick)
    document = Document(environment.collect(options.device), left_out=absent(cases, options))
    for case in cases:
        if reason := too_slow(case, options, roofline):
            document.left_out[case.name] = reason
            document.roofline = roofline.facts()
            continue
        progress(case.name)
        document.rows.extend(run_case(case, options, roofline))
        document.roofline = roofline.facts()
        each(document)
    return document


#: A case of which one call takes longer than this is not for this machine.
_MOST_SECONDS = 60


def too_slow(case: Case, options: Options, roofline: Roofline) -> str:
    """Why a case would keep this CPU busy for too long, or "": its GEMMs are torch's."""
    if options.device.type != "cpu" or not case.heavy:
        return ""
    seconds = case.flops / roofline.own_rate(case.dtype)
    if seconds < _MOST_SECONDS:
        return ""
    kind = str(case.dtype).removeprefix("torch.")
    return f"one call would take {seconds:.0f} s: torch's {kind} product is that slow here"


def run_case(case: Case, options: Options, roofline: Roofline) -> list[Row]:
    """Checks every provider, then times those that are right; one row each and cache state."""
    chosen, baseline = choose_providers(case, options)
    checked = chosen
    if case.baseline not in {p.name for p in chosen}:
        yardstick = {p.name: p for p in case.providers(options.device)}[case.baseline]
        checked = [yardstick, *chosen]
    with torch.no_grad():
        verdicts = check(case, options.device, checked, options.seed)
        runs = {p.name: p.run for p in chosen if verdicts[p.name].ok}
        # a wrong baseline leaves nothing to compare with, a lost device nothing to time on
        comparable = verdicts[baseline].ok and verdicts[case.baseline].ok
        timed = runs if comparable and not why_lost() else {}
        rows: list[Row] = []
        inputs = None
        caches = options.caches
        if case.heavy:  # sweeps through the caches itself; on a GPU a warm graph holds 16 calls
            caches = caches[:1] if options.device.type == "cpu" else caches[-1:]
        for cache in caches:
            samples = None
            if timed:
                # Runs write into them on a CPU; on a GPU each run has a copy, and they take seconds
                # to make where they are large.
                if inputs is None or options.device.type == "cpu":
                    inputs = case.make(options.device, options.seed + 1)
                samples = _measure(case, options, timed, inputs, roofline, cold=cache == "cold")
            rows += [
                _row(case, p, verdicts[p.name], options, roofline, cache, samples, baseline)
                for p in chosen
            ]
    return rows


#: Among the samples: what memory alone took, each time as long as the case's bytes take.
_CEILING = "ceiling"


def _measure(
    case: Case, options: Options, runs, inputs: Inputs, roofline: Roofline, *, cold: bool
) -> Samples:
    if options.device.type == "cuda":
        from vicostream_kernels.bench.timer_cuda import CudaClock, measure_cuda

        clock = CudaClock(options.device)
        return measure_cuda(
            runs, inputs, cold=cold, budget=options.budget, clock=clock, graphs=options.graphs
        )
    if case.heavy:
        return measure_cpu(runs, inputs, case.bytes, cold=cold, budget=HEAVY)
    ceiling = roofline.ceiling(case.bytes, cold=cold, reads=case.reads)
    runs = {**runs, _CEILING: lambda inputs: ceiling()}
    samples = measure_cpu(runs, inputs, case.bytes, cold=cold, budget=options.budget)
    samples.nanoseconds[_CEILING] = [ceiling.scale * ns for ns in samples.nanoseconds[_CEILING]]
    return samples


def _row(
    case: Case,
    provider: Provider,
    verdict: Verdict,
    options: Options,
    roofline: Roofline,
    cache: str,
    samples: Samples | None,
    baseline: str,
) -> Row:
    row = Row(
        case=case.name,
        word=case.word,
        op=case.op,
        provider=provider.name,
        axes=dict(case.axes),
        dtype=str(case.dtype).removeprefix("torch."),
        device=options.device.type,
        threads=torch.get_num_threads(),
        cache=cache,
        match=verdict.ok,
        error=verdict.relative,
        reason=verdict.reason,
        baseline=baseline,
        bytes=case.bytes,
        flops=case.flops,
        note=provider.note,
    )
    if samples is None or provider.name not in samples.nanoseconds:
        if verdict.ok:
            why = why_lost() and "the device was lost"
            row.reason = f"not timed: {why or f'the baseline {baseline!r} failed its check'}"
        return row
    taken = samples.nanoseconds[provider.name]
    times = timing(taken)
    ratio: Ratio = paired_ratio(samples.paired[baseline], samples.paired[provider.name])
    row.method, row.samples = samples.method, times.samples
    row.p20_us, row.p50_us, row.p80_us = times.p20, times.p50, times.p80
    row.gb_s = case.bytes / times.p50 / 1e3
    row.tflop_s = case.flops / times.p50 / 1e6
    if _CEILING in samples.nanoseconds:
        moving = samples.nanoseconds[_CEILING]
        computing = roofline.floor_us(0, case.flops, case.dtype, cold=True)
        row.floor_us = max(timing(moving).p50, computing)
        row.floor_pct = 100 * max(paired_ratio(moving, taken).median, computing / times.p50)
    else:
        row.floor_us = roofline.floor_us(
            case.bytes, case.flops, case.dtype, cold=cache == "cold", reads=case.reads
        )
        row.floor_pct = 100 * row.floor_us / times.p50
    row.ratio, row.ratio_low, row.ratio_high = ratio.median, ratio.low, ratio.high
    row.significant = ratio.significant
    return row


def parse_device(text: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; raises ValueError when it is no such thing or not there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ValueError(f"device {text!r} is not one of cpu, cuda, cuda:N")
    device = torch.device(text)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device {text!r} is not there: torch finds {count} CUDA devices")
    return device


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def provider_names(text: str) -> tuple[str, ...]:
    """``cpu,torch`` -> ``("ours:cpu", "torch")``: a backend's name means this package's own."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(f"ours:{name}" if name in BACKENDS else name for name in names)
