"""Copies of a case's inputs, so that every provider starts from the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vicostream_kernels.bench.registry import Inputs


def map_tensors(value: Any, apply: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``apply`` on every tensor inside dicts, lists, tuples and dataclass-like values."""
    if isinstance(value, torch.Tensor):
        return apply(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, apply) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, apply) for item in value)
    return value


def clone_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, in memory of its own."""
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor)


def clone(inputs: Inputs) -> Inputs:
    return map_tensors(inputs, clone_tensor)


def to_truth(inputs: Inputs) -> Inputs:
    """Copies on the CPU, floating point as float64: what a reference computes the truth from."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().cpu().clone()
        return tensor.double() if tensor.is_floating_point() else tensor

    return map_tensors(inputs, convert)


def allocated_bytes(inputs: Inputs) -> int:
    """Bytes that the tensors of one input set occupy."""
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.untyped_storage().nbytes()
        return tensor

    map_tensors(inputs, count)
    return total
