"""The tests of the ops, on the Triton backend, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vicostream_kernels.ops  # noqa: F401 (declares what each backend implements)
from kit import interpreter
from vicostream_kernels import backends

pytest.importorskip("triton")

WORDS = sorted({op.word for op in backends.OPS.values() if "triton" in op.implementations})
_LONG_WORDS = ("retrieve", "attention", "preprocess", "append", "prune")
LONGEST_FIRST = sorted(WORDS, key=lambda word: (_LONG_WORDS + (word,)).index(word))


# Too long for every run; the slow test below has them, and the others cover what they cover.
_LONG = tuple(
    f"tests/ops/test_{test}"
    for test in (
        *(f"prune.py::test_chunk_intra[{eps}-" for eps in (0.15, 0.5, 0.9)),
        "prune.py::test_chunk_intra[0.25-4-135",
        "prune.py::test_dtd_relative[True",
        *(f"prune.py::test_dtd_relative[False-{share}" for share in (0.7, 0.85, 1.0)),
        "prune.py::test_stc_gaussian_with_history[1",
        *(
            f"prune.py::test_threshold_of_every_metric_and_reference[{name}"
            for name in ("previous-l", "last_kept-l1", "chunk_first-l", "frame_mean-l1")
        ),
        *(f"prune_edges.py::test_ratio_per_group_counts_each_group[{r}" for r in (0.5, 1.0)),
        *(
            f"prune_edges.py::test_capacity_cuts_in_order_and_count_stays_true[{c}"
            for c in (1, 239, 240, 600)
        ),
        "prune_edges.py::test_tokens_with_nan_or_inf_stay[metric",
        "prune_edges.py::test_tokens_with_nan_or_inf_stay[reference=last",
        "prune_edges.py::test_tokens_with_nan_or_inf_stay[k",
        "prune_stream.py::test_steps_in_any_pieces_give_the_bits_of_one_call[reference=f",
        "prune_stream.py::test_bits_at_the_size_of_a_model",
        "prune_stream.py::test_rules_over_a_chunk_say_that_they_are_not_causal",
        "prune_stream.py::test_steps_in_any_pieces_give_the_bits_of_one_call[keep",
        "prune_stream.py::test_packed_equals_separate[keep",
        "prune_edges.py::test_mask_or_keeps_in_addition",
        "prune_stream.py::test_packed_equals_separate[threshold=0.4",
        "prune_stream.py::test_packed_equals_separate[reference=r",
        "prune_stream.py::test_packed_equals_separate[reference=l",
        "prune_stream.py::test_packed_equals_separate[reference=f",
        *(f"reuse.py::test_ratio_alone[{ratio}-4-540" for ratio in ("0.0", "0.3", "0.85", "1.0")),
        *(f"retrieve.py::test_a_stream_has_the_bits_it_has_alone[{s}" for s in ("cosine", "bound")),
        "retrieve.py::test_a_stream_has_the_bits_it_has_alone[dot-softmax",
        "retrieve.py::test_a_stream_has_the_bits_it_has_alone[dot-max",
        *(f"retrieve_summaries.py::test_minmax_of_each_part[{part}" for part in ("5-5", "8-4")),
        "retrieve_choice.py::test_top_k_of_many[5000",
        "retrieve_choice.py::test_scores_in_order_alike_or_missing[triton-cpu-1002",
        *(
            f"retrieve_large.py::test_a_choice_among_many[{{'{x}'"
            for x in ("token_budget", "ratio")
        ),
        *(f"retrieve_pages.py::test_long_lists[{size}-" for size in ("300-90", "3000-1000")),
        "retrieve_native.py::test_one_and_two_threads_give_the_same_bits",
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
        *(
            f"preprocess.py::test_levels_are_the_definitions_within_two[{s}"
            for s in ("(360", "(253")
        ),
        *(
            f"preprocess.py::test_levels_are_the_definitions_within_two[{size}-{kind}"
            for size in ("(17, 25, 56, 84)", "(1, 100, 28, 280)")
            for kind in ("dots", "smooth")
        ),
    )
)


# Files that are not named after their word.
_MORE = {"retrieve": ("select_pages",)}


def files(word: str) -> list[str]:
    folder = Path(__file__).resolve().parents[1] / "ops"
    names = (name for stem in (word, *_MORE.get(word, ())) for name in folder.glob(f"test_{stem}*"))
    return sorted(f"tests/ops/{name.name}" for name in names)


def left_out_of(word: str) -> list[str]:
    return [test for test in _LONG if test.startswith(tuple(files(word)))]


def run_words(words: Sequence[str]) -> interpreter.Run:
    options = [f"--deselect={test}" for word in words for test in left_out_of(word)]
    # bfloat16 is refused there: the interpreter computes it wrongly.
    return interpreter.run(
        [file for word in words for file in files(word)],
        "-k", "triton-cpu and not bfloat16", *options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(request):
    """Two processes of one thread for the selected words, each with a half of what there is to do
    (neither comes near the limit of a process): one for each word would import torch six times."""
    chosen = {
        item.callspec.params["word"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_the_ops_tests_pass_in_the_interpreter"
    }
    words = [word for word in LONGEST_FIRST if word in chosen]
    halves: tuple[list[str], list[str]] = ([], [])
    for at, word in enumerate(words):  # dealt out and back again, the longest first
        halves[(at + 1) // 2 % 2].append(word)
    with ThreadPoolExecutor(2) as two:
        runs = [(half, two.submit(run_words, half)) for half in halves if half]
        yield {word: run for half, run in runs for word in half}
        two.shutdown(cancel_futures=True)


@pytest.mark.skipif(interpreter.ACTIVE, reason="this is the interpreter's process")
@pytest.mark.timeout(1800)  # each process has a limit of its own, from when it starts
@pytest.mark.parametrize("word", LONGEST_FIRST)
def test_the_ops_tests_pass_in_the_interpreter(runs, word):
    ran = runs[word].result()
    left_out, mine = left_out_of(word), tuple(files(word))
    outcomes = {nodeid: o for nodeid, o in ran.outcomes.items() if nodeid.startswith(mine)}
    failed = [f"{nodeid}\n{o.text}" for nodeid, o in outcomes.items() if o.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    passed = [nodeid for nodeid, o in outcomes.items() if o.outcome == "passed"]
    assert passed, f"no test of {word} ran on the Triton backend:\n{ran.output}"
    found = [n for n in ran.collected if "triton-cpu" in n and "bfloat16" not in n]
    stale = [test for test in left_out if not any(n.startswith(test) for n in found)]
    assert not stale, f"no tests begin like these, which are to be left out: {stale}"


def test_what_is_left_out_is_in_files_that_run():
    of_words = tuple(file for word in WORDS for file in files(word))
    assert [test for test in _LONG if not test.startswith(of_words)] == []


@pytest.mark.slow
@pytest.mark.skipif(interpreter.ACTIVE, reason="this is the interpreter's process")
@pytest.mark.parametrize("test", sorted({test.partition("[")[0] for test in _LONG}))
def test_the_long_ones_pass_too(test):
    outcomes = interpreter.run([test], "-k", "triton-cpu and not bfloat16").outcomes
    failed = [f"{nodeid}\n{o.text}" for nodeid, o in outcomes.items() if o.outcome == "failed"]
    assert not failed, "\n\n".join(failed)
    assert any(o.outcome == "passed" for o in outcomes.values()), f"{test} did not run"
