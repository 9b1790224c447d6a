"""The tests of the ops on what nvcc makes of `csrc/cuda`, run instruction by instruction.

A few in each run; all that there are for both targets, and in several orders of blocks, are slow.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from ptx import cuda_driver

import vicostream_kernels.ops  # noqa: F401 (declares what each backend implements)
from kit import compiled, emulation, interpreter, nvcc
from vicostream_kernels import backends

pytestmark = [
    pytest.mark.skipif(cuda_driver.missing() is not None, reason=str(cuda_driver.missing())),
    pytest.mark.skipif(emulation.ACTIVE or interpreter.ACTIVE, reason="a process of its own"),
]
WORDS = sorted({op.word for op in backends.OPS.values() if "cuda" in op.implementations})
#: One or more for each word, of the types and shapes that a model has.
FEW = tuple(
    f"tests/ops/test_{test}"
    for test in (
        "append.py::test_matches_the_reference[mrope-128-torch.bfloat16-cuda-cpu]",
        "append.py::test_summaries_are_those_of_the_stored_keys[both-300-105-True-raw-cuda-cpu]",
        "attention.py::test_head_dims_and_dtypes[128-bfloat16-cuda-cpu]",
        "retrieve.py::test_scores_against_loops[bound-max-stream-torch.float16-cuda-cpu]",
        "retrieve_choice.py::test_ties_go_to_the_lowest_index[cuda-cpu]",
        "retrieve_large.py::test_the_best_wherever_they_lie[periodic-33000-{'k': 1000}-2-cuda-cpu]",
        "retrieve_pages.py::test_it_is_the_list_of_the_choice[cosine-max-query_head-cuda-cpu]",
    )
)


def run(
    targets: Sequence[str],
    capability: int,
    *options: str,
    seed: int = 1,
    seconds: float | None = None,
) -> interpreter.Run:
    emulation.build()
    for source in nvcc.SOURCES:  # here: the process has its time limit
        nvcc.ptx_of(source, capability)
    mode = {"VICO_EMULATE": "1", "VICO_EMULATE_SEED": str(seed)}
    return compiled.run(
        targets, capability, "-p", "kit.emulation", *options, mode=mode, seconds=seconds
    )


def test_a_few_of_each_word():
    compiled.must_pass(run(FEW, 80), FEW)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("capability", "seed"), ((80, 1), (90, 2)))
@pytest.mark.parametrize("word", WORDS)
def test_all_of_a_word(word, capability, seed):
    for file in compiled.files_of(word):
        ran = run([file], capability, "-k", "cuda-cpu", seed=seed, seconds=compiled.SLOW_S)
        if ran.outcomes:  # some files have no test of this backend
            compiled.must_pass(ran)
