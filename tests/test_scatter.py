"""Reading into many places: every layout gets the bytes of the file, in order."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicostream_kernels import _scatter
from vicostream_kernels._placement import runs_of
from vicostream_kernels._scatter import PIECE, fill, in_pieces
from vicostream_kernels._tensor_file import DamagedFile

DATA = bytes(os.urandom(PIECE // 2) * 6)
SMALL, LARGE = [300, 20, 4000], [PIECE + 17, 70_000]


def read(path, sizes, start=5):
    """What lies in parts of these sizes afterwards, and the bytes that came back to be checked."""
    memory = memoryview(bytearray(sum(sizes) + len(sizes)))  # a byte between two parts
    parts, at = [], 0
    for size in sizes:
        parts.append(memory[at : at + size])
        at += size + 1
    checked = b""
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        for piece in in_pieces(parts):
            assert sum(map(len, piece)) <= PIECE
            for filled in fill(file, piece):
                checked += bytes(filled)
    between = [memory[sum(sizes[:i]) + i - 1] for i in range(1, len(sizes) + 1)]
    assert not any(between[1:])
    return b"".join(parts), checked


@pytest.fixture
def path(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    return tmp_path / "file"


@pytest.mark.parametrize("readv", ["as it is", "a few bytes a call", None])
@pytest.mark.parametrize("sizes", [SMALL, LARGE, LARGE + SMALL, SMALL * 300, [0, 9, 0], []])
def test_parts_of_any_size_get_their_bytes(path, sizes, readv, monkeypatch):
    if readv is None:
        monkeypatch.setattr(_scatter, "_readv", None)
    elif readv != "as it is":
        real = getattr(os, "readv", None) or pytest.skip("no readv here")
        monkeypatch.setattr(_scatter, "_readv", lambda fd, parts: real(fd, [parts[0][:9_999]]))
    expected = DATA[5 : 5 + sum(sizes)]
    assert read(path, sizes) == (expected, expected)


@pytest.mark.parametrize("sizes", [SMALL, LARGE])
def test_a_file_that_ends_early_is_damaged(path, sizes):
    path.write_bytes(DATA[: 5 + sum(sizes) - 1])
    with pytest.raises(DamagedFile, match="truncated"):
        read(path, sizes)


@settings(max_examples=50, deadline=None)
@given(
    pages=st.lists(st.integers(0, 9), unique=True, max_size=8),
    size=st.integers(1, 5),
    data=st.data(),
)
def test_runs_are_the_slots_in_order_and_as_long_as_they_can_be(pages, size, data):
    fills = [data.draw(st.integers(1, size)) for _ in pages]
    runs = runs_of(pages, fills, size)
    slots = [page * size + i for page, fill in zip(pages, fills) for i in range(fill)]
    assert [first + i for first, n in runs for i in range(n)] == slots
    breaks = sum(b != a + 1 for a, b in zip(slots, slots[1:]))
    assert len(runs) == (breaks + 1 if slots else 0)
