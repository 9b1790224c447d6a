"""Threads of a block in step, one instruction at a time, and the grid's blocks one after another.

Where threads part, those at the lowest instruction go on until they meet others. Blocks run in an
order that a seed shuffles.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx import effects, modifiers, traffic, warp
from ptx.arithmetic import Computed, computed
from ptx.block import PARAMETER, PARAMETERS, WARP, Block, Step
from ptx.memory import Fault, GlobalMemory
from ptx.operands import reader
from ptx.text import (
    SIZES,
    Instruction,
    Kernel,
    Number,
    Operand,
    Sink,
    Symbol,
    Unsupported,
    Variable,
)
from ptx.values import Array, encoder

#: Where a thread is that has ended.
_ENDED = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Stretch:
    """Instructions that are run one after another, and what comes then."""

    steps: tuple[Step, ...]
    lines: tuple[str, ...]
    #: "next", "branch", "end" or "barrier".
    then: str
    guard: Callable[[Block], Array] | None = None
    target: int = -1
    #: Where the first instruction is one that lanes of a warp do together: which lanes.
    meets: Callable[[Block, Array], Array] | None = None


class Program:
    """A kernel, ready to run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.name = kernel.name
        self._stretches = _stretches(kernel)
        self.static_shared, self.addresses = _place_shared(kernel)
        at = 0  # of each thread's own memory
        for name, variable in kernel.variables.items():
            if variable.space == "local":
                self.addresses[name] = at = -(-at // variable.align) * variable.align
                at += variable.size
        self.local = at
        self.constants = {
            name: _stored(variable)
            for name, variable in kernel.variables.items()
            if variable.space in ("global", "const")
        }

    def launch(
        self,
        grid: Sequence[int],
        threads: int,
        arguments: Sequence[Any],
        memory: GlobalMemory,
        dynamic_shared: int = 0,
        seed: int = 0,
    ) -> None:
        """Runs all blocks. ``arguments``: one for each parameter, an int, a float or bytes."""
        symbols = dict(self.addresses)
        for name, data in self.constants.items():
            symbols[name] = memory.add_array(data, name)
        for n, (name, _) in enumerate(self.kernel.parameters):
            symbols[name] = PARAMETERS + n * PARAMETER
        parameters = _parameters(self.kernel, arguments)
        grid = (*grid, 1, 1)[:3]
        places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        random.Random(seed).shuffle(places)
        shared = self.static_shared + dynamic_shared
        with np.errstate(all="ignore"):
            for place in places:
                block = Block(
                    self.kernel, threads, place, grid, symbols, parameters, memory, shared,
                    self.local,
                )  # fmt: skip
                self._run(block)
                if traffic.current is not None:
                    traffic.current.kernels[self.name].blocks += 1

    def _run(self, block: Block) -> None:
        at: int = 0
        while at != _ENDED:
            stretch = self._stretches[at]
            self._steps(block, stretch, None)
            if stretch.then == "branch":
                taken = stretch.guard(block) if stretch.guard else None
                if taken is None or taken.all():
                    at = stretch.target
                elif not taken.any():
                    at += 1
                else:
                    places = np.where(block.full(taken), stretch.target, at + 1)
                    at = self._apart(block, places)
            elif stretch.then == "end":
                if stretch.guard is None:
                    break
                over = block.full(stretch.guard(block))
                at = self._apart(block, np.where(over, _ENDED, at + 1))
            else:
                if stretch.then == "barrier":
                    block.shared.barrier()
                at += 1
        block.end()

    def _apart(self, block: Block, places: Array) -> int:
        """Runs on from there, thread by thread where it must be, until all are at one place."""
        places = places.astype(np.int64)
        # At a barrier of the block; at an instruction of a warp whose other lanes are elsewhere.
        waiting, held = np.zeros((2, block.threads), bool)
        while True:
            ready = ~waiting & ~held & (places != _ENDED)
            if not ready.any():
                if held.any():
                    at = int(places[held].min())
                    block.ended = places == _ENDED
                    stretch, there = self._stretches[at], held & (places == at)
                    self._meet(block, stretch, there)
                if not waiting.any():
                    return _ENDED
                block.shared.barrier()
                waiting[:] = False
                continue
            at = int(places[ready].min())
            here = ready & (places == at)
            if here.all():
                return at
            stretch = self._stretches[at]
            block.ended = places == _ENDED
            if stretch.meets is not None:
                missing = block.missing(here, stretch.meets(block, here)).any(1)
                late = here & missing[block.warps]
                held, here = held | late, here & ~late
                if not here.any():
                    continue
            held[:] = False
            self._steps(block, stretch, here)
            if stretch.then == "branch":
                taken = here if stretch.guard is None else here & block.full(stretch.guard(block))
                places = np.where(here, np.where(taken, stretch.target, at + 1), places)
            elif stretch.then == "end":
                over = here if stretch.guard is None else here & block.full(stretch.guard(block))
                places = np.where(here, np.where(over, _ENDED, at + 1), places)
            else:
                places = np.where(here, at + 1, places)
                if stretch.then == "barrier":
                    waiting |= here

    def _meet(self, block: Block, stretch: _Stretch, there: Array) -> None:
        """Fails: some lanes wait for others that wait, too."""
        warp, lane = np.argwhere(block.missing(there, stretch.meets(block, there)))[0]
        line = (*stretch.lines, stretch.then)[0]
        raise Fault(
            f"lane {lane} of warp {warp} is not there, although the mask names it\n"
            f"  in {self.name}, block {block.place}, at `{line}`"
        )

    def _steps(self, block: Block, stretch: _Stretch, mask: Array | None) -> None:
        if traffic.current is not None:
            warps = block.threads // WARP if mask is None else len(np.unique(block.warps[mask]))
            traffic.current.note_stretch(self.name, stretch.lines, warps, stretch.then != "next")
        for step, line in zip(stretch.steps, stretch.lines, strict=True):
            try:
                step(block, mask)
            except (Fault, Unsupported) as error:
                where = f"{self.name}, block {block.place}, at `{line}`"
                raise type(error)(f"{error}\n  in {where}") from None


def _stored(variable: Variable) -> Array:
    """The bytes of a variable; those of a constant are not written."""
    data = variable.initial or bytes(variable.size)
    return np.frombuffer(data if variable.space == "const" else bytearray(data), np.uint8)


def _place_shared(kernel: Kernel) -> tuple[int, dict[str, int]]:
    """Bytes of static shared memory, and addresses; dynamic shared memory comes after it."""
    at, addresses, dynamic = 0, {}, []
    for name, variable in kernel.variables.items():
        if variable.space == "shared":
            if variable.size == 0:
                dynamic.append(name)
                continue
            at = -(-at // variable.align) * variable.align
            addresses[name] = at
            at += variable.size
    at = -(-at // 16) * 16 if at else 0
    return at, addresses | dict.fromkeys(dynamic, at)


def _parameters(kernel: Kernel, arguments: Sequence[Any]) -> list[bytes]:
    """The bytes of each parameter."""
    if len(arguments) != len(kernel.parameters):
        raise ValueError(
            f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(arguments)}"
        )
    made = []
    for (_, kind), value in zip(kernel.parameters, arguments, strict=True):
        if isinstance(value, bytes):
            made.append(value)
            continue
        size = SIZES[kind]
        if isinstance(value, float):
            made.append(np.array([value], f"f{size}").tobytes())
        else:
            made.append((int(value) & (1 << 8 * size) - 1).to_bytes(size, "little"))
    return made


def _stretches(kernel: Kernel) -> list[_Stretch]:
    code = kernel.instructions
    cuts = {0, *kernel.labels.values()}
    for i, instruction in enumerate(code):
        if _control(instruction, kernel, {}) is not None:
            cuts.add(i + 1)
        if warp.members_of(instruction) is not None:
            cuts.add(i)
    starts = {start: n for n, start in enumerate(sorted(c for c in cuts if c < len(code)))}
    ordered = [*sorted(starts), len(code)]
    made = []
    for start, end in zip(ordered, ordered[1:]):
        last = code[end - 1]
        control = _control(last, kernel, starts)
        body = code[start : end - 1] if control else code[start:end]
        pairs = [(_step(each, kernel), each.line) for each in body]
        made.append(
            _Stretch(
                tuple(step for step, _ in pairs),
                tuple(line for _, line in pairs),
                meets=warp.members_of(code[start]),
                **(control or {"then": "next"}),
            )
        )
    return [*made, _Stretch((), (), "end")]  # a label behind the last instruction


def _control(
    instruction: Instruction, kernel: Kernel, starts: Mapping[int, int]
) -> dict[str, Any] | None:
    """How a stretch goes on after this instruction; None where it is none of those."""
    guard = _guard(instruction)
    if instruction.opcode == "bra":
        target = instruction.operands[0]
        assert isinstance(target, Symbol)
        place = kernel.labels[target.name]
        return {"then": "branch", "guard": guard, "target": starts.get(place, len(starts))}
    if instruction.opcode in ("ret", "exit"):
        return {"then": "end", "guard": guard}
    if instruction.opcode in ("bar", "barrier") and not warp.is_warp_barrier(instruction):
        if guard is not None or instruction.operands != (Number(0),):
            raise Unsupported(f"`{instruction.line}`")
        return {"then": "barrier"}
    return None


def _guard(instruction: Instruction) -> Callable[[Block], Array] | None:
    return None if instruction.guard is None else reader(instruction.guard, "pred")


def _step(instruction: Instruction, kernel: Kernel) -> Step:
    """What runs one instruction for the threads of a mask, or for all."""
    try:
        modifiers.check(instruction)
        plain = _pure(instruction, kernel) or effects.effect(instruction, kernel)
    except (Unsupported, KeyError, ValueError, StopIteration) as error:
        raise Unsupported(f"`{instruction.line}`: {error}") from error
    guard = _guard(instruction)
    if guard is None:
        return plain

    def guarded(block: Block, mask: Array | None) -> None:
        on = guard(block)
        if mask is None:
            if on.all():
                return plain(block, None)
            mask = block.full(on)
        else:
            mask = mask & on
        if mask.any():
            plain(block, mask)

    return guarded


def _pure(instruction: Instruction, kernel: Kernel) -> Step | None:
    """An instruction that computes registers from registers."""
    made = None if _carries(instruction) else computed(instruction)
    if made is None:
        return None
    target, *sources = instruction.operands
    if instruction.opcode == "setp":
        return _set_predicates(made, target, sources, kernel)
    if len(sources) != len(made.sources):
        raise Unsupported(f"{len(sources)} operands")
    reads = [reader(each, kind) for each, kind in zip(sources, made.sources, strict=True)]
    if isinstance(target, Sink):
        return lambda block, mask: None
    compute = made.compute
    index, keep = target.index, encoder(made.result, kernel.registers[target.index])

    def run(block: Block, mask: Array | None) -> None:
        block.write(index, keep(compute(*[read(block) for read in reads])), mask)

    return run


def _set_predicates(made: Computed, first: Operand, sources: list[Operand], kernel: Kernel) -> Step:
    """`setp`: a comparison, its opposite too where there is a second target; each may be joined
    with a predicate."""
    second: Operand = Sink()
    if len(sources) > len(made.sources):
        second, *sources = sources
    if len(sources) != len(made.sources):
        raise Unsupported(f"{len(sources)} operands")
    reads = [reader(each, kind) for each, kind in zip(sources, made.sources, strict=True)]

    def run(block: Block, mask: Array | None) -> None:
        values = [read(block) for read in reads]
        test = made.compute(*values[:2])
        for target, held in ((first, test), (second, ~test)):
            if not isinstance(target, Sink):
                joined = made.join(held, values[2]) if made.join else held
                block.write(target.index, joined, mask)

    return run


def _carries(instruction: Instruction) -> bool:
    return "cc" in instruction.modifiers or instruction.opcode in ("addc", "subc", "madc")
