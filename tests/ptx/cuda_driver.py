"""The launches of `csrc/cuda` run as what nvcc made of it.

The host code is the emulator's build (`kit.emulation`), whose launches come here; the kernels are
compiled by nvcc for a GPU. They find each other by their names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kit import emulation, nvcc
from ptx import text
from ptx.machine import Program
from ptx.memory import Fault, GlobalMemory


def missing() -> str | None:
    """Why this can't be done here, or None."""
    for tool in ("nvcc", "nm", "c++filt"):
        if shutil.which(tool) is None:
            return f"needs {tool}"
    return emulation.missing()


def activate(capability: int) -> None:
    """Has all launches of the emulated module run the PTX for that capability."""
    programs, module = compile_all(capability), emulation.module()
    names = _kernels_of(emulation.build(emulation.WATCHED), module.loaded_at())
    module.set_launcher(_Launcher(programs, names))
    call_emulated = emulation.emulated

    @cache
    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        inner = call_emulated(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            with _record():
                return inner(*args, **kwargs)

        return call

    emulation.emulated = recorded


def compile_all(capability: int) -> dict[str, Callable[[], Program]]:
    """The kernels by their demangled names."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        modules = list(pool.map(lambda source: nvcc.ptx_of(source, capability), nvcc.SOURCES))
    kernels = {}
    for module in modules:
        for kernel in text.parse(module.read_text()).values():
            kernels[kernel.name] = cache(lambda kernel=kernel: Program(kernel))
    return dict(zip(_demangled(list(kernels)), kernels.values(), strict=True))


def _demangled(names: Sequence[str]) -> list[str]:
    said = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return [_canonical(line) for line in said.splitlines()]


def _canonical(name: str) -> str:
    return name.replace("vico_emulated::", "vico::")


def _kernels_of(module: Path, base: int) -> dict[int, str]:
    """The functions of the loaded module by address."""
    said = subprocess.check_output(["nm", "-C", str(module)], text=True)
    found = re.findall(r"^([0-9a-f]+) [tTwW] (.*)$", said, re.MULTILINE)
    return {base + int(value, 16): _canonical(name) for value, name in found}


_storages: list[torch.UntypedStorage] | None = None
_data_ptr = torch.Tensor.data_ptr


@contextmanager
def _record() -> Iterator[None]:
    """Notes the tensors whose addresses are taken: what the launches within may touch."""
    global _storages

    def data_ptr(tensor: torch.Tensor) -> int:
        _storages.append(tensor.untyped_storage())
        return _data_ptr(tensor)

    before, _storages = _storages, []
    torch.Tensor.data_ptr = data_ptr
    try:
        yield
    finally:
        torch.Tensor.data_ptr = _data_ptr
        _storages = before


class _Launcher:
    def __init__(self, programs: dict[str, Callable[[], Program]], names: dict[int, str]) -> None:
        self._programs, self._names = programs, names

    def __call__(
        self, kernel: int, grid: tuple[int, ...], threads: int, shared: int, arguments: list[bytes]
    ) -> str | None:
        memory = GlobalMemory()
        for storage in _storages or ():
            memory.add(storage.data_ptr(), storage.nbytes(), f"{storage.nbytes()} bytes")
        try:
            program = self._programs[self._names[kernel]]()
            program.launch(grid, threads, arguments, memory, shared, seed=emulation.SEED)
        except (Fault, text.Unsupported) as error:
            return str(error)
        return None
