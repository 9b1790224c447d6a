"""What is taught when: the stages, their phases, and what is asked in each."""

from __future__ import annotations

from dataclasses import dataclass

#: Shares of the forms of questions.
SHARES = {
    "shape": 0.18,
    "color": 0.14,
    "count": 0.12,
    "last_color": 0.16,
    "last_place": 0.14,
    "order": 0.15,
    "motion": 0.11,
}
#: With more about places, and less often about empty ones.
PLACE_SHARES = {
    "shape": 0.28,
    "color": 0.20,
    "count": 0.14,
    "last_color": 0.10,
    "last_place": 0.10,
    "order": 0.11,
    "motion": 0.07,
}
#: With more about what is gone.
PAST_SHARES = {
    "shape": 0.10,
    "color": 0.08,
    "count": 0.10,
    "last_color": 0.20,
    "last_place": 0.20,
    "order": 0.24,
    "motion": 0.08,
}
#: With more of what pruning makes hard as well.
BOUNDED_SHARES = {
    "shape": 0.12,
    "color": 0.10,
    "count": 0.16,
    "last_color": 0.19,
    "last_place": 0.15,
    "order": 0.20,
    "motion": 0.08,
}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Part of a stage; losses by their weight, 0 where one is not taught yet.

    end: share of the stage at which it ends. longest: most steps of a video. short: share of the
    batches that have 1 to 4 steps all the same. shares: of the forms of questions. sparse: share
    of the batches whose chunks are what was read of much longer streams.
    counting, following: a head is shown what to count, and a token where its shape was before.
    again: the lookup is taught in the next layer too, whose keys know what has moved. answering:
    the token before the answer is shown what that is about. hues: tokens say that their shape had
    another colour.
    """

    end: float
    longest: int
    short: float = 0.2
    shares: dict[str, float]
    sparse: float = 0.0
    counting: float = 0.0
    following: float = 0.0
    again: float = 0.0
    answering: float = 0.0
    hues: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``rate``: the highest learning rate; ``naming``, ``lookup``, ``trail``, ``retrieval``:
    weights of the losses beside that of the answer."""

    name: str
    bounded: bool
    rate: float
    warmup: int
    naming: float
    lookup: float
    trail: float
    retrieval: float
    phases: tuple[Phase, ...]


_ALL = {"counting": 0.2, "following": 0.2, "again": 0.3, "answering": 0.3, "hues": 0.3}
FULL = Stage(
    name="tiny_full", bounded=False, rate=2e-3, warmup=100,
    naming=0.5, lookup=0.3, trail=0.3, retrieval=0.1,
    phases=(
        Phase(end=0.09, longest=4, shares=PLACE_SHARES),
        Phase(end=0.13, longest=8, shares=SHARES),
        Phase(end=0.21, longest=16, shares=SHARES),
        Phase(end=0.29, longest=32, shares=SHARES),
        Phase(end=0.36, longest=32, shares=SHARES, counting=0.2),
        Phase(end=0.44, longest=32, shares=SHARES, counting=0.2, following=0.2),
        Phase(end=0.60, longest=64, shares=PAST_SHARES, **_ALL),
        Phase(end=1.00, longest=96, short=0.1, shares=PAST_SHARES, sparse=0.2, **_ALL),
    ),
)  # fmt: skip
_LESS = {"counting": 0.2, "following": 0.1, "again": 0.2, "answering": 0.3, "hues": 0.2}
BOUNDED = Stage(
    name="tiny", bounded=True, rate=1e-3, warmup=50,
    naming=0.3, lookup=0.2, trail=0.2, retrieval=0.3,
    phases=(
        Phase(end=0.20, longest=32, shares=BOUNDED_SHARES, **_LESS),
        Phase(end=1.00, longest=96, short=0.1, shares=BOUNDED_SHARES, sparse=0.5, **_LESS),
    ),
)  # fmt: skip
