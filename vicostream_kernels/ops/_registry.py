"""Registers ops with torch.library: schema, implementation, fake, and the no-autograd rule.

``Library.define`` + ``impl`` instead of ``custom_op``: several microseconds less a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from vicostream_kernels.ops._direct import direct, increment_versions

NAMESPACE = "vicostream"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], *, integral: bool = False
) -> Any:
    """Defines ``vicostream::<schema>``; returns what the public function calls, by position.

    ``run`` checks its arguments, picks a backend and computes; ``fake`` gives shapes and dtypes
    only (and runs the same checks). An op either returns fresh tensors or writes into arguments
    that its schema marks as mutated and returns nothing. ``integral``: all tensors are integers,
    which no gradient can reach, so autograd need not look (3 us less a call).
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    arguments = overload._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    above = torch.library.fallthrough_kernel if integral else _refuse_autograd(name, overload)
    _LIBRARY.impl(name, above, "Autograd")
    if written:
        # Not with autograd, which inference mode leaves out.
        _LIBRARY.impl(name, _counted(overload, written), "ADInplaceOrView")
    return direct(overload, run, written, integral)


def _counted(overload: Any, written: list[int]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = overload(*args)
        increment_versions(args, written)
        return result

    return counted


def _refuse_autograd(name: str, overload: Any) -> Callable[..., Any]:
    def refuse() -> None:
        raise RuntimeError(
            f"{name} has no backward: an input requires grad. Call it under "
            "torch.no_grad() or torch.inference_mode(), or detach() the input."
        )

    def below_autograd(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    refuse()
        if forward_ad._current_level >= 0:  # its tangents do not show in requires_grad
            for value in (*args, *kwargs.values()):
                dual = isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value)
                if dual and dual.tangent is not None:
                    refuse()
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    return below_autograd
