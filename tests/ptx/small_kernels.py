"""Kernels of a few instructions, run by the machine: what its own tests are made of."""

from __future__ import annotations

import struct

import torch

from ptx import text
from ptx.machine import Program
from ptx.memory import GlobalMemory


def run(body: str, *tensors: torch.Tensor, threads: int = 32, shared: int = 0, grid=(1,)) -> None:
    """A kernel of ``body`` on these tensors' addresses, ``%rd0`` on; ``%r0`` is the thread."""
    parameters = ",".join(f".param .u64 k_{i}" for i in range(len(tensors)))
    loads = "".join(f"ld.param.u64 %rd{i}, [k_{i}];" for i in range(len(tensors)))
    ptx = f""".version 8.0
    .target sm_90a
    .address_size 64
    .extern .shared .align 16 .b8 smem[];
    .visible .entry k({parameters}) {{
      .reg .pred %p<8>; .reg .b16 %h<32>; .reg .b32 %r<64>; .reg .b64 %rd<32>;
      {loads} mov.u32 %r0, %tid.x; {body} ret;
    }}"""
    memory = GlobalMemory()
    for i, tensor in enumerate(tensors):
        memory.add(tensor.data_ptr(), tensor.untyped_storage().nbytes(), f"tensor {i}")
    Program(text.parse(ptx)["k"]).launch(
        grid, threads, [t.data_ptr() for t in tensors], memory, shared
    )


def of_lanes(instructions: str, *inputs: list[int], bits: int = 32, threads: int = 32) -> list[int]:
    """``%r10`` (``%rd20`` for 64 bits) of each thread after instructions on ``%r1``, ``%r2`` ..."""
    given_ = torch.tensor([list(map(signed, each)) for each in inputs], dtype=torch.int32)
    out = torch.zeros(threads, dtype=torch.int64 if bits == 64 else torch.int32)
    loads = "".join(
        f"ld.global.b32 %r{i + 1}, [%rd11+{4 * threads * i}];" for i in range(len(inputs))
    )
    result = "%rd20" if bits == 64 else "%r10"
    run(
        f"mul.wide.u32 %rd10, %r0, 4; add.s64 %rd11, %rd0, %rd10; {loads} {instructions}"
        f"mul.wide.u32 %rd12, %r0, {bits // 8}; add.s64 %rd13, %rd1, %rd12;"
        f"st.global.b{bits} [%rd13], {result};",
        given_.reshape(-1), out, threads=threads,
    )  # fmt: skip
    return [value & (1 << bits) - 1 for value in out.tolist()]


def signed(value: int, bits: int = 32) -> int:
    return value - (value >> bits - 1 << bits)


def as_float(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


def as_bits(value: float) -> int:
    return struct.unpack("I", struct.pack("f", value))[0]
