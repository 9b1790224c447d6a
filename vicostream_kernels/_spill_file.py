"""Groups of blocks that left their pages, and the files that hold them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import shutil
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels._blocks import Block
from vicostream_kernels._scatter import fill, in_pieces
from vicostream_kernels._tensor_file import (
    DamagedFile,
    Entry,
    header_of,
    raw,
    write_all,
)

try:
    import fcntl
except ImportError:  # no locks there: what a killed process leaves behind stays
    fcntl = None  # type: ignore[assignment]

_PREFIX = "vicostream-spill-"
_FILE = re.compile(r"\d{8,}\.safetensors")
_NICE = 10
#: Threads that read blocks at once, the caller's among them.
MOST_READERS = 4


@dataclass(eq=False, slots=True)
class Record:
    """Keys and values of a block below the pages, [layers, pools, tokens, G, d].

    ``start`` counts bytes from the first of its group; ``digest`` is known once a file has it.
    """

    group: Group
    start: int
    shape: tuple[int, ...]
    digest: bytes = b""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.group.dtype.itemsize


@dataclass(eq=False)
class Group:
    """Blocks that went down together, in one buffer or one file; never changed afterwards.

    ``records`` are those of the blocks that live. Such a block may have pages again: its record
    is then a copy, which saves writing the block a second time.
    """

    dtype: torch.dtype
    nbytes: int = 0
    records: dict[Block, Record] = field(default_factory=dict)
    buffer: torch.Tensor | None = None  # [>= nbytes] uint8, on the host
    arrived: Any = None  # CUDA event: the copy from the device into the buffer is complete
    path: Path | None = None
    file_bytes: int = 0  # size of the file, present or being written
    header: bytes = b""
    sealed: tuple[Record, ...] = ()
    first: int = 0  # commit number of the oldest block
    writing: Future[tuple[Path, list[bytes]]] | None = None
    error: OSError | None = None

    def add(self, block: Block, shape: tuple[int, ...]) -> Record:
        """A place for a block in the group."""
        record = Record(self, self.nbytes, shape)
        self.records[block] = record
        self.nbytes += record.nbytes
        return record

    def seal(self) -> None:
        """Nothing is added any more: the file's header is settled."""
        self.sealed = tuple(self.records.values())
        self.first = min(block._order for block in self.records)
        entries = [
            Entry(f"{i}/{block.start_s:g}-{block.end_s:g}s", self.dtype, record.shape)
            for i, (block, record) in enumerate(self.records.items())
        ]
        self.header, _ = header_of(entries, {"format": "vicostream-blocks/1"})
        self.file_bytes = len(self.header) + self.nbytes

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Times of the blocks that live, s."""
        return [(block.start_s, block.end_s) for block in self.records]

    def view(self, record: Record) -> torch.Tensor:
        """A record in the buffer."""
        part = self.buffer[record.start : record.start + record.nbytes]
        return part.view(self.dtype).view(record.shape)

    def written(self, path: Path, digests: Sequence[bytes]) -> None:
        """The file is complete."""
        self.path = path
        for record, digest in zip(self.sealed, digests):
            record.digest = digest


class SpillFolder:
    """The files of groups, in a private folder, written by a thread behind the caller's.

    The folder is made with its first file, and locked: the lock ends with the process, however that
    ends, so that folders without one are of processes that were killed. They are removed then.
    Cleaners of temporary files leave locked folders alone.
    """

    def __init__(self, parent: str | None) -> None:
        # Absolute: the process may change its folder.
        self.where = os.path.abspath(os.path.expanduser(parent or tempfile.gettempdir()))
        self._path: Path | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._readers_of = 0  # the process
        self._count = 0

    def write(self, group: Group) -> None:
        """Starts to write a sealed group. ``group.writing`` then yields what `Group.written` takes,
        or an OSError; no part of a file stays behind then."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(
                1, thread_name_prefix="vicostream-spill", initializer=_stand_back
            )
        self._count += 1
        parts = [raw(group.view(record)) for record in group.sealed]
        name = f"{self._count:08d}.safetensors"
        group.error = None
        group.writing = self._thread.submit(
            self._write, name, memoryview(group.header), parts, group.arrived
        )

    def _write(
        self, name: str, header: memoryview, parts: list[memoryview], arrived: Any
    ) -> tuple[Path, list[bytes]]:
        if arrived is not None:
            arrived.synchronize()
        path = self._folder() / name
        digests = []
        try:
            with open(path, "xb", buffering=0) as file:
                write_all(file, header)
                for part in parts:
                    digests.append(hashlib.sha256(part).digest())
                    write_all(file, part)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return path, digests

    def _folder(self) -> Path:
        if self._path is not None and not self._path.is_dir():
            self._remove()  # somebody removed it: what comes next needs another
            self._path = None
        if self._path is None:
            os.makedirs(self.where, exist_ok=True)
            _clear_abandoned(self.where)
            made, lock = _locked_folder(self.where)
            # Also where a cache is dropped without a close, and when the process ends.
            self._remove = weakref.finalize(self, _remove_folder, made, lock, os.getpid())
            self._path = Path(made)
        return self._path

    def read(self, record: Record, into: Iterable[memoryview]) -> None:
        """Fills ``into``, one after the other, with a record from its file. Raises OSError or
        DamagedFile; what was filled is worth nothing then."""
        digest = hashlib.sha256()
        with open(record.group.path, "rb", buffering=0) as file:
            if file.read(len(record.group.header)) != record.group.header:
                raise DamagedFile("its header has changed")
            file.seek(record.start, os.SEEK_CUR)
            for parts in in_pieces(into):
                for filled in fill(file, parts):
                    digest.update(filled)
        if digest.digest() != record.digest:
            raise DamagedFile("its contents have changed")

    def read_all(
        self, jobs: Sequence[tuple[Record, Iterable[memoryview]]], *, all_of_them: bool
    ) -> list[Exception | None]:
        """As `read` for each, several at once, and what it raised. Unless ``all_of_them`` are
        wanted, no more are begun after an error: those before it have been read.

        The caller and other threads read, as many as torch has threads, four at most: checking
        takes the time, and that goes on without the GIL.
        """
        errors: list[Exception | None] = [None] * len(jobs)
        left = deque(range(len(jobs)))

        def work() -> None:
            while True:
                try:
                    i = left.popleft()
                except IndexError:
                    return
                try:
                    self.read(*jobs[i])
                except (OSError, DamagedFile) as error:
                    errors[i] = error
                    if not all_of_them:
                        left.clear()

        helpers = min(torch.get_num_threads(), MOST_READERS, len(jobs)) - 1
        if helpers > 0 and self._readers_of != os.getpid():  # threads do not survive a fork
            self._readers = ThreadPoolExecutor(
                MOST_READERS - 1, thread_name_prefix="vicostream-read"
            )
            self._readers_of = os.getpid()
        helping: list[Future[None]] = []
        try:
            with contextlib.suppress(RuntimeError):  # no thread to be had: the caller reads alone
                for _ in range(helpers):
                    helping.append(self._readers.submit(work))
            work()
        finally:
            left.clear()
            helping = [helper for helper in helping if not helper.cancel()]
            _wait_through(helping)
        for helper in helping:
            helper.result()
        return errors

    def close(self) -> None:
        """Removes all files; all threads have ended."""
        if self._readers is not None and self._readers_of == os.getpid():
            self._readers.shutdown(wait=True, cancel_futures=True)
        self._readers, self._readers_of = None, 0
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        if self._path is not None:
            self._remove()
            self._path = None


def _wait_through(futures: Sequence[Future[None]]) -> None:
    """Until all have ended, whatever interrupts it meanwhile, which is raised then: first of all,
    nothing is written into the caller's memory any more."""
    interrupted: BaseException | None = None
    while True:
        try:
            wait(futures)
            break
        except BaseException as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _stand_back() -> None:
    """The thread takes what the model leaves of the cores: a parallel region lasts as long as its
    slowest thread, so that each turn taken from one would cost all. Not further down: on a machine
    that is busy with something else it still gets a tenth of a core, more than ingest needs."""
    if sys.platform == "linux":  # elsewhere this would be the whole process
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            nice = max(_NICE, os.getpriority(os.PRIO_PROCESS, thread))
            os.setpriority(os.PRIO_PROCESS, thread, nice)


def _locked_folder(parent: str) -> tuple[str, int | None]:
    """A new private folder and the handle that locks it; None where there are no locks."""
    while True:
        made = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
        lock = _lock(made, wait=True)
        if os.path.isdir(made):
            return made, lock
        if lock is not None:  # another process took it for abandoned before the lock
            os.close(lock)


def _lock(folder: str, *, wait: bool) -> int | None:
    """A handle that locks a folder until it is closed; None where another has the lock, or where
    the file system has no locks for folders (network file systems)."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _clear_abandoned(parent: str) -> None:
    """Removes this user's spill folders that no process locks, unless something else is in them."""
    if fcntl is None:
        return
    entries: list[os.DirEntry[str]] = []
    with contextlib.suppress(OSError):
        entries = [entry for entry in os.scandir(parent) if entry.name.startswith(_PREFIX)]
    for entry in entries:
        with contextlib.suppress(OSError):
            if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
                continue
            lock = _lock(entry.path, wait=False)
            if lock is None:
                continue
            try:
                for name in os.listdir(entry.path):
                    if _FILE.fullmatch(name):
                        os.unlink(os.path.join(entry.path, name))
                os.rmdir(entry.path)
            finally:
                os.close(lock)


def _remove_folder(folder: str, lock: int | None, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the process that still uses it
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
