"""Tiers: what goes down when, what comes back, and what is said when a file fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from cache_kit import add, make_cache

from vicostream_kernels import _spill_file
from vicostream_kernels._transfer import Transfer
from vicostream_kernels.cache import DiskFull, LostBlock, NotResident, OutOfPages, Tiers

#: Of make_cache: 4 tokens x 2 pools x 8 floats.
PAGE = 256


def tiered(pages=4, *, group=1, **options):
    """A cache of that many pages; a group is ``group`` full pages."""
    options.setdefault("folder", None)
    memory = pages * PAGE + (0 if options.get("host_bytes") else 2 * group * PAGE)
    memory += -(-memory // 7)  # an eighth is for rows
    tiers = Tiers(memory_bytes=memory, group_bytes=group * PAGE, **options)
    return make_cache(pages=1000, tiers=tiers)


def fill(stream, n, *, first=0, **options):
    """Chunks of one full page each, a second long; every key is its number, values its negative."""
    blocks = []
    for i in range(first, first + n):
        block = add(stream, 4, start_s=float(i), end_s=i + 0.5, **options)
        stream.cache.k_pages[:, block.pages] = float(i)
        stream.cache.v_pages[:, block.pages] = -float(i)
        blocks.append(block)
    return blocks


def check(stream, blocks, first=0):
    for i, block in enumerate(blocks, first):
        found = stream.contents(block)
        assert found[:, 0].eq(i).all() and found[:, 1].eq(-i).all(), block


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_the_least_recently_retrieved_goes_down_and_comes_back_unchanged():
    with tiered(4) as cache, cache.open() as stream:
        blocks = fill(stream, 4)
        assert [b.tier for b in blocks] == ["memory"] * 4
        assert stream.fetch([blocks[0]]) == ["memory"]
        blocks += fill(stream, 2, first=4)
        assert [bool(b.pages) for b in blocks] == [True, False, False, True, True, True]
        with pytest.raises(NotResident, match=r"chunk block 1-1.5 s .* fetch it"):
            stream.page_table(blocks)
        cache.settle()
        assert stream.fetch([blocks[2], blocks[1]]) == ["disk", "disk"]
        cache.settle()
        assert [b.tier for b in blocks] == ["disk", "memory", "memory", "disk", "memory", "memory"]
        check(stream, blocks)
        table = stream.page_table(blocks[1:3])[0].tolist()
        assert cache.k_pages[0, table, 0, 0, 0].tolist() == [1.0, 2.0]
        assert cache.page_fill[table].tolist() == [4, 4]


def test_pinned_and_held_blocks_stay_and_say_so_when_nothing_else_is_left():
    with tiered(4) as cache, cache.open() as stream:
        pinned = fill(stream, 2, pinned=True)
        held = fill(stream, 2, first=2)
        with stream.hold(held):
            with pytest.raises(
                OutOfPages, match="4 in chunks pinned or held.*engine.history_bytes"
            ):
                stream.reserve(1)
            with pytest.raises(ValueError, match="is held by 1 user"):
                stream.spill(held[:1])
        with pytest.raises(ValueError, match="not pinned"):
            stream.spill(pinned)
        assert len(stream.reserve(8).pages) == 2
        assert [b.tier for b in pinned] == ["memory"] * 2 and not held[0].pages
        with pytest.raises(OutOfPages, match="fetch of 2 blocks"):
            stream.fetch(held)
        check(stream, pinned + held)


def test_what_came_back_is_not_written_a_second_time(tmp_path):
    with tiered(4, folder=str(tmp_path)) as cache, cache.open() as stream:
        blocks = fill(stream, 8)
        cache.settle()
        assert len(files(tmp_path)) == 4
        for block in blocks * 2:
            stream.fetch([block])
        cache.settle()
        assert len(files(tmp_path)) == 8
        check(stream, blocks)
        for block in blocks[:5]:
            stream.evict(block)
        assert len(files(tmp_path)) == 3
    assert list(tmp_path.iterdir()) == []


def test_files_hold_groups_in_safetensors(tmp_path):
    safe_open = pytest.importorskip("safetensors").safe_open
    with tiered(8, group=3, folder=str(tmp_path)) as cache, cache.open() as stream:
        fill(stream, 9)
        cache.settle()
        (path,) = files(tmp_path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "vicostream-blocks/1"}
            assert list(file.keys()) == ["0/0-0.5s", "1/1-1.5s", "2/2-2.5s"]
            for i, name in enumerate(file.keys()):
                tensor = file.get_tensor(name)
                assert tensor.shape == (1, 2, 4, 1, 8)
                assert tensor[:, 0].eq(i).all() and tensor[:, 1].eq(-i).all()


def test_beyond_the_last_budget_the_oldest_are_forgotten_with_their_rows(tmp_path):
    # Four chunks in memory, three in files.
    with tiered(4, folder=str(tmp_path), disk_bytes=3 * 500) as cache, cache.open() as stream:
        for i in range(12):
            block = fill(stream, 1, first=i)[0]
            stream.set_summary(block, torch.tensor([float(i)]))
        cache.settle()
        assert stream.forgotten.spans == [(0.0, 4.5)] and stream.forgotten.chunks == 5
        assert [b.start_s for b in stream.chunks] == list(range(5, 12))
        assert stream.summaries()[0, :, 0].tolist() == list(range(5, 12))
        assert sum(p.stat().st_size for p in files(tmp_path)) == cache.tier_bytes()["disk"][0]
        assert cache.tier_bytes()["disk"][0] <= 3 * 500
        assert not stream.losses
        check(stream, stream.chunks, first=5)


@pytest.mark.parametrize("written", [False, True])
def test_the_oldest_goes_also_on_its_way_to_its_file(tmp_path, written):
    """How fast the disk is does not decide what is forgotten."""
    with tiered(4, folder=str(tmp_path), disk_bytes=2 * 500) as cache, cache.open() as stream:
        old, middle, young = fill(stream, 3)
        stream.spill([young])
        cache.settle()
        stream.spill([old])
        if written:
            cache.settle()
        stream.spill([middle])
        cache.settle()
        assert (old.state, middle.tier, young.tier) == ("evicted", "disk", "disk")


@pytest.mark.parametrize("written", [False, True])
def test_nothing_goes_for_a_file_that_nobody_wants(tmp_path, written):
    with tiered(4, folder=str(tmp_path), disk_bytes=2 * 500) as cache, cache.open() as stream:
        first, second, third = fill(stream, 3)
        stream.spill([first])
        cache.settle()
        stream.spill([second])
        if written:
            cache.settle()
        stream.free(second)
        stream.spill([third])
        cache.settle()
        assert (first.tier, third.tier) == ("disk", "disk") and len(files(tmp_path)) == 2


def test_host_memory_lies_between():
    with tiered(4, host_bytes=4 * PAGE) as cache, cache.open() as stream:
        blocks = fill(stream, 10)
        cache.settle()
        assert [b.tier for b in blocks] == ["disk"] * 4 + ["host"] * 2 + ["memory"] * 4
        assert stream.fetch(blocks[3:6]) == ["disk", "host", "host"]
        check(stream, blocks)
    with tiered(4, host_bytes=4 * PAGE, disk_bytes=0) as cache, cache.open() as stream:
        fill(stream, 12)
        assert set(cache.tier_bytes()) == {"memory", "host"}
        assert stream.forgotten.chunks and stream.forgotten.spans[0][0] == 0.0
        check(stream, stream.chunks, first=stream.forgotten.chunks)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_copy_that_fails_leaves_everything_where_it_was(monkeypatch, way):
    def failing(self, *given):
        copy(self, *given)
        raise MemoryError("no more")

    copy = getattr(Transfer, way)
    with tiered(4, host_bytes=8 * PAGE, disk_bytes=0) as cache, cache.open() as stream:
        blocks = fill(stream, 8)
        before = [block.tier for block in blocks], cache.tier_bytes()
        assert before[0] == ["host"] * 4 + ["memory"] * 4
        with monkeypatch.context() as patch:
            patch.setattr(Transfer, way, failing)
            with pytest.raises(MemoryError, match="no more"):
                if way == "up":
                    stream.spill(blocks[4:6])
                    before = [block.tier for block in blocks], cache.tier_bytes()
                    stream.fetch(blocks[:2])
                else:
                    stream.spill(blocks[4:])
        assert ([block.tier for block in blocks], cache.tier_bytes()) == before
        check(stream, blocks)
        assert stream.fetch(blocks[:2]) == ["host", "host"]
        check(stream, blocks)
        stream.spill(blocks[:2])
        check(stream, blocks)


def test_rows_of_summaries_count_and_bound_the_history():
    with tiered(64) as cache, cache.open() as stream:
        for i in range(300):
            stream.set_summary(fill(stream, 1, first=i)[0], torch.zeros(32))
        used, budget = cache.tier_bytes()["memory"]
        assert used <= budget and stream.live_summary_bytes <= budget // 8 + 128
        assert 10 < len(stream.chunks) < 40 and stream.forgotten.chunks > 250
        check(stream, stream.chunks[-3:], first=297)


def disk_fails(monkeypatch, wanted=errno.ENOSPC):
    """The disk takes half of each write, then nothing."""

    def write_all(file, data):
        file.write(data[: len(data) // 2])
        raise OSError(wanted, "No space left on device")

    monkeypatch.setattr(_spill_file, "write_all", write_all)


def test_a_full_disk_loses_nothing_and_names_the_span(tmp_path, monkeypatch):
    with tiered(4, folder=str(tmp_path)) as cache, cache.open() as stream:
        with monkeypatch.context() as patch:
            disk_fails(patch)
            blocks = fill(stream, 6)
            with pytest.raises(DiskFull, match=r"0-0.5 s .*No space left.*allow_missing") as caught:
                stream.reserve(4)
            assert caught.value.spans == ((0.0, 0.5),)
            assert files(tmp_path) == []
            budget = cache.tiers.memory_bytes
            assert cache.tier_bytes() == {"memory": (6 * PAGE, budget), "disk": (0, None)}
            check(stream, blocks)
            with pytest.raises(DiskFull):
                cache.settle()
        blocks += fill(stream, 2, first=6)  # there is space again
        cache.settle()
        check(stream, blocks)
        assert len(files(tmp_path)) == 4 and not stream.losses


def test_a_full_disk_is_survived_where_the_user_allows_it(tmp_path, monkeypatch):
    with tiered(4, folder=str(tmp_path), allow_missing=True) as cache, cache.open() as stream:
        disk_fails(monkeypatch)
        fill(stream, 10)
        cache.settle()
        assert [b.start_s for b in stream.chunks] == [6, 7, 8, 9]
        assert [(l.start_s, l.end_s) for l in stream.losses] == [(i, i + 0.5) for i in range(6)]
        assert "No space left" in stream.losses[0].why
        check(stream, stream.chunks, first=6)


#: Spills into a folder, says so, and waits.
SPILLS = """
import sys
sys.path[:0] = {path!r}
from test_tiers import fill, tiered
cache = tiered(4, folder={folder!r})
fill(cache.open(), 8)
cache.settle()
print("spilled", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    """Not what a living process uses, nor files of others, whatever their folders are called."""
    code = SPILLS.format(path=sys.path, folder=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "spilled\n"
        others = tmp_path / "vicostream-spill-notes" / "notes.txt"
        elsewhere = tmp_path / "elsewhere" / "00000001.safetensors"
        for path in (others, elsewhere):
            path.parent.mkdir()
            path.write_text("mine")
        (tmp_path / "vicostream-spill-link").symlink_to(elsewhere.parent)
        with tiered(4, folder=str(tmp_path)) as living, living.open() as stream:
            fill(stream, 7)
            living.settle()
            assert len(files(tmp_path)) == 4 + 3 + 1  # of two living ones, and the other's
            process.kill()
            process.wait(timeout=60)
            assert len(files(tmp_path)) == 4 + 3 + 1
            with tiered(4, folder=str(tmp_path)) as cache, cache.open() as other:
                fill(other, 6)
                cache.settle()
                assert len(files(tmp_path)) == 3 + 2 + 1
            check(stream, stream.chunks)
        assert files(tmp_path) == [elsewhere] and others.exists()
    finally:
        process.kill()
        process.communicate()


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    with tiered(4, folder=str(tmp_path)) as cache, cache.open() as stream:
        blocks = fill(stream, 6)
        cache.settle()
        (folder,) = tmp_path.iterdir()
        for path in files(tmp_path):
            path.unlink()
        folder.rmdir()
        blocks += fill(stream, 2, first=6)
        cache.settle()
        assert len(files(tmp_path)) == 2
        check(stream, blocks[2:], first=2)
        with pytest.raises(LostBlock, match="No such file"):
            stream.fetch(blocks[:1])


def test_a_file_that_cannot_go_does_not_keep_its_stream(tmp_path):
    """A folder stands in its place: nothing else is left behind, and the cache goes on."""
    with tiered(4, folder=str(tmp_path)) as cache:
        stream, other = cache.open(), cache.open()
        fill(stream, 8)
        cache.settle()
        for path in files(tmp_path):
            path.unlink()
            path.mkdir()
        stream.close()
        assert stream.closed and cache.used_pages == 0 and cache.streams == [other]
        check(other, fill(other, 3))
    assert not files(tmp_path), "they go with their folder"


def test_a_fork_leaves_the_files_to_its_parent(tmp_path):
    with tiered(4, folder=str(tmp_path)) as cache, cache.open() as stream:
        fill(stream, 6)
        cache.settle()
        (folder,) = tmp_path.iterdir()
        _spill_file._remove_folder(str(folder), None, os.getpid() + 1)
        assert len(files(tmp_path)) == 2
    assert list(tmp_path.iterdir()) == []


def test_files_are_found_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with tiered(4, folder="spilled") as cache, cache.open() as stream:
        blocks = fill(stream, 6)
        cache.settle()
        monkeypatch.chdir("/")
        assert stream.fetch(blocks[:1]) == ["disk"]
        assert files(tmp_path)
    assert not files(tmp_path)


def missing(path):
    path.unlink()


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def renamed(path):
    """What the file says of itself, not what it holds."""
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(data)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    "damage, why",
    [
        (missing, "No such file"),
        (flipped, "contents have changed"),
        (renamed, "header has changed"),
        (truncated, "truncated"),
    ],
)
@pytest.mark.parametrize("allowed", [False, True])
def test_a_lost_file_names_the_span(tmp_path, damage, why, allowed):
    options = {"folder": str(tmp_path), "allow_missing": allowed}
    with tiered(4, **options) as cache, cache.open() as stream:
        blocks = fill(stream, 7)
        cache.settle()
        damage(files(tmp_path)[1])
        wanted = blocks[0:3]
        if not allowed:
            with pytest.raises(LostBlock, match=rf"1-1.5 s .*{why}") as caught:
                stream.fetch(wanted)
            assert caught.value.spans == ((1.0, 1.5),)
            assert len(stream.chunks) == 7 and not stream.losses
            check(stream, [blocks[0]] + blocks[2:2])
            assert stream.fetch([blocks[2]]) == ["disk"]
        else:
            assert stream.fetch(wanted) == ["disk", None, "disk"]
            assert blocks[1].state == "evicted" and blocks[1] not in stream.chunks
            assert [(loss.start_s, loss.end_s) for loss in stream.losses] == [(1.0, 1.5)]
            assert why in stream.losses[0].why


@pytest.mark.parametrize(
    "options, message",
    [
        ({"memory_bytes": 0}, "memory_bytes=0 must be >= 1"),
        ({"memory_bytes": 9, "disk_bytes": -1}, "disk_bytes=-1 must be >= 0"),
        ({"memory_bytes": 9, "group_bytes": 0}, "group_bytes=0 must be >= 1"),
        ({"memory_bytes": 9, "disk_bytes": 0}, "leaves no tier below"),
    ],
)
def test_budgets_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Tiers(**options)


def test_the_cache_says_what_does_not_go_with_tiers():
    with pytest.raises(ValueError, match="leaves no page of 256 bytes"):
        make_cache(tiers=Tiers(memory_bytes=1000))
    with pytest.raises(ValueError, match="grow must be False"):
        make_cache(tiers=Tiers(memory_bytes=10**6), grow=True)
    with pytest.raises(TypeError, match="tiers must be Tiers"):
        make_cache(tiers=10**6)
    with make_cache() as cache, cache.open() as stream:
        block = fill(stream, 1)[0]
        assert stream.fetch([block]) == ["memory"] and block.tier == "memory"
        with pytest.raises(ValueError, match="without tiers"):
            stream.spill([block])
        cache.make_room(10**6)
        cache.settle()
        assert cache.tier_bytes() == {"memory": (cache.bytes, None)}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("host", [0, 1 << 20])
def test_on_a_gpu_copies_arrive_before_they_are_read(host):
    tiers = Tiers(memory_bytes=40 * 16 * 4096 + (1 << 20), host_bytes=host, group_bytes=1 << 18)
    cache = make_cache(pages=40, layers=4, page_size=16, device="cuda", head_dim=64, tiers=tiers)
    with cache, cache.open() as stream:
        blocks, written = [], []
        for i in range(60):
            block = add(stream, 29, start_s=i, end_s=i + 0.5)
            values = torch.randn(4, 2, 16, 1, 64, device="cuda")
            cache.k_pages[:, block.pages] = values
            blocks.append(block)
            written.append(values.clone())
        for i in (0, 30, 5, 59, 12):
            stream.fetch([blocks[i]])
            for layer in range(4):
                cache.ready(layer)
                found = cache.k_pages[layer, blocks[i].pages].flatten(0, 1)[:29]
                assert torch.equal(found, written[i][layer].flatten(0, 1)[:29])
        cache.settle()
        for block, values in zip(blocks, written):
            found = stream.contents(block)[:, 0]
            assert torch.equal(found, values.flatten(1, 2)[:, :29].cpu())
