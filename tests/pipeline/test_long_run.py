"""Streams that do not end: what is kept is accounted for, and nothing else grows."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.pipeline.report import rss_bytes


def stream_frames(stream, count):
    """Frames that never end: a short clip over and over."""
    clip = pictures(40)
    for start in range(0, count, 40):
        stream.ingest(clip[: min(40, count - start)])


def test_without_history_pages_and_bytes_are_flat():
    with small_engine("streaming-llm", attention__window=200) as made, made.open() as stream:
        stream_frames(stream, 480)
        chunks = stream.report()["chunks"][10:]
        assert len({chunk["kv_pages"] for chunk in chunks}) == 1
        assert len({chunk["kv_bytes"] for chunk in chunks}) == 1
        kv = stream.report()["kv"]
        assert kv["pool_bytes"] == made.cache.pool_bytes
        assert kv["peak_bytes"] <= kv["bytes"] * 1.5
        assert len(stream.history.ids) == len(stream.history.cache.blocks) < 10


@pytest.mark.parametrize("preset", ["vicostream", "full-history"])
def test_with_history_the_growth_is_what_the_report_accounts_for(preset):
    with small_engine(preset, engine__window_chunks=2, retrieve="none") as made:
        with made.open() as stream:
            before = made.cache.used_pages
            stream_frames(stream, 240)
            report = stream.report()
    page = report["kv"]["page_size"]
    # Markers have a page each.
    pages = [-(-chunk["kept"] // page) + 2 for chunk in report["chunks"]]
    expected = before + np.cumsum(pages)
    assert [chunk["kv_pages"] for chunk in report["chunks"]] == expected.tolist()
    per_page = report["kv"]["bytes"] // report["kv"]["pages"]
    assert all(c["kv_bytes"] == c["kv_pages"] * per_page for c in report["chunks"])


def test_what_a_chunk_reads_does_not_grow_with_the_history():
    with small_engine(engine__window_chunks=2) as made, made.open() as stream:
        lengths = []
        write = stream._llm.write

        def watched(block, count, embeds, positions, view, outputs):
            lengths.append(view.table.shape[1])
            return write(block, count, embeds, positions, view, outputs)

        stream._llm.write = watched
        stream_frames(stream, 320)
        assert len(lengths) == 40 and len(set(lengths[10:])) == 1


@pytest.mark.slow
def test_five_thousand_frames_at_full_size():
    """The figures of the issue: flat pages, bytes and memory; a chunk late in the stream takes the
    time of one early in it within 5 %. Early and late are timed in turn, a young stream beside the
    old one, so that the machine's drift over the run does not decide."""
    torch.set_num_threads(2)
    clip = pictures(80, 360, 640)
    with small_engine("streaming-llm", engine__pixels=90_000) as made, made.open() as old:
        for start in range(0, 5000, 40):
            old.ingest(clip[start % 80 : start % 80 + 40])
            if start == 400:
                resident = rss_bytes()
        assert rss_bytes() - resident < 64 * 2**20
        after = old.report()["chunks"][20:]
        assert len(after) == 605
        assert len({chunk["kv_pages"] for chunk in after}) == 1
        assert len({chunk["kv_bytes"] for chunk in after}) == 1
        with made.open() as young:
            for start in range(0, 160, 40):
                young.ingest(clip[start % 80 : start % 80 + 40])
            for turn in range(60):
                part = clip[8 * (turn % 10) : 8 * (turn % 10) + 8]
                for stream in (old, young) if turn % 2 else (young, old):
                    stream.ingest(part)
            late, early = (
                statistics.median(chunk["ms"] for chunk in stream.report()["chunks"][-60:])
                for stream in (old, young)
            )
    assert abs(late - early) <= 0.05 * early, (early, late)
