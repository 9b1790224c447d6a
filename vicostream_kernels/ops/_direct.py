"""The public functions' way past torch's dispatcher, where the dispatcher would change nothing.

A Python kernel behind the dispatcher costs several microseconds a call, as much as a small op
itself takes. Nobody needs it in plain eager code on CPU tensors; whoever does need it
(``torch.compile``, fake tensors, modes, vmap, autograd, subclasses, a profiler) still gets it:
the dispatcher's own state, of this thread and of each tensor, tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

_C = torch._C
_thread_keys, _tensor_keys = _C._dispatch_tls_local_include_set, _C._dispatch_keys
_function_modes, _profiler = _C._len_torch_function_stack, _C._autograd._profiler_enabled
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN = {
    "int": (int,),
    "float": (float,),
    "bool": (bool,),
    "str": (str,),
    "List[int]": (list,),
}


def _keys(*names: str) -> int:
    keys = _C.DispatchKeySet(getattr(_C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | _C.DispatchKeySet(getattr(_C.DispatchKey, name))
    return keys.raw_repr()


_USUAL = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
_INFERENCE = _keys("CPU", "AutocastCPU")
#: What a thread adds to its tensors' keys (nothing special, or inference mode) -> the keys that a
#: tensor may have. Modes, functorch and tracing add other keys; wrappers and lazily negated
#: tensors have other ones.
_ALLOWED = {
    _keys("BackendSelect", "ADInplaceOrView"): frozenset({_USUAL}),
    _keys("BackendSelect"): frozenset({_USUAL, _INFERENCE}),
}


def direct(
    overload: Any, run: Callable[..., Any], written: Sequence[int], integral: bool
) -> Callable[..., Any]:
    """``overload`` for positional arguments; it calls the kernel ``run`` itself where it may.

    ``written``: the places of the arguments that ``run`` writes. Autograd refuses to use what it
    saved of a tensor that was written since, and the kernels write behind its back.
    """
    takes = [_types(argument) for argument in overload._schema.arguments]
    places_of: dict[tuple[type, ...], tuple[int, ...]] = {}

    def learn(types: tuple[type, ...]) -> tuple[int, ...] | None:
        """The places of the tensors; None where the dispatcher converts or refuses something."""
        if len(types) > len(takes) or any(t not in taken for t, taken in zip(types, takes)):
            return None
        places_of[types] = tuple(i for i, t in enumerate(types) if t in _TENSORS)
        return places_of[types]

    def call(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return overload(*args)
        types = tuple(map(type, args))
        places = places_of.get(types) or learn(types)
        allowed = _ALLOWED.get(_thread_keys().raw_repr())
        if places is None or allowed is None or _function_modes() or _profiler():
            return overload(*args)
        if integral:
            # Integers are never negated lazily; whatever else is not plain has no address, or
            # fails when it is asked for one.
            for i in places:
                tensor = args[i]
                if not (tensor.is_cpu and tensor.data_ptr()):
                    return overload(*args)
            return run(*args)
        if forward_ad._current_level >= 0:
            return overload(*args)
        grad = torch.is_grad_enabled()
        for i in places:
            tensor = args[i]
            if _tensor_keys(tensor).raw_repr() not in allowed or (grad and tensor.requires_grad):
                return overload(*args)
        result = run(*args)
        if written and _INFERENCE not in allowed:
            changed = [args[i] for i in written if i < len(args) and args[i] is not None]
            torch.autograd.graph.increment_version(changed)
        return result

    return call


def _types(argument: Any) -> tuple[type, ...]:
    """What an argument may be without the dispatcher converting it."""
    kind = argument.type.annotation_str
    optional = kind.startswith("Optional[")
    if optional:
        kind = kind.removeprefix("Optional[")[:-1]
    types = _TENSORS if kind == "Tensor" else _PLAIN.get(kind, ())
    return (*types, type(None)) if optional else types
