"""Ctrl-C, SIGTERM and a terminal that is closed: all end a run, with what was done until then.

While there is a session to save the first signal waits for the chunk in work, the second does not.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: SIGHUP is not there on every system.
SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)})


@contextmanager
def heard() -> Iterator[None]:
    """Has all of them raise ``KeyboardInterrupt``, but those that are ignored (``nohup``)."""
    left = (signal.SIG_IGN, None)  # None: somebody else's, not Python's
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in SIGNALS
        if signal.getsignal(number) not in left
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Keeps them until the block is left: what it does is done whole."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stop:
    """A context in which the first signal only sets ``wanted``, so that a chunk in work is done
    and the stream stays usable; a second one is a ``KeyboardInterrupt`` wherever it comes.

    Signals that do not raise ``KeyboardInterrupt`` outside are left alone, and so are all where
    ``holds`` is false or the thread gets none.
    """

    def __init__(self, holds: bool, tell: Callable[[], None]) -> None:
        self._holds, self._tell = holds, tell
        self._before: dict[int, Any] = {}
        self.wanted = self.insisted = False

    def __enter__(self) -> Stop:
        if self._holds and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is signal.default_int_handler:
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _came(self, *_: object) -> None:
        if self.wanted:
            self.insisted = True
            raise KeyboardInterrupt
        self.wanted = True
        self._tell()

    def check(self) -> None:
        """A place at which the stream may be left."""
        if self.wanted:
            raise KeyboardInterrupt
