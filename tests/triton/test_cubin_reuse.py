"""Every configuration of the reuse kernels compiles for sm_80 and sm_90 without a spill."""

from __future__ import annotations

import pytest

from kit import interpreter

pytest.importorskip("triton")
if interpreter.ACTIVE:
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from triton_calls import BF16, FP16, FP32, empty, select_call  # noqa: E402

from kit.cubin import compile_launch, compiled_for, record_launches  # noqa: E402
from vicostream_kernels.triton_kernels import reuse  # noqa: E402


@pytest.mark.parametrize(
    ("dtype", "width", "metric", "capability"),
    [
        (FP32, 1280, "cosine", 80),
        (BF16, 1280, "cosine", 90),
        (BF16, 64, "l2", 80),
        (FP16, 4096, "l1", 90),
        (FP32, 45, "dot", 90),
    ],
    ids=str,
)
def test_select(dtype, width, metric, capability):
    launches = record_launches(select_call(dtype, width, metric=metric))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["similarity_kernel", "rank_kernel", "list_kernel"]
    for launch in launches:
        compile_launch(launch, capability).check()


@pytest.mark.parametrize(
    ("dtype", "width", "capability"), [(FP32, 1280, 80), (BF16, 1280, 90), (FP16, 40, 80)], ids=str
)
def test_rows(dtype, width, capability):
    x, rows = empty(4, 540, width, dtype=dtype), empty(4, 135, width, dtype=dtype)
    index = empty(4, 135)
    (gather,) = record_launches(lambda: reuse.gather_rows(x, index))
    (merge,) = record_launches(lambda: reuse.merge_rows(x[0], rows, index, x))
    (bare,) = record_launches(lambda: reuse.merge_rows(x, rows, index))
    for launch in (gather, merge, bare):
        compile_launch(launch, capability).check()


def test_rows_move_in_vectors_of_16_bytes():
    x, rows, index = empty(4, 540, 1280, dtype=BF16), empty(4, 135, 1280, dtype=BF16), empty(4, 135)
    (select, *_) = record_launches(
        lambda: reuse.select_changed(x, x[0], 135, None, 135, "cosine", None)
    )
    (merge,) = record_launches(lambda: reuse.merge_rows(x[0], rows, index, x))
    ptx = compile_launch(select, 90).ptx
    assert ptx.count("ld.global.v4.b32") == 2 * 5 and "bar.sync" not in ptx
    # Sums of equal rows round alike, whatever the compiler would fuse by itself.
    ptx = compile_launch(select, 90, enable_fp_fusion=False).ptx
    assert ptx.count("fma.rn.f32") >= 3 * 1280 // 32
    ptx = compile_launch(merge, 90).ptx
    assert ptx.count("ld.global.v4.b32") >= 3 and "st.global.v4.b32" in ptx


@pytest.mark.parametrize(("width", "apart"), ((1280, 1280), (40, 48)))
def test_rows_that_lie_oddly_are_added_up_like_others(width, apart):
    """How wide loads are settles the order of additions, and equal rows have exactly 1."""

    def loads(feature, reference):
        select, *_ = record_launches(
            lambda: reuse.select_changed(feature, reference, 2, None, 2, "cosine", None)
        )
        _, key = compiled_for(select)
        # Where rows begin anywhere, it tells nothing where the first one does.
        names = ("feature_", "reference_") if width % 16 == 0 else ("feature_s", "reference_s")
        return {k: v for k, v in key.items() if k.startswith(names)}

    for places in (20, 1):
        x = empty(4, places, width, dtype=BF16)
        turned = empty(4, width, places, dtype=BF16).transpose(1, 2)
        odd = empty(4 * (places * apart + 4), dtype=BF16)
        odd = odd.as_strided(x.shape, (places * apart + 4, apart, 1))
        alone = x[:1].as_strided((1, places, width), (7, 5 if places == 1 else width, 1))
        for other in (turned, odd, odd[1:2], alone):
            assert loads(other, x) == loads(x, other) == loads(x, x)
