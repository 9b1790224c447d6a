"""Instructions that do more than compute: which function runs each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx import accesses, later, matrices, warp
from ptx.block import Block, Step
from ptx.modifiers import types_of
from ptx.operands import reader
from ptx.text import Instruction, Kernel, Unsupported
from ptx.values import Array


def effect(instruction: Instruction, kernel: Kernel) -> Step:
    return _EFFECTS[instruction.opcode](instruction, kernel)


def _carried(instruction: Instruction, kernel: Kernel) -> Step:
    """Sums and products with a carry, in 32 bits."""
    (kind,) = types_of(instruction.modifiers)
    if kind not in ("u32", "b32") and (kind, instruction.opcode[:3]) != ("s32", "add"):
        raise Unsupported("carries of other than 32 bits without a sign")
    target, *sources = instruction.operands
    opcode = instruction.opcode[:3]
    takes, gives = instruction.opcode.endswith("c"), "cc" in instruction.modifiers
    high = "hi" in instruction.modifiers
    reads = [reader(each, "u32") for each in sources]

    def run(block: Block, mask: Array | None) -> None:
        values = [read(block).astype(np.uint64) for read in reads]
        if opcode == "mad":
            product = values[0] * values[1]
            part = product >> np.uint64(32) if high else product & np.uint64(0xFFFFFFFF)
            values = [part, values[2]]
        total = values[0] + values[1] + (block.carry if takes else np.uint64(0))
        if gives:
            carry = total >> np.uint64(32)
            block.carry = carry if mask is None else np.where(mask, carry, block.carry)
        block.write(target.index, total.astype(np.uint32), mask)

    return run


def _nothing(instruction: Instruction, kernel: Kernel) -> Step:
    return lambda block, mask: None


_EFFECTS: dict[str, Callable[[Instruction, Kernel], Step]] = {
    "atom": accesses.atomic,
    "ld": accesses.load,
    "st": accesses.store,
    "mov": accesses.move,
    "cvta": accesses.to_address,
    "mad": _carried,
    "madc": _carried,
    "add": _carried,
    "addc": _carried,
    "shfl": warp.shuffle,
    "redux": warp.reduce,
    "vote": warp.vote,
    "bar": warp.warp_barrier,
    "cp": later.copy,
    "wgmma": later.multiply,
    "ldmatrix": matrices.load_matrices,
    "stmatrix": matrices.store_matrices,
    "mma": matrices.multiply_matrices,
    "fence": _nothing,
    "membar": _nothing,
    "prefetch": _nothing,
}
