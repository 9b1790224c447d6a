"""A driver for Triton whose device is this package: kernels are compiled for a GPU and run here."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver

from kit.cubin import SHARED_LIMIT
from ptx import text
from ptx.machine import Program
from ptx.memory import GlobalMemory
from vicostream_kernels import backends
from vicostream_kernels.triton_kernels import attention

#: What becomes of a kernel's text before it is run, for tests of what a wrong one would do.
altered: Callable[[str], str] = str


def activate(capability: int, patch: pytest.MonkeyPatch) -> None:
    """Has the triton backend take CPU tensors, compile for that capability and run here."""
    patch.setenv("TRITON_CACHE_DIR", _cache_folder().name)
    # The module goes to the "device" as the text that the compiler made, before ptxas.
    patch.setattr(nvidia.CUDABackend, "make_cubin", lambda _, ptx, *rest: ptx.encode())
    patch.setattr(backends, "INTERPRET", True)
    patch.setattr(backends, "_triton_missing", lambda *_: None)
    # The tiles of that device, not of a CPU.
    patch.setattr(attention, "_tensor_cores", lambda device: {80: "mma", 90: "wgmma"}[capability])
    driver.set_active(Driver(capability))


@contextlib.contextmanager
def compiled_for(capability: int) -> Iterator[None]:
    """The same for a while."""
    with pytest.MonkeyPatch.context() as patch:
        activate(capability, patch)
        try:
            yield
        finally:
            driver.set_active(None)  # Triton looks for a GPU again, once it needs one


@cache
def _cache_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


class Utilities:
    def __init__(self, capability: int) -> None:
        self._shared = SHARED_LIMIT[capability]

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, (ptx.decode(), name, shared), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared, "multiprocessor_count": 132}


@cache
def _program(ptx: str, name: str) -> Program:
    return Program(text.parse(ptx)[name])


class Launcher:
    """Called as Triton calls the function that it makes in C."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds = list(_flat(source.signature.values()))
        self._threads = 32 * metadata.num_warps
        if metadata.global_scratch_size or metadata.num_ctas != 1:
            raise text.Unsupported("scratch memory, or clusters")

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        if x * y * z == 0:
            return
        ptx, name, shared = function
        program = _program(altered(ptx), name)
        memory, values = GlobalMemory(), []
        for kind, value in zip(self._kinds, _flat(arguments), strict=True):
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                memory.add(storage.data_ptr(), storage.nbytes(), f"a tensor {list(value.shape)}")
                value = value.data_ptr()
            values.append(0 if value is None else value)
        values += [0] * (len(program.kernel.parameters) - len(values))  # scratch, of no bytes
        program.launch((x, y, z), self._threads, values, memory, shared)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value


class Driver(DriverBase):
    """What Triton asks of a driver, but for what only its own launcher and timer ask."""

    launcher_cls = Launcher

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = Utilities(capability)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError
