"""Triton kernels and how they are launched, one file for each word, and nothing else.

Installed as `vicostream_kernels.triton_kernels`. The files import Triton, so they are imported only
when an op is first served by it; this one does not.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def mend_interpreter(version: str) -> None:
    """Before kernels run in the interpreter of ``triton.__version__``; once for a process."""
    if _release(version) < (3, 7):
        from vicostream_kernels.triton_kernels import _interpreter

        _interpreter.mend()


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def refusal(
    version: str,
    capability: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why these kernels must not run under this Triton, or None where they may.

    Only what concerns our kernels is listed. Ranges that are known for other kernels, such as the
    wrong gradients on Hopper before 3.8 (github.com/fla-org/flash-linear-attention/pull/983), are
    not a reason.

    Args:
        version: `triton.__version__`.
        capability: `torch.cuda.get_device_capability()`; None for Triton's interpreter.
        dtype: of the tensors; None when it is not known yet.
    """
    if _release(version) < (3, 3):
        return f"Triton {version} has no tuples of tensors, which the kernels use; 3.3 or newer has"
    if capability is not None and capability < (8, 0):
        return (
            "the kernels use instructions of compute capability 8.0 (such as min.NaN), "
            f"this device has {capability[0]}.{capability[1]}"
        )
    if capability is None and dtype == torch.bfloat16:
        return (
            "Triton's interpreter computes bfloat16 wrongly "
            "(https://github.com/triton-lang/triton/pull/11585); float32 and float16 work"
        )
    return None
