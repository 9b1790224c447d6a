"""The tests of the ops, on the Triton backend, in Triton's interpreter."""

from __future__ import annotations

from functools import cache

import pytest

import vicostream_kernels.ops  # noqa: F401 (declares what each backend implements)
from kit import interpreter
from vicostream_kernels import backends

pytest.importorskip("triton")

WORDS = sorted({op.word for op in backends.OPS.values() if "triton" in op.implementations})


@cache
def run() -> interpreter.Run:
    return interpreter.run(["tests/ops"], "-k", "triton-cpu")


@pytest.mark.skipif(interpreter.ACTIVE, reason="this is the interpreter's process")
@pytest.mark.parametrize("word", WORDS)
def test_the_ops_tests_pass_in_the_interpreter(word):
    outcomes = {n: o for n, o in run().outcomes.items() if n.startswith(f"tests/ops/test_{word}")}
    failed = [f"{nodeid}\n{o.text}" for nodeid, o in outcomes.items() if o.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    passed = [nodeid for nodeid, o in outcomes.items() if o.outcome == "passed"]
    assert passed, f"no test of {word} ran on the Triton backend:\n{run().output}"
