"""prune: where the tokens of each segment lie, on the host and in the kernels.

A call is segments of steps x places tokens, one after the other. Equal segments need two numbers;
for others the kernels read a small table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._launch import cdiv

#: Tokens of the blocks that decisions are counted in.
BLOCK = 128


def constants(values: Sequence[int], width: int, device: torch.device) -> torch.Tensor:
    """Small numbers on the device, [len / width, width] int32; no wait.

    Made for each call: what is kept could be read on a stream that does not know of its copy, and
    be let go while a captured graph still reads it.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        made = filled(values, device)
    else:
        pinned = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
        made = pinned.to(device, non_blocking=True)
    return made.view(-1, width)


def filled(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """The same, [len]: a launch for each number, which a graph can hold unlike host memory."""
    made = torch.empty(len(values), dtype=torch.int32, device=device)
    for i, value in enumerate(values):
        made[i : i + 1].fill_(value)
    return made


@dataclass(frozen=True)
class Layout:
    """The segments of a call; sizes in tokens but for ``step_count``, all steps together."""

    segments: int
    steps: int  # the most of a segment
    places: int
    total: int
    step_count: int
    blocks: int
    table: torch.Tensor | None

    @staticmethod
    def of(x: torch.Tensor, shapes: Sequence[int] | None) -> "Layout":
        """Of x [T, N, D], or of x [M, D] with shapes (T0, N0, T1, N1, ...)."""
        pairs = [x.shape[:2]] if shapes is None else list(zip(shapes[::2], shapes[1::2]))
        steps, places = max(t for t, _ in pairs), max(n for _, n in pairs)
        rows: list[int] = []
        start = first_step = blocks = 0
        for t, n in pairs:
            rows += (t, n, start, first_step, blocks)
            start += t * n
            first_step += t
            blocks += cdiv(t * n, BLOCK)
        same = len(set(map(tuple, pairs))) == 1
        table = None if same else constants(rows, 5, x.device)
        return Layout(len(pairs), steps, places, start, first_step, blocks, table)

    def arguments(self) -> dict[str, torch.Tensor | int | None]:
        """The arguments of `segment_of`."""
        return {"table_ptr": self.table, "steps": self.steps, "places": self.places}


@triton.jit
def segment_of(table_ptr, s, steps, places, BLOCK: tl.constexpr):
    """Steps, places, first token, first step and first block of segment s."""
    start = s * steps * places
    first_step = s * steps
    first_block = s * tl.cdiv(steps * places, BLOCK)
    if table_ptr is not None:
        steps = tl.load(table_ptr + s * 5)
        places = tl.load(table_ptr + s * 5 + 1)
        start = tl.load(table_ptr + s * 5 + 2)
        first_step = tl.load(table_ptr + s * 5 + 3)
        first_block = tl.load(table_ptr + s * 5 + 4)
    return steps, places, start, first_step, first_block


@triton.jit
def step_stride(places, stride_t, stride_n, PACKED: tl.constexpr):
    """From one step to the next: packed steps follow each other without gaps."""
    stride = stride_t
    if PACKED:
        stride = stride_n * places
    return stride
