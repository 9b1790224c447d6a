"""A plugin of pytest: the tests of the ops on what the compilers made, run here.

`VICO_PTX` is the compute capability, 80 or 90. The tests of "triton-cpu" run what Triton compiles;
in the emulator's process (`VICO_EMULATE`) those of "cuda-cpu" run what nvcc does.
"""

from __future__ import annotations

import os

import pytest

CAPABILITY = int(os.environ.get("VICO_PTX", "0"))


def pytest_configure() -> None:
    if CAPABILITY:
        activate()


def activate() -> None:
    """Has this process run kernels as they were compiled for `VICO_PTX`."""
    from kit import emulation

    if emulation.ACTIVE:
        from ptx import cuda_driver

        cuda_driver.activate(CAPABILITY)
    else:
        from ptx import triton_driver

        triton_driver.activate(CAPABILITY, pytest.MonkeyPatch())
