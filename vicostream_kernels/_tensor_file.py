"""Safetensors files written and read a piece at a time, so that a long history needs no second copy
of itself in memory. Format: eight bytes length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # what the safetensors library reads


class DamagedFile(ValueError):
    """A file that is not what was written; the message says how, without its name."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name, dtype and shape; where its bytes start in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(
    entries: Iterable[Entry], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The bytes before the first tensor, and the entries with their places filled in. The tensors
    follow in the order given, without gaps."""
    described: dict[str, object] = {"__metadata__": dict(metadata)}
    placed, at = [], 0
    for entry in entries:
        described[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        placed.append((entry, at))
        at += entry.nbytes
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise ValueError(f"a header of {len(text)} bytes is larger than safetensors allows")
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {
        e.name: Entry(e.name, e.dtype, e.shape, first + at) for e, at in placed
    }


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Metadata and entries of a file of ``size`` bytes, read from its start.

    Raises :class:`DamagedFile` where they do not fit the file, each other, or the format.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise DamagedFile("no safetensors header, or one that is longer than the file")
    try:
        described = json.loads(file.read(length))
        metadata = described.pop("__metadata__", {})
        entries, end = {}, 0
        for name, entry in described.items():
            start, stop = entry["data_offsets"]
            made = Entry(name, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start)
            if start != end or stop - start != made.nbytes:
                raise DamagedFile(f"the tensor {name!r} is not where it should be")
            entries[name], end = made, stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedFile):
            raise
        raise DamagedFile(f"the header cannot be read ({error})") from error
    if 8 + length + end != size:
        raise DamagedFile(f"{8 + length + end} bytes expected, {size} found")
    return metadata, entries


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to be written from or read into."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def read_into(file: BinaryIO, start: int, tensor: torch.Tensor) -> None:
    """Fills a contiguous CPU tensor from the bytes at ``start``; raises :class:`DamagedFile` where
    the file ends before."""
    file.seek(start)
    view = raw(tensor)
    while view:
        n = file.readinto(view)  # type: ignore[attr-defined]
        if not n:
            raise DamagedFile("the file is truncated")
        view = view[n:]


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Writes all bytes to an unbuffered file, which may take fewer at a time."""
    while data:
        data = data[file.write(data) :]
