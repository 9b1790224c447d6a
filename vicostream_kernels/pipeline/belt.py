"""The way of a chunk through the stages: one stage after another, or each in a thread of its own.

A stage here is a function of one value. Both ways take values in their order, so what comes out has
the same bits (at equal intra-op threads: a stage's thread has as many as torch is set to).
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

from vicostream_kernels.pipeline.errors import surface
from vicostream_kernels.pipeline.lanes import Lane

Stage = Callable[[Any], Any]
#: Values that a stage works on or that wait for it: with one more than it works on, stages whose
#: times vary need not wait for each other each time.
_ROOM = 2


class Way(Protocol):
    """What ``Line`` and ``Belt`` have in common; used by one thread.

    A stage that raises ``again`` (a type of exception, or several) keeps its value and is tried
    again at the next call. What else it raises is the end: no value goes on after that. A call that
    waits may be interrupted and made again.
    """

    @property
    def over(self) -> bool:
        """Whether nothing goes on any more, and the caller has heard why."""
        ...

    def ready(self) -> None:
        """Returns when there is room for a value; raises what a stage raised before."""
        ...

    def put(self, value: Any) -> None:
        """Hands a value on; ``ready`` has returned. What its stages raise comes from here or from a
        later call."""
        ...

    def drain(self) -> None:
        """Returns when all values are through; raises what a stage raised."""
        ...

    def settle(self) -> None:
        """Returns when all values are through but what waits to be tried again, and does not try;
        raises what is the end."""
        ...

    def close(self) -> None:
        """Drops the values on their way; a stage that is at work ends first. May be repeated."""
        ...

    def unheard(self) -> BaseException | None:
        """What a stage raised and no call has raised yet. It counts as heard then."""
        ...


class Line:
    """One stage after another, in the caller's thread, within ``put``."""

    def __init__(
        self, stages: Sequence[Stage], again: type[Exception] | tuple[type[Exception], ...]
    ) -> None:
        self._stages, self._again = stages, again
        self._waiting: tuple[int, Any] | None = None  # the stage to be tried again
        self.over = False

    def ready(self) -> None:
        self.drain()

    def put(self, value: Any) -> None:
        self._run(0, value)

    def drain(self) -> None:
        if self._waiting is not None:
            self._run(*self._waiting)

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self._waiting = None

    def unheard(self) -> None:
        pass

    def _run(self, at: int, value: Any) -> None:
        self._waiting = None
        try:
            while at < len(self._stages):
                value = self._stages[at](value)
                at += 1
        except self._again:
            self._waiting = at, value
            raise
        except BaseException:
            self.over = True
            raise


class Belt:
    """Each stage in a thread of its own, on the lane of the same place in ``lanes``."""

    def __init__(
        self,
        stages: Sequence[Stage],
        again: type[Exception] | tuple[type[Exception], ...],
        lanes: Sequence[Lane],
    ) -> None:
        self._stages, self._again, self._lanes = stages, again, lanes
        self._inboxes: list[deque[Any]] = [deque() for _ in stages]  # the first is being worked on
        # Entered by itself: a signal that is handled in the midst of a condition's own `__enter__`
        # or `__exit__`, which are Python, would leave it locked for ever.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._error: BaseException | None = None  # the caller has yet to hear it
        self._rests = self._over = False  # until the caller's next call; for good
        self._failed = False  # an error was the end
        self._threads = [
            threading.Thread(target=self._work, args=(at,), name=f"vicostream-{at}", daemon=True)
            for at in range(len(stages))
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.stop()
            raise
        _RUNNING.add(self)

    @property
    def over(self) -> bool:
        return self._over and self._error is None

    def ready(self) -> None:
        self._until(lambda: self._room(0))

    def put(self, value: Any) -> None:
        value = self._lanes[0].leave(value)
        with self._lock:
            self._inboxes[0].append(value)
            self._changed.notify_all()

    def drain(self) -> None:
        self._until(lambda: not any(self._inboxes))

    def settle(self) -> None:
        with self._lock:
            self._wait(lambda: not any(self._inboxes))
            if self._over:
                self._say()

    def stop(self) -> None:
        """As ``close``, but waits for nothing."""
        with self._lock:
            self._over = True
            self._changed.notify_all()

    def close(self) -> None:
        self._check_caller()
        self.stop()
        for thread in self._threads:
            thread.join()
        for inbox in self._inboxes:
            inbox.clear()

    def unheard(self) -> BaseException | None:
        with self._lock:
            error, self._error = self._error, None
            self._rests = self._rests or error is not None
            return error

    def _until(self, done: Callable[[], bool]) -> None:
        with self._lock:
            # Each time, and first: what was interrupted before it told the others is told now.
            self._changed.notify_all()
            self._rests = False
            self._wait(done)
            self._say()

    def _wait(self, done: Callable[[], bool]) -> None:
        self._check_caller()
        self._changed.wait_for(lambda: self._still() or done())

    def _check_caller(self) -> None:
        if threading.current_thread() in self._threads:
            raise RuntimeError("a stage, or what it calls, cannot wait for its own stream")

    def _still(self) -> bool:
        """Whether nothing moves on: before the caller has heard why, and then until it calls again,
        by when it may have made room."""
        return self._error is not None or self._rests or self._over

    def _say(self) -> None:
        """Raises an error once."""
        surface([self.unheard()])

    def _room(self, at: int) -> bool:
        return at == len(self._stages) or len(self._inboxes[at]) < _ROOM

    def _work(self, at: int) -> None:
        inbox, lane = self._inboxes[at], self._lanes[at]
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._over or (inbox and not self._still()))
                if self._over:
                    return
                value = inbox[0]
            try:
                with lane:
                    value = lane.leave(self._stages[at](lane.take(value)))
            except BaseException as error:  # the caller's next call raises it
                with self._lock:
                    self._changed.wait_for(lambda: self._over or not self._still())
                    self._fail(error)
                continue
            with self._lock:
                self._changed.wait_for(lambda: self._over or self._room(at + 1))
                if self._over:
                    return
                inbox.popleft()
                if at + 1 < len(self._stages):
                    self._inboxes[at + 1].append(value)
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """Notes an error for the caller, also one that comes while the belt is being closed."""
        if self._error is not None or self._failed:
            return  # the belt is over by an error before
        self._error, self._failed = error, not isinstance(error, self._again)
        self._over = self._over or self._failed
        self._changed.notify_all()

    def _orphan(self) -> None:
        """The threads did not come along through a fork, and whatever lock they held is held."""
        self._lock, self._threads, self._over = threading.RLock(), [], True
        self._changed = threading.Condition(self._lock)


_RUNNING: WeakSet[Belt] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Threads that are at work while the interpreter goes away end the process with an abort."""
    belts = list(_RUNNING)
    for belt in belts:
        belt.close()
    surface([belt.unheard() for belt in belts])


def _forked() -> None:
    for belt in list(_RUNNING):
        belt._orphan()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
