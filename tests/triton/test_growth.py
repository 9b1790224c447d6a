"""A stream that grows compiles nothing anew: a compilation in its midst is a pause of a second."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kit import interpreter

pytest.importorskip("triton")
if interpreter.ACTIVE:
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from kit.cubin import compiled_for, record_launches  # noqa: E402
from vicostream_kernels import PruneRule  # noqa: E402
from vicostream_kernels.triton_kernels import (  # noqa: E402
    append,
    attention,
    preprocess,
    prune,
    retrieve,
    reuse,
)

BF16, FP32 = torch.bfloat16, torch.float32
LENGTHS = (1, 7, 16, 40, 300, 2000)


def empty(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def moved(*shape):
    """A view that begins where its length puts it: at any multiple of four bytes."""
    whole = empty(shape[0], shape[1] % 4 + shape[1], *shape[2:])
    return whole[:, shape[1] % 4 :]


def same_for_all(call) -> None:
    """``call(length)`` launches the same compiled kernels, whatever the length."""
    launches = (record_launches(partial(call, length)) for length in LENGTHS)
    first, *rest = ([compiled_for(launch) for launch in of_length] for of_length in launches)
    for length, other in zip(LENGTHS[1:], rest):
        assert [name for name, _ in other] == [name for name, _ in first]
        for (name, known), (_, new) in zip(first, other):
            differ = {k: (known[k], v) for k, v in new.items() if known[k] != v}
            assert not differ, f"{name} of {length} is compiled anew: {differ}"


@pytest.mark.parametrize("rows", (1, 320))
@pytest.mark.parametrize("turned", (False, True), ids=("plain", "turned"))
def test_attention_over_a_table_that_grows(rows, turned):
    h, g, d, pages = 28, 4, 128, 3000
    pool = empty(pages, 64, g, d, dtype=BF16)

    def call(length):
        attention.sink_window_attention(
            empty(rows, h, d, dtype=BF16), pool, pool, empty(1, length), empty(2),
            empty(rows, h, d, dtype=BF16), None, None, empty(pages), 4, 4096, None, None, None,
            empty(1, length, 3) if turned else None,
            empty(d // 2, dtype=FP32) if turned else None, [16, 24, 24] if turned else None,
        )  # fmt: skip

    same_for_all(call)


def test_append_of_any_number_of_tokens():
    h, g, d, pages = 28, 4, 128, 300
    pools = [empty(pages, 64, g, d, dtype=BF16) for _ in range(2)]

    def call(n):
        q, k = empty(n, h, d, dtype=BF16), empty(n, g, d, dtype=BF16)
        append.rope_append(
            q, k, k, empty(3, n), empty(d // 2, dtype=FP32), [16, 24, 24], *pools, empty(n), q,
            sum=empty(n + 64, g, d, dtype=FP32), count=moved(1, n + 64)[0],
            block_of_page=empty(pages),
        )  # fmt: skip

    same_for_all(call)


@pytest.mark.parametrize("rule", ({"k": 64}, {"token_budget": 4096}), ids=str)
def test_retrieval_from_a_history_that_grows(rule):
    selection = {
        "k": None, "ratio": None, "mass": None, "token_budget": None, "tokens_per_block": None,
        "min_k": 1, "group": 1, "force_first": 0, "force_last": 0, "capacity": 64, **rule,
    }  # fmt: skip
    keys = empty(3000, 64, 4, 128, dtype=BF16)

    def call(n):
        table, sizes = moved(1, n, 1), None if rule.get("k") else empty(1, n)
        sums, _ = retrieve.summarize_blocks(keys, table, empty(3000), "mean", 1)
        counts = moved(1, n)
        query = empty(1, 28, 128, dtype=BF16)
        index, _, _ = retrieve.topk_blocks(
            query, sums, None, counts, None, None, None, sizes, "dot", "mean", "stream", None,
            **selection,
        )  # fmt: skip
        retrieve.select_pages(index, table, empty(1, 3), moved(1, n))

    same_for_all(call)


def test_chunks_of_any_number_of_frames():
    def call(n):
        frames, half = empty(n, 360, 640, 3, dtype=torch.uint8), (0.5,) * 3
        preprocess.preprocess_frames(frames, 252, 420, half, half, 14, 2, 2, BF16)

    same_for_all(call)


@pytest.mark.parametrize(
    "rule",
    (
        PruneRule(threshold=0.25, reduce="any", always_keep="first"),
        PruneRule(
            reference=("running_mean", "frame_mean"), metric="gaussian", ratio=0.25, channels=0.5
        ),
    ),
    ids=("chunk-intra", "stc"),
)
def test_pruning_of_chunks_of_any_number_of_steps(rule):
    def call(steps):
        tokens, width = steps * 135, 2048
        prune.prune_tokens(
            empty(steps, 135, width, dtype=BF16), empty(3, steps, 135), rule, None,
            empty(tokens, width, dtype=BF16), empty(3, tokens), empty(tokens), empty(2),
            empty(steps, 135, dtype=torch.bool),
        )  # fmt: skip

    same_for_all(call)


def test_reuse_in_calls_of_any_number_of_steps():
    places, width, rows = 540, 1280, 135

    def call(steps):
        feature, reference = (
            empty(steps, places, width, dtype=BF16),
            empty(places, width, dtype=BF16),
        )
        index, _, _ = reuse.select_changed(feature, reference, rows, None, rows, "cosine")
        changed = reuse.gather_rows(feature, index)
        reuse.merge_rows(reference, changed, index, feature)

    same_for_all(call)
