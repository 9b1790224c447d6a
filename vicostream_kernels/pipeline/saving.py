"""Saving a session: the file of ``snapshot``, written aside and renamed when it is whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, fields
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from vicostream_kernels._tensor_file import Entry, header_of, raw, write_all
from vicostream_kernels.cache import Block, LostBlock
from vicostream_kernels.pipeline.block_facts import BlockFacts, to_columns
from vicostream_kernels.pipeline.errors import InputError, PipelineError
from vicostream_kernels.pipeline.snapshot import DIGEST, FORMAT, STATE, TOTALS, VERSION, plain

if TYPE_CHECKING:
    from vicostream_kernels.pipeline.session import Stream

_ROWS = 1024  # of a table, copied at a time


def save(stream: Stream, path: str | os.PathLike[str]) -> None:
    """Writes a session; see ``Stream.save``."""
    if not Path(path).name or "\0" in os.fspath(path):
        raise InputError(f"save: {path!r} names no file")
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_partials(path)
        try:
            while not _written(partial, stream):
                pass  # each time without the block that turned out to be lost
            os.replace(partial, path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise PipelineError(f"the session cannot be saved to {path}: {why}") from error


def _written(partial: Path, stream: Stream) -> bool:
    """False where blocks were lost on the way, and are now forgotten (``allow_missing``)."""
    lost: list[tuple[Block, LostBlock]] = []
    with open(partial, "wb", buffering=0) as file:
        _write(file, _Saved(stream, lost).tensors())
        os.fsync(file.fileno())
    for block, error in lost:
        stream.history.cache._lose(block, str(error))
    if lost:
        stream._account()
    return not lost


#: A tensor of a file: what it will look like, and how to get it, piece by piece, when it is its
#: turn.
_Tensor = tuple[Entry, Callable[[], Iterable[torch.Tensor]]]


def _write(file: BinaryIO, tensors: list[_Tensor]) -> None:
    entries = [entry for entry, _ in tensors] + [Entry(DIGEST, torch.uint8, (32,))]
    header, _ = header_of(entries, {"format": FORMAT, "version": str(VERSION)})
    digest = hashlib.sha256(header)
    write_all(file, memoryview(header))
    for _, pieces in tensors:
        for piece in pieces():
            data = raw(piece.detach().cpu().contiguous())
            digest.update(data)
            write_all(file, data)
    write_all(file, memoryview(digest.digest()))


def _clear_partials(path: Path) -> None:
    """What processes that were killed left behind."""
    for left in path.parent.glob(f".{escape(path.name)}.*.partial"):
        pid = left.name.rsplit(".", 2)[1]
        if pid.isdecimal() and not _alive(int(pid)):
            left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # another user's
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Saved:
    """What is saved of a stream. Blocks that turn out to be lost while they are read are added to
    ``lost``; the file is of no use then, and the rest is read only to find the others."""

    def __init__(self, stream: Stream, lost: list[tuple[Block, LostBlock]]) -> None:
        self._stream, self._lost = stream, lost
        history = stream.history
        retired = set(history._retired)
        # The texts of open answers are no part of the session.
        self._parts = {history.sink: "sink", history.preamble: "preamble"}
        self._blocks = [
            block
            for block in history.cache.blocks
            if block not in retired and (block.kind == "chunk" or block in self._parts)
        ]

    def tensors(self) -> list[_Tensor]:
        prune = self._stream._prune
        single = {STATE: torch.frombuffer(bytearray(self._state()), dtype=torch.uint8)}
        facts = to_columns([self._facts(block) for block in self._blocks])
        single |= {f"blocks/{name}": column for name, column in facts.items()}
        tensors = [_whole(name, tensor) for name, tensor in single.items()]
        tensors += self._of_blocks()
        carried = {f"frames/{i}": part for i, part in enumerate(self._stream._buffer)}
        if prune._state is not None:
            for field in fields(prune._state):
                if (value := getattr(prune._state, field.name)) is not None:
                    carried[f"prune/{field.name}"] = value
        for name, value in prune._scorer_state.items():
            if isinstance(value, torch.Tensor):
                carried[f"scorer/{name}"] = value
        if self._stream._encode.state is not None:
            for name, value in self._stream._encode.state.tensors().items():
                carried[f"encoder/{name}"] = value
        return tensors + [_whole(name, tensor) for name, tensor in carried.items()]

    def _of_blocks(self) -> Iterator[_Tensor]:
        cache, blocks = self._stream.history.cache, self._blocks
        layers, names, _, *token = cache.cache._record_shape(0)
        tokens = sum(block.tokens for block in blocks)
        shape = (tokens, layers, names, *token)
        yield Entry("contents", cache.cache.dtype, shape), self._contents
        if rows := [block._row for block in blocks if block._summarised]:
            yield _picked("summaries", cache._table.vectors, rows)
        if cache.keys is not None:
            rows = [row for block in blocks for row in cache.keys.places(block)]
            for name, table in cache.keys.tables.items():
                yield _picked(f"rows/{name}", table.transpose(0, 1), rows)

    def _contents(self) -> Iterator[torch.Tensor]:
        """Of each block [tokens, layers, 2 or 3, G, d]."""
        allowed = self._stream._engine.method.engine.allow_missing
        for block in self._blocks:
            try:
                contents = self._stream.history.cache.contents(block)
            except LostBlock as error:
                if not allowed:
                    raise
                self._lost.append((block, error))
                continue
            if not self._lost:
                yield contents.movedim(2, 0)

    def _facts(self, block: Block) -> BlockFacts:
        history = self._stream.history
        keys = history.cache.keys
        first_id, after_id = history.ids[block]
        return BlockFacts(
            kind=block.kind,
            part=self._parts.get(block, ""),
            tokens=block.tokens,
            lead=block.markers[0],
            trail=block.markers[1],
            start_s=block.start_s,
            end_s=block.end_s,
            pinned=block.pinned,
            number=block._number,
            first_id=first_id,
            after_id=after_id,
            rows=0 if keys is None else len(keys.places(block)),
            summarised=block._summarised,
        )

    def _state(self) -> bytes:
        stream = self._stream
        history, cache, prune = stream.history, stream.history.cache, stream._prune
        forgotten = deepcopy(cache.forgotten)
        for block in history._retired:  # they go when the answers that hold them end
            if block.kind == "chunk":
                forgotten.add(block)
        scorer = {
            name: value
            for name, value in prune._scorer_state.items()
            if not isinstance(value, torch.Tensor)
        }
        state = {
            "model": stream._engine.identity(),
            "config": plain(stream._engine.config()),
            "stream": {
                "period": stream._period,
                "times": stream._times,
                "now": stream._now,
                "given": stream._given,
                "since": stream._since,
                "most_pages": stream._most_pages,
            },
            "history": {
                "next_id": history.next_id,
                "chunks_seen": history.chunks_seen,
                "numbered": cache.chunks_seen,
            },
            "forgotten": {
                "chunks": forgotten.chunks,
                "tokens": forgotten.tokens,
                "last": list(forgotten.last),
                "runs": forgotten._runs,
            },
            "prune": {"grid": prune._grid, "scorer": scorer},
            "recorder": _figures(stream.recorder),
        }
        return json.dumps(state, separators=(",", ":")).encode()


def _whole(name: str, tensor: torch.Tensor) -> _Tensor:
    return Entry(name, tensor.dtype, tuple(tensor.shape)), lambda: [tensor]


def _picked(name: str, table: torch.Tensor, rows: list[int]) -> _Tensor:
    """Some rows of a table."""

    def pieces() -> Iterator[torch.Tensor]:
        for first in range(0, len(rows), _ROWS):
            index = torch.tensor(rows[first : first + _ROWS], device=table.device)
            yield table.index_select(0, index)

    return Entry(name, table.dtype, (len(rows), *table.shape[1:])), pieces


def _figures(recorder: Any) -> dict[str, Any]:
    questions = [
        {**{f.name: getattr(q, f.name) for f in fields(q) if f.name not in ("reads", "relevance")},
         "reads": [asdict(block) for block in q.reads]}
        for q in recorder.questions
    ]  # fmt: skip
    totals = {name: getattr(recorder, name) for name in TOTALS}
    return {
        "totals": totals | {"frames_left_out": recorder.read - recorder.frames_ingested},
        "questions": questions,
        "errors": [asdict(error) for error in recorder.errors],
        "peak_bytes": recorder.kv["peak_bytes"],
    }
