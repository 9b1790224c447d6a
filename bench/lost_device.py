"""Whether this process has lost its CUDA device.

After an illegal address, a failed assertion or the like every CUDA call of the process fails, so
whatever runs next would be blamed for it. Only a new process gets the device back.
"""

from __future__ import annotations

import torch


def why_lost() -> str:
    """The error that every CUDA call of this process ends with from now on; "" without one."""
    for _ in range(2):  # an error that is told once and then forgotten does not count
        if not torch.cuda.is_initialized():
            return ""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            said = first_line(error)
        else:
            return ""
    return said


def first_line(error: BaseException) -> str:
    """``Type: its first line``, short enough for a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
