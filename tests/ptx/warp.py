"""What the lanes of a warp do together: shuffles, votes, reductions, barriers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.block import WARP, Block, Step
from ptx.memory import Fault
from ptx.modifiers import types_of
from ptx.operands import lanes, reader
from ptx.text import Instruction, Kernel, Operand, Sink, Unsupported
from ptx.values import Array


def is_warp_barrier(instruction: Instruction) -> bool:
    return instruction.opcode == "bar" and "warp" in instruction.modifiers


_ALIGNED = ("ldmatrix", "stmatrix", "mma", "bar")  # by all lanes of a warp


def members_of(instruction: Instruction) -> Callable[[Block, Array], Array] | None:
    """Which lanes [warps, 32] must meet at this instruction, as those that are there say.

    None where each is on its own.
    """
    if instruction.guard is not None:
        return None
    opcode = instruction.opcode
    if opcode in ("shfl", "vote", "redux") or is_warp_barrier(instruction):
        read = reader(instruction.operands[-1], "b32")
        return lambda block, there: _members(block, read(block), there)
    if opcode in _ALIGNED:
        return lambda block, there: np.ones((block.threads // WARP, WARP), bool)
    return None


def _members(block: Block, masks: Array, there: Array | None) -> Array:
    """The lanes [warps, 32] that the member mask names, of which those that are there agree."""
    bits = lanes(block.full(masks))
    one = np.zeros((len(bits), 1), np.int64)
    running = np.ones_like(bits, bool) if there is None else lanes(there)
    if there is not None:
        one = np.argmax(running, 1)[:, None]
    first = np.take_along_axis(bits, one, 1)
    if (running & (bits != first)).any():
        raise Unsupported("lanes of one warp that name other members")
    members = (first >> np.arange(WARP, dtype=np.uint32) & 1).astype(bool)
    if (running & ~members).any():
        raise Fault("a lane that the mask does not name")
    return members


def _put_all(block: Block, item: Operand, bits: Array, mask: Array | None) -> None:
    if not isinstance(item, Sink):
        block.write(item.index, bits, mask)


def shuffle(instruction: Instruction, kernel: Kernel) -> Step:
    mode = next(each for each in instruction.modifiers if each in ("up", "down", "bfly", "idx"))
    operands = list(instruction.operands)
    target = operands.pop(0)
    valid = operands.pop(0) if len(operands) == 5 else None
    read, by, clamp = (reader(each, "b32") for each in operands[:3])
    member = reader(operands[3], "b32")
    lane = np.arange(WARP)

    def run(block: Block, mask: Array | None) -> None:
        members = _members(block, member(block), mask)
        block.whole_warps(mask, members)
        values = lanes(block.full(read(block)))
        b = lanes(block.full(by(block))).astype(np.int64) & 31
        c = lanes(block.full(clamp(block))).astype(np.int64)
        segment, bound = c >> 8 & 31, c & 31
        most = lane & segment | bound & ~segment
        least = lane & segment
        if mode == "up":
            source = lane - b
            inside = source >= most
        else:
            source = {"down": lane + b, "bfly": lane ^ b, "idx": least | b & ~segment}[mode]
            inside = source <= most
        source = np.where(inside, source, lane)
        gives = members & ~lanes(block.ended)
        unnamed = ~np.take_along_axis(gives, source, 1)
        if (unnamed if mask is None else unnamed & lanes(mask)).any():
            raise Fault("a lane takes from one that the mask does not name, or that has ended")
        made = np.take_along_axis(values, source, 1).reshape(-1)
        _put_all(block, target, made, mask)
        if valid is not None:
            _put_all(block, valid, np.broadcast_to(inside, values.shape).reshape(-1), mask)

    return run


def reduce(instruction: Instruction, kernel: Kernel) -> Step:
    """`redux.sync`: one result for a warp."""
    (kind,) = types_of(instruction.modifiers)
    how = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[next(each for each in instruction.modifiers if each not in ("sync", kind))]  # fmt: skip
    target, source, members = instruction.operands
    read, member = reader(source, kind), reader(members, "b32")

    def run(block: Block, mask: Array | None) -> None:
        named = _members(block, member(block), mask)
        block.whole_warps(mask, named)
        if not (named & ~lanes(block.ended)).all():
            raise Unsupported("a reduction over a part of a warp")
        values = lanes(block.full(read(block)))
        made = how.reduce(values, axis=1, dtype=values.dtype)
        _put_all(block, target, np.repeat(made, WARP).view(f"u{made.itemsize}"), mask)

    return run


def vote(instruction: Instruction, kernel: Kernel) -> Step:
    target, source, members = instruction.operands
    read, member = reader(source, "pred"), reader(members, "b32")
    mode = next(each for each in instruction.modifiers if each in ("all", "any", "ballot"))
    weights = np.uint32(1) << np.arange(WARP, dtype=np.uint32)

    def run(block: Block, mask: Array | None) -> None:
        named = _members(block, member(block), mask)
        block.whole_warps(mask, named)
        held = lanes(block.full(read(block)))
        there = named & ~lanes(block.ended)
        if mode == "ballot":
            made = np.where(held & there, weights, 0).sum(1, dtype=np.uint32)
        elif mode == "any":
            made = (held & there).any(1)
        else:
            made = (held | ~there).all(1)
        _put_all(block, target, np.repeat(made, WARP), mask)

    return run


def warp_barrier(instruction: Instruction, kernel: Kernel) -> Step:
    member = reader(instruction.operands[0], "b32")

    def run(block: Block, mask: Array | None) -> None:
        block.whole_warps(mask, _members(block, member(block), mask))

    return run
