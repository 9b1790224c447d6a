"""Reads a file into memory that lies in many places, as a block's pages do.

Large parts are read where they belong, several in one call. Where the parts are small, they are
read together into memory of the thread's own first: a call, or a turn without the GIL, for each of
them would take longer than the second copy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from vicostream_kernels._tensor_file import DamagedFile

#: A piece is read and then checked while it is in the core's own cache.
PIECE = 1 << 19
#: Parts of fewer bytes than this, on average, go over the thread's own memory.
_SMALL = 1 << 14
_MOST_PARTS = 1024  # what a call takes, on any system
_readv = getattr(os, "readv", None)  # not on Windows
_own = threading.local()


def in_pieces(parts: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """The parts in order, in lists of `PIECE` bytes at most; larger ones are cut."""
    piece: list[memoryview] = []
    room = PIECE
    for part in parts:
        while part:
            piece.append(part[:room])
            part = part[room:]
            room -= len(piece[-1])
            if not room or len(piece) == _MOST_PARTS:
                yield piece
                piece, room = [], PIECE
    if piece:
        yield piece


def fill(file: BinaryIO, parts: Sequence[memoryview]) -> Sequence[memoryview]:
    """Fills ``parts``, a piece, from where an unbuffered file stands. Returns the same bytes in as
    few parts as there are, until the thread's next call. Raises :class:`DamagedFile` where the file
    ends before."""
    size = sum(map(len, parts))
    if len(parts) == 1 or (_readv is not None and size >= _SMALL * len(parts)):
        _fill_in_place(file, parts)
        return parts
    whole = _scratch()[:size]
    _fill_in_place(file, [whole])
    at = 0
    for part in parts:
        part[:] = whole[at : at + len(part)]
        at += len(part)
    return [whole]


def _fill_in_place(file: BinaryIO, parts: Sequence[memoryview]) -> None:
    left = list(parts)
    while left:
        if len(left) == 1:
            n = file.readinto(left[0])  # type: ignore[attr-defined]
        else:
            n = _readv(file.fileno(), left)
        if not n:
            raise DamagedFile("the file is truncated")
        while left and n >= len(left[0]):
            n -= len(left.pop(0))
        if n:
            left[0] = left[0][n:]


def _scratch() -> memoryview:
    """`PIECE` bytes of the thread's own."""
    if not hasattr(_own, "bytes"):
        _own.bytes = memoryview(bytearray(PIECE))
    return _own.bytes
