"""What happens in a synthetic clip: shapes on a 3 x 3 board, step by step, from a seed.

The log is the truth: pictures are drawn from it, answers are looked up in it, and nothing else
knows what happened.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = (
    "circle", "ring", "square", "frame", "diamond", "triangle", "wedge", "star",
    "plus", "cross", "heart", "moon", "bar", "pole", "stripes", "fence",
    "checker", "ell", "tee", "hourglass", "bowtie", "arch", "dots", "target",
)  # fmt: skip
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "cyan", "white")
#: Places of the board in raster order: the index is the cell.
PLACES = (
    "northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast",
)  # fmt: skip
SIDE = 3
CELLS = SIDE * SIDE
#: Never more shapes than this at a time.
MOST = 4
#: (words, step in the cell index) of the four moves.
MOVES = (("left", 0, -1), ("right", 0, 1), ("up", -1, 0), ("down", 1, 0))


@dataclass(frozen=True)
class Log:
    """The state after each step, ``T`` steps; -1 where there is nothing.

    Attributes:
        shape, colour, variant: [T, 9] int8 of each cell (indices of ``SHAPES``, ``COLOURS``, and of
            the drawing variant).
        place: [T, 24] int8, the cell of each shape; a shape is never there twice at a time.
        life: [T, 24] int16, the number of the appearance that each shape is in, from 0 on over the
            whole clip.
        moved: [T, 24] int8, index of ``MOVES`` in the step in which a shape moved.
    """

    shape: np.ndarray
    colour: np.ndarray
    variant: np.ndarray
    place: np.ndarray
    life: np.ndarray
    moved: np.ndarray

    @property
    def steps(self) -> int:
        return self.shape.shape[0]


@dataclass
class _Thing:
    shape: int
    colour: int
    variant: int
    cell: int
    life: int
    dies: int
    moves: int
    recolours: int


def simulate(
    rng: np.random.Generator,
    steps: int,
    *,
    variants: range,
    pool: int = 20,
    pace: float = 1.0,
) -> Log:
    """Lets shapes come and go for ``steps`` steps.

    A shape stays 6 to 20 steps; two in five move to a free neighbouring place once, one in five
    changes its colour once. How many are wanted at a time (0 to 4) is drawn anew every 8 to 20
    steps, so a clip of any length stays populated. ``pool`` of the 24 shapes take part, the others
    never come; a shape that left comes back, in another colour, when it is among those that were
    away longest. ``pace`` below 1 makes everything happen faster.
    """
    log = Log(
        *(np.full((steps, CELLS), -1, np.int8) for _ in range(3)),
        place=np.full((steps, len(SHAPES)), -1, np.int8),
        life=np.full((steps, len(SHAPES)), -1, np.int16),
        moved=np.full((steps, len(SHAPES)), -1, np.int8),
    )
    waiting = list(rng.permutation(len(SHAPES))[:pool])  # away longest first
    last_colour: dict[int, int] = {}
    things: list[_Thing] = []
    wanted = int(rng.integers(0, MOST + 1))
    redraw = int(rng.integers(4, 21))
    lives = 0
    draws = _Draws(rng)
    for step in range(steps):
        for thing in [t for t in things if t.dies <= step]:
            things.remove(thing)
            waiting.append(thing.shape)
        for thing in things:
            if thing.moves == step:
                _move(log, draws, step, thing, things)
            if thing.recolours == step:
                thing.colour = _other(draws, len(COLOURS), thing.colour)
        if step >= redraw:
            wanted = draws.below(MOST + 1)
            redraw = step + 1 + int(pace * (7 + draws.below(13)))
        while waiting and len(things) < wanted and (step == 0 or draws.below(100) < 45):
            shape = waiting.pop(draws.below(max(1, len(waiting) // 2)))
            stay = max(2, round(pace * (6 + draws.below(15))))
            dies = step + (stay if step else 1 + draws.below(stay))
            moves = step + 1 + draws.below(stay) if draws.below(100) < 45 else -1
            recolours = step + 1 + draws.below(stay) if draws.below(100) < 20 else -1
            taken = {t.cell for t in things}
            free = [cell for cell in range(CELLS) if cell not in taken]
            colour = _other(draws, len(COLOURS), last_colour.get(shape, -1))
            last_colour[shape] = colour
            things.append(
                _Thing(
                    shape,
                    colour,
                    variants[draws.below(len(variants))],
                    free[draws.below(len(free))],
                    lives,
                    dies,
                    moves,
                    recolours,
                )
            )
            lives += 1
        for t in things:
            last_colour[t.shape] = t.colour
            log.shape[step, t.cell] = t.shape
            log.colour[step, t.cell] = t.colour
            log.variant[step, t.cell] = t.variant
            log.place[step, t.shape] = t.cell
            log.life[step, t.shape] = t.life
    return log


class _Draws:
    """Small integers from a block of random numbers: one draw at a time costs NumPy more."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self._left = rng, iter(())

    def below(self, n: int) -> int:
        value = next(self._left, None)
        if value is None:
            self._left = iter(self._rng.random(256).tolist())
            value = next(self._left)
        return int(value * n)


def _other(draws: _Draws, n: int, not_this: int) -> int:
    if not_this < 0:
        return draws.below(n)
    value = draws.below(n - 1)
    return value + (value >= not_this)


def _move(log: Log, draws: _Draws, step: int, thing: _Thing, things: list[_Thing]) -> None:
    """To a free neighbouring place; a shape that is shut in stays."""
    taken = {t.cell for t in things}
    row, column = divmod(thing.cell, SIDE)
    ways = [
        (way, (row + down) * SIDE + column + right)
        for way, (_, down, right) in enumerate(MOVES)
        if 0 <= row + down < SIDE and 0 <= column + right < SIDE
    ]
    ways = [(way, cell) for way, cell in ways if cell not in taken]
    if ways:
        way, thing.cell = ways[draws.below(len(ways))]
        log.moved[step, thing.shape] = way
