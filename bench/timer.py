"""Times several ways to do the same work in turn, so that they share whatever the machine does.

Every round calls each provider once, forward in even rounds and backward in odd ones (A B, B A,
A B, ...). Ratios are taken inside a round, see ``stats.paired_ratio``.
"""

from __future__ import annotations

import gc
import glob
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vicostream_kernels.bench.inputs import allocated_bytes, clone
from vicostream_kernels.bench.registry import Inputs

Run = Callable[[Inputs], Any]
#: A timed region shorter than this holds several calls, so that reading the clock costs < 1 %.
_SHORTEST_NS = 100_000
_MOST_CALLS = 64
_MOST_SETS = 256
_FALLBACK_LLC = 32 << 20
#: Untimed calls before a timed region, at most: enough to go through twice the last-level cache.
#: One leaves it filled in part where warm, as other cores share it, and full of lines that the
#: provider before wrote, which then go back to memory in the midst of the timed call.
_MOST_UNTIMED = 4
_UNTIMED_S = 0.1  # longer calls go through the cache many times on their own
#: The largest freed block after which glibc keeps what is freed, up to this size.
_LARGEST_KEPT = (32 << 20) - (64 << 10)


@dataclass(frozen=True)
class Budget:
    """How long to measure one case in one cache state.

    ``warm_up`` calls come first; ``untimed``: more before each timed region (`measure_cpu`).
    """

    seconds: float
    least_rounds: int
    most_rounds: int
    warm_up: int = 3
    untimed: bool = True


FULL = Budget(seconds=2.0, least_rounds=20, most_rounds=400)
#: Calls of seconds that sweep through the caches themselves.
HEAVY = Budget(seconds=0.0, least_rounds=5, most_rounds=5, warm_up=1, untimed=False)
QUICK = Budget(seconds=0.4, least_rounds=8, most_rounds=100)


@dataclass(frozen=True)
class Samples:
    """Nanoseconds per call of each provider, one entry a round, and how they were taken.

    ``compared``: the same for ratios, where not all of ``nanoseconds`` were taken in one way.
    """

    nanoseconds: dict[str, list[float]]
    method: str
    compared: dict[str, list[float]] | None = None

    @property
    def paired(self) -> dict[str, list[float]]:
        return self.nanoseconds if self.compared is None else self.compared


def turns(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Endless rounds: forward, backward, forward, ..."""
    forward, backward = tuple(names), tuple(reversed(names))
    while True:
        yield forward
        yield backward


def last_level_cache_bytes() -> int:
    """The largest cache that this CPU reports, or 32 MiB where it reports none."""
    sizes = [_FALLBACK_LLC >> 10]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        try:
            with open(path) as file:
                text = file.read().strip()
            sizes.append(int(text.rstrip("KMG")) << {"M": 10, "G": 20}.get(text[-1], 0))
        except (OSError, ValueError):
            continue
    return max(sizes) << 10


class Sweeper:
    """Evicts the CPU caches by reading twice what they hold: lines that were written would go back
    to memory in the midst of the timed call.

    In numpy on one thread: straight after a parallel torch region, torch's own ``cos`` was seen to
    take milliseconds instead of microseconds (two OpenMP users on the same cores).
    """

    def __init__(self, cache_bytes: int) -> None:
        self._buffer = np.ones(2 * cache_bytes, dtype=np.uint8)  # zeros need not be memory yet

    def __call__(self) -> None:
        self._buffer.max()


@contextmanager
def no_garbage_collection():
    """Collects now, not inside: a collection in one half of a pair would look like work."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Has the C library hand out freed memory again, as in a process that has run a model.

    Until a process has freed a block this large, glibc may return each output of a few megabytes to
    the system; the next call then waits for the same pages, or does not, by chance.
    """
    np.empty(_LARGEST_KEPT, np.uint8)


def rotation(
    inputs: Inputs, moved_bytes: int, cache_bytes: int, memory_bytes: int
) -> list[Inputs] | None:
    """Enough copies that the bytes one pass touches are 8 x the cache; None where that is too many.

    Only ``moved_bytes`` of a set are touched, so these count, not what is allocated; the copies
    together may take ``memory_bytes``.
    """
    sets = max(2, -(-8 * cache_bytes // moved_bytes))
    if sets > _MOST_SETS or sets * allocated_bytes(inputs) > memory_bytes:
        return None
    return [inputs] + [clone(inputs) for _ in range(sets - 1)]


def free_memory_bytes() -> int:
    """Bytes the system can hand out without swapping; 1 GiB where it does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except (OSError, ValueError):
        pass
    return 1 << 30


def measure_cpu(
    runs: Mapping[str, Run],
    inputs: Inputs,
    moved_bytes: int,
    *,
    cold: bool,
    budget: Budget,
    cache_bytes: int | None = None,
) -> Samples:
    """Times each run on the CPU with ``perf_counter_ns``.

    Warm: all providers work on one input set. Cold: a timed call never finds its inputs in cache,
    because calls rotate through copies (``rotation``) or, where inputs are so small that thousands
    of copies would be needed, because the caches are swept before each call. In both each timed
    region follows up to four untimed calls: thread pools, code and what the caches hold besides the
    inputs are as calls of its own leave them, as they are inside a model.
    """
    cache_bytes = cache_bytes or last_level_cache_bytes()
    sets, sweep, method = [inputs], None, "warm"
    if cold:
        rotated = rotation(inputs, moved_bytes, cache_bytes, free_memory_bytes() // 4)
        if rotated is None:
            sets, sweep, method = [inputs, clone(inputs)], Sweeper(cache_bytes), "cold: swept"
        else:
            sets, method = rotated, f"cold: {len(rotated)} input sets"
    keep_freed_memory()
    with no_garbage_collection():
        needed = -(-2 * cache_bytes // max(1, moved_bytes))
        untimed = min(_MOST_UNTIMED, needed) if budget.untimed else 0
        return Samples(_measure_cpu(runs, sets, sweep, cold, untimed, budget), method)


def _measure_cpu(
    runs: Mapping[str, Run],
    sets: Sequence[Inputs],
    sweep: Callable[[], None] | None,
    cold: bool,
    untimed: int,
    budget: Budget,
) -> dict[str, list[float]]:
    calls = {name: 1 for name in runs}
    for name, run in runs.items():
        once = _warm_up(run, sets[0], budget.warm_up)
        if not cold:
            calls[name] = int(min(_MOST_CALLS, max(1, _SHORTEST_NS // max(once, 1))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    turn = 0
    started = time.perf_counter()
    for done, order in enumerate(turns(list(runs))):
        late = time.perf_counter() - started > budget.seconds
        if done >= budget.most_rounds or (late and done >= budget.least_rounds):
            return samples
        for name in order:
            run, count = runs[name], calls[name]
            enough = time.perf_counter() + _UNTIMED_S
            for _ in range(untimed):
                run(sets[turn % len(sets)])
                turn += 1
                if time.perf_counter() > enough:
                    break
            chosen = sets[turn % len(sets)]
            if sweep is not None:
                sweep()
            start = time.perf_counter_ns()
            for _ in range(count):
                run(chosen)
            samples[name].append((time.perf_counter_ns() - start) / count)
            turn += 1
    raise AssertionError("turns() never ends")


def _warm_up(run: Run, inputs: Inputs, least: int, seconds: float = 0.02) -> int:
    """Calls until the time is up; returns the fastest call in nanoseconds."""
    fastest, count, until = 1 << 62, 0, time.perf_counter() + seconds
    while count < least or time.perf_counter() < until:
        start = time.perf_counter_ns()
        run(inputs)
        fastest = min(fastest, time.perf_counter_ns() - start)
        count += 1
    return fastest
