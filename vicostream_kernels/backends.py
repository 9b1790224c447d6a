"""Which implementations exist for an op on a device, and the reason when one does not.

Each op declares its implementations as ``"module:function"`` strings; a module is imported when it
is first used, so importing the package needs neither Triton nor the compiled module ``_C``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch

from vicostream_kernels.triton_kernels import mend_interpreter, refusal

WORDS = ("prune", "attention", "reuse", "retrieve", "preprocess", "append")
BACKENDS = ("cuda", "triton", "cpu", "reference")
_AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_FALLBACK_ORDER = ("reference",)
#: The oldest GPU that the architectures in CMakeLists.txt serve.
_MIN_CAPABILITY = (8, 0)
#: Triton's interpreter decides when a kernel is decorated, so the variable counts at import.
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend can't serve an op; the message says why and what can."""


@dataclass(frozen=True)
class Op:
    """An op, the word it belongs to and where each backend's implementation lives."""

    word: str
    name: str
    implementations: dict[str, str] = field(default_factory=dict)
    #: A backend that ``auto`` passes over: no device has shown it to be the faster one yet.
    on_request: str | None = None


OPS: dict[str, Op] = {}


def declare(word: str, name: str, *, on_request: str | None = None, **implementations: str) -> Op:
    """Registers the implementations of op ``name``: ``backend="module:function"`` each."""
    if word not in WORDS or not set(implementations) <= set(BACKENDS):
        raise ValueError(f"unknown word {word!r} or backend in {sorted(implementations)}")
    OPS[name] = Op(word, name, implementations, on_request)
    return OPS[name]


def _read_environment() -> tuple[str, ...]:
    names = tuple(n.strip() for n in os.environ.get("VICO_BACKEND", "auto").split(",") if n.strip())
    for name in names:
        if name not in (*BACKENDS, "auto"):
            raise ValueError(
                f"VICO_BACKEND={','.join(names)}: {name!r} is not one of "
                f"auto, {', '.join(BACKENDS)}"
            )
    return names or ("auto",)


#: What ``auto`` means, e.g. ("triton",) or ("triton", "auto"); read once at import.
AUTO = _read_environment()


@lru_cache(maxsize=1)
def native() -> tuple[Any | None, str | None]:
    """The compiled module ``_C`` and None, or None and the reason why it is missing."""
    try:
        return importlib.import_module("vicostream_kernels._C"), None
    except ImportError as error:
        return None, f"the compiled module _C is missing ({error}); build it with `make build`"


@cache
def _triton_missing(device_type: str, dtype: torch.dtype | None = None) -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not installed ({error}); pip install 'vicostream-kernels[triton]'"
    if device_type != "cuda":
        reason = refusal(triton.__version__, None, dtype)
        if reason is None:
            mend_interpreter(triton.__version__)
        return reason
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    return refusal(triton.__version__, capability, dtype)


def missing(backend: str, device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Why ``backend`` can't run on this kind of device here, or None when it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if device_type != "cuda" and not INTERPRET:
            return (
                "Triton runs on CUDA tensors; on the CPU only in its interpreter "
                "(set TRITON_INTERPRET=1 before the import)"
            )
        return _triton_missing(device_type, dtype)
    if backend != device_type:
        return f"the {backend} backend takes {backend} tensors, got {device_type}"
    module, reason = native()
    if module is None:
        return reason
    if backend == "cuda" and not module.has_cuda:
        return "_C was built without CUDA (no nvcc at build time, or VICO_CUDA=0)"
    if backend == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < _MIN_CAPABILITY:
            return (
                "_C holds kernels for compute capability 8.0 and newer, "
                f"this device has {capability[0]}.{capability[1]}"
            )
    return None


def why_not(
    op_name: str, backend: str, device_type: str, dtype: torch.dtype | None = None
) -> str | None:
    """Why ``backend`` can't serve the op on this kind of device, or None when it can."""
    if backend not in BACKENDS:
        return f"no such backend; choose from auto, {', '.join(BACKENDS)}"
    if backend not in OPS[op_name].implementations:
        return f"{op_name} has no {backend} implementation yet"
    return missing(backend, device_type, dtype)


@cache
def _load(op_name: str, backend: str) -> Callable[..., Any]:
    module, _, function = OPS[op_name].implementations[backend].partition(":")
    return getattr(importlib.import_module(module), function)


def served_by(op_name: str, device_type: str, dtype: torch.dtype | None = None) -> tuple[str, ...]:
    """The backends that can serve the op on this kind of device here, the fastest first."""
    order = _auto_order(op_name, device_type)
    rest = tuple(b for b in BACKENDS if b not in order)
    return tuple(b for b in order + rest if why_not(op_name, b, device_type, dtype) is None)


def _auto_order(op_name: str, device_type: str) -> tuple[str, ...]:
    order = _AUTO_ORDER.get(device_type, _FALLBACK_ORDER)
    return tuple(name for name in order if name != OPS[op_name].on_request)


@cache
def choose(
    op_name: str,
    backend: str,
    device_type: str,
    dtype: torch.dtype | None = None,
    cuda_refuses: str | None = None,
) -> str:
    """The backend that serves this request; raises BackendUnavailable, ValueError.

    ``cuda_refuses``: why the CUDA kernels don't take this call, whatever the device.
    """
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(
            f"{op_name}: backend={backend!r} is not one of auto, {', '.join(BACKENDS)}"
        )
    order: tuple[str, ...] = ()
    for name in AUTO if backend == "auto" else (backend,):
        order += _auto_order(op_name, device_type) if name == "auto" else (name,)
    reasons = {}
    for name in order:
        reasons[name] = why_not(op_name, name, device_type, dtype)
        if name == "cuda" and reasons[name] is None:
            reasons[name] = cuda_refuses
        if reasons[name] is None:
            return name
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    source = f"VICO_BACKEND={','.join(AUTO)}" if backend == "auto" else f"backend={backend!r}"
    raise BackendUnavailable(
        f"{op_name}: {source} can't be served on {device_type} ({said}); "
        f"what can: {', '.join(served_by(op_name, device_type, dtype)) or 'nothing'}"
    )


def resolve(
    op_name: str, backend: str, tensor: torch.Tensor, cuda_refuses: str | None = None
) -> Callable[..., Any]:
    """The function that serves ``op_name`` for tensors like ``tensor``."""
    device_type = "cpu" if tensor.is_cpu else tensor.device.type  # the name takes half a us
    dtype = tensor.dtype
    return _load(op_name, choose(op_name, backend, device_type, dtype, cuda_refuses))


def prepared(
    op_name: str, backend: str, tensor: torch.Tensor, tensors: Sequence[Any], *options: Any,
    cuda_refuses: str | None = None, **more: Any,
) -> Callable[..., Any]:  # fmt: skip
    """Like ``resolve``, with everything but the tensors settled: the result takes these only.

    An implementation with a ``prepare`` is asked, once for all calls with such tensors, for a
    function that has sizes, strides and options worked out; None from it: nothing is gained.
    """
    run = resolve(op_name, backend, tensor, cuda_refuses)
    prepare = getattr(run, "prepare", None)
    made = None if prepare is None else prepare(*tensors, *options, **more)
    return made or (lambda *given: run(*given, *options, **more))


def table(device_type: str) -> list[dict[str, Any]]:
    """One row per op: word, op, what auto takes, and per backend None (served) or the reason."""
    rows = []
    for op in sorted(OPS.values(), key=lambda op: (WORDS.index(op.word), op.name)):
        reasons = {b: why_not(op.name, b, device_type) for b in BACKENDS}
        try:
            auto = choose(op.name, "auto", device_type)
        except BackendUnavailable:
            auto = None
        rows.append({"word": op.word, "op": op.name, "auto": auto, "backends": reasons})
    return rows


def info() -> dict[str, Any]:
    """What is installed here and what serves each op, as plain data (``vicostream info``)."""
    module, reason = native()
    triton = sys.modules.get("triton") or (
        importlib.import_module("triton") if find_spec("triton") is not None else None
    )
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "triton_interpreter": INTERPRET,
        "native": module.build_info() if module is not None else None,
        "native_missing": reason,
        "cuda_available": cuda,
        "cuda_missing": None if cuda else _cuda_missing(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if cuda
        else [],
        "threads": torch.get_num_threads(),
        "auto": list(AUTO),
        "ops": {kind: table(kind) for kind in ("cpu", "cuda")},
    }


def usable_device(device: torch.device | str) -> torch.device:
    """``device``; raises ValueError where it is none, or a GPU that is not here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: give cpu, cuda or cuda:N") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ValueError(
                f"device={str(device)!r}: this machine has {count} usable CUDA devices "
                "(`vicostream info` says why)"
            )
    return found


def _cuda_missing() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return f"torch was built for CUDA {torch.version.cuda} but finds no usable driver or device"
