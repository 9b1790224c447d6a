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
    arguments = overload._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    traced = _at_known_places(overload, fake, written) if written else fake
    torch.library.register_fake(f"{NAMESPACE}::{name}", traced, lib=_LIBRARY)
    above = torch.library.fallthrough_kernel if integral else _refuse_autograd(name, overload)
    _LIBRARY.impl(name, above, "Autograd")
    if written:
        # Not with autograd, which inference mode leaves out.
        _LIBRARY.impl(name, _counted(overload, written), "ADInplaceOrView")
    return direct(overload, run, written, integral)


def _at_known_places(
    overload: Any, fake: Callable[..., Any], written: list[int]
) -> Callable[..., Any]:
    """``fake``, but for views at a symbolic offset that are written: inductor takes it for 0
    (pytorch issue 198068), and what is meant for one layer's pages would go into the first one's.
    """
    op, names = overload._schema.name.rpartition("::")[2], overload._schema.arguments

    def traced(*args: Any, **kwargs: Any) -> Any:
        for i in written:
            name = names[i].name
            tensor = args[i] if i < len(args) else kwargs.get(name)
            if tensor is not None and isinstance(tensor.storage_offset(), torch.SymInt):
                raise RuntimeError(
                    f"{op}: {name} is written, and it is a view at an offset that is dynamic, "
                    "which torch.compile gets wrong (pytorch issue 198068): call "
                    "torch._dynamo.mark_static(pool) on what it is a view of, or give each layer's "
                    "keys and values tensors of their own"
                )
        return fake(*args, **kwargs)

    return traced


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
