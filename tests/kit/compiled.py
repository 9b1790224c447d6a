"""Tests of the ops in a process in which kernels run as they were compiled (`ptx.plugin`)."""

from __future__ import annotations

from collections.abc import Sequence

from kit import interpreter

#: What all tests of a file may take; on a busy machine some take a quarter of an hour.
SLOW_S = 7200
#: Files that are not named after their word.
_MORE = {"retrieve": ("select_pages",)}


def files_of(word: str) -> list[str]:
    root = interpreter.ROOT / "tests" / "ops"
    stems = (word, *_MORE.get(word, ()))
    return sorted(f"tests/ops/{f.name}" for stem in stems for f in root.glob(f"test_{stem}*.py"))


def run(
    targets: Sequence[str],
    capability: int,
    *options: str,
    mode: dict[str, str],
    seconds: float | None = None,
) -> interpreter.Run:
    """``mode``: more variables of the process. ``seconds``: that it may take."""
    mode = {"VICO_PTX": str(capability), "TRITON_INTERPRET": "0"} | mode
    return interpreter.run(list(targets), "-p", "ptx.plugin", *options, mode=mode, seconds=seconds)


def must_pass(ran: interpreter.Run, wanted: Sequence[str] | None = None) -> None:
    """``wanted``: the tests that must have run; by default one at least."""
    failed = [f"{n}\n{o.text}" for n, o in ran.outcomes.items() if o.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    passed = {n for n, o in ran.outcomes.items() if o.outcome == "passed"}
    assert passed, ran.output
    assert wanted is None or passed == set(wanted), ran.output
