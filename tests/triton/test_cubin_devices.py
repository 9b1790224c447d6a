"""The Triton kernels compile for the devices that their tiles were not made for, too.

8.6 and 8.9 (A10, RTX 3090; L4, L40S, RTX 4090) and 12.0 (RTX 5090) have 99 KiB of shared memory a
block, 10.0 (B200) multiplies in tensor memory. See ``kit.cubin.SPILL_LIMIT``.
"""

from __future__ import annotations

import itertools

import pytest

from kit import interpreter

pytest.importorskip("triton")
if interpreter.ACTIVE:
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from triton_calls import (  # noqa: E402
    BF16,
    FP32,
    append_call,
    build_attention,
    check_attention,
    empty,
    paged_call,
    preprocess_call,
    prune_call,
    select_call,
    topk_call,
    varlen_call,
)

from kit.cubin import compile_launch, record_launches  # noqa: E402
from vicostream_kernels.methods import get  # noqa: E402
from vicostream_kernels.triton_kernels import retrieve, reuse  # noqa: E402

DEVICES = (86, 89, 100, 120)
QUICK = {
    "append": append_call(BF16, 128, raw=True, sums=True, sub=1),
    "chunk-intra": prune_call(get("vicostream").prune, BF16, 2048),
    "select": select_call(BF16, 1280),
    "retrieve": topk_call(
        empty(1, 2048, dtype=BF16), empty(1, 4096, 2048, dtype=BF16), score="cosine", k=64
    ),
}
KEYS, BOUNDS = empty(1, 8192, 4, 256, dtype=FP32), empty(1, 8192, 4, 4, 128, dtype=FP32)
QUERY, OFFSETS = empty(20, 28, 256, dtype=FP32), empty(2)
ALL = {
    **{
        f"append-{dtype}-{d}": append_call(dtype, d, raw=True, sums=True, sub=2)
        for dtype, d in itertools.product((FP32, BF16), (64, 80, 128, 256))
    },
    "stc": prune_call(get("stc").prune, FP32, 2048, state=True),
    "merge": lambda: reuse.merge_rows(
        empty(4, 540, 1280, dtype=BF16), empty(4, 135, 1280, dtype=BF16), empty(4, 135)
    ),
    "cosine": topk_call(
        QUERY, KEYS, None, empty(1, 8192), OFFSETS, score="cosine", scope="query_head",
        num_blocks=empty(1), ratio=0.25, capacity=2048,
    ),
    "bound": topk_call(
        QUERY[..., :128], BOUNDS, BOUNDS, None, OFFSETS, score="bound", scope="query_head",
        num_blocks=empty(1), k=64,
    ),
    "summaries": lambda: retrieve.summarize_blocks(
        empty(300, 64, 4, 128, dtype=BF16), empty(1, 100, 3), empty(300), "minmax", 4
    ),
    "pages": lambda: retrieve.select_pages(
        empty(1, 4, 64), empty(1, 4096, 9), empty(1, 2), empty(1, 40)
    ),
    "preprocess": preprocess_call((1080, 1920), (252, 420), 14, 2, BF16),
}  # fmt: skip


@pytest.mark.parametrize("capability", DEVICES[1:])
@pytest.mark.parametrize("word", QUICK)
def test_a_word(word, capability):
    for launch in record_launches(QUICK[word]):
        compile_launch(launch, capability).check()


@pytest.mark.slow
@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("word", ALL)
def test_every_word(word, capability):
    for launch in record_launches(ALL[word]):
        compile_launch(launch, capability).check()


@pytest.mark.parametrize("capability", DEVICES[1:])
@pytest.mark.parametrize("kernel", ("prefill_kernel", "split_kernel", "varlen_kernel"))
def test_attention(kernel, capability):
    call = varlen_call(BF16, 80) if kernel == "varlen_kernel" else paged_call(BF16, 128)
    check_attention(build_attention(call, capability, kernel), BF16, capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("turned", (False, True), ids=("plain", "turned"))
@pytest.mark.parametrize("d", (8, 64, 80, 96, 128, 256))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_attention_of_every_class(dtype, d, turned, capability):
    call = paged_call(dtype, d, window=True, shift=turned)
    check_attention(build_attention(call, capability), dtype, capability)
    if not turned:
        check_attention(build_attention(varlen_call(dtype, d), capability), dtype, capability)
