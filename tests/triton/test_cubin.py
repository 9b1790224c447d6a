"""Every configuration of the Triton kernels compiles for sm_80 and sm_90 without a spill.

No GPU is needed. One list of calls per word; what a call launches is recorded and compiled.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from kit import interpreter

triton = pytest.importorskip("triton")
if interpreter.ACTIVE:
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton_calls import BF16, FP16, FP32, append_call  # noqa: E402

from kit.cubin import SHARED_LIMIT, Cubin, compile_launch, record_launches  # noqa: E402
from vicostream_kernels.triton_kernels._sums import product  # noqa: E402

# Everything at once wherever registers are tightest, the plain call where it is most used; a
# compilation takes about a second, so not the whole product.
APPEND = {
    (FP32, 64, 80): dict(raw=True),
    (FP32, 80, 90): dict(raw=True, sums=True, sub=2),
    (FP32, 128, 80): dict(raw=True, sums=True, sub=2),
    (FP32, 128, 90): dict(gaps=True, raw=True),
    (FP32, 256, 90): dict(raw=True),
    (FP16, 64, 90): dict(),
    (FP16, 80, 80): dict(raw=True, sums=True),
    (FP16, 128, 90): dict(raw=True),
    (FP16, 256, 80): dict(raw=True),
    (BF16, 64, 80): dict(raw=True),
    (BF16, 64, 90): dict(sub=4),
    (BF16, 80, 80): dict(),
    (BF16, 80, 90): dict(raw=True),
    (BF16, 128, 80): dict(),
    (BF16, 128, 90): dict(raw=True, sums=True, sub=1, summary_raw=True),
    (BF16, 256, 80): dict(raw=True, sums=True, sub=1),
    (BF16, 256, 90): dict(raw=True),
}


@pytest.mark.parametrize(
    ("key", "options"),
    APPEND.items(),
    ids=lambda value: "-".join(map(str, value)).replace("torch.", ""),
)
def test_append(key, options):
    dtype, d, capability = key
    launches = record_launches(append_call(dtype, d, **options))
    assert [launch.kernel.__name__ for launch in launches] == (
        ["rotate_kernel", "summary_kernel"]
        if options.get("sums") or options.get("sub")
        else ["rotate_kernel"]
    )
    for launch in launches:
        compile_launch(launch, capability).check()


def test_append_computes_each_angle_once():
    # An angle's phase is the only int32 that becomes a float. Each thread has as many as fit into
    # 16 bytes; a layout that repeats them for each head, or for each half, would show here.
    (launch,) = record_launches(append_call(BF16, 128))
    ptx = compile_launch(launch, 90).ptx
    conversions = len(re.findall(r"cvt\.rn\.f32\.s32", ptx))
    assert 8 <= conversions <= 2 * 8, "at most once in each of the two branches"
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 3 * 2 * 4, "vectors of 16 bytes"


def test_the_bounds_of_append_keep_nan():
    # The interpreter's minimum keeps NaN whether asked to or not; the hardware's must be asked.
    _, summary = record_launches(append_call(FP16, 64, sub=1))
    ptx = compile_launch(summary, 80).ptx
    for name in ("min", "max"):
        assert re.search(rf"\b{name}\.NaN\.f32", ptx), name
        assert not re.search(rf"\b{name}\.f32", ptx), name


@triton.jit
def _spilling_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # 512 values per thread, all of them alive until the maximum is known.
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n)
    tl.store(y_ptr + n, x / tl.max(x, 0))


@triton.jit
def _sine_kernel(x_ptr, y_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y_ptr + n, tl.sin(tl.load(x_ptr + n)))


@triton.jit
def _squares_kernel(x_ptr, y_ptr, N: tl.constexpr, PRODUCT: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    squares = product(x, x) if PRODUCT else x * x
    tl.store(y_ptr, tl.sum(squares, 0))


@triton.jit
def _dot_kernel(x_ptr, y_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.dot(x, x))


def compile_toy(kernel, n, capability, dtype=FP32, **options):
    x = torch.empty(n * n, dtype=dtype, device="meta")
    y = torch.empty(n * n, dtype=FP32, device="meta")
    (launch,) = record_launches(lambda: kernel[(1,)](x, y, n, **options))
    return compile_launch(launch, capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_gate_catches_spills(capability):
    built = compile_toy(_spilling_kernel, 16384, capability, num_warps=1)
    assert built.spill_stores > 0 and built.spill_loads > 0
    with pytest.raises(AssertionError, match="spills"):
        built.check()


def test_the_gate_catches_local_memory_without_spills():
    # The slow path of libdevice's sine keeps an array; the reason for our own polynomials.
    built = compile_toy(_sine_kernel, 128, 80)
    assert built.spill_stores == 0
    with pytest.raises(AssertionError, match="local memory"):
        built.check()


@pytest.mark.parametrize("capability", [80, 90])
def test_the_gate_catches_sums_whose_bits_depend_on_the_lane(capability):
    # A value a thread: its product meets another lane's in one fused operation.
    with pytest.raises(AssertionError, match="lanes have other bits of one sum"):
        compile_toy(_squares_kernel, 128, capability, PRODUCT=False).check()
    compile_toy(_squares_kernel, 128, capability, PRODUCT=True).check()


@pytest.mark.parametrize(
    ("capability", "has", "lacks"), [(80, "mma", "wgmma"), (90, "wgmma", "mma")]
)
def test_the_gate_tells_tensor_cores_apart(capability, has, lacks):
    built = compile_toy(_dot_kernel, 64, capability, FP16, num_warps=4)
    built.check(expect_instruction=has)
    with pytest.raises(AssertionError, match=f"no {lacks}"):
        built.check(expect_instruction=lacks)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_the_gate_limits_shared_memory(capability):
    fits = Cubin("toy", capability, 32, 0, 0, 0, SHARED_LIMIT[capability], "")
    fits.check()
    with pytest.raises(AssertionError, match="shared"):
        dataclasses.replace(fits, shared=fits.shared + 1).check()


def test_the_gate_compiles_what_would_run():
    # The specialisation is the launcher's own: strides of 1 and multiples of 16 are constants.
    (launch,) = record_launches(append_call(BF16, 128))
    assert launch.grid == (40 * 8,)
    assert launch.options == {"num_warps": 2, "enable_fp_fusion": True}
    aligned = compile_launch(launch, 80)
    (launch,) = record_launches(append_call(BF16, 128, gaps=True))
    gapped = compile_launch(launch, 80)
    assert ".v4.b32" in aligned.ptx and ".v4.b32" not in gapped.ptx
