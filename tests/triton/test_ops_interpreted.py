"""The tests of the ops, on the Triton backend, in Triton's interpreter."""

from __future__ import annotations

from functools import cache

import pytest

import vicostream_kernels.ops  # noqa: F401 (declares what each backend implements)
from kit import interpreter
from vicostream_kernels import backends

pytest.importorskip("triton")

WORDS = sorted({op.word for op in backends.OPS.values() if "triton" in op.implementations})


# Too long for every run; the slow test below has them, and the others cover what they cover.
_LONG = tuple(
    f"tests/ops/test_{test}"
    for test in (
        *(f"reuse.py::test_ratio_alone[{ratio}-4-540" for ratio in ("0.0", "0.3", "0.85", "1.0")),
        *(
            f"attention.py::test_head_dims_and_dtypes[{d}-float16"
            for d in (8, 24, 64, 96, 128, 256)
        ),
        "attention.py::test_a_streams_bits_do_not_depend_on_the_others[float32",
        "attention.py::test_launch_hint_never_changes_results",
        "attention.py::test_missing_entries_contribute_nothing_wherever_they_stand[page_fill",
        *(f"attention.py::test_page_sizes[{size}-" for size in (3, 64, 256)),
        "attention.py::test_head_groups[1-7",
        "attention.py::test_head_groups[3-5",
        "attention_decode.py",
        "attention_properties.py::test_each_streams_bits_are_its_own",
        "attention_properties.py::test_two_parts_merge_to_the_whole",
        "attention_shift.py::test_evictions_and_any_number_of_moves_equal_a_fresh_run[0-0",
        "attention_shift.py::test_evictions_and_any_number_of_moves_equal_a_fresh_run[1",
        "attention_shift.py::test_evictions_and_any_number_of_moves_equal_a_fresh_run[2",
        "attention_shift.py::test_evictions_and_any_number_of_moves_equal_a_fresh_run[3",
        "attention_varlen.py::test_varlen_bits_do_not_depend_on_other_windows",
    )
)


@cache
def run() -> interpreter.Run:
    left_out = [f"--deselect={test}" for test in _LONG]
    # bfloat16 is refused there: the interpreter computes it wrongly.
    return interpreter.run(["tests/ops"], "-k", "triton-cpu and not bfloat16", *left_out)


@pytest.mark.skipif(interpreter.ACTIVE, reason="this is the interpreter's process")
@pytest.mark.parametrize("word", WORDS)
def test_the_ops_tests_pass_in_the_interpreter(word):
    outcomes = {n: o for n, o in run().outcomes.items() if n.startswith(f"tests/ops/test_{word}")}
    failed = [f"{nodeid}\n{o.text}" for nodeid, o in outcomes.items() if o.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    passed = [nodeid for nodeid, o in outcomes.items() if o.outcome == "passed"]
    assert passed, f"no test of {word} ran on the Triton backend:\n{run().output}"


@pytest.mark.slow
@pytest.mark.skipif(interpreter.ACTIVE, reason="this is the interpreter's process")
@pytest.mark.parametrize("test", _LONG)
def test_the_long_ones_pass_too(test):
    path, _, parameters = test.partition("[")
    chosen = f"triton-cpu and not bfloat16 and {parameters.rstrip('-') or 'triton'}"
    outcomes = interpreter.run([path], "-k", chosen).outcomes
    failed = [f"{nodeid}\n{o.text}" for nodeid, o in outcomes.items() if o.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    assert any(o.outcome == "passed" for o in outcomes.values()), f"{test} did not run"
