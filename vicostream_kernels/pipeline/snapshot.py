"""A session in a file: everything that the next answers depend on; ``saving`` writes it.

One safetensors file. Its first tensor is the state as JSON. Facts, keys and values, and summaries
are a tensor each for all blocks, whose rows stand one after another, so that the header of a
million chunks is that of one. Then come what pruning and the encoder carry from chunk to chunk, and
frames that wait for the rest of their chunk. The last tensor is the SHA-256 of every byte before
it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from vicostream_kernels._tensor_file import (
    DamagedFile,
    Entry,
    raw,
    read_header,
    read_into,
)
from vicostream_kernels.ops.prune import PruneState
from vicostream_kernels.pipeline.block_facts import BlockFacts, check_columns, from_columns
from vicostream_kernels.pipeline.errors import InputError, Trouble
from vicostream_kernels.pipeline.report import BlockRead, QuestionFigures

if TYPE_CHECKING:
    from vicostream_kernels.models import Qwen2_5_VLRunner
    from vicostream_kernels.pipeline.engine import StreamEngine
    from vicostream_kernels.pipeline.session import Stream

FORMAT, VERSION = "vicostream-session", 2
STATE, DIGEST = "state", "sha256"
_PIECE = 1 << 20
#: Keys that say where history lies and how long answers are, not what was computed.
_FREE = {
    f"engine.{name}"
    for name in (
        "max_pages", "history_bytes", "host_bytes", "disk_bytes", "spill_dir", "allow_missing",
        "max_new_tokens", "max_question_tokens", "overlap",
    )
}  # fmt: skip
TOTALS = (
    "frames_ingested", "frames_processed", "chunk_count", "tokens_seen", "tokens_kept", "ingest_s",
)  # fmt: skip


class SnapshotError(InputError):
    """A file that cannot be restored; the message is one line that says why."""


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


class Snapshot:
    """A session's file, open and verified; a context manager.

    Raises :class:`SnapshotError` for a file that is missing, damaged, not a session, or of another
    version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115
        except (OSError, ValueError) as error:  # the latter of a name with NUL in it
            raise self._refused(getattr(error, "strerror", None) or str(error)) from error
        try:
            self._entries = self._verified()
            self.state = self._readable()
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

    def _verified(self) -> dict[str, Entry]:
        size = os.fstat(self._file.fileno()).st_size
        try:
            metadata, entries = read_header(self._file, size)
        except DamagedFile as error:
            raise self._refused(f"it is damaged, or not a session: {error}") from error
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise self._refused("it is not a session of vicostream")
        version = metadata.get("version", "")
        if version != str(VERSION):
            if not version.isdecimal():
                raise self._refused(f"it has the unknown format {version!r}")
            age = "a newer" if int(version) > VERSION else "an older"
            raise self._refused(
                f"it has format {version}, written by {age} version; this one reads {VERSION}"
            )
        if list(entries)[-1:] != [DIGEST] or entries[DIGEST].nbytes != 32:
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
        return entries

    def _readable(self) -> dict[str, Any]:
        """The state; there are also as many tokens, rows and summaries as the blocks say."""
        try:
            state = json.loads(bytes(raw(self.tensor(STATE))))
            if not isinstance(state, dict):
                raise ValueError("its state is no object")
            columns = dict(self.named("blocks/"))
            check_columns(columns)
            tokens, rows, summaries = (
                int(columns[name].sum()) for name in ("tokens", "rows", "summarised")
            )
            wanted = {"contents": tokens, "summaries": summaries}
            wanted |= {name: rows for name in self._entries if name.startswith("rows/")}
            for name, count in wanted.items():
                entry = self._entries.get(name)
                if count != (0 if entry is None or not entry.shape else entry.shape[0]):
                    raise ValueError(f"its {name} are not those of its blocks")
        except (KeyError, ValueError) as error:
            raise self._refused(f"it is damaged: {error}") from error
        return state

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

    def blocks(self) -> Iterator[BlockFacts]:
        """The blocks' facts, in the order of their commits."""
        return from_columns(dict(self.named("blocks/")))

    def into(self, stream: Stream) -> None:
        """Fills a new stream."""
        state, history, cache = self.state, stream.history, stream.history.cache
        device = stream._engine.runner.device
        # Before the blocks: this engine's smaller budgets may drop some, which joins what is there.
        gone, forgotten = state["forgotten"], cache.forgotten
        forgotten.chunks, forgotten.tokens = gone["chunks"], gone["tokens"]
        forgotten.last.extend(map(tuple, gone["last"]))
        forgotten._runs += [list(run) for run in gone["runs"]]

        self._adopt(stream)
        history.next_id = state["history"]["next_id"]
        history.chunks_seen = state["history"]["chunks_seen"]
        cache.chunks_seen = state["history"]["numbered"]

        times = state["stream"]
        stream._period, stream._times, stream._now = times["period"], times["times"], times["now"]
        known = (0.0, -1) if stream._now is None else (stream._now, 0)  # of an older session
        stream._given, stream._since = times.get("given", known[0]), times.get("since", known[1])
        stream._most_pages = times["most_pages"]
        stream._buffer = [frames for _, frames in self.named("frames/")]
        prune = stream._prune
        prune._grid = None if state["prune"]["grid"] is None else tuple(state["prune"]["grid"])
        prune._scorer_state = dict(state["prune"]["scorer"])
        _, encoding, pruning, _ = stream._lanes
        with pruning:
            carried = {name: tensor.to(device) for name, tensor in self.named("prune/")}
            prune._state = PruneState(**carried) if carried else None
            prune._scorer_state |= {name: t.to(device) for name, t in self.named("scorer/")}
        if stream._encode.state is not None:
            with encoding:
                stream._encode.state.load(dict(self.named("encoder/")))
        _take_figures(stream.recorder, state["recorder"])

    def _adopt(self, stream: Stream) -> None:
        history, cache = stream.history, stream.history.cache
        parts = {name: _Rows(self._file, entry) for name, entry in self._entries.items()}
        rows = {name[5:]: part for name, part in parts.items() if name.startswith("rows/")}
        for facts in self.blocks():
            if facts.kind == "chunk":
                cache.chunks_seen = facts.number
            block = cache.adopt(
                parts["contents"].take(facts.tokens).movedim(0, 2),
                kind=facts.kind,
                markers=(facts.lead, facts.trail),
                start_s=facts.start_s,
                end_s=facts.end_s,
                pinned=facts.pinned,
                summary=parts["summaries"].take(1)[0] if facts.summarised else None,
                rows={name: part.take(facts.rows).transpose(0, 1) for name, part in rows.items()},
            )
            history.ids[block] = facts.first_id, facts.after_id
            if facts.part:
                setattr(history, facts.part, block)


class _Rows:
    """Reads a tensor of the file from its front, some rows at a time."""

    def __init__(self, file: BinaryIO, entry: Entry) -> None:
        self._file, self._entry, self._at = file, entry, entry.start

    def take(self, count: int) -> torch.Tensor:
        rows = torch.empty(count, *self._entry.shape[1:], dtype=self._entry.dtype)
        read_into(self._file, self._at, rows)
        self._at += rows.nbytes
        return rows


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
