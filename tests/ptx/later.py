"""What is begun and waited for: copies into shared memory, products of four warps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx import tensor_cores
from ptx.block import Block, Pending, Step
from ptx.modifiers import types_of
from ptx.operands import addresses_of, by_all, chosen, items, reader
from ptx.text import Instruction, Kernel, Operand, Unsupported, Vector
from ptx.values import Array

_WARPGROUP = 128  # threads


def copy(instruction: Instruction, kernel: Kernel) -> Step:
    """`cp.async`: the bytes are there once the thread's wait is over, and not a moment before."""
    waits = _group_or_wait(instruction, "cp.async", lambda block: block.copies)
    return waits or _begin_copy(instruction, kernel)


def multiply(instruction: Instruction, kernel: Kernel) -> Step:
    """`wgmma`: four warps multiply together; their factors are read when they wait for it."""
    waits = _group_or_wait(instruction, "wgmma", lambda block: block.products)
    return waits or _begin_product(instruction, kernel)


def _group_or_wait(
    instruction: Instruction, what: str, pending: Callable[[Block], Pending]
) -> Step | None:
    modifiers = instruction.modifiers
    if "fence" in modifiers:
        return lambda block, mask: by_all(block, mask, what)
    if "commit_group" in modifiers:

        def commit(block: Block, mask: Array | None) -> None:
            by_all(block, mask, what)
            pending(block).commit()

        return commit
    if "wait_all" in modifiers:

        def wait_all(block: Block, mask: Array | None) -> None:
            by_all(block, mask, what)
            pending(block).commit()
            pending(block).wait(0)

        return wait_all
    if "wait_group" in modifiers:
        count = instruction.operands[0].value

        def wait(block: Block, mask: Array | None) -> None:
            by_all(block, mask, what)
            pending(block).wait(count)

        return wait
    return None


def _begin_copy(instruction: Instruction, kernel: Kernel) -> Step:
    modifiers = instruction.modifiers
    if not {"shared", "shared__cta"} & set(modifiers) or "global" not in modifiers:
        raise Unsupported(f"cp.{'.'.join(modifiers)}")
    target, source, size, *rest = instruction.operands
    into = addresses_of(target, "shared", kernel)
    out_of = addresses_of(source, "global", kernel)
    width = size.value
    kept = reader(rest[0], "u32") if rest else None
    if width not in (4, 8, 16) or ("cg" in modifiers and width != 16):
        raise Unsupported(f"a copy of {width} bytes")

    def run(block: Block, mask: Array | None) -> None:
        to = chosen(block, into(block), mask)
        warps = chosen(block, block.warps, mask)
        at = chosen(block, out_of(block), mask)
        count = np.full(len(at), width) if kept is None else chosen(block, kept(block), mask)
        if ((count != 0) & (count != width)).any():
            raise Unsupported(f"a copy of other than all or none of {width} bytes")
        some = count > 0
        running = np.ones(block.threads, bool) if mask is None else mask
        reading = running.copy()
        reading[running] = some
        block.note("load", instruction.line, at[some], width, reading)
        block.note("shared", instruction.line, to, width, running)
        block.memory.check(at[some], width)
        block.shared.begin_copy(to, width, warps)

        def arrive() -> None:
            loaded = [np.zeros(len(at), np.uint32) for _ in range(width // 4)]
            if some.any():
                got = block.memory.load(at[some], 4, width // 4)
                for each, values in zip(loaded, got, strict=True):
                    each[some] = values
            block.shared.end_copy(to, loaded, warps)

        block.copies.add(arrive)

    return run


def _begin_product(instruction: Instruction, kernel: Kernel) -> Step:
    modifiers = instruction.modifiers
    shape = next(each for each in modifiers if each.startswith("m64n"))
    columns = int(shape[4:].partition("k")[0])
    kinds = types_of(modifiers)
    if kinds[0] != "f32" or kinds[1] not in ("f16", "bf16"):
        raise Unsupported(f"wgmma.{'.'.join(modifiers)}")
    d, a, b, accumulate, *flags = instruction.operands
    numbers = [flag.value for flag in flags]
    if numbers[:2] != [1, 1]:
        raise Unsupported("a negated factor")
    sums = [item.index for item in d.items]
    left = _Factor(a, 64, kinds[1], len(numbers) == 4 and numbers[2] == 1)
    right = _Factor(b, columns, kinds[1], numbers[-1] == 1)
    keeps = reader(accumulate, "pred")

    def run(block: Block, mask: Array | None) -> None:
        by_all(block, mask, "wgmma")
        keep = block.full(keeps(block))[::_WARPGROUP]
        # Now and at the wait: what is read in between must not be written.
        at = [factor.begin(block) for factor in (left, right)]

        def finish() -> None:
            before = tensor_cores.c_fragment([block.full(block.registers[r]) for r in sums])
            before = before.reshape(-1, 64, columns) * keep[:, None, None]
            a, b = left.matrices(block, at[0]), right.matrices(block, at[1])
            made = [tensor_cores.product(x, y.T, c) for x, y, c in zip(a, b, before, strict=True)]
            registers = tensor_cores.c_registers(np.stack(made).reshape(-1, 16, columns))
            for r, value in zip(sums, registers, strict=True):
                block.registers[r] = value

        block.products.add(finish)

    return run


class _Factor:
    """A matrix of each four warps, in their registers or in shared memory."""

    def __init__(self, operand: Operand, rows: int, kind: str, outer: bool) -> None:
        self.held = isinstance(operand, Vector)
        self.reads = [reader(each, "b32" if self.held else "b64") for each in items(operand)]
        self.rows, self.kind, self.major = rows, kind, "outer" if outer else "k"

    def begin(self, block: Block) -> list[int]:
        """The descriptors, one for four warps, of which a thread's stands for all."""
        if self.held:
            return []
        at = [int(each) for each in block.full(self.reads[0](block))[::_WARPGROUP]]
        self.matrices(block, at)
        return at

    def matrices(self, block: Block, at: list[int]) -> list[Array]:
        if self.held:
            values = [block.full(read(block)) for read in self.reads]
            return list(tensor_cores.a_fragment(values, self.kind).reshape(-1, 64, 16))
        return [
            # Who reads is none of the warps that have written: a barrier must stand between.
            tensor_cores.described_matrix(
                block.shared, descriptor, self.rows, self.kind, self.major, 1_000 + group
            )
            for group, descriptor in enumerate(at)
        ]
