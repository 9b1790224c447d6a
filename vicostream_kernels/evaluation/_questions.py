"""Questions about a log, their true answers and where in time the evidence is.

Seven forms in five kinds. An answer is one word. *Last* is meant literally: a shape may come back
in another colour, and what counts is its last appearance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vicostream_kernels.evaluation._world import (
    CELLS,
    COLOURS,
    MOVES,
    PLACES,
    SHAPES,
    Log,
)

#: Steps of a chunk in the presets: questions are asked at chunk ends.
CHUNK = 4
NUMBERS = ("zero", "one", "two", "three", "four")
NOTHING, NEVER = "nothing", "never"
#: form -> (kind, text). ``{0}``, ``{1}`` are a place or shapes.
FORMS = {
    "shape": ("now", "What is at {0} now?"),
    "color": ("now", "What color is at {0} now?"),
    "count": ("count", "How many shapes now?"),
    "last_color": ("past", "What color was the {0}?"),
    "last_place": ("past", "Where was the {0} last?"),
    "order": ("order", "Which came last, {0} or {1}?"),
    "motion": ("motion", "Which way did the {0} move?"),
}
KINDS = ("now", "past", "count", "order", "motion")


@dataclass(frozen=True)
class Asked:
    """A question before it has a time: ``form`` of ``FORMS``, indices of its places or shapes, the
    step that it is asked after, the answer, and the first and last steps of the evidence."""

    form: str
    about: tuple[int, ...]
    step: int
    answer: str
    evidence: tuple[tuple[int, int], ...]

    @property
    def kind(self) -> str:
        return FORMS[self.form][0]

    @property
    def text(self) -> str:
        words = PLACES if self.kind == "now" else SHAPES
        return FORMS[self.form][1].format(*(words[index] for index in self.about))


class Truth:
    """Answers about one log.

    ``last``, ``start`` [T, 24]: when each shape was seen last up to a step, and when that
    appearance began; -1 before it ever came. ``moved`` [T, 24]: when it moved last.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        seen = log.place >= 0
        steps = np.arange(log.steps, dtype=np.int32)[:, None]
        before = np.vstack((np.full((1, len(SHAPES)), -1, log.life.dtype), log.life[:-1]))
        self.last = _latest(seen, steps)
        self.start = _latest(seen & (log.life != before), steps)
        self.moved = _latest(log.moved >= 0, steps)
        self.colour = np.take_along_axis(log.colour, log.place.clip(0).astype(np.int64), axis=1)
        self.colour[~seen] = -1

    # -- answers ---------------------------------------------------------------------------------

    def ask(self, form: str, about: tuple[int, ...], step: int) -> Asked:
        """The question with its answer. Raises ``ValueError`` where it has none."""
        answer, evidence = getattr(self, "_" + form)(step, *about)
        return Asked(form, about, step, answer, evidence)

    def _shape(self, step: int, cell: int) -> tuple:
        shape = self.log.shape[step, cell]
        return (SHAPES[shape] if shape >= 0 else NOTHING), ((step, step),)

    def _color(self, step: int, cell: int) -> tuple:
        colour = self.log.colour[step, cell]
        return (COLOURS[colour] if colour >= 0 else NOTHING), ((step, step),)

    def _count(self, step: int) -> tuple:
        return NUMBERS[int((self.log.place[step] >= 0).sum())], ((step, step),)

    def _last_color(self, step: int, shape: int) -> tuple:
        last = self.last[step, shape]
        if last < 0:
            return NEVER, ()
        return COLOURS[self.colour[last, shape]], (self._unchanged(self.colour, last, shape),)

    def _last_place(self, step: int, shape: int) -> tuple:
        last = self.last[step, shape]
        if last < 0:
            return NEVER, ()
        place = self.log.place
        return PLACES[place[last, shape]], (self._unchanged(place, last, shape),)

    def _order(self, step: int, one: int, two: int) -> tuple:
        spans = [(int(self.start[step, s]), int(self.last[step, s])) for s in (one, two)]
        (start, end), (other_start, other_end) = spans
        if min(start, other_start) < 0 or (start - other_start) * (end - other_end) <= 0:
            raise ValueError(f"order: {SHAPES[one]} and {SHAPES[two]} have none at step {step}")
        return SHAPES[one if start > other_start else two], tuple(sorted(spans))

    def _motion(self, step: int, shape: int) -> tuple:
        when = int(self.moved[step, shape])
        if when < 0:
            return NEVER, ()
        return MOVES[self.log.moved[when, shape]][0], ((when - 1, when),)

    def _unchanged(self, what: np.ndarray, last: int, shape: int) -> tuple[int, int]:
        """Steps up to ``last`` in which the shape was there without a change of ``what``."""
        first = int(last)
        column = what[:, shape]
        start = self.start[last, shape]
        while first > start and column[first - 1] == column[last]:
            first -= 1
        return first, int(last)

    # -- choices ---------------------------------------------------------------------------------

    def pick(
        self,
        rng: np.random.Generator,
        form: str,
        step: int,
        *,
        age: int = 0,
        never: float = 0.1,
        nothing: float = 0.3,
    ) -> Asked | None:
        """A question of a form at a step, answers spread evenly; None where there is none.

        ``age``: least number of steps since a shape of ``last_color`` and ``last_place`` was seen.
        ``never``, ``nothing``: shares of questions with that answer.
        """
        if form == "count":
            return self.ask(form, (), step)
        if form in ("shape", "color"):
            held = self.log.shape[step] >= 0
            if held.any() and (held.all() or rng.random() >= nothing):
                cells = np.flatnonzero(held)
            else:
                cells = np.flatnonzero(~held)
            return self.ask(form, (int(cells[rng.integers(len(cells))]),), step)
        if form == "order":
            return self._pick_order(rng, step)
        known = self.moved[step] if form == "motion" else self.last[step]
        if rng.random() < never:
            shapes = np.flatnonzero(known < 0)
        else:
            shapes = np.flatnonzero((known >= 0) & (self.last[step] <= step - age))
        if not shapes.size:
            return None
        return self.ask(form, (int(shapes[rng.integers(len(shapes))]),), step)

    def _pick_order(self, rng: np.random.Generator, step: int) -> Asked | None:
        known = np.flatnonzero(self.last[step] >= 0)
        start, end = self.start[step, known], self.last[step, known]
        one, two = np.nonzero((start[:, None] < start) & (end[:, None] < end))
        if not one.size:
            return None
        at = rng.integers(one.size)
        pair = (int(known[one[at]]), int(known[two[at]]))
        return self.ask("order", pair if rng.random() < 0.5 else pair[::-1], step)


def _latest(when: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """[T, 24] int32: the newest step up to each one where ``when`` holds, or -1."""
    return np.maximum.accumulate(np.where(when, steps, -1).astype(np.int32), axis=0)


def chance(kind: str) -> float:
    """What guessing among the possible answers scores, "nothing" and "never" included."""
    sizes = {
        "now": 2 / (len(SHAPES) + 1 + len(COLOURS) + 1),
        "past": 2 / (len(COLOURS) + 1 + CELLS + 1),
        "count": 1 / len(NUMBERS),
        "order": 1 / 2,
        "motion": 1 / (len(MOVES) + 1),
    }
    return sizes[kind]
