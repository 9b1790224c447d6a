"""Matrices of a warp: from and to shared memory, and their products."""

from __future__ import annotations

from ptx import tensor_cores
from ptx.block import Block, Step
from ptx.memory import Fault
from ptx.modifiers import types_of
from ptx.operands import addresses_of, chosen, items, lanes, put, reader
from ptx.text import Instruction, Kernel, Unsupported
from ptx.values import Array


def _aligned(block: Block, mask: Array | None) -> None:
    """All lanes of a warp hold a part, those that have ended too."""
    if mask is not None:
        some = lanes(mask)
        if (some.any(1) & ~some.all(1)).any():
            raise Fault("a lane of a warp is missing from what all its lanes do")


def load_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    target, source = instruction.operands
    targets = items(target)
    addresses = addresses_of(source, "shared", kernel)
    transposed = "trans" in instruction.modifiers

    def run(block: Block, mask: Array | None) -> None:
        _aligned(block, mask)
        at = chosen(block, addresses(block), mask)
        warps = chosen(block, block.warps, mask)
        block.note_rows(instruction.line, at, len(targets), mask)
        made = tensor_cores.load_matrices(block.shared, at, len(targets), transposed, warps)
        for item, value in zip(targets, made, strict=True):
            put(block, item, value, "b32", kernel, mask)

    return run


def store_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    target, source = instruction.operands
    reads = [reader(item, "b32") for item in items(source)]
    addresses = addresses_of(target, "shared", kernel)
    transposed = "trans" in instruction.modifiers

    def run(block: Block, mask: Array | None) -> None:
        _aligned(block, mask)
        at = chosen(block, addresses(block), mask)
        warps = chosen(block, block.warps, mask)
        values = [chosen(block, read(block), mask) for read in reads]
        block.note_rows(instruction.line, at, len(reads), mask)
        tensor_cores.store_matrices(block.shared, at, values, transposed, warps)

    return run


def multiply_matrices(instruction: Instruction, kernel: Kernel) -> Step:
    modifiers = instruction.modifiers
    kinds = types_of(modifiers)
    if "m16n8k16" not in modifiers or kinds[0] != "f32" or kinds[1] not in ("f16", "bf16"):
        raise Unsupported(f"mma.{'.'.join(modifiers)}")
    d, a, b, c = (items(each) for each in instruction.operands)
    reads = [[reader(item, "b32") for item in items] for items in (a, b, c)]

    def run(block: Block, mask: Array | None) -> None:
        _aligned(block, mask)
        a, b, c = ([chosen(block, read(block), mask) for read in each] for each in reads)
        made = tensor_cores.product(
            tensor_cores.a_fragment(a, kinds[1]),
            tensor_cores.b_fragment(b, kinds[1]),
            tensor_cores.c_fragment(c),
        )
        for item, value in zip(d, tensor_cores.c_registers(made), strict=True):
            put(block, item, value, "b32", kernel, mask)

    return run
