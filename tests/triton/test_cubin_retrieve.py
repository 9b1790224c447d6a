"""Every configuration of the retrieve kernels compiles for sm_80 and sm_90 without a spill."""

from __future__ import annotations

import re

import pytest

from kit import interpreter

pytest.importorskip("triton")
if interpreter.ACTIVE:
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from triton_calls import BF16, FP16, FP32, empty, topk_call  # noqa: E402

from kit.cubin import compile_launch, record_launches  # noqa: E402
from vicostream_kernels.triton_kernels import retrieve  # noqa: E402


def check(call, capability, names):
    launches = record_launches(call)
    assert [launch.kernel.__name__ for launch in launches] == names
    return [(compile_launch(launch, capability)) for launch in launches]


CHOICE = ["keys_kernel", "pick_kernel"]
WALK = ["keys_kernel", "reach_kernel", "pick_kernel"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_vectors_of_any_origin(dtype, capability):
    """ViCoStream's question: 4096 blocks of 2048 channels."""
    query, summary = empty(1, 2048, dtype=dtype), empty(1, 4096, 2048, dtype=dtype)
    call = topk_call(query, summary, score="cosine", k=64)
    built = check(call, capability, ["queries_kernel", "score_kernel", *CHOICE])
    for cubin in built:
        cubin.check()
    ptx = built[1].ptx
    # 2048 elements of 256 threads; a mask that follows a sum of unknown numbers cuts vectors up.
    assert ptx.count("ld.global.v4.b32") >= 2048 // 256 * dtype.itemsize // 16 + 1, "16 bytes"
    assert not re.search(r"ld\.global\S*\.b16|ld\.global\.v2", ptx), "every summary in vectors"


@pytest.mark.parametrize(
    ("dtype", "d", "score", "pool", "scope", "capability"),
    [
        (FP32, 128, "bound", "mean", "query_head", 80),
        (BF16, 128, "bound", "max", "kv_head", 90),
        (FP16, 256, "bound", "mean", "stream", 80),
        (FP32, 256, "cosine", "mean", "query_head", 90),
        (BF16, 64, "dot", "max", "query_head", 80),
        (FP32, 80, "cosine", "softmax", "stream", 90),
    ],
    ids=str,
)
def test_keys_of_heads(dtype, d, score, pool, scope, capability):
    query, cu = empty(20, 28, d, dtype=dtype), empty(2)
    shape = (1, 8192, 4, 4, d) if score == "bound" else (1, 8192, 4, d)
    kmax = empty(*shape, dtype=FP32) if score == "bound" else None
    count = None if score == "bound" else empty(1, 8192)
    call = topk_call(
        query, empty(*shape, dtype=FP32), kmax, count, cu, score=score, pool=pool, scope=scope,
        num_blocks=empty(1), ratio=0.25, capacity=2048,
    )  # fmt: skip
    names = ["queries_kernel", "score_kernel"]
    names += ["shares_kernel", "average_kernel"] if pool == "softmax" else []
    for cubin in check(call, capability, [*names, *CHOICE]):
        cubin.check()


@pytest.mark.parametrize(
    ("rule", "capability"),
    [
        (dict(mass=0.9, group=2), 80),
        (dict(mass=0.9, sizes=empty(1, 4096)), 90),
        (dict(token_budget=4096, sizes=empty(1, 4096)), 90),
    ],
    ids=["mass", "mass-of-tokens", "budget"],
)
def test_rules_that_walk_all_blocks(rule, capability):
    query, summary = empty(1, 256, dtype=FP32), empty(1, 4096, 256, dtype=FP32)
    call = topk_call(query, summary, num_blocks=empty(1), **rule)
    for cubin in check(call, capability, ["queries_kernel", "score_kernel", *WALK]):
        cubin.check()


@pytest.mark.parametrize(
    ("dtype", "d", "kind", "capability"),
    [(BF16, 128, "mean", 90), (FP32, 256, "minmax", 80), (FP16, 80, "minmax", 90)],
    ids=str,
)
def test_summaries(dtype, d, kind, capability):
    keys, table, fill = empty(300, 64, 4, d, dtype=dtype), empty(1, 100, 3), empty(300)
    sub = 4 if kind == "minmax" else 1
    call = lambda: retrieve.summarize_blocks(keys, table, fill, kind, sub)  # noqa: E731
    (cubin,) = check(call, capability, ["summary_kernel"])
    cubin.check()
    if kind == "minmax":
        assert "min.NaN.f32" in cubin.ptx and "max.NaN.f32" in cubin.ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_pages(capability):
    call = lambda: retrieve.select_pages(  # noqa: E731
        empty(1, 4, 64), empty(1, 4096, 9), empty(1, 2), empty(1, 40)
    )
    for cubin in check(call, capability, ["pages_kernel", "list_kernel"]):
        cubin.check()
