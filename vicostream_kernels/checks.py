"""Argument checks that every op shares: they name the argument, what it got and what is allowed."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache, wraps
from typing import Any

import torch

#: Checks that must read device data (index ranges, uniqueness) run only with VICO_CHECK=1.
CHECK_VALUES = os.environ.get("VICO_CHECK", "0").lower() not in ("", "0", "false", "off", "no")

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


def short(dtype: torch.dtype) -> str:
    """``torch.float32`` -> ``float32``."""
    return str(dtype).removeprefix("torch.")


#: A model calls an op with a handful of shapes, again and again; past this the memory starts anew.
_MOST_REMEMBERED = 4096
#: What is its own key; asked for by type, since ``isinstance`` takes longer to say no.
_VALUES = frozenset({int, float, bool, str})


def remember(check: Callable[..., Any]) -> Callable[..., Any]:
    """Skips ``check(*args)`` for layouts that passed before: a key costs less than the checks.

    The key holds what a check may look at: shape, strides, dtype and device of each tensor, and
    every other argument's value. What the check returned is returned again. Symbolic sizes
    (torch.compile) are always checked.
    """
    passed: dict[Hashable, Any] = {}

    @wraps(check)
    def remembering(*args: object) -> Any:
        try:
            key = tuple(  # of a list: a generator takes half as long again
                [
                    a
                    if a is None or type(a) in _VALUES
                    else (a.shape, a.stride(), a.dtype, a.is_cpu or a.device)
                    if isinstance(a, torch.Tensor)
                    else (tuple(a) if isinstance(a, list) else a)
                    for a in args
                ]
            )
            return passed[key]
        except KeyError:
            pass
        except (TypeError, RuntimeError, AttributeError):  # symbolic sizes have no hash
            key = None
        # Out here, so that what it raises does not come with the key's whole KeyError.
        return _passing(check, args, passed, key)

    return remembering


def remember_pages(check: Callable[..., Any]) -> Callable[..., Any]:
    """`remember` for a check of two tensors, two optional ones and a string that looks at no
    strides: one flat key, less than half the time."""
    passed: dict[Hashable, Any] = {}

    @wraps(check)
    def remembering(a: Any, b: Any, c: Any, d: Any, e: str) -> Any:
        try:
            key = (
                a.shape, a.dtype, a.is_cpu or a.device, b.shape, b.dtype, b.is_cpu or b.device,
                c if c is None else (c.shape, c.dtype, c.is_cpu or c.device),
                d if d is None else (d.shape, d.dtype, d.is_cpu or d.device), e,
            )  # fmt: skip
            return passed[key]
        except KeyError:
            pass
        except (TypeError, RuntimeError, AttributeError):
            key = None
        return _passing(check, (a, b, c, d, e), passed, key)

    return remembering


def _passing(check, args: tuple[object, ...], passed: dict[Hashable, Any], key: Hashable) -> Any:
    result = check(*args)
    if key is None:
        return result
    if len(passed) >= _MOST_REMEMBERED:
        passed.clear()
    passed[key] = result
    return result


@cache
def _names(spec: str) -> tuple[str, ...]:
    return tuple(spec.split())


class Dims:
    """Binds the letters of a contract (``"N H d"``) to sizes, and refuses the first mismatch.

    A name seen before must have the size it had; a number must be that size; ``_`` is anything.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    def bind(
        self,
        name: str,
        tensor: torch.Tensor,
        spec: str,
        dtypes: Sequence[torch.dtype] | torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Checks one tensor against ``spec``; raises TypeError (type, dtype) or ValueError."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{self.op}: {name} must be a tensor, got {type(tensor).__name__}")
        names = _names(spec)
        if tensor.dim() != len(names):
            raise ValueError(
                f"{self.op}: {name} must have {len(names)} dimensions [{', '.join(names)}], "
                f"got shape {tuple(tensor.shape)}"
            )
        for letter, size in zip(names, tensor.shape):
            if letter == "_":
                continue
            wanted = int(letter) if letter.isdigit() else self.sizes.setdefault(letter, size)
            if wanted != size:
                known = ", ".join(
                    n if n.isdigit() or n == "_" else f"{n}={self.sizes.get(n, '?')}" for n in names
                )
                raise ValueError(
                    f"{self.op}: {name} has shape {tuple(tensor.shape)}, expected [{known}]"
                )
        if dtypes is not None:
            check_dtype(self.op, name, tensor, dtypes)
        if device is not None and tensor.device != device:
            raise ValueError(
                f"{self.op}: {name} is on {tensor.device}, expected {device} like the first input"
            )
        return tensor


def check_dtype(
    op: str, name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype] | torch.dtype
) -> None:
    """Raises TypeError unless ``tensor.dtype`` is one of ``dtypes``."""
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{op}: {name} has dtype {short(tensor.dtype)}, "
            f"allowed: {', '.join(short(d) for d in allowed)}"
        )


def check_head_dim(op: str, d: int) -> None:
    """Head dims are multiples of 8 up to 256 (the ops' common contract)."""
    if d % 8 or not 8 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: head dim {d} must be a multiple of 8 from 8 to {MAX_HEAD_DIM}")


def check_choice(op: str, name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(
            f"{op}: {name}={value!r} is not one of {', '.join(repr(a) for a in allowed)}"
        )


def check_range(
    op: str, name: str, value: float, low: float | None = None, high: float | None = None
) -> None:
    """Raises ValueError unless ``low <= value <= high`` (None does not restrict; NaN fails), and
    TypeError for what is no number; a tensor is none, as reading it waits for the device."""
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a number, got a tensor")
    try:
        outside = (
            value != value
            or (low is not None and value < low)
            or (high is not None and value > high)
        )
    except (TypeError, ValueError, RuntimeError):  # the last two of arrays
        raise TypeError(f"{op}: {name}={value!r:.60} must be a number") from None
    if outside:
        bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
        raise ValueError(f"{op}: {name}={value} is outside {bounds}")


def check_last_dim_dense(op: str, **tensors: torch.Tensor | None) -> None:
    """Tensors written in place need a dense last dimension, and a place for each element.

    Where several elements share a place (expanded dimensions, overlapping windows) the last write
    would win.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} is written in place and needs a dense last dimension, "
                f"got strides {tuple(tensor.stride())}"
            )
        sizes = (*tensor.shape, *tensor.stride())
        if any(isinstance(n, torch.SymInt) for n in sizes) or not tensor.numel():
            continue  # symbolic: the true sizes come here too
        reach = 0  # of the dimensions so far, from the smallest stride on
        for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
            if size > 1 and stride <= reach:
                raise ValueError(
                    f"{op}: {name} is written in place and several elements share a place, "
                    f"got shape {tuple(tensor.shape)} with strides {tuple(tensor.stride())}"
                )
            reach += (size - 1) * stride


def check_apart(op: str, **tensors: torch.Tensor | None) -> None:
    """Tensors written in place may lie between each other, but no two start at one address.

    Reads addresses, which ``remember`` does not know of: call it outside remembered checks.
    """
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        if tensor is None or not (address := tensor.data_ptr()):  # 0: no elements
            continue
        if address in seen:
            raise ValueError(
                f"{op}: {seen[address]} and {name} are the same memory; both are written, so each "
                "needs its own"
            )
        seen[address] = name


def check_no_overlap(
    op: str, written: dict[str, torch.Tensor | None], read: dict[str, torch.Tensor | None]
) -> None:
    """For VICO_CHECK=1: no written tensor shares memory with another one. Those with gaps are left
    out: whether another one lies in them, addresses alone do not tell."""
    spans = []
    for name, tensor in {**written, **read}.items():
        if tensor is None or not tensor.numel():
            continue
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        if reach == tensor.numel():
            start = tensor.data_ptr()
            spans.append((name, start, start + reach * tensor.element_size()))
    for i, (name, start, end) in enumerate(spans):
        if name not in written:
            return
        for other, other_start, other_end in spans[i + 1 :]:
            if start < other_end and other_start < end:
                raise ValueError(
                    f"{op}: {name} is written and shares memory with {other}; each needs its own"
                )


def check_tensor(op: str, name: str, value: object) -> None:
    """For what is asked for its shape before the op itself looks at its arguments."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_int(op: str, name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is an integer, numpy's and symbolic ones included."""
    if isinstance(value, int) and not isinstance(value, bool):
        return  # asked first: dynamo's symbolic integers can be asked for nothing else
    if isinstance(value, (bool, torch.Tensor)) or not hasattr(value, "__index__"):
        got = type(value).__name__ if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(f"{op}: {name}={got} must be an int")


def int_list(op: str, name: str, value: Iterable[object] | None) -> list[int] | None:
    """``value`` as a list of ints, None as None; raises TypeError for anything else."""
    if value is None:
        return None
    try:
        return [operator.index(v) for v in value]
    except TypeError:
        raise TypeError(f"{op}: {name}={value!r} must be a sequence of ints or None") from None


def float_list(op: str, name: str, value: Iterable[object]) -> list[float]:
    """``value`` as a list of floats; raises TypeError for anything else."""
    try:
        return [float(v) for v in value]
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name}={value!r} must be a sequence of floats") from None


def check_mrope_section(op: str, section: Sequence[int] | None, half: int) -> None:
    """``mrope_section`` splits the d/2 frequencies among (t, h, w), as transformers has it."""
    if section is None:
        return
    if len(section) != 3 or any(s < 0 for s in section) or sum(section) != half:
        raise ValueError(
            f"{op}: mrope_section={list(section)} must be three non-negative sizes that add up "
            f"to d/2={half}"
        )
