"""Streams: how frames are cut must not matter, and a question must leave no trace."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels import StreamEngine
from vicostream_kernels.cache import OutOfPages
from vicostream_kernels.pipeline.errors import InputError, PipelineError
from vicostream_kernels.pipeline.session import joined

PRESETS = ["vicostream", "full-history", "streaming-llm"]
#: A window that a few small chunks fill, and a rule that keeps some but not all.
CHANGES = {
    "vicostream": {"prune__threshold": 0.9, "retrieve__k": 3},
    "full-history": {},
    "streaming-llm": {"attention__window": 50},
}


def engine(preset):
    return small_engine(preset, **CHANGES[preset])


def live_keys(stream):
    """Keys, values and pages of everything that the stream keeps, layer by layer."""
    cache = stream.history.cache.cache
    pages = [page for block in stream.history.cache.blocks for page in block.pages]
    fill = cache.page_fill[pages].tolist()
    kept = [cache.k_pages[:, page, :n] for page, n in zip(pages, fill)]
    kept += [cache.v_pages[:, page, :n] for page, n in zip(pages, fill)]
    return torch.cat(kept, dim=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_answers_and_cache_do_not_depend_on_how_frames_are_cut(preset):
    frames = pictures(43)
    times = np.arange(43) / 5
    results = []
    for sizes in ([43], [1] * 43, [5, 0, 11, 8, 16, 3], [8] * 5 + [3]):
        with engine(preset) as made, made.open() as stream:
            at = done = 0
            for size in sizes:
                done += stream.ingest(frames[at : at + size], times[at : at + size])
                at += size
            assert (at, done) == (43, 5)
            done += stream.flush()
            text = "".join(stream.ask("What happened?"))
            report = stream.report()
            results.append((text, live_keys(stream), report["tokens"], done))
    for text, keys, tokens, done in results[1:]:
        assert text == results[0][0] and torch.equal(keys, results[0][1])
        assert (tokens, done) == results[0][2:]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_question_leaves_no_trace_in_the_video(preset):
    frames = pictures(56)
    with engine(preset) as made, made.open() as quiet, made.open() as asked:
        for start in range(0, 56, 8):
            part = frames[start : start + 8]
            quiet.ingest(part)
            used = made.cache.used_pages
            asked.ingest(part)
            grown = made.cache.used_pages - used
            first = "".join(asked.ask("What is this?"))
            assert first == "".join(asked.ask("What is this?"))
            assert made.cache.used_pages == used + grown
        assert torch.equal(live_keys(quiet), live_keys(asked))
        assert quiet.history.next_id == asked.history.next_id


def test_a_question_sees_what_had_ended_at_its_time():
    frames, times = pictures(48), np.arange(48) / 8
    now = {}
    with engine("vicostream") as made, made.open() as stream:
        for chunk in range(6):
            part = slice(8 * chunk, 8 * chunk + 8)
            stream.ingest(frames[part], times[part])
            answer = stream.ask("What?")
            now[chunk] = ("".join(answer), answer.figures.blocks)
        for chunk in range(6):
            end = times[8 * chunk + 7]
            later = stream.ask("What?", end)
            assert ("".join(later), later.figures.blocks) == now[chunk]
            if chunk:
                before = stream.ask("What?", end - 1e-6)
                assert ("".join(before), before.figures.blocks) == now[chunk - 1]
    assert len({blocks[-1] for _, blocks in now.values() if blocks}) > 1


@pytest.mark.parametrize(
    ("preset", "before", "changes"),
    [
        *((preset, 40, CHANGES[preset]) for preset in PRESETS),
        # Here the system prompt is still in part visible, and leaves while the answer is decoded.
        ("streaming-llm", 16, {"attention__window": 150}),
        ("vicostream", 24, {"retrieve": "none", "engine__history": "window"}),
    ],
)
def test_video_that_comes_while_an_answer_is_decoded_changes_nothing(preset, before, changes):
    frames = pictures(80)
    with small_engine(preset, **changes) as made, made.open() as stream:
        stream.ingest(frames[:before])
        whole = "".join(stream.ask("What happened?"))
        answer = stream.ask("What happened?")
        text = ""
        for start in range(before, 80, 8):
            text += next(answer, "")
            stream.ingest(frames[start : start + 8])
        assert text + "".join(answer) == whole
        assert not stream.history._retired and not stream.history._holds


@pytest.mark.parametrize("each", [1, 7, 24])
def test_times_that_nobody_gives_do_not_depend_on_how_frames_are_cut(each, tmp_path):
    """A session that is restored in between counts on."""
    with small_engine("vicostream") as engine:
        stream = engine.open(fps=10)
        stream.ingest(pictures(3), [0.0, 0.1, 0.35])
        for at in range(3, 24, each):
            stream.ingest(pictures(24)[at : at + each])
            if at == 3:
                stream.save(tmp_path / "session")
                stream.close()
                stream = engine.restore(tmp_path / "session")
        stream.flush()
        ends = [chunk.end_s for chunk in stream.history.chunks()]
        stream.close()
    assert ends == [0.35 + n * 0.1 for n in (5, 13, 21)]


def test_a_partial_chunk_is_seen_after_a_flush_only():
    with engine("vicostream") as made, made.open(fps=10) as stream:
        stream.ingest(pictures(11))
        answer = stream.ask("What?")
        assert answer.figures.blocks == [(0.0, pytest.approx(0.7))]
        assert stream.report()["frames"] == {"read": 11, "processed": 8, "dropped": 3}
        assert stream.flush() == 1 and stream.flush() == 0
        assert len(stream.ask("What?").figures.blocks) == 2
        report = stream.report()
        assert [c["frames"] for c in report["chunks"]] == [8, 3]
        # 3 frames are two steps: the odd last one is repeated.
        assert report["chunks"][1]["seen"] * 2 == report["chunks"][0]["seen"]


def test_before_the_first_frame_and_before_the_first_chunk():
    with engine("vicostream") as made, made.open() as stream:
        alone = stream.ask("What?")
        text = "".join(alone)
        assert alone.figures.tokens > 0 and alone.figures.blocks == []
        stream.ingest(pictures(16))
        early = stream.ask("What?", -1.0)
        assert "".join(early) == text and early.figures.blocks == []
        assert len(stream.ask("What?", 1e9).figures.blocks) == 2


def test_frames_of_another_size_end_the_chunk_before_them():
    with engine("vicostream") as made, made.open() as stream:
        stream.ingest(pictures(11))
        stream.ingest(pictures(5, 80, 48))
        stream.ingest(pictures(9))
        stream.flush()
        assert [c["frames"] for c in stream.report()["chunks"]] == [8, 3, 5, 8, 1]
        assert "".join(stream.ask("What?"))


def test_memory_of_the_caller_may_change_after_the_call():
    frames = pictures(12)
    with engine("vicostream") as made, made.open() as kept, made.open() as overwritten:
        kept.ingest(frames)
        buffer = frames.copy()
        overwritten.ingest(buffer[:5])
        buffer[:5] = 0
        overwritten.ingest(buffer[5:])
        buffer[:] = 0
        for stream in (kept, overwritten):
            stream.flush()
        assert torch.equal(live_keys(kept), live_keys(overwritten))


def test_tensors_arrays_and_views_are_the_same_frames():
    frames = pictures(8)
    flipped = np.ascontiguousarray(frames[:, ::-1])[:, ::-1]
    frozen = frames.copy()
    frozen.flags.writeable = False

    class Array(np.ndarray):
        """As readers of pictures have their own."""

    keys = []
    with engine("full-history") as made:
        for given in (frames, torch.from_numpy(frames), flipped, frozen, frames.view(Array)):
            with made.open() as stream:
                assert stream.ingest(given) == 1
                keys.append(live_keys(stream))
    assert all(torch.equal(other, keys[0]) for other in keys[1:])


def test_an_answer_that_is_left_gives_its_pages_back():
    with engine("vicostream") as made, made.open() as stream:
        stream.ingest(pictures(16))
        used = made.cache.used_pages
        for _ in stream.ask("What?"):
            break
        gc.collect()
        assert made.cache.used_pages == used
        with stream.ask("What?") as answer:
            next(answer)
            assert made.cache.used_pages > used
        assert made.cache.used_pages == used and answer.figures.finish == "closed"
        assert list(answer) == []


def test_answers_count_their_tokens_and_stop_at_the_budget():
    with engine("vicostream") as made, made.open() as stream:
        stream.ingest(pictures(8))
        for limit in (1, 5):
            answer = stream.ask("What?", max_new_tokens=limit)
            pieces = list(answer)
            assert "".join(pieces) == answer.text and all(pieces)
            assert answer.figures.tokens == limit and answer.figures.finish == "length"
            assert answer.figures.ttft_ms > 0


def test_the_end_token_ends_the_answer(monkeypatch):
    with engine("vicostream") as made, made.open() as stream:
        stream.ingest(pictures(8))
        said = stream.ask("What?")
        list(said)
        end = made.runner.eos_ids[0]
        queue = iter([40, 41, end, 42])
        sampler = type("Fixed", (), {"next_token": lambda self, ids, logits: next(queue)})()
        answer = stream.ask("What?", sampler=sampler)
        text = "".join(answer)
        assert text == made.runner.tokenizer.decode([40, 41])
        assert (answer.figures.tokens, answer.figures.finish) == (2, "stop")


def test_streams_of_an_engine_do_not_touch_each_other():
    frames, other = pictures(40), pictures(40, start=30)
    with engine("vicostream") as made:
        with made.open() as alone:
            alone.ingest(frames)
            text, keys = "".join(alone.ask("What?")), live_keys(alone)
        with made.open() as one, made.open() as two:
            for start in range(0, 40, 5):
                one.ingest(frames[start : start + 5])
                two.ingest(other[start : start + 5])
            assert "".join(one.ask("What?")) == text
            assert torch.equal(live_keys(one), keys)
            assert not torch.equal(live_keys(two), keys)
        assert made.cache.used_pages == 0


@pytest.mark.parametrize(
    ("frames", "error", "said"),
    [
        (np.zeros((2, 48, 80, 3), np.float32), TypeError, "must be uint8"),
        (np.zeros((48, 80, 3), np.uint8), ValueError, "must be \\[F, H, W, 3\\]"),
        (np.zeros((1, 3, 48, 80), np.uint8), ValueError, "must be \\[F, H, W, 3\\]"),
        (np.zeros((1, 0, 80, 3), np.uint8), ValueError, "must be \\[F, H, W, 3\\]"),
        ([[1]], TypeError, "must be a tensor or a NumPy array"),
        (np.zeros((1, 1, 300, 3), np.uint8), InputError, "300 x 1 pixels.*aspect"),
    ],
)
def test_frames_that_are_none_are_refused(frames, error, said):
    with engine("vicostream") as made, made.open() as stream:
        with pytest.raises(error, match=said):
            stream.ingest(frames)
        assert stream.ingest(pictures(8)) == 1


@pytest.mark.parametrize(
    "foreign",
    [
        torch.empty(5, 48, 80, 3, dtype=torch.uint8, device="meta"),
        torch.zeros(5, 48, 80, 3, dtype=torch.uint8).to_sparse(),
    ],
    ids=["meta", "sparse"],
)
def test_frames_without_data_in_a_chunk_half_full_leave_no_trace(foreign):
    with engine("vicostream") as made, made.open() as clean, made.open() as stream:
        clean.ingest(pictures(16))
        stream.ingest(pictures(16)[:5])
        with pytest.raises(ValueError, match="ingest: frames must be a strided tensor with data"):
            stream.ingest(foreign)
        assert stream.recorder.frames_ingested == 5
        assert stream.ingest(pictures(16)[5:]) == 2
        assert stream.time_s == clean.time_s
        assert torch.equal(live_keys(stream), live_keys(clean))


def test_frames_of_several_devices_in_one_chunk_meet_on_the_engines():
    here = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    assert joined([here], torch.device("meta")) is here
    assert joined([here, here[:1]], torch.device("meta")).device.type == "cpu"
    mixed = joined([here, here[:1].to("meta")], torch.device("meta"))
    assert mixed.device.type == "meta" and mixed.shape == (4, 8, 8, 3)


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([0.0], "1 entries for 2 frames"),
        ([1.0, 0.5], "not before"),
        ([0.0, float("nan")], "finite"),
    ],
)
def test_times_that_are_none_are_refused(times, said):
    with engine("vicostream") as made, made.open() as stream:
        with pytest.raises(ValueError, match=said):
            stream.ingest(pictures(2), times)
        stream.ingest(pictures(2), [5.0, 6.0])
        with pytest.raises(ValueError, match="not before"):
            stream.ingest(pictures(1), [5.5])
        assert stream.time_s == 6.0


@pytest.mark.parametrize("text", ["", "   ", None])
def test_empty_questions_are_refused(text):
    with engine("vicostream") as made, made.open() as stream:
        with pytest.raises(InputError, match="empty"):
            stream.ask(text)


def test_questions_longer_than_the_budget_are_refused_before_anything_is_written():
    with small_engine(engine__max_question_tokens=20) as made, made.open() as stream:
        used = made.cache.used_pages
        with pytest.raises(InputError, match="tokens, allowed: 20 .engine.max_question_tokens"):
            stream.ask("why " * 200)
        assert made.cache.used_pages == used
        with pytest.raises(InputError, match="finite"):
            stream.ask("What?", float("nan"))
        with pytest.raises(InputError, match="max_new_tokens=0"):
            stream.ask("What?", max_new_tokens=0)


def test_closed_streams_and_engines_say_so():
    made = engine("vicostream")
    stream = made.open()
    stream.ingest(pictures(16))
    answer = stream.ask("What?")
    stream.close()
    stream.close()
    assert answer.figures.finish == "closed" and made.cache.used_pages == 0
    for call in (lambda: stream.ingest(pictures(1)), stream.flush, lambda: stream.ask("What?")):
        with pytest.raises(PipelineError, match="closed"):
            call()
    assert stream.report()["frames"]["processed"] == 16
    with made.open() as other:
        other.ingest(pictures(16))
        answer = other.ask("What?")
        made.close()
        assert answer.figures.finish == "closed" and list(answer) == []
        with pytest.raises(PipelineError, match="closed"):
            other.ingest(pictures(1))


def test_what_fails_at_either_end_leaves_nothing_in_the_cache(monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    with small_engine() as made:
        with monkeypatch.context() as patch:
            patch.setattr("vicostream_kernels.pipeline.session.Prefill", broken)
            with pytest.raises(RuntimeError, match="out of memory"):
                made.open()
        assert made.cache.streams == []
        stream = made.open()
        stream.ingest(pictures(8))
        answer = stream.ask("What?")
        with monkeypatch.context() as patch:
            patch.setattr(answer, "close", broken)
            with pytest.raises(RuntimeError, match="out of memory"):
                stream.close()
        assert made.cache.streams == [] and made.cache.used_pages == 0


def test_a_full_cache_forgets_the_oldest_chunk_but_never_the_window():
    with small_engine(engine__max_pages=36, prune="none") as made, made.open() as stream:
        stream.ingest(pictures(96))
        chunks = stream.history.chunks()
        assert stream.history.cache.forgotten.chunks > 0 and len(chunks) >= 5
        assert made.cache.total_pages == 36
        assert chunks[-1].end_s == stream.time_s
        answer = stream.ask("What?", max_new_tokens=2)
        assert list(answer) and len(answer.figures.blocks) <= len(chunks)
    with small_engine(engine__max_pages=20, prune="none") as made, made.open() as stream:
        with pytest.raises(OutOfPages, match="What would help"):
            stream.ingest(pictures(96))
        with pytest.raises(OutOfPages, match="What would help"):  # the chunk waits
            stream.ingest(pictures(8))
        done = stream.report()["frames"]["processed"]
        assert 0 < done < 96


def test_an_engine_refuses_what_it_would_ignore():
    for overrides, said in (
        ({"prune.external": 1.0}, "external"),
        ({"prune.threshold": None, "prune.k": (1, 2)}, "groups"),
        ({"prune.nope": 1}, "unknown key"),
    ):
        with pytest.raises(ValueError, match=said):
            StreamEngine.from_pretrained("tiny-random", overrides=overrides)
    with small_engine() as made:
        for fps in (0, None, float("nan"), "25", 10**400):
            with pytest.raises(ValueError, match="open: fps=.* must be a positive number"):
                made.open(fps=fps)
        with pytest.raises(ValueError, match="open: the system message .* not UTF-8 text"):
            made.open(system="\udcff")


def first_logits(preset, **changes):
    frames = pictures(60)
    with small_engine(preset, **changes) as made, made.open() as stream:
        stream.ingest(frames)
        stream.flush()
        logits = []
        head = made.runner.logits
        made.runner.logits = lambda hidden: logits.append(head(hidden)) or logits[-1]
        try:
            list(stream.ask("What happened?", max_new_tokens=2))
        finally:
            del made.runner.logits
        return torch.cat(logits)


@pytest.mark.parametrize("preset", PRESETS)
def test_page_size_and_padding_change_nothing(preset):
    changes = CHANGES[preset]
    expected = first_logits(preset, **changes)
    for layout in ({"engine__page_size": 1}, {"engine__page_size": 7, "engine__bucket": 32}):
        got = first_logits(preset, **changes, **layout)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("vicostream", {"engine__frames_per_chunk": 1}),
        ("vicostream", {"engine__frames_per_chunk": 5, "engine__window_chunks": 0}),
        ("vicostream", {"attention__sink_tokens": 4}),
        ("vicostream", {"prune": "none", "retrieve": "none"}),
        ("vicostream", {"retrieve": "none", "engine__history": "window"}),
        ("vicostream", {"retrieve__force_last": 1, "retrieve__k": 2, "retrieve__score": "dot"}),
        ("full-history", {"prune": "vicostream", "retrieve": "vicostream"}),
        ("full-history", {"engine__max_pages": 40}),
        ("streaming-llm", {"attention__window": 20}),
        ("streaming-llm", {"attention__window": 60, "attention__sink_tokens": 0}),
        ("streaming-llm", {"attention__window": 60, "attention__positions": "absolute"}),
        ("streaming-llm", {"attention__window": 60, "attention__sink_tokens": 500}),
        ("streaming-llm", {"attention__window": 60, "prune": "vicostream"}),
        ("streaming-llm", {"attention__window": 60, "engine__history": "all"}),
    ],
)
def test_methods_can_be_mixed(preset, changes):
    logits = first_logits(preset, **changes)
    assert logits.shape[0] == 2 and logits.isfinite().all()


def test_the_readme_example():
    with StreamEngine.from_pretrained("tiny-random", overrides={"engine.pixels": 6272}) as made:
        with made.open() as stream:
            stream.ingest(pictures(16))
            assert "".join(stream.ask("What happened?", max_new_tokens=4))


def test_rules_with_a_state_see_the_stream_as_one():
    """A rule against the previous step, with no step kept by force, needs the step of the chunk
    before: the second chunk of a still picture keeps nothing."""
    still = np.repeat(pictures(1), 24, axis=0)
    changes = {"prune__always_keep": "first_of_stream", "prune__threshold": 0.9}
    with small_engine(**changes) as made, made.open() as stream:
        stream.ingest(still)
        kept = [chunk["kept"] for chunk in stream.report()["chunks"]]
        assert kept[0] > 0 and kept[1:] == [0, 0]
        assert "".join(stream.ask("What?", max_new_tokens=3))
        stream.ingest(np.repeat(pictures(1, 80, 48), 8, axis=0))
        assert stream.report()["chunks"][-1]["kept"] >= 0
