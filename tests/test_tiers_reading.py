"""Many blocks are read from disk at once: order, errors, threads, and what is seen meanwhile."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from test_tiers import PAGE, check, files, fill, flipped, missing, tiered

from vicostream_kernels import _spill_file
from vicostream_kernels._spill_file import SpillFolder
from vicostream_kernels._transfer import Transfer
from vicostream_kernels.cache import LostBlock


@pytest.fixture(autouse=True)
def three_at_once(monkeypatch):
    """However many cores there are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


def spilled(cache, stream):
    """Eight blocks on disk, each in a file of its own; the pages hold what came after them."""
    blocks = fill(stream, 8)
    fill(stream, 10, first=8)
    cache.settle()
    assert {block.tier for block in blocks} == {"disk"}
    return blocks


@pytest.mark.parametrize("damage", [missing, flipped])
@pytest.mark.parametrize("allowed", [False, True])
def test_an_error_in_the_third_of_eight(tmp_path, monkeypatch, damage, allowed):
    """It is known before the first has been read, and that one comes nevertheless."""
    read, failed = SpillFolder.read, threading.Event()

    def slow(self, record, into):
        if record is first:
            assert failed.wait(60)
        try:
            read(self, record, into)
        except Exception:
            failed.set()
            raise

    with tiered(10, folder=str(tmp_path), allow_missing=allowed) as cache:
        with cache.open() as stream:
            blocks = spilled(cache, stream)
            first = blocks[0]._copy
            monkeypatch.setattr(SpillFolder, "read", slow)
            damage(files(tmp_path)[2])
            if allowed:
                assert stream.fetch(blocks) == ["disk"] * 2 + [None] + ["disk"] * 5
                assert [(loss.start_s, loss.end_s) for loss in stream.losses] == [(2.0, 2.5)]
                here = [block for block in blocks if block is not blocks[2]]
            else:
                with pytest.raises(LostBlock, match=r"of 2-2.5 s cannot be read from .*3\.safe"):
                    stream.fetch(blocks)
                here = blocks[:2]
                assert all(block.tier == "disk" and not block.pages for block in blocks[2:])
            assert [block.tier for block in here] == ["memory"] * len(here)
            listed = [page for block in stream.chunks for page in block.pages]
            assert cache.used_pages == len(listed)
            assert int(cache.page_fill.sum()) == 4 * len(listed)
            for block in here:
                check(stream, [block], first=int(block.start_s))
            if not allowed:
                stream.fetch(blocks[:2] + blocks[3:])
                check(stream, blocks[3:], first=3)


def test_pages_are_shown_when_all_of_them_are_there(tmp_path, monkeypatch):
    read, seen = SpillFolder.read, []

    def watching(self, record, into):
        read(self, record, into)
        seen.append((int(cache.page_fill.sum()), [len(block.pages) for block in blocks]))

    with tiered(10, folder=str(tmp_path)) as cache, cache.open() as stream:
        blocks = spilled(cache, stream)
        monkeypatch.setattr(SpillFolder, "read", watching)
        assert stream.fetch(blocks) == ["disk"] * 8
        assert seen == [(4 * 2, [0] * 8)] * 8
        check(stream, blocks)


@pytest.mark.parametrize("where", ["the caller", "a helper"])
def test_what_nobody_expects_gives_the_pages_back_once_nothing_is_written(
    tmp_path, monkeypatch, where
):
    read, caller, running = SpillFolder.read, threading.current_thread(), []

    def failing(self, record, into):
        running.append(None)
        try:
            if (threading.current_thread() is caller) == (where == "the caller"):
                raise MemoryError("no more")
            threading.Event().wait(0.1)
            read(self, record, into)
        finally:
            running.pop()

    with tiered(10, folder=str(tmp_path)) as cache, cache.open() as stream:
        blocks = spilled(cache, stream)
        with monkeypatch.context() as patch:
            patch.setattr(SpillFolder, "read", failing)
            with pytest.raises(MemoryError, match="no more"):
                stream.fetch(blocks)
        assert not running and not any(block.pages for block in blocks)
        assert cache.used_pages == 2 and int(cache.page_fill.sum()) == 8
        assert stream.fetch(blocks) == ["disk"] * 8
        check(stream, blocks)


def test_no_interrupt_gives_pages_back_that_are_still_written(tmp_path, monkeypatch):
    """However many, and whatever a signal's handler raises."""
    read, caller, go, running = SpillFolder.read, threading.current_thread(), threading.Event(), []

    def slow(self, record, into):
        if threading.current_thread() is caller:
            assert begun.wait(60)
            raise KeyboardInterrupt
        running.append(None)
        begun.set()
        assert go.wait(60)
        read(self, record, into)
        running.pop()

    def interrupted(futures):
        if interrupts:
            raise interrupts.pop()
        go.set()
        return wait(futures)

    begun, wait = threading.Event(), _spill_file.wait
    interrupts = [KeyboardInterrupt(), TimeoutError("an alarm")]
    with tiered(10, folder=str(tmp_path)) as cache, cache.open() as stream:
        blocks = spilled(cache, stream)
        with monkeypatch.context() as patch:
            patch.setattr(SpillFolder, "read", slow)
            patch.setattr(_spill_file, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream.fetch(blocks)
        assert not running and not interrupts and cache.used_pages == 2
        assert stream.fetch(blocks) == ["disk"] * 8
        check(stream, blocks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_reads_with_threads_of_its_own(tmp_path):
    with tiered(10, folder=str(tmp_path)) as cache, cache.open() as stream:
        blocks = spilled(cache, stream)
        stream.fetch(blocks)
        stream.spill(blocks)
        child = os.fork()
        if child == 0:
            found = []
            try:
                signal.alarm(20)  # ends it, should it wait for threads that are not there
                found = stream.fetch(blocks)
            finally:
                os._exit(0 if found == ["disk"] * 8 else 1)
        assert os.waitpid(child, 0)[1] == 0


def ours():
    return [t for t in threading.enumerate() if t.name.startswith("vicostream-")]


def test_threads_are_few_and_gone_after_the_close(tmp_path, monkeypatch):
    before = ours()
    with tiered(10, folder=str(tmp_path)) as cache, cache.open() as stream:
        blocks = spilled(cache, stream)
        assert len(ours()) == len(before) + 1
        stream.fetch(blocks[:1])
        assert len(ours()) == len(before) + 1, "one block needs no thread"
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        for _ in range(3):
            stream.fetch(blocks)
            stream.spill(blocks)
        assert len(ours()) <= len(before) + _spill_file.MOST_READERS
    assert ours() == before


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_the_writing_thread_stands_back_and_no_other_one(tmp_path):
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    before = ours()
    with tiered(10, folder=str(tmp_path)) as cache, cache.open() as stream:
        stream.fetch(spilled(cache, stream))
        nice = {
            thread.name.rpartition("_")[0]: os.getpriority(os.PRIO_PROCESS, thread.native_id)
            for thread in ours()
            if thread not in before
        }
        assert nice == {"vicostream-spill": max(mine, 10), "vicostream-read": mine}
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


def test_a_thread_that_stands_back_further_stays_there(monkeypatch):
    given = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "getpriority", lambda which, who: 19)
    monkeypatch.setattr(os, "setpriority", lambda which, who, nice: given.append(nice))
    _spill_file._stand_back()
    assert given == [19]


class Device(Transfer):
    """As on a GPU: records come up over host memory of their own, all in one copy."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.on_gpu, self.came = True, []

    def buffer(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)

    def down(self, pools, runs, record):
        Transfer(torch.device("cpu")).down(pools, runs, record)

    def up(self, pools, arriving):
        self.came.append(len(arriving))
        Transfer(torch.device("cpu")).up(pools, arriving)

    def mark(self):
        return None

    def wait(self):
        pass

    def settle(self):
        self.settled = True


@pytest.mark.parametrize("host", [0, 6 * PAGE])
def test_records_of_their_own_come_up_in_one_copy(tmp_path, host):
    with tiered(10, folder=str(tmp_path), host_bytes=host) as cache, cache.open() as stream:
        device = Device()
        cache._residency.transfer = cache._residency.below._transfer = device
        blocks = fill(stream, 18)[:8]
        cache.settle()
        tiers = ["disk"] * 8 if not host else ["disk"] * 4 + ["host"] * 4
        assert stream.fetch(blocks) == tiers and device.came == [8]
        check(stream, blocks)
        stream.spill(blocks)
        flipped(files(tmp_path)[1])
        with pytest.raises(LostBlock, match="of 1-1.5 s cannot"):
            stream.fetch(blocks)
        assert device.came[1:] == [1] and blocks[0].tier != "disk"
        check(stream, blocks[:1])
    assert device.settled, "pools may be somebody else's memory after the close"


class Queue:
    """Stands in for ``torch.cuda`` in `Transfer`: copies are made at once, events say how far."""

    def __init__(self, monkeypatch, pools, wanted) -> None:
        self.pools, self.wanted, self.complete = pools, wanted, []
        for name, value in {
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda device: None,
            "Event": lambda: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def wait_stream(self, stream):
        pass

    def record(self, stream):
        """The layers that are there."""
        there = [
            all(torch.equal(p[layer], w[layer]) for p, w in zip(self.pools, self.wanted))
            for layer in range(len(self.pools[0]))
        ]
        self.complete.append(there.count(True))


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_on_a_gpu_layers_arrive_one_after_another(monkeypatch, layers):
    shape = (layers, 9, 4, 2, 8)  # nine pages of four
    pools, wanted = ([torch.zeros(shape) for _ in range(2)] for _ in range(2))
    runs = [[(0, 3)], [(8, 4), (20, 2)], [(13, 1)]]
    records = [torch.randn(layers, 2, n, 2, 8) for n in (3, 6, 1)]
    arriving = list(zip(runs, records))
    transfer = Transfer(torch.device("cpu"))
    transfer.up(wanted, arriving)
    transfer._copying = queue = Queue(monkeypatch, pools, wanted)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    slots = torch.tensor([s for each in runs for first, n in each for s in range(first, first + n)])
    transfer._queue(pools, arriving, slots)
    assert queue.complete == list(range(1, layers + 1))
    assert all(torch.equal(p, w) for p, w in zip(pools, wanted))
