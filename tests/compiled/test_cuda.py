"""The tests of the ops on what nvcc makes of `csrc/cuda`, run instruction by instruction.

A few in each run; all that there are for both targets, and in several orders of blocks, are slow.
"""

from __future__ import annotations

import pytest
from ptx import cuda_driver

import vicostream_kernels.ops  # noqa: F401 (declares what each backend implements)
from kit import emulation, interpreter
from vicostream_kernels import backends

pytestmark = [
    pytest.mark.skipif(cuda_driver.missing() is not None, reason=str(cuda_driver.missing())),
    pytest.mark.skipif(emulation.ACTIVE or interpreter.ACTIVE, reason="a process of its own"),
]
WORDS = sorted({op.word for op in backends.OPS.values() if "cuda" in op.implementations})
#: Files that are not named after their word.
MORE = {"retrieve": ("select_pages",)}
#: At least one for each kernel, of the types and shapes that a model has.
FEW = tuple(
    f"tests/ops/test_{test}"
    for test in (
        "append.py::test_matches_the_reference[mrope-128-torch.bfloat16-cuda-cpu]",
        "append.py::test_summaries_are_those_of_the_stored_keys[11-5-both-raw-cuda-cpu]",
        "attention.py::test_decode_over_a_long_list[cuda-cpu]",
        "attention.py::test_head_dims_and_dtypes[128-bfloat16-cuda-cpu]",
        "attention.py::test_head_dims_and_dtypes[80-float16-cuda-cpu]",
        "attention.py::test_head_dims_and_dtypes[256-float32-cuda-cpu]",
        "retrieve.py::test_scores_against_loops[bound-max-stream-torch.float16-cuda-cpu]",
        "retrieve_choice.py::test_ties_go_to_the_lowest_index[cuda-cpu]",
        "retrieve_large.py::test_the_best_wherever_they_lie[periodic-33000-{'k': 1000}-2-cuda-cpu]",
        "retrieve_pages.py::test_it_is_the_list_of_the_choice[cosine-max-query_head-cuda-cpu]",
    )
)


def run(targets: list[str], capability: int, *options: str, seed: int = 1) -> interpreter.Run:
    emulation.build()
    for source in cuda_driver.nvcc.SOURCES:
        cuda_driver.nvcc.ptx_of(source, capability)
    mode = {"VICO_EMULATE": "1", "VICO_EMULATE_SEED": str(seed), "VICO_PTX": str(capability)}
    plugins = ("-p", "ptx.plugin", "-p", "kit.emulation")
    return interpreter.run(targets, *plugins, *options, mode=mode)


def verdict(ran: interpreter.Run) -> None:
    failed = [f"{n}\n{o.text}" for n, o in ran.outcomes.items() if o.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    assert any(o.outcome == "passed" for o in ran.outcomes.values()), ran.output


def test_a_few_of_each_word():
    ran = run(list(FEW), 80)
    verdict(ran)
    assert {n for n, o in ran.outcomes.items() if o.outcome == "passed"} == set(FEW), ran.output


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("capability", "seed"), ((80, 1), (90, 2)))
@pytest.mark.parametrize("word", WORDS)
def test_all_of_a_word(word, capability, seed):
    root = interpreter.ROOT / "tests" / "ops"
    stems = (word, *MORE.get(word, ()))
    for file in sorted(f.name for stem in stems for f in root.glob(f"test_{stem}*.py")):
        ran = run([f"tests/ops/{file}"], capability, "-k", "cuda-cpu", seed=seed)
        if ran.outcomes:  # some files have no test of this backend
            verdict(ran)
