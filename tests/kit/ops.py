"""What every registered op must pass: opcheck, fullgraph compilation, the no-autograd rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kit.poison import unpoisoned


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def check_op(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Runs opcheck: schema, fake tensors, autograd registration, AOT dispatch, dynamic shapes."""
    torch.library.opcheck(op, args, kwargs or {})


def check_fullgraph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """``torch.compile(fullgraph=True)`` gives the bits of eager, mutated arguments included."""
    torch._dynamo.reset()
    ours = [_clone(a) for a in args]
    compiled_args = [_clone(a) for a in args]
    with unpoisoned():
        wanted = function(*ours, **kwargs)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        got = compiled(*compiled_args, **kwargs)
    torch.utils._pytree.tree_map(_assert_equal, (got, compiled_args), (wanted, ours))


def _assert_equal(got: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def check_refuses_grad(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> None:
    """An input that requires grad raises, and the same call under no_grad does not."""
    position = next(
        i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()
    )
    needy = [_clone(a) for a in args]
    needy[position] = needy[position].detach().requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        op(*needy, **(kwargs or {}))
    with torch.no_grad():
        op(*needy, **(kwargs or {}))
