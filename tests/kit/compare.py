"""Comparison with reasons: how far a result may be from the truth, and why that far."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Round-off floor in units of the result dtype's epsilon, times the largest true value: one
#: rounding of the result plus one of an intermediate of the same size.
FLOOR_ULPS = 2.0
#: 1 - cosine of all values together; catches a small bias everywhere that single errors hide.
MAX_COSINE_DISTANCE = {torch.float32: 1e-9, torch.float16: 2e-6, torch.bfloat16: 1e-4}


def cosine_distance(got: torch.Tensor, truth: torch.Tensor) -> float:
    """1 - cosine similarity in float64; 0 where both are all zero."""
    a, b = got.double().flatten(), truth.double().flatten()
    norm = a.norm() * b.norm()
    if norm == 0:
        return 0.0 if a.norm() == b.norm() else 1.0
    return 1.0 - float(a @ b / norm)


def assert_matches(
    got: torch.Tensor,
    truth: torch.Tensor,
    torch_result: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    name: str = "result",
    factor: float = 2.0,
    summed: float = 0.0,
) -> None:
    """Fails unless ``got`` is as close to ``truth`` as torch itself comes in that dtype.

    Args:
        got: the result under test, in the tested dtype.
        truth: the same in float64.
        torch_result: the same computation by torch in the tested dtype; its error, doubled, is
            allowed beside the round-off floor. None allows the floor only. Of several (the same
            formula with its roundings in other places, all of them torch's) the largest error
            counts: which of them rounds luckily differs between processors.
        summed: the largest sum of |terms| behind a value: partial sums, which are float32, may
            have that size and their rounding is allowed in any order. 0: none.
    """
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} != {tuple(truth.shape)}"
    truth = truth.double().cpu()
    value = got.double().cpu()
    for kind, test in (("nan", torch.isnan), ("inf", torch.isinf)):
        differs = test(value) != test(truth)
        assert not differs.any(), (
            f"{name}: {kind} at {differs.nonzero()[0].tolist()} in one and not in the other "
            f"({int(differs.sum())} places)"
        )
    infinite = torch.isinf(truth)
    assert torch.equal(value[infinite], truth[infinite]), f"{name}: infinities differ in sign"
    finite = torch.isfinite(truth)
    if not finite.any():
        return
    value = torch.where(finite, value, 0.0)
    truth = torch.where(finite, truth, 0.0)

    error = (value - truth).abs()
    floor = FLOOR_ULPS * torch.finfo(got.dtype).eps * float(truth.abs().max())
    floor += FLOOR_ULPS * torch.finfo(torch.float32).eps * summed
    allowed = floor
    if torch_result is not None:
        several = [torch_result] if isinstance(torch_result, torch.Tensor) else torch_result
        results = torch.stack([result.double().cpu() for result in several])
        torch_error = (results - truth)[:, finite].abs()
        # Where torch overflows it sets no measure: an infinite error would allow everything.
        torch_error = torch_error[torch_error.isfinite()]
        allowed += factor * float(torch_error.max()) if torch_error.numel() else 0.0
    worst = int(error.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    assert float(error.max()) <= allowed, (
        f"{name}: error {float(error.max()):.3e} at {place} (got {float(value.flatten()[worst])}, "
        f"truth {float(truth.flatten()[worst])}), allowed {allowed:.3e} "
        f"({factor} x torch's own error in {got.dtype} + floor {floor:.3e})"
    )
    distance = cosine_distance(value, truth)
    limit = MAX_COSINE_DISTANCE.get(got.dtype, 1e-12)
    assert distance <= limit, f"{name}: 1 - cosine = {distance:.3e}, allowed {limit:.0e}"


def assert_same_bits(got: torch.Tensor, wanted: torch.Tensor, *, name: str = "result") -> None:
    """Fails unless both have the same bits (NaN included), naming the first that differs."""
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, (
        f"{name}: {got.dtype} {tuple(got.shape)} != {wanted.dtype} {tuple(wanted.shape)}"
    )
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differs = got.contiguous().view(width) != wanted.contiguous().view(width)
    if differs.any():
        place = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}: first of {int(differs.sum())} differing elements at {place}: "
            f"{got[place].item()!r} != {wanted[place].item()!r}"
        )
