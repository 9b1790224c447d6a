"""The tests of the ops on the CUDA kernels, which run on the CPU over `tests/emulator`."""

from __future__ import annotations

from functools import cache

import pytest

import vicostream_kernels.ops  # noqa: F401 (declares what each backend implements)
from kit import emulation, interpreter
from vicostream_kernels import backends

WORDS = sorted({op.word for op in backends.OPS.values() if "cuda" in op.implementations})
pytestmark = [
    pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing())),
    pytest.mark.skipif(emulation.ACTIVE, reason="this is the emulator's process"),
]


#: Files that are not named after their word.
MORE = {"retrieve": ("select_pages",)}


def starts(word: str) -> tuple[str, ...]:
    return tuple(f"tests/ops/test_{stem}" for stem in (word, *MORE.get(word, ())))


def verdict(run: interpreter.Run, word: str) -> None:
    outcomes = {n: o for n, o in run.outcomes.items() if n.startswith(starts(word))}
    failed = [f"{nodeid}\n{o.text}" for nodeid, o in outcomes.items() if o.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    passed = [nodeid for nodeid, o in outcomes.items() if o.outcome == "passed"]
    assert passed, f"no test of {word} ran on the cuda backend:\n{run.output}"


@cache
def run(seed: int) -> interpreter.Run:
    return emulation.run(["tests/ops"], "-k", "cuda-cpu", seed=seed)


@pytest.mark.parametrize("word", WORDS)
def test_the_ops_tests_pass_in_the_emulator(word):
    verdict(run(1), word)


@pytest.mark.slow
@pytest.mark.parametrize("seed", (2, 3, 4))
@pytest.mark.parametrize("word", WORDS)
def test_in_other_orders_of_threads_and_copies_too(word, seed):
    verdict(run(seed), word)


@pytest.mark.slow
@pytest.mark.parametrize("word", WORDS)
def test_no_two_threads_race_in_shared_memory(word):
    # A word at a time: each run has its time limit, and watching takes several times as long.
    files = sorted(file.name for file in (emulation.ROOT / "tests" / "ops").glob("test_*.py"))
    targets = [path for path in (f"tests/ops/{f}" for f in files) if path.startswith(starts(word))]
    verdict(emulation.run(targets, "-k", "cuda-cpu", watched=True), word)
