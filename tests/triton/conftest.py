"""The tests under interpreter/ run in the interpreter's process and are reported one by one."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest

from kit import interpreter

_FOLDER = Path(__file__).parent / "interpreter"


@cache
def _run(nodeids: tuple[str, ...]) -> interpreter.Run:
    return interpreter.run(nodeids)


def _replay(nodeids: tuple[str, ...], nodeid: str) -> None:
    _run(nodeids).replay(nodeid)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Has the selected tests of that folder replay their outcome in place of running here."""
    if interpreter.ACTIVE:
        return
    items = [item for item in session.items if _FOLDER in item.path.parents]
    # A process for each file: one of several pytest processes may get one file without the others.
    files: dict[Path, list[str]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item.nodeid)
    for item in items:
        item.setup = lambda: None
        item.runtest = partial(_replay, tuple(files[item.path]), item.nodeid)
