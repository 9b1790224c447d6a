"""The tests of the ops on what Triton compiles for a GPU, run instruction by instruction.

A few in each run, for Hopper; all that there are for both targets are slow.
"""

from __future__ import annotations

import pytest
import torch

import vicostream_kernels.ops  # noqa: F401 (declares what each backend implements)
from kit import compiled, emulation, interpreter
from vicostream_kernels import backends

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    interpreter.ACTIVE or emulation.ACTIVE or torch.cuda.is_available(),
    reason="a process of its own does this",
)

WORDS = sorted({op.word for op in backends.OPS.values() if "triton" in op.implementations})
#: One or more for each word, of the types and shapes that a model has.
FEW = tuple(
    f"tests/ops/test_{test}"
    for test in (
        "append.py::test_matches_the_reference[mrope-80-torch.bfloat16-triton-cpu]",
        "attention.py::test_head_dims_and_dtypes[128-bfloat16-triton-cpu]",
        "attention_varlen.py::test_varlen_head_dims_and_scale[80-triton-cpu]",
        "attention_varlen.py::test_merge_formula[3.0-bfloat16-triton-cpu]",
        "preprocess.py::test_order_of_rows_and_columns[2-2-1-1-triton-cpu]",
        "prune.py::test_chunk_intra[0.25-4-135-64-torch.bfloat16-triton-cpu]",
        "reuse.py::test_forced_rows_come_first[triton-cpu]",
        "retrieve.py::test_scores_against_loops[dot-softmax-stream-torch.float16-triton-cpu]",
        "retrieve_choice.py::test_ties_go_to_the_lowest_index[triton-cpu]",
        "retrieve_pages.py::test_it_is_the_list_of_the_choice[cosine-max-query_head-triton-cpu]",
    )
)


def test_a_few_of_each_word():
    compiled.must_pass(compiled.run(FEW, 90, mode={}), FEW)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("word", WORDS)
def test_all_of_a_word(word, capability):
    for file in compiled.files_of(word):
        ran = compiled.run([file], capability, "-k", "triton-cpu", mode={}, seconds=compiled.SLOW_S)
        if ran.outcomes:  # some files have no test of this backend
            compiled.must_pass(ran)
