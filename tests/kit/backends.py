"""Backends as test parameters: the served ones run, the others are skipped with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kit import emulation
from vicostream_kernels import backends


def backends_of(op_name: str) -> list[Any]:
    """``pytest.param((backend, device))`` for each backend the op declares.

    GPU backends carry the ``gpu`` marker. Triton's interpreter needs a process of its own, so on
    the CPU the triton backend appears only there (``tests/triton``). The same goes for the CUDA
    kernels and their emulator (``tests/cuda``).
    """
    made = []
    for backend in backends.OPS[op_name].implementations:
        if backend == "cuda" and emulation.ACTIVE:
            made.append(pytest.param((backend, "cpu"), id="cuda-cpu"))
            continue
        if backend in ("cuda", "triton") and not (backend == "triton" and backends.INTERPRET):
            reason = backends.why_not(op_name, backend, "cuda")
            if reason is None and not torch.cuda.is_available():
                reason = "needs a CUDA device"
            marks = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=str(reason))]
            made.append(pytest.param((backend, "cuda"), id=f"{backend}-cuda", marks=marks))
            continue
        reason = backends.why_not(op_name, backend, "cpu")
        marks = [pytest.mark.skipif(reason is not None, reason=str(reason))]
        made.append(pytest.param((backend, "cpu"), id=f"{backend}-cpu", marks=marks))
    return made
