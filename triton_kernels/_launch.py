"""What every launch needs: sizes, stride arguments by name, and the device of its tensors."""

import contextlib
from collections.abc import Mapping
from functools import lru_cache

import torch

# Triton has these too, but for kernels: called from the host they are slow, a dozen times a launch.


def cdiv(x: int, y: int) -> int:
    return -(-x // y)


def power_of_2(n: int) -> int:
    """The next one from ``n`` on, which is at least 1."""
    return 1 << (n - 1).bit_length()


def strides(tensor: torch.Tensor | None, name: str, axes: str) -> Mapping[str, int]:
    """The stride arguments of one tensor, named after its axes; 0 where there is no tensor."""
    return _named(name, axes, (0,) * len(axes) if tensor is None else tensor.stride())


@lru_cache(maxsize=4096)
def _named(name: str, axes: str, values: tuple[int, ...]) -> Mapping[str, int]:
    return {f"{name}_stride_{axis}": value for axis, value in zip(axes, values, strict=True)}


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one; launches go to its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
