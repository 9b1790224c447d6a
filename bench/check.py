"""Correctness before speed: every provider against a float64 truth, on poisoned memory.

A provider that fails here gets no time at all, only the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vicostream_kernels.bench.inputs import clone, to_truth
from vicostream_kernels.bench.lost_device import first_line, why_lost
from vicostream_kernels.bench.registry import Case, Outputs, Provider, Tolerance


@dataclass(frozen=True)
class Verdict:
    """``relative`` is the worst relative RMS error of any output, ``reason`` the first fault."""

    ok: bool
    relative: float
    reason: str = ""


@contextmanager
def poisoned_empty():
    """Inside, ``torch.empty`` gives NaN (floats) or the largest value (integers)."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def check(
    case: Case, device: torch.device, providers: Sequence[Provider], seed: int
) -> dict[str, Verdict]:
    """Runs each provider once on its own copy of fresh inputs and judges its outputs.

    The providers run before the truth is computed, so that memory it leaves behind can't pass for
    a provider's own work. The case's baseline must be among ``providers``: it is the yardstick.
    Where a provider loses the device the later ones do not run; what the others made is judged.
    """
    made = case.make(device, seed)
    before = to_truth(made)  # a lost device gives nothing back
    lost_by = ""
    got: dict[str, Outputs | str] = {}  # outputs, or why there are none
    for provider in providers:
        if lost_by:
            got[provider.name] = f"not run: {lost_by} lost the device"
            continue
        try:
            inputs = clone(made)
            if provider.ours:
                with poisoned_empty():
                    result = provider.run(inputs)
            else:
                result = provider.run(inputs)
            outputs = case.outputs(inputs, result)
            got[provider.name] = {name: out.detach().cpu() for name, out in outputs.items()}
        except Exception as error:  # a provider that raises is a finding, not the end of the run
            got[provider.name] = f"raised {first_line(error)}"
            lost_by = provider.name if why_lost() else ""
    truth = case.reference(before)

    yardstick = got[case.baseline]
    if isinstance(yardstick, str):
        yardstick = None
    verdicts = {}
    for provider in providers:
        outputs = got[provider.name]
        if isinstance(outputs, str):
            verdicts[provider.name] = Verdict(False, float("nan"), outputs)
        else:
            bound = None if provider.name == case.baseline else yardstick
            verdicts[provider.name] = judge(outputs, truth, bound, case.allowed, case.dtype)
    return verdicts


def judge(
    outputs: Outputs,
    truth: Outputs,
    yardstick: Outputs | None,
    allowed: Tolerance,
    dtype: torch.dtype,
) -> Verdict:
    """Compares outputs with the truth; with a yardstick, also their worst error with its worst."""
    if set(outputs) != set(truth):
        return Verdict(False, float("nan"), f"outputs {sorted(outputs)}, expected {sorted(truth)}")
    worst = 0.0
    for name, true in truth.items():
        out = outputs[name]
        reason, relative, error = _compare(out, true)
        worst = max(worst, relative)
        if not reason and not relative <= allowed.relative:
            reason = f"relative error {relative:.2e} > {allowed.relative:.0e}"
        if not reason and yardstick is not None:
            scale = true[true.isfinite()].abs().max().item() if true.isfinite().any() else 0.0
            floor = allowed.floor * torch.finfo(dtype).eps * scale
            reference_error = _compare(yardstick[name], true)[2]
            bound = allowed.factor * reference_error + floor
            if not error <= bound:
                reason = f"largest error {error:.2e} > {bound:.2e} ({allowed.factor:g} x torch's)"
        if reason:
            return Verdict(False, worst, f"{name}: {reason}")
    return Verdict(True, worst)


def _compare(out: torch.Tensor, true: torch.Tensor) -> tuple[str, float, float]:
    """A fault or "", the relative RMS error, and the largest absolute error."""
    if out.shape != true.shape:
        return f"shape {tuple(out.shape)}, expected {tuple(true.shape)}", float("nan"), float("nan")
    if not true.is_floating_point():
        wrong = int((out != true).sum())
        return (f"{wrong} of {true.numel()} integers differ" if wrong else ""), 0.0, 0.0
    out = out.double()
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = int((test(out) != test(true)).sum())
        if wrong:
            fault = f"{wrong} of {true.numel()} elements differ in being {what}"
            return fault, float("nan"), float("nan")
    finite = true.isfinite()
    error = (out - true)[finite]
    if not error.numel():
        return "", 0.0, 0.0
    norm = true[finite].norm().item()
    largest = error.abs().max().item()
    relative = error.norm().item() / norm if norm else (0.0 if largest == 0 else float("inf"))
    return "", relative, largest
