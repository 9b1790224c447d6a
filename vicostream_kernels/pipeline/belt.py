"""The way of a chunk through the stages: one stage after another, or each in a thread of its own.

A stage here is a function of one value. Both ways take values in their order, so what comes out has
the same bits (at equal intra-op threads: a stage's thread has as many as torch is set to).
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakSet

from vicostream_kernels.pipeline.lanes import Lane

Stage = Callable[[Any], Any]
#: Values that a stage works on or that wait for it: with one more than it works on, stages whose
#: times vary need not wait for each other each time.
_ROOM = 2


class Way(Protocol):
    """What ``Line`` and ``Belt`` have in common; used by one thread.

    A stage that raises ``again`` (a type of exception) keeps its value and is tried again at the
    next call. What else it raises is the end: no value goes on after that.
    """

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


class Line:
    """One stage after another, in the caller's thread, within ``put``."""

    def __init__(self, stages: Sequence[Stage], again: type[Exception]) -> None:
        self._stages, self._again = stages, again
        self._waiting: tuple[int, Any] | None = None  # the stage to be tried again

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

    def _run(self, first: int, value: Any) -> None:
        self._waiting = None
        for at in range(first, len(self._stages)):
            try:
                value = self._stages[at](value)
            except self._again:
                self._waiting = at, value
                raise


class Belt:
    """Each stage in a thread of its own, on the lane of the same place in ``lanes``."""

    def __init__(
        self, stages: Sequence[Stage], again: type[Exception], lanes: Sequence[Lane]
    ) -> None:
        self._stages, self._again, self._lanes = stages, again, lanes
        self._inboxes: list[deque[Any]] = [deque() for _ in stages]  # the first is being worked on
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._rests = self._over = False  # until the caller's next call; for good
        self._threads = [
            threading.Thread(target=self._work, args=(at,), name=f"vicostream-{at}", daemon=True)
            for at in range(len(stages))
        ]
        for thread in self._threads:
            thread.start()
        _RUNNING.add(self)

    def ready(self) -> None:
        self._until(lambda: self._room(0))

    def put(self, value: Any) -> None:
        value = self._lanes[0].leave(value)
        with self._changed:
            self._inboxes[0].append(value)
            self._changed.notify_all()

    def drain(self) -> None:
        self._until(lambda: not any(self._inboxes))

    def settle(self) -> None:
        with self._changed:
            self._wait(lambda: not any(self._inboxes))
            if self._over:
                self._say()

    def stop(self) -> None:
        """As ``close``, but waits for nothing."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def close(self) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()
        for inbox in self._inboxes:
            inbox.clear()

    def _until(self, done: Callable[[], bool]) -> None:
        with self._changed:
            if self._rests:
                self._rests = False
                self._changed.notify_all()
            self._wait(done)
            self._say()

    def _wait(self, done: Callable[[], bool]) -> None:
        if threading.current_thread() in self._threads:
            raise RuntimeError("a stage, or what it calls, cannot wait for its own stream")
        self._changed.wait_for(lambda: self._still() or done())

    def _still(self) -> bool:
        """Whether nothing moves on: before the caller has heard why, and then until it calls again,
        by when it may have made room."""
        return self._error is not None or self._rests or self._over

    def _say(self) -> None:
        """Raises an error once."""
        if self._error is not None:
            error, self._error, self._rests = self._error, None, True
            raise error

    def _room(self, at: int) -> bool:
        return at == len(self._stages) or len(self._inboxes[at]) < _ROOM

    def _work(self, at: int) -> None:
        inbox, lane = self._inboxes[at], self._lanes[at]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over or (inbox and not self._still()))
                if self._over:
                    return
                value = inbox[0]
            try:
                with lane:
                    value = lane.leave(self._stages[at](lane.take(value)))
            except BaseException as error:  # the caller's next call raises it
                with self._changed:
                    self._changed.wait_for(lambda: self._over or not self._still())
                    if self._over:
                        return
                    self._error, self._over = error, not isinstance(error, self._again)
                    self._changed.notify_all()
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._over or self._room(at + 1))
                if self._over:
                    return
                inbox.popleft()
                if at + 1 < len(self._stages):
                    self._inboxes[at + 1].append(value)
                self._changed.notify_all()


#: Threads that are at work while the interpreter goes away end the process with an abort.
_RUNNING: WeakSet[Belt] = WeakSet()


@atexit.register
def _close_all() -> None:
    for belt in list(_RUNNING):
        belt.close()
