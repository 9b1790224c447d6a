"""A session in a file: everything that the next answers depend on, written whole or not at all.

One safetensors file. Its metadata hold the state as JSON; its tensors are the blocks' keys and
values, their summaries, what pruning and the encoder carry from chunk to chunk, and frames that
wait for the rest of their chunk. The last tensor is the SHA-256 of every byte before it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, fields
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from vicostream_kernels._tensor_file import (
    DamagedFile,
    Entry,
    header_of,
    raw,
    read_header,
    read_into,
    write_all,
)
from vicostream_kernels.cache import Block, LostBlock
from vicostream_kernels.ops.prune import PruneState
from vicostream_kernels.pipeline.errors import InputError, PipelineError, Trouble
from vicostream_kernels.pipeline.report import BlockRead, QuestionFigures

if TYPE_CHECKING:
    from vicostream_kernels.models import Qwen2_5_VLRunner
    from vicostream_kernels.pipeline.engine import StreamEngine
    from vicostream_kernels.pipeline.session import Stream

FORMAT, VERSION = "vicostream-session", 1
_DIGEST = "sha256"
_PIECE = 1 << 20
#: Keys that say where history lies and how long answers are, not what was computed.
_FREE = {
    f"engine.{name}"
    for name in (
        "max_pages", "history_bytes", "host_bytes", "disk_bytes", "spill_dir", "allow_missing",
        "max_new_tokens", "max_question_tokens",
    )
}  # fmt: skip
_TOTALS = (
    "frames_ingested", "frames_processed", "chunk_count", "tokens_seen", "tokens_kept", "ingest_s",
)  # fmt: skip


class SnapshotError(InputError):
    """A file that cannot be restored; the message is one line that says why."""


# -- saving ----------------------------------------------------------------------------------------


def save(stream: Stream, path: str | os.PathLike[str]) -> None:
    """Writes a session; see ``Stream.save``."""
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


class _Missing(Exception):
    def __init__(self, block: Block, error: LostBlock) -> None:
        self.block, self.error = block, error


def _written(partial: Path, stream: Stream) -> bool:
    """False where a block was lost on the way, and is now forgotten (``allow_missing``)."""
    try:
        with open(partial, "wb", buffering=0) as file:
            _write(file, stream)
            os.fsync(file.fileno())
    except _Missing as missing:
        if not stream._engine.method.engine.allow_missing:
            raise missing.error from None
        stream.history.cache._lose(missing.block, str(missing.error))
        stream._account()
        return False
    return True


def _write(file: BinaryIO, stream: Stream) -> None:
    state, tensors = _state(stream)
    tensors.append((Entry(_DIGEST, torch.uint8, (32,)), lambda: torch.empty(0)))
    text = json.dumps(state, separators=(",", ":"))
    metadata = {"format": FORMAT, "version": str(VERSION), "state": text}
    try:
        header, _ = header_of([entry for entry, _ in tensors], metadata)
    except ValueError as error:  # some hundred thousand chunks
        raise PipelineError(f"the history is too long for one session file: {error}") from error
    digest = hashlib.sha256(header)
    write_all(file, memoryview(header))
    for _, read in tensors[:-1]:
        data = raw(read())
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


#: Tensors of a file, in order: what they will look like, and how to get them when it is their turn.
_Tensors = list[tuple[Entry, Callable[[], torch.Tensor]]]


def _state(stream: Stream) -> tuple[dict[str, Any], _Tensors]:
    tensors: _Tensors = []

    def keep(name: str, tensor: torch.Tensor) -> None:
        entry = Entry(name, tensor.dtype, tuple(tensor.shape))
        tensors.append((entry, lambda: tensor.detach().cpu().contiguous()))

    def contents(block: Block) -> torch.Tensor:
        try:
            return cache.contents(block)
        except LostBlock as error:
            raise _Missing(block, error) from error

    history, cache = stream.history, stream.history.cache
    pool, retired = cache.cache, set(history._retired)
    # The texts of open answers are no part of the session.
    always = {history.sink: "sink", history.preamble: "preamble"}
    blocks = [
        block
        for block in cache.blocks
        if block not in retired and (block.kind == "chunk" or block in always)
    ]
    for i, block in enumerate(blocks):
        entry = Entry(f"block/{i}", pool.dtype, pool._record_shape(block.tokens))
        tensors.append((entry, lambda block=block: contents(block)))
        if block._summarised:
            keep(f"summary/{i}", cache._table.vectors[block._row])
        if cache.keys is not None:
            for name, rows in cache.keys.rows_of(block).items():
                keep(f"rows/{i}/{name}", rows)
    for i, part in enumerate(stream._buffer):
        keep(f"frames/{i}", part)

    prune, scorer = stream._prune, {}
    if prune._state is not None:
        for field in fields(prune._state):
            if (value := getattr(prune._state, field.name)) is not None:
                keep(f"prune/{field.name}", value)
    for name, value in prune._scorer_state.items():
        if isinstance(value, torch.Tensor):
            keep(f"scorer/{name}", value)
        else:
            scorer[name] = value
    if stream._encode.state is not None:
        for name, value in stream._encode.state.tensors().items():
            keep(f"encoder/{name}", value)

    forgotten = deepcopy(cache.forgotten)
    for block in history._retired:  # they go when the answers that hold them end
        if block.kind == "chunk":
            forgotten.add(block)
    return {
        "model": stream._engine.identity(),
        "config": plain(stream._engine.config()),
        "stream": {
            "period": stream._period,
            "times": stream._times,
            "now": stream._now,
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
        "blocks": [
            {
                "kind": block.kind,
                "part": always.get(block, ""),
                "start_s": block.start_s,
                "end_s": block.end_s,
                "markers": block.markers,
                "pinned": block.pinned,
                "number": block._number,
                "ids": history.ids[block],
            }
            for block in blocks
        ],
        "prune": {"grid": prune._grid, "scorer": scorer},
        "recorder": _figures(stream.recorder),
    }, tensors


def _figures(recorder: Any) -> dict[str, Any]:
    questions = [
        {**{f.name: getattr(q, f.name) for f in fields(q) if f.name not in ("reads", "relevance")},
         "reads": [asdict(block) for block in q.reads]}
        for q in recorder.questions
    ]  # fmt: skip
    totals = {name: getattr(recorder, name) for name in _TOTALS}
    return {
        "totals": totals | {"frames_left_out": recorder.read - recorder.frames_ingested},
        "questions": questions,
        "errors": [asdict(error) for error in recorder.errors],
        "peak_bytes": recorder.kv["peak_bytes"],
    }


def plain(value: Any) -> Any:
    """A configuration as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def fingerprint(model: torch.nn.Module) -> str:
    """Tells one model's weights from another's: names, shapes, dtypes and every byte.

    Weights on a GPU are copied to the host a tensor at a time: seconds for billions of weights.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        digest.update(raw(weight.detach().cpu().contiguous()))
    return digest.hexdigest()


def settings_of(runner: Qwen2_5_VLRunner) -> str:
    """Tells apart what weights do not: the configuration, how pictures are scaled, and how text
    becomes tokens."""
    config = runner.model.config.to_dict()
    for key in ("_name_or_path", "transformers_version"):  # where it lay, what read it
        config.pop(key, None)
    tokenizer = runner.tokenizer
    facts = {
        "config": config,
        "images": [runner.image_mean, runner.image_std, runner.min_pixels, runner.max_pixels],
        "eos": sorted(runner.eos_ids),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "template": tokenizer.chat_template,
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# -- restoring -------------------------------------------------------------------------------------


class Snapshot:
    """A session's file, open and verified; a context manager.

    Raises :class:`SnapshotError` for a file that is missing, damaged, not a session, or of a newer
    version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from error
        try:
            self.state, self._entries = self._verified()
        except BaseException as error:
            self._file.close()
            if isinstance(error, OSError):
                raise self._refused(error.strerror or str(error)) from error
            raise

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _refused(self, why: str) -> SnapshotError:
        return SnapshotError(f"the session {self._path} cannot be restored: {why}")

    def _verified(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        size = os.fstat(self._file.fileno()).st_size
        try:
            metadata, entries = read_header(self._file, size)
        except DamagedFile as error:
            raise self._refused(f"it is damaged, or not a session: {error}") from error
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise self._refused("it is not a session of vicostream")
        version = metadata.get("version", "")
        if version != str(VERSION):
            newer = version.isdecimal() and int(version) > VERSION
            raise self._refused(
                f"it has format {version}, written by a newer version; this one reads {VERSION}"
                if newer
                else f"it has the unknown format {version!r}"
            )
        if list(entries)[-1:] != [_DIGEST] or entries[_DIGEST].nbytes != 32:
            raise self._refused("it is damaged: it has no digest")
        digest = hashlib.sha256()
        self._file.seek(0)
        left = size - 32
        while left:
            piece = self._file.read(min(left, _PIECE))
            if not piece:
                raise self._refused("it is damaged: it ends too early")
            digest.update(piece)
            left -= len(piece)
        if self._file.read(32) != digest.digest():
            raise self._refused("it is damaged: its contents do not fit their digest")
        return json.loads(metadata["state"]), entries

    def check(self, engine: StreamEngine) -> None:
        """Raises :class:`SnapshotError` where another model or configuration computed it."""
        ours, theirs = engine.identity(), self.state["model"]
        if ours != theirs:
            names = [key for key in ours if ours[key] != theirs.get(key)]
            said = ", ".join(f"{key} {theirs.get(key)} (here {ours[key]})" for key in names)
            raise self._refused(f"it was computed by another model: {said}")
        here, there = _flat(plain(engine.config())), _flat(self.state["config"])
        other = [
            f"{key}={there.get(key)} (here {here.get(key)})"
            for key in sorted({*here, *there} - _FREE)
            if here.get(key) != there.get(key)
        ]
        if other:
            raise self._refused(f"it was computed with other settings: {', '.join(other)}")

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the host."""
        entry = self._entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        read_into(self._file, entry.start, tensor)
        return tensor

    def named(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors below ``prefix``, by the rest of their names."""
        for name in self._entries:
            if name.startswith(prefix):
                yield name.removeprefix(prefix), self.tensor(name)

    def into(self, stream: Stream) -> None:
        """Fills a new stream."""
        state, history, cache = self.state, stream.history, stream.history.cache
        device = stream._engine.runner.device
        # Before the blocks: this engine's smaller budgets may drop some, which joins what is there.
        gone, forgotten = state["forgotten"], cache.forgotten
        forgotten.chunks, forgotten.tokens = gone["chunks"], gone["tokens"]
        forgotten.last.extend(map(tuple, gone["last"]))
        forgotten._runs += [list(run) for run in gone["runs"]]

        for i, kept in enumerate(state["blocks"]):
            block = self._block(stream, i, kept)
            history.ids[block] = tuple(kept["ids"])
            if kept["part"]:
                setattr(history, kept["part"], block)
        history.next_id = state["history"]["next_id"]
        history.chunks_seen = state["history"]["chunks_seen"]
        cache.chunks_seen = state["history"]["numbered"]

        times = state["stream"]
        stream._period, stream._times, stream._now = times["period"], times["times"], times["now"]
        stream._most_pages = times["most_pages"]
        stream._buffer = [frames for _, frames in self.named("frames/")]
        prune = stream._prune
        prune._grid = None if state["prune"]["grid"] is None else tuple(state["prune"]["grid"])
        carried = {name: tensor.to(device) for name, tensor in self.named("prune/")}
        prune._state = PruneState(**carried) if carried else None
        prune._scorer_state = dict(state["prune"]["scorer"])
        prune._scorer_state |= {name: t.to(device) for name, t in self.named("scorer/")}
        if stream._encode.state is not None:
            stream._encode.state.load(dict(self.named("encoder/")))
        _take_figures(stream.recorder, state["recorder"])

    def _block(self, stream: Stream, i: int, kept: dict[str, Any]) -> Block:
        cache = stream.history.cache
        if kept["kind"] == "chunk":
            cache.chunks_seen = kept["number"]
        summary = self.tensor(f"summary/{i}") if f"summary/{i}" in self._entries else None
        return cache.adopt(
            self.tensor(f"block/{i}"),
            kind=kept["kind"],
            markers=tuple(kept["markers"]),
            start_s=kept["start_s"],
            end_s=kept["end_s"],
            pinned=kept["pinned"],
            summary=summary,
            rows=dict(self.named(f"rows/{i}/")),
        )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """``{"engine": {"pixels": 1}}`` as ``{"engine.pixels": 1}``."""
    flat: dict[str, Any] = {}
    for section, values in config.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat


def _take_figures(recorder: Any, kept: dict[str, Any]) -> None:
    for name, value in kept["totals"].items():
        setattr(recorder, name, value)
    recorder.kv["peak_bytes"] = kept["peak_bytes"]
    for entry in kept["questions"]:
        reads = [BlockRead(**block) for block in entry.pop("reads")]
        blocks = [tuple(block) for block in entry.pop("blocks")]
        recorder.questions.append(QuestionFigures(**entry, blocks=blocks, reads=reads))
    recorder.errors.extend(Trouble(**error) for error in kept["errors"])
