"""Whose turn it is at the cache and the LLM, which stages, answers and whoever closes share."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from threading import RLock, get_ident
from typing import Any
from weakref import WeakSet

from vicostream_kernels.pipeline.lanes import Lane


class Turn(Lane):
    """One thread's at a time, on one lane. May be nested.

    Whoever left comes after whoever waits. A lock does not see to that: a stage that leaves it and
    comes back with its next chunk is there before the thread that waits has woken up. So the lock
    is taken by way of another, which its next owner keeps until it has the first.
    """

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self.leave, self.take = lane.leave, lane.take
        self.join, self.follow = lane.join, lane.follow
        self._later: deque[Callable[[], Any]] = deque()
        self._renew()
        _TURNS.add(self)

    def _renew(self) -> None:
        # Reentrant: what handles a signal may want the turn that its own thread waits for.
        self._next, self._lock = RLock(), RLock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        if self._owner == get_ident():
            self._lock.acquire()
            self._depth += 1
            return
        try:
            with self._next:
                self._lock.acquire()
                self._owner = get_ident()
            self._lane.__enter__()
            self._depth = 1
        except BaseException:  # perhaps a signal's, before or after the lock was taken
            if self._lock._is_owned():
                self._depth, self._owner = 0, None
                self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._depth -= 1
            if self._depth == 0:
                self._lane.__exit__()
        finally:
            # No call before the release: what handles a signal would come before it.
            outermost = self._depth == 0
            if outermost:
                self._owner = None
            self._lock.release()
        if outermost:
            self._catch_up()

    def later(self, call: Callable[[], Any]) -> None:
        """Has ``call`` done by whoever has the turn, when it leaves; now where nobody has it.

        Never waits, and never calls into the middle of what its own thread does at the cache: that
        is for what the garbage collector brings, which may come anywhere.
        """
        self._later.append(call)
        self._catch_up()

    def _catch_up(self) -> None:
        while self._later and self._owner != get_ident() and self._lock.acquire(blocking=False):
            self._owner, self._depth = get_ident(), 1
            try:
                with self._lane:
                    while self._later:
                        self._later.popleft()()
            finally:
                self._owner, self._depth = None, 0
                self._lock.release()


_TURNS: WeakSet[Turn] = WeakSet()


def _forked() -> None:
    """Whose turn it was is not there any more, but for the thread that forked."""
    for turn in list(_TURNS):
        if turn._owner != get_ident():
            turn._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
