"""torch.empty and its kin come back full of NaN, so an output element nobody wrote fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo.trace_rules

# Dynamo and `with torch.device(...)` look functions up by identity, in tables that they fill when
# they first need them: fill both now, while torch.empty is itself.
torch._dynamo.trace_rules.get_torch_obj_rule_map()
with torch.device("meta"):
    torch.empty(0)

_PLACES = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")]
_PLACES += [(torch.Tensor, "new_empty")]
_ORIGINAL = {(owner, name): getattr(owner, name) for owner, name in _PLACES}


def _fill(x: torch.Tensor) -> torch.Tensor:
    if isinstance(x, torch._subclasses.FakeTensor) or x.device.type == "meta":
        return x
    if x.is_floating_point():
        return x.fill_(float("nan"))
    if x.dtype in (torch.int32, torch.int64):
        return x.fill_(0x5A5A5A5A)
    return x


def _poisoned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _fill(function(*args, **kwargs))

    return wrapper


def _set(poison: bool) -> None:
    for (owner, name), original in _ORIGINAL.items():
        setattr(owner, name, _poisoned(original) if poison else original)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block, empties are poisoned."""
    _set(True)
    try:
        yield
    finally:
        _set(False)


@contextmanager
def unpoisoned() -> Iterator[None]:
    """Inside ``poisoned``: the original functions, which torch.compile can trace."""
    _set(False)
    try:
        yield
    finally:
        _set(True)
