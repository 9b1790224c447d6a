"""The cross-compile gate: what a call launches, built to a cubin without a GPU, and what it uses.

    calls = record_launches(lambda: rope_append(*meta_tensors))
    built = compile_launch(calls[0], capability=90)
    built.check(expect_instruction="wgmma")

The launches are recorded from the launch function itself, so the gate builds the specialisation
that would run: the same constants, warps, divisible strides. It says nothing of results or speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia import compiler as nvidia  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

#: Shared memory a block may use, in bytes, by compute capability (CUDA C++ guide, table 21).
SHARED_LIMIT = {
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip
#: Tiles are made for A100 and H100. Elsewhere a few words may be spilled, in bytes.
SPILL_LIMIT = {80: 0, 86: 32, 89: 32, 90: 0, 100: 32, 120: 32}
#: Columns of tensor memory that a block may take, which 10.x has.
TENSOR_MEMORY = 512
#: What stands in the PTX when a tensor core is used.
INSTRUCTIONS = {
    "mma": r"\bmma\.sync\.", "wgmma": r"\bwgmma\.mma_async\.", "tcgen05": r"\btcgen05\.mma\.",
}  # fmt: skip

_POINTER_TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Recorded:
    """One launch as the launch function asked for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Cubin:
    """What ptxas says about one kernel; sizes in bytes."""

    name: str
    capability: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    ptx: str
    tensor_memory: int = 0

    def check(self, expect_instruction: str | None = None) -> None:
        """Fails on spills, on local memory, on too much shared memory, on a missing instruction."""
        what = f"{self.name} for sm_{self.capability} ({self.registers} registers)"
        spilled = SPILL_LIMIT[self.capability]
        assert max(self.spill_stores, self.spill_loads) <= spilled, (
            f"{what} spills {self.spill_stores} bytes of stores, {self.spill_loads} of loads"
        )
        assert self.stack <= spilled and ".local" not in self.ptx, (
            f"{what} uses local memory, {self.stack} bytes of stack"
        )
        limit = SHARED_LIMIT[self.capability]
        assert self.shared <= limit, f"{what} needs {self.shared} bytes shared, of {limit}"
        columns = self.tensor_memory
        assert columns <= TENSOR_MEMORY, f"{what} needs {columns} columns of tensor memory"
        unlike = lanes_unlike(self.ptx)
        assert not unlike, f"{what}: lanes have other bits of one sum after `{unlike[0]}`"
        if expect_instruction is not None:
            found = [n for n, pattern in INSTRUCTIONS.items() if re.search(pattern, self.ptx)]
            assert expect_instruction in found, f"{what} has no {expect_instruction}, has {found}"


def lanes_unlike(ptx: str) -> list[str]:
    """The sums of another lane's value and this lane's product that are fused, or may be.

    Two lanes that add each other's values round differently there: see `_sums.product`.
    """
    shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%r\d+)", ptx))
    products = set(re.findall(r"\bmul\.(?:ftz\.)?f32\s+(%r\d+)", ptx))
    found = []
    for line, kind, operands in re.findall(r"(\b(fma|add|sub)\.[\w.]*f32\s+(%r[^;]*));", ptx):
        _, *sources = (each.strip() for each in operands.split(","))
        others = set(sources) & shuffled
        if kind == "fma" and sources[2] in others:
            found.append(line)
        elif kind != "fma" and ".rn." not in line and others and set(sources) & products:
            found.append(line)
    return found


def record_launches(call: Callable[[], Any]) -> list[Recorded]:
    """Runs ``call`` with every Triton launch recorded instead of done. Meta tensors will do."""
    recorded: list[Recorded] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args)) | kwargs
        arguments = {name: given.pop(name) for name in kernel.arg_names if name in given}
        for parameter in kernel.params:
            if parameter.has_default:
                arguments.setdefault(parameter.name, parameter.default)
        grid = grid(arguments) if callable(grid) else grid
        recorded.append(Recorded(kernel, tuple(grid), arguments, given))

    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(JITFunction, "run", record)
        call()
    return recorded


def _specialise(value: Any, parameter: Any) -> tuple[str, bool]:
    """The type of an argument as the launcher names it, and whether it is a multiple of 16."""
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        # Allocations are aligned to 256 bytes; a view is as aligned as its offset.
        offset = value.storage_offset() * value.element_size()
        aligned = offset % 16 == 0 and not parameter.do_not_specialize_on_alignment
        return _POINTER_TYPES[value.dtype], aligned and not parameter.do_not_specialize
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, value % 16 == 0 and not parameter.do_not_specialize


def compiled_for(launch: Recorded) -> tuple[str, dict[str, Any]]:
    """The kernel and what Triton compiles it for; equal for launches that share one binary."""
    key: dict[str, Any] = {}
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        kind = _specialise(value, parameter)
        key[parameter.name] = (*kind, value if kind[0] == "constexpr" else None)
    return launch.kernel.__name__, key | launch.options


def compile_launch(launch: Recorded, capability: int, **options: Any) -> Cubin:
    """Builds what ``launch`` would run on a device of this compute capability (see SHARED_LIMIT).

    ``options``: of the compiler, in place of the launch's own.
    """
    if launch.kernel.fn.__module__.startswith("vicostream_kernels"):
        # What a launch does not say differs by release, and with it bits and speed.
        assert "enable_fp_fusion" in launch.options, f"{launch.kernel.__name__} leaves fusion open"
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, divisible = _specialise(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", _cache_of_this_process().name)
        # `_measure` asks ptxas, and once is enough: Triton keeps nothing of what it says.
        patch.setattr(nvidia.CUDABackend, "make_cubin", lambda *_: b"")
        built = triton.compile(source, target=target, options=launch.options | options)
    measured = _measure(launch.kernel.__name__, capability, built.asm["ptx"], built.metadata.shared)
    return replace(measured, tensor_memory=getattr(built.metadata, "tmem_size", 0) or 0)


@cache
def _cache_of_this_process() -> tempfile.TemporaryDirectory[str]:
    """Nothing that an earlier session compiled is found in it, and nobody runs what is in it."""
    return tempfile.TemporaryDirectory()


def _ptxas(capability: int) -> str:
    try:
        tool = nvidia.get_ptxas(capability)
    except TypeError:  # before Triton 3.6 there was one for all, and no argument
        tool = nvidia.get_ptxas()
    return getattr(tool, "path", None) or tool[0]


@cache
def _measure(name: str, capability: int, ptx: str, shared: int) -> Cubin:
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    command = [_ptxas(capability), "-v", f"--gpu-name={target}", "-o", "/dev/null", "/dev/stdin"]
    log = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        assert found, f"ptxas says nothing like {pattern!r} about {name}:\n{log}"
        return int(found[1])

    return Cubin(
        name=name,
        capability=capability,
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        shared=shared,
        ptx=ptx,
    )
