"""The groups below the pages: from a host buffer to a file, and out, each within its budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch

from vicostream_kernels._blocks import Block
from vicostream_kernels._spill_file import Group, Record, SpillFolder
from vicostream_kernels._tensor_file import raw
from vicostream_kernels._tiers import IN_FLIGHT, DiskFull, LostBlock, Tiers
from vicostream_kernels._transfer import Transfer


class Below:
    """Holds groups; the host tier and the files of one cache.

    With a host tier a group stays in its buffer until newer ones need the room; without, it is
    written at once. A thread writes, at most two groups behind; then the caller waits.
    """

    def __init__(self, tiers: Tiers, transfer: Transfer) -> None:
        self._tiers, self._transfer = tiers, transfer
        self._files = SpillFolder(tiers.folder)
        self._groups: dict[Group, None] = {}  # least recently used first
        self._writing: deque[Group] = deque()
        self._failed: list[Group] = []
        self._spare: list[torch.Tensor] = []  # buffers of the usual size
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self.buffer_bytes = self.disk_bytes = 0

    # -- for the residency -----------------------------------------------------------------------

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory for a group, as soon as there is room. Raises DiskFull where there will be
        none."""
        usual = self._tiers.group
        size = max(nbytes, usual)
        while self._crowded(size):
            if self._writing:
                self.reap(wait=True)
            elif not self._demote():
                break  # one group may be larger than its tier
        self.buffer_bytes += size
        if size == usual and self._spare:
            return self._spare.pop()
        return self._transfer.buffer(size)

    def take(self, group: Group) -> None:
        """A sealed group has its contents."""
        self._groups[group] = None
        if not self._tiers.host_bytes:
            self._write(group)
            return
        # Early, so that the next group finds room without a wait.
        room = max(self._tiers.host_bytes - IN_FLIGHT * self._tiers.group, 0)
        while self._resting_bytes() > room and self._demote():
            pass

    def used(self, group: Group) -> None:
        """One of its blocks was retrieved."""
        del self._groups[group]
        self._groups[group] = None

    def forget(self, block: Block) -> None:
        """A block has no use for its record any more."""
        group = block._copy.group
        block._copy, block._away = None, False
        del group.records[block]
        if not group.records:
            self._discard(group)

    def load(self, block: Block) -> torch.Tensor:
        """The record of a block, on the host, complete; on the CPU it holds until the next call.
        Raises LostBlock."""
        record: Record = block._copy
        group = record.group
        if group.buffer is not None:
            if group.arrived is not None:
                group.arrived.synchronize()
            return group.view(record)
        out = self.room_for(block)
        (error,) = self.read([(block, [raw(out)])])
        if error is not None:
            raise error
        return out

    def resting(self, block: Block) -> torch.Tensor | None:
        """The record of a block, where it lies on the host, as soon as the device is done."""
        group = block._copy.group
        return None if group.buffer is None else group.view(block._copy)

    def read(
        self, wanted: Sequence[tuple[Block, Iterable[memoryview] | None]]
    ) -> list[LostBlock | None]:
        """Fills memory with the records of blocks from their files, several at once; nothing for
        None. Returns what went wrong with each; where nothing may be missing, blocks after the
        first with an error were not all read."""
        jobs = [(block._copy, into) for block, into in wanted if into is not None]
        errors = iter(self._files.read_all(jobs, all_of_them=self._tiers.allow_missing))
        found = [None if into is None else next(errors) for _, into in wanted]
        return [
            None if error is None else self._lost(block, error)
            for (block, _), error in zip(wanted, found)
        ]

    @staticmethod
    def _lost(block: Block, error: Exception) -> LostBlock:
        """What it means that a block's file could not be read."""
        why = getattr(error, "strerror", None) or str(error)
        span = (block.start_s, block.end_s)
        lost = LostBlock(
            f"the history of {_span([span])} cannot be read from {block._copy.group.path}: {why}",
            [span],
        )
        lost.__cause__ = error
        return lost

    def reap(self, wait: bool = False) -> None:
        """Takes note of the files that are complete; with ``wait``, of the next one at least."""
        while self._writing and (wait or self._writing[0].writing.done()):
            wait = False
            group = self._writing.popleft()
            writing, group.writing = group.writing, None
            try:
                group.written(*writing.result())
            except OSError as error:
                self.disk_bytes -= group.file_bytes
                group.error = error
                self._failed.append(group)
                if self._tiers.allow_missing:
                    self._give_up(group)
            else:
                self._release(group)
            if not group.records and group in self._groups:
                self._discard(group)

    def settle(self) -> None:
        """Waits until nothing is on its way to a file. Raises DiskFull."""
        while self._writing:
            self.reap(wait=True)
        while self._failed:
            self._again(self._failed[0])

    def drop_oldest(self, *, in_files: bool = False) -> bool:
        """Drops the group with the oldest block, where ``in_files`` of those in files or on their
        way there, which are waited for: how fast the disk is must not decide what is forgotten.
        None with a block that is held. False where none can go."""
        if in_files and any(not group.records for group in self._writing):
            self.reap(wait=True)  # what nobody wants goes when its file is complete
            return True
        for group in sorted(self._groups, key=lambda g: g.first):
            if in_files and group.path is None and group.writing is None:
                continue
            if group.records and not _kept(group):
                if in_files and group.writing is not None:
                    self.reap(wait=True)
                else:
                    self._drop(group)
                return True
        if in_files and self._writing:
            self.reap(wait=True)
            return True
        return False

    def close(self) -> None:
        self._files.close()
        self._groups.clear()
        self._writing.clear()
        self._failed.clear()
        self._spare.clear()
        self.buffer_bytes = self.disk_bytes = 0

    # -- buffers ---------------------------------------------------------------------------------

    def _crowded(self, size: int) -> bool:
        if self._tiers.host_bytes:
            return self.buffer_bytes + size > self._tiers.host_bytes
        return len(self._writing) + len(self._failed) >= IN_FLIGHT

    def _resting_bytes(self) -> int:
        """Bytes of the buffers that are not on their way to a file."""
        return self.buffer_bytes - sum(len(group.buffer) for group in self._writing)

    def _demote(self) -> bool:
        """Sends the least recently used group on from the host, or drops the oldest where there are
        no files. False where there is none."""
        if self._failed:
            self._again(self._failed[0])
            return True
        if self._tiers.disk_bytes == 0:
            return self.drop_oldest()
        for group in self._groups:
            if group.buffer is not None and group.writing is None:
                self._write(group)
                return True
        return False

    def give_back(self, group: Group) -> None:
        """The buffer of a group that is not taken after all."""
        self._transfer.settle()
        self._release(group)

    def _release(self, group: Group) -> None:
        buffer, group.buffer, group.arrived = group.buffer, None, None
        self.buffer_bytes -= len(buffer)
        if len(buffer) == self._tiers.group and len(self._spare) < IN_FLIGHT:
            self._spare.append(buffer)

    def room_for(self, block: Block) -> torch.Tensor:
        """Host memory for the record of a block; on the CPU it holds until the next call."""
        record: Record = block._copy
        dtype, size = record.group.dtype, record.nbytes
        if self._transfer.on_gpu:
            # Each on its own: the copy to the device reads it later.
            scratch = self._transfer.buffer(size)
        else:
            if len(self._scratch) < size:
                self._scratch = self._transfer.buffer(size)
            scratch = self._scratch[:size]
        return scratch.view(dtype).view(record.shape)

    # -- files -----------------------------------------------------------------------------------

    def _write(self, group: Group) -> None:
        limit = self._tiers.disk_bytes
        while limit is not None and self.disk_bytes + group.file_bytes > limit:
            if not self.drop_oldest(in_files=True):
                if not _kept(group):
                    self._drop(group)
                    return
                break  # what an answer still wants may exceed the budget for its time
        self.disk_bytes += group.file_bytes
        self._files.write(group)
        self._writing.append(group)

    def _again(self, group: Group) -> None:
        """Tries once more to write a group: what found no space before may find some now."""
        self._failed.remove(group)
        group.error = None
        self._write(group)
        while group.writing is not None:
            self.reap(wait=True)
        if group in self._failed:
            raise DiskFull(
                f"the history of {_span(group.spans)} cannot be written to {self._files.where}: "
                f"{group.error.strerror or group.error}; it stays in memory: free space, or allow "
                "that history goes missing (engine.allow_missing=true)",
                group.spans,
            ) from group.error

    def _give_up(self, group: Group) -> None:
        """What cannot be written is let go, as the user allowed."""
        why = f"cannot be written to {self._files.where}: {group.error.strerror or group.error}"
        for block in list(group.records):
            if block._away:
                block._stream._lose(block, why)
            else:
                self.forget(block)

    def _drop(self, group: Group) -> None:
        for block in list(group.records):
            if block._away:
                block._stream._evict(block)
            else:
                self.forget(block)

    def _discard(self, group: Group) -> None:
        """Nothing in the group lives. One that is being written goes when that is done."""
        if group.writing is not None:
            return
        del self._groups[group]
        if group in self._failed:
            self._failed.remove(group)
        if group.buffer is not None:
            self._release(group)
        if group.path is not None:
            try:
                group.path.unlink(missing_ok=True)
            except OSError:
                return  # it goes with the folder, if it can go at all, and counts until then
            self.disk_bytes -= group.file_bytes


def _kept(group: Group) -> bool:
    """Whether a block that has nothing but this record is in use."""
    return any(block._away and block._keeps for block in group.records)


def _span(spans: Iterable[tuple[float, float]]) -> str:
    starts, ends = zip(*spans)
    return f"{min(starts):g}-{max(ends):g} s"
