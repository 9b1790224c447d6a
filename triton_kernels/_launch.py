"""What every launch needs: stride arguments by name, and the device of its tensors."""

import contextlib

import torch


def strides(tensor: torch.Tensor | None, name: str, axes: str) -> dict[str, int]:
    """The stride arguments of one tensor, named after its axes; 0 where there is no tensor."""
    values = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"{name}_stride_{axis}": value for axis, value in zip(axes, values, strict=True)}


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's device the current one; launches go to its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
