"""History beyond a memory budget: the same answers, accounts that hold, and what goes wrong."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
from pipeline_kit import pictures, small_engine

from vicostream_kernels import _spill_file, methods
from vicostream_kernels.cache import DiskFull, LostBlock, OutOfPages
from vicostream_kernels.models import text
from vicostream_kernels.pipeline.engine import StreamEngine
from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.report import SCHEMA_FILE

jsonschema = pytest.importorskip("jsonschema")

#: About nine chunks of three pages, of the 24 that the tests stream.
BUDGET = 5 * 2**18
TIERS = {"engine__history_bytes": BUDGET, "engine__window_chunks": 2, "retrieve__k": 4}


def streamed(made, chunks=24, **options):
    stream = made.open(fps=2, **options)
    for start in range(0, chunks * 8, 40):
        stream.ingest(pictures(40)[: min(40, chunks * 8 - start)])
    return stream


def told(stream, time_s=None):
    """The answer and the blocks that it read."""
    answer = stream.ask("What happened at the beginning?", time_s)
    text = "".join(answer)
    return text, answer.figures.blocks


#: ReKV chooses per layer and moves what it chose, LiveVLM chooses pages.
PRESETS = {
    "vicostream": TIERS,
    "rekv": {"attention__window": 40, "retrieve__k": 2, "engine__history_bytes": 2 * BUDGET},
    "livevlm": {"attention__window": 40, "retrieve__ratio": 0.05}
    | {"engine__history_bytes": 3 * BUDGET},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_answers_do_not_depend_on_where_the_history_lies(preset):
    found = []
    budget = PRESETS[preset]["engine__history_bytes"]
    for given in ("none", budget):
        changes = PRESETS[preset] | {"engine__history_bytes": given}
        with small_engine(preset, **changes) as made:
            with streamed(made) as stream:
                answers = [told(stream), told(stream, 20.0), told(stream)]
                stream.ingest(pictures(16))
                answers.append(told(stream))
                report = stream.report()
                found.append((answers, report["tokens"]))
    assert found[0] == found[1]
    tiers = {read["tier"] for q in report["questions"] for read in q["reads"]}
    assert tiers == {"memory", "disk"}
    assert report["kv"]["tiers"]["memory"]["bytes"] <= budget
    assert report["kv"]["tiers"]["disk"]["bytes"] > 0
    assert report["forgotten"] == {"chunks": 0, "tokens": 0, "spans": []}
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
    validator.validate(json.loads(json.dumps(report)))


def test_what_is_beyond_the_last_budget_is_forgotten_and_said_to_be():
    with small_engine(**TIERS, engine__disk_bytes=300_000) as made, streamed(made) as stream:
        report = stream.report()
        assert report["kv"]["tiers"]["disk"]["bytes"] <= 300_000
        (span,) = report["forgotten"]["spans"]
        assert span[0] == 0.0 and span[1] == stream.history.cache.chunks[0].start_s - 0.5
        assert report["forgotten"]["chunks"] + len(stream.history.cache.chunks) == 24
        assert report["errors"] == []
        told(stream)


def test_what_is_forgotten_does_not_depend_on_overlap():
    """Chunks of different sizes: what goes down together depends on how much room is made."""
    noise = np.random.default_rng(1).integers(0, 255, (8, 48, 80, 3), dtype=np.uint8)
    still = np.repeat(pictures(1), 8, axis=0)
    changes = {"engine__history_bytes": 2**20, "engine__disk_bytes": 100_000}
    changes |= {"engine__window_chunks": 1, "retrieve__k": 1, "engine__page_size": 4}
    found = []
    for overlap in (False, True):
        with small_engine(**changes, engine__overlap=overlap) as made, made.open(fps=2) as stream:
            forgotten = []
            for i in range(24):
                stream.ingest(still if i % 3 else noise)
                stream.flush()
                forgotten.append(stream.report()["forgotten"])
            found.append(forgotten)
    assert found[0] == found[1] and found[0][-1]["chunks"] > 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_chunk_that_finds_no_room_has_the_time_of_its_first_frame(monkeypatch, overlap):
    fail(monkeypatch)
    with small_engine(**TIERS, engine__overlap=overlap) as made, made.open(fps=2) as stream:
        with pytest.raises(DiskFull) as caught:
            for _ in range(4):
                stream.ingest(pictures(40))
                stream.flush()
        assert caught.value.chunk_time_s == stream.recorder.frames_processed / 2 > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_a_stream_that_finds_no_room_is_not_opened_and_leaves_nothing(monkeypatch, overlap):
    with small_engine(**TIERS, engine__overlap=overlap) as made, made.open(fps=2) as stream:
        with monkeypatch.context() as patch:
            fail(patch)
            with pytest.raises(DiskFull):
                for _ in range(4):
                    stream.ingest(pictures(40))
                    stream.flush()
            pages = made.cache.used_pages
            for _ in range(2):
                with pytest.raises(DiskFull):
                    # A system prompt takes room as a chunk does.
                    made.open(system="long " * 50)
            assert made.cache.used_pages == pages and len(made.cache.streams) == 1
        with made.open() as another:
            assert "".join(another.ask("What?"))
        stream.flush()


def test_more_than_fits_says_what_would_help():
    with small_engine(**(TIERS | {"retrieve__k": 20})) as made, streamed(made) as stream:
        for _ in range(2):
            with pytest.raises(OutOfPages, match="a larger memory budget .engine.history_bytes"):
                stream.ask("What?")
        assert not any(b._holds or b._keeps for b in stream.history.cache.blocks)
        stream.ingest(pictures(8))


def fail(monkeypatch):
    def write_all(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_spill_file, "write_all", write_all)


def test_a_full_disk_stops_before_anything_is_lost(monkeypatch):
    with small_engine(**TIERS) as made, made.open(fps=2) as whole:
        for _ in range(4):
            whole.ingest(pictures(40))
        expected = told(whole)
    with small_engine(**TIERS) as made, made.open(fps=2) as stream:
        stream.ingest(pictures(40))
        with monkeypatch.context() as patch:
            fail(patch)
            with pytest.raises(DiskFull, match="No space left on device.*allow_missing"):
                for _ in range(3):
                    taken = stream.time_s
                    stream.ingest(pictures(40))
        # The frames up to the failure are there; the caller goes on with the rest.
        rest = round((stream.time_s - taken) * 2) if taken else 0
        assert 0 < rest <= 40 and rest % 8 == 0 and stream.report()["errors"] == []
        stream.flush()
        stream.ingest(pictures(40)[rest:])
        while stream.time_s < 79:
            stream.ingest(pictures(40))
        assert told(stream) == expected


def test_a_chunk_larger_than_all_before_waits_where_the_disk_is_full(tmp_path, monkeypatch):
    """Its frames have passed the stages with a state; the rest of the way is gone later."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 48, 80, 3), dtype=np.uint8)
    still = np.repeat(pictures(1), 8, axis=0)
    changes = {**TIERS, "engine__page_size": 2, "engine__history_bytes": BUDGET // 2}
    found = []
    for full in (False, True):
        with small_engine(**changes) as made, made.open(fps=2) as stream:
            for _ in range(12):
                stream.ingest(still)
            if full:
                room = made.cache.make_room
                with monkeypatch.context() as patch:
                    fail(patch)
                    # Room for chunks as they were, as far as that goes.
                    patch.setattr(made.cache, "make_room", lambda n: None)
                    with pytest.raises(DiskFull):
                        for start in range(0, 48, 8):
                            taken = start + 8
                            stream.ingest(noise[start:taken])
                    for call in (stream.flush, lambda: stream.save(tmp_path / "s")):
                        with pytest.raises(DiskFull):
                            call()
                    assert stream.recorder.frames_processed == 96 + taken - 8
                    stream.ask("What?").close()
                assert stream.flush() == 1 and made.cache.make_room == room
                stream.ingest(noise[taken:])
            else:
                stream.ingest(noise)
            found.append((told(stream), stream.report()["tokens"]))
    assert found[0] == found[1]


def test_what_a_failed_call_took_is_counted_and_the_rest_can_follow(monkeypatch):
    """No room for the second of five chunks: its frames wait, those after it were not taken."""
    with small_engine(retrieve__k=4) as made, made.open(fps=2) as whole:
        whole.ingest(pictures(40))
        expected = told(whole)
    with small_engine(retrieve__k=4) as made, made.open(fps=2) as stream:
        calls = []

        def make_room(pages):
            calls.append(pages)
            if len(calls) == 2:
                raise DiskFull("full", [])

        monkeypatch.setattr(made.cache, "make_room", make_room)
        with pytest.raises(DiskFull):
            stream.ingest(pictures(40))
        taken = stream.recorder.frames_ingested
        assert (taken, stream.recorder.frames_processed, stream.time_s) == (16, 8, 7.5)
        assert stream.ingest(pictures(40)[taken:]) == 4
        assert stream.recorder.frames_ingested == stream.recorder.frames_processed == 40
        assert told(stream) == expected


def test_a_full_disk_is_survived_where_that_is_allowed(monkeypatch):
    fail(monkeypatch)
    with small_engine(**TIERS, engine__allow_missing=True) as made, streamed(made) as stream:
        told(stream)
        report = stream.report()
        assert report["forgotten"]["chunks"] == len(report["errors"]) > 5
        first = report["errors"][0]
        assert first["where"] == "history" and "No space left" in first["what"]
        assert first["what"].startswith("the history of 0-3.5 s went missing")


@pytest.mark.parametrize("allowed", [False, True])
def test_a_missing_file_names_the_span_and_is_read_around_where_allowed(tmp_path, allowed):
    changes = TIERS | {"retrieve__force_first": 2}
    options = {"engine__spill_dir": str(tmp_path), "engine__allow_missing": allowed}
    with small_engine(**changes, **options) as made, streamed(made) as stream:
        made.cache.settle()
        oldest = min(tmp_path.rglob("*.safetensors"))
        oldest.unlink()
        if allowed:
            text, blocks = told(stream)
            assert text and (0.0, 3.5) not in blocks and len(blocks) >= 2
            assert "0-3.5 s" in stream.report()["errors"][0]["what"]
        else:
            with pytest.raises(LostBlock, match="0-3.5 s cannot be read"):
                stream.ask("What?")
            assert len(stream.history.cache.chunks) == 24
    assert list(tmp_path.iterdir()) == []


def test_history_lost_while_an_answer_is_open_is_read_around():
    """A write fails between two tokens; what the next token would choose is gone."""
    changes = PRESETS["rekv"] | {"retrieve__reuse_steps": 1, "engine__allow_missing": True}
    with small_engine("rekv", **changes) as made, streamed(made) as stream:
        made.cache.settle()
        answer = stream.ask("What happened at the beginning?", max_new_tokens=40)
        next(answer)
        made.cache.settle()  # what the question sent down is on disk too, however slow that is
        cache = stream.history.cache
        for block in [block for block in cache.chunks if block.tier == "disk"]:
            cache._lose(block, "no space")
        assert "".join(answer) and answer.figures.finish in ("length", "stop")
        assert {read.tier for read in answer.figures.reads} <= {"memory", "disk"}


def test_where_the_last_chunk_is_lost_the_one_before_ends_what_is_read(tmp_path):
    options = {"engine__spill_dir": str(tmp_path), "engine__allow_missing": True}
    with small_engine(**TIERS, **options) as made, streamed(made) as stream:
        made.cache.settle()
        before, last = [block for block in stream.history.cache.chunks if block.tier == "disk"][1:3]
        last._copy.group.path.unlink()
        asked = stream.ask("What?", last.end_s)
        assert asked._reading.chunks[-1] is before and before.pages
        assert asked._reading._suffix.tolist() == [before.segments[-1].pages]
        assert "".join(asked)


@pytest.mark.parametrize(
    "typed, value", [("256MiB", 2**28), ("1.5GB", 1_500_000_000), ("4096", 4096), ("none", None)]
)
def test_bytes_may_be_typed_with_a_unit(typed, value):
    method = methods.get("vicostream", {"engine.history_bytes": typed})
    assert method.engine.history_bytes == value


@pytest.mark.parametrize(
    "preset, changes, why",
    [
        ("full-history", {"engine.history_bytes": "1GiB"}, "none can leave memory"),
        ("vicostream", {"engine.history_bytes": "12parsecs"}, "give none or a whole number"),
        ("vicostream", {"engine.disk_bytes": "1GiB"}, "set engine.history_bytes"),
        ("quest", {"engine.history_bytes": "1GiB", "engine.window_chunks": 4}, "fit in memory"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(preset, changes, why):
    with pytest.raises(ValueError, match=why):
        methods.get(preset, changes)


def test_a_folder_for_files_that_cannot_be_used_is_found_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("in the way")
    wrong = {"engine.history_bytes": BUDGET, "engine.spill_dir": str(tmp_path / "file" / "spilled")}
    with pytest.raises(InputError, match=r"engine.spill_dir=.*spilled: Not a directory"):
        StreamEngine.from_pretrained("no-such-model", overrides=wrong)


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with small_engine(**TIERS, engine__spill_dir="~/spilled") as made, streamed(made):
        made.cache.settle()
        assert list((tmp_path / "spilled").rglob("*.safetensors"))


def test_what_was_fetched_has_come_before_pages_are_written(monkeypatch):
    """On a GPU a copy may still be on its way to a page that left again and has a new owner."""
    order, append = [], text.rope_append

    def write(*args, **options):
        order.append("write")
        return append(*args, **options)

    with small_engine() as made, made.open() as stream:
        monkeypatch.setattr(text, "rope_append", write)
        monkeypatch.setattr(made.cache, "ready", order.append)
        stream.ingest(pictures(8))
        layers = made.runner.layers
    waited = [before for before, now in zip(order, order[1:]) if now == "write"]
    assert waited == list(range(layers)) * (len(waited) // layers) and waited
