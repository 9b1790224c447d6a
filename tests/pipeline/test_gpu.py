"""The engine on a GPU: no wait for the device in a chunk, and the answers of the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from pipeline_kit import SMALL, pictures, small_engine

from vicostream_kernels import StreamEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def engine():
    with StreamEngine.from_pretrained(
        "tiny-random", overrides=SMALL, device="cuda", dtype=torch.float32
    ) as made:
        yield made


def test_the_host_never_waits_for_a_chunk_but_for_its_count(engine):
    """Copies that wait, ``item`` and the like raise here; the event of the count does not."""
    frames = torch.from_numpy(pictures(32)).pin_memory()
    with engine.open() as stream:
        stream.ingest(frames[:16])
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert stream.ingest(frames[16:]) == 2
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", ["vicostream", "full-history", "streaming-llm"])
def test_a_stream_gives_what_it_gives_on_the_cpu(preset):
    # A threshold that no token's score is near: cuDNN's convolutions are TF32 by default.
    changes = {"streaming-llm": {"attention__window": 150}, "vicostream": {"prune__threshold": 0.2}}
    changes = changes.get(preset, {})
    frames, kept, keys = pictures(48), [], []
    overrides = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    on_gpu = StreamEngine.from_pretrained(
        "tiny-random", preset=preset, overrides=overrides, device="cuda", dtype=torch.float32
    )
    for made in (small_engine(preset, **changes), on_gpu):
        with made, made.open() as stream:
            stream.ingest(frames)
            kept.append([chunk["kept"] for chunk in stream.report()["chunks"]])
            block = stream.history.chunks()[-1]
            page = block.body.pages[0]
            keys.append(made.cache.k_pages[:, page, : min(16, block.body_tokens)].cpu())
            assert "".join(stream.ask("What?", max_new_tokens=3))
    assert kept[0] == kept[1]
    torch.testing.assert_close(keys[0], keys[1], rtol=1e-2, atol=1e-2)


def test_a_chunk_may_have_frames_of_host_and_device(engine):
    frames, keys = torch.from_numpy(pictures(32)), []
    for devices in (("cpu",), ("cpu", "cuda")):
        with engine.open() as stream:
            for turn, part in enumerate(frames.split(5)):
                stream.ingest(part.to(devices[turn % len(devices)]))
            newest = stream.history.chunks()[-1]
            keys.append(stream.history.cache.contents(newest).clone())
    assert torch.equal(*keys)


def test_frames_on_the_device_may_be_those_of_the_reference_on_the_host():
    overrides = {**SMALL, "reuse.skip_tolerance": 0}
    with (
        StreamEngine.from_pretrained(
            "tiny-random", preset="stc", overrides=overrides, device="cuda", dtype=torch.float32
        ) as made,
        made.open() as stream,
    ):
        still = torch.from_numpy(pictures(1)).expand(8, -1, -1, -1)
        for device in ("cpu", "cuda", "cpu", "cuda"):
            stream.ingest(still.to(device))
        assert stream.report()["reuse"]["skipped_steps"] > 0


def test_the_report_has_the_times_of_the_device(engine):
    with engine.open() as stream:
        stream.ingest(pictures(80))
        report = stream.report()
    assert report["device"]["type"] == "cuda" and report["memory"]["peak_device_bytes"] > 0
    assert all(stage["p50"] > 0 for stage in report["stages_ms"].values())
    json.dumps(report)


@pytest.mark.parametrize("preset", ["vicostream", "vicostream+stc", "quest"])
def test_overlapped_stages_give_the_bits_of_a_serial_run(preset):
    """Streams wait for each other where they must: many chunks, questions between them."""
    frames, found = pictures(88), []
    for overlap in (False, True, True):
        overrides = {**SMALL, "engine.overlap": overlap}
        with (
            StreamEngine.from_pretrained(
                "tiny-random", preset=preset, overrides=overrides, device="cuda"
            ) as made,
            made.open() as stream,
        ):
            said = []
            for at in range(0, 88, 8):
                stream.ingest(frames[at : at + 8])
                if at % 32 == 0:
                    said.append("".join(stream.ask("What?", max_new_tokens=4)))
            stream.flush()
            kept = [stream.history.cache.contents(b).clone() for b in stream.history.chunks()]
            found.append((said, kept))
    for said, kept in found[1:]:
        assert said == found[0][0] and all(map(torch.equal, kept, found[0][1]))
