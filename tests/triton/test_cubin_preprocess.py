"""The preprocess kernels compile for sm_80 and sm_90 without a spill."""

from __future__ import annotations

import re

import pytest
import torch

from kit import interpreter

pytest.importorskip("triton")
if interpreter.ACTIVE:
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from triton_calls import preprocess_call  # noqa: E402

from kit.cubin import compile_launch, record_launches  # noqa: E402


@pytest.mark.parametrize(
    ("source", "dtype", "capability", "names"),
    [
        ((1080, 1920), torch.bfloat16, 90, ["across_kernel", "patches_kernel"]),
        ((360, 420), torch.float16, 80, ["patches_kernel"]),  # only the height changes
        ((252, 420), torch.float32, 80, ["patches_kernel"]),  # neither
    ],
    ids=str,
)
def test_a_chunk(source, dtype, capability, names):
    launches = record_launches(preprocess_call(source, (252, 420), 14, 2, dtype))
    assert [launch.kernel.__name__ for launch in launches] == names
    for launch in launches:
        compile_launch(launch, capability).check()


@pytest.mark.parametrize("capability", [80, 90])
def test_the_rows_of_a_thread_share_a_weight(capability):
    """Lanes along a row, whose loads join; a weight takes ten multiplications, a load one."""
    across, _ = record_launches(preprocess_call((1080, 1920), (252, 420), 14, 2, torch.bfloat16))
    ptx = compile_launch(across, capability).ptx
    loads = len(re.findall(r"\bld\.global", ptx))
    multiplications = len(re.findall(r"\b(?:fma\.rn|mul)\.f32", ptx))
    assert loads == 8 and multiplications < 3 * loads


@pytest.mark.parametrize(
    ("source", "size", "patch"),
    [
        ((5, 7), (5, 1), 1),
        ((7, 5), (1, 5), 1),
        ((1, 1), (28, 28), 14),
        ((600, 600), (600, 600), 600),
    ],
    ids=str,
)
def test_sizes_of_one_and_patches_of_many(source, size, patch):
    """An argument that is 1 becomes a constant, which only the compiler sees."""
    for launch in record_launches(preprocess_call(source, size, patch, 1, torch.float32)):
        compile_launch(launch, 80).check()
