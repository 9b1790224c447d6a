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
_PRIVATE = ("_dispatch_tls_local_include_set", "_dispatch_keys", "_len_torch_function_stack")
#: A torch without one of these names: every call goes through the dispatcher.
_KNOWN = all(hasattr(_C, name) for name in _PRIVATE) and hasattr(_C._autograd, "_profiler_enabled")
if _KNOWN:
    _thread_keys, _tensor_keys, _function_modes = (getattr(_C, name) for name in _PRIVATE)
    _profiler = _C._autograd._profiler_enabled
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _number(x: Any, *methods: str) -> bool:
    """Tensors are none: to read one waits for the device, and one of several streams is no number
    for all of them."""
    return not isinstance(x, torch.Tensor) and any(hasattr(x, method) for method in methods)


#: Schema type -> what its arguments are called, and what torch takes for one.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Tensor": ("a tensor", lambda x: isinstance(x, torch.Tensor)),
    "int": ("an int", lambda x: _number(x, "__index__")),
    "float": ("a float", lambda x: _number(x, "__float__", "__index__")),
    "str": ("a string", lambda x: isinstance(x, str)),
    "ScalarType": ("a torch.dtype", lambda x: isinstance(x, torch.dtype)),
}
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

    ``written``: the places of the arguments that ``run`` writes.
    """
    if not _KNOWN:
        return overload
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
        if places is None:
            _refuse_types(overload, args)
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
        if written:
            increment_versions(args, written)
        return result

    return call


def increment_versions(args: Sequence[Any], written: Sequence[int]) -> None:
    """Autograd refuses to use what it saved of a tensor that was written since; the kernels write
    behind its back. Tensors made in inference mode have no version."""
    changed = [args[i] for i in written if i < len(args) and args[i] is not None]
    torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])


def _kind(argument: Any) -> tuple[str, bool]:
    """What its schema calls an argument's type, and whether it may be None."""
    kind = argument.type.annotation_str
    if kind.startswith("Optional["):
        return kind.removeprefix("Optional[")[:-1], True
    return kind, False


def _types(argument: Any) -> tuple[type, ...]:
    """What an argument may be without the dispatcher converting it."""
    kind, optional = _kind(argument)
    types = _TENSORS if kind == "Tensor" else _PLAIN.get(kind, ())
    return (*types, type(None)) if optional else types


def _refuse_types(overload: Any, args: Sequence[Any]) -> None:
    """Raises TypeError, by name, for what the dispatcher would refuse with the whole schema."""
    for argument, value in zip(overload._schema.arguments, args):
        kind, optional = _kind(argument)
        wanted, takes = _KINDS.get(kind, ("", None))
        if takes is None or takes(value) or (optional and value is None):
            continue
        tensor = isinstance(value, torch.Tensor)
        if hasattr(type(value), "__torch_function__") and not tensor:  # torch.fx's proxies
            continue
        name = overload._schema.name.rpartition("::")[2]
        got = type(value).__name__ if tensor or kind == "Tensor" else f"{value!r:.60}"
        raise TypeError(
            f"{name}: {argument.name} must be {wanted}{' or None' if optional else ''}, got {got}"
        )
