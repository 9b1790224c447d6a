"""CUDA streams for the stages of an overlapped engine. On the CPU there are none: threads suffice.

Every value that goes from one lane to another takes an event with it, which the other lane waits
for on the device, and tells the allocator who still reads its tensors. The host waits for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch


class Lane:
    """Where a stage's work goes: entered around it, in one thread at a time."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def leave(self, value: Any) -> Any:
        """``value``, ready to be taken by another lane; called where it was made."""
        return value

    def take(self, value: Any) -> Any:
        """What ``leave`` made ready, for the work of this lane."""
        return value

    def join(self) -> None:
        """The current stream waits for what this lane has been given."""

    def follow(self) -> None:
        """This lane waits for what the current stream has been given."""


class CudaLane(Lane):
    """A CUDA stream; it begins with all that the current one was given before.

    What outlives a call is made on the lane that uses it: freed memory goes back to the stream that
    it was made on, whose next owner waits for no other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self.follow()
        self._entered = ExitStack()

    def __enter__(self) -> None:
        self._entered.enter_context(torch.cuda.stream(self._stream))

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    def leave(self, value: Any) -> Any:
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        return value, ready

    def take(self, value: Any) -> Any:
        value, ready = value
        self._stream.wait_event(ready)
        for tensor in tensors_of(value):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)
        return value

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a value that stages pass on: in dataclasses, tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_of(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
