"""Who sees whom: what each forward reads, recomputed from the methods' words alone."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels.models import Qwen2_5_VLRunner


@dataclass
class Forward:
    """One forward as the LLM saw it: visible tokens as (block, offset) in logical order."""

    visible: list[tuple[str, int]]
    new: int
    attend: object
    positions: torch.Tensor
    seen_from: int


@contextlib.contextmanager
def watched(monkeypatch, stream):
    """Records every forward of ``stream``; blocks are named system, sink, c0, c1, ... and text."""
    forwards: list[Forward] = []
    names: dict[int, str] = {}
    original = Qwen2_5_VLRunner.forward

    def forward(self, embeds, positions, attend, outputs="all"):
        fill = attend.cache.page_fill.tolist()
        owner = {}
        chunk = stream.history.chunks_seen
        cache = stream.history.cache
        for block in [*cache.blocks, *cache._reserved]:
            if block.kind == "chunk":
                names.setdefault(id(block), f"c{chunk}")
                if block.tokens is None:
                    names[id(block)] = f"c{chunk}"
            elif block is stream.history.sink:
                names[id(block)] = "sink"
            else:
                names[id(block)] = "preamble" if block is stream.history.preamble else "text"
            offset = 0
            for page in block.pages:
                owner[page] = (names[id(block)], offset)
                offset += fill[page]
        tokens = []
        for page in attend.page_table.flatten().tolist():
            if page >= 0:
                name, first = owner[page]
                tokens += [(name, first + i) for i in range(fill[page])]
        new = int(attend.cu_seqlens_q[1])
        start = 0 if attend.window_start is None else int(attend.window_start)
        visible = [
            token
            for j, token in enumerate(tokens[: len(tokens) - new])
            if j < attend.sink_tokens or j >= start
        ]
        forwards.append(Forward(visible, new, attend, positions[:, :new].clone(), start))
        return original(self, embeds, positions, attend, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2_5_VLRunner, "forward", forward)
        yield forwards


def blocks_of(forward):
    return list(dict.fromkeys(name for name, _ in forward.visible))


def test_vicostream_video_sees_the_four_forwards_before_it(monkeypatch):
    with small_engine(prune__threshold=0.9) as made, made.open() as stream:
        with watched(monkeypatch, stream) as forwards:
            stream.ingest(pictures(72))
        for i, forward in enumerate(forwards):
            expected = [f"c{j}" for j in range(max(0, i - 4), i)]
            if i < 4:  # the prompt is one of the four forwards before it
                expected.insert(0, "preamble")
            assert blocks_of(forward) == expected
            whole = {b: sum(n == b for n, _ in forward.visible) for b in expected}
            for j, name in enumerate(n for n in expected if n != "preamble"):
                entry = stream.report()["chunks"][max(0, i - 4) + j]
                assert whole[name] == entry["kept"] + 2  # markers belong to the chunk
            assert forward.attend.sink_tokens == 0 and forward.attend.window is None
            assert forward.attend.page_shift is None


def test_vicostream_ids_follow_the_rule(monkeypatch):
    """Absolute ids: a chunk continues at the largest id + 1; dropped tokens keep their ids."""
    rows, columns = 2, 3  # 48 x 80 pixels grow to 84 x 112 and then shrink to 56 x 84
    for threshold in (1.0, -1.0):
        with small_engine(prune__threshold=threshold) as made, made.open() as stream:
            base = len(made.runner.system_ids())
            with watched(monkeypatch, stream) as forwards:
                stream.ingest(pictures(24))
                list(stream.ask("What?", max_new_tokens=3))
            for forward in forwards[:3]:
                # A step counts one second, two ids a second (tokens_per_second).
                video = [
                    (base + 1 + 2 * step, base + 1 + row, base + 1 + column)
                    for step in range(4 if threshold == 1.0 else 1)
                    for row in range(rows)
                    for column in range(columns)
                ]
                end = base + 1 + max(2 * 3, rows - 1, columns - 1) + 1
                expected = [(base,) * 3, *video, (end,) * 3]
                assert list(zip(*forward.positions.tolist())) == expected
                base = end + 1
            for forward in forwards[3:]:
                expected = list(range(base, base + forward.new))
                assert forward.positions.tolist() == [expected] * 3
                base += forward.new


def test_a_vicostream_question_reads_the_system_prompt_the_best_chunks_and_the_last_marker(
    monkeypatch,
):
    kept = []
    with small_engine(retrieve__k=3, prune__threshold=0.9) as made, made.open() as stream:
        prune = stream._prune.run

        def remember(chunk):
            done = prune(chunk)
            kept.append(done.tokens[: done.count.get()].double().mean(0))
            return done

        monkeypatch.setattr(stream._prune, "run", remember)
        frames = pictures(80)
        times = np.arange(80) / 8
        stream.ingest(frames, times)
        torch.testing.assert_close(
            stream.history.cache.summaries()[0], torch.stack(kept).float(), rtol=1e-5, atol=1e-6
        )
        runner = made.runner
        for text, chunks in (("What color is it?", 10), ("Where?", 6)):
            ids = runner.question_ids(text)
            query = runner.embed(torch.tensor(ids)).double().mean(0)
            similarity = torch.stack(
                [torch.cosine_similarity(query, vector, dim=0) for vector in kept[:chunks]]
            )
            best = sorted(similarity.topk(3).indices.tolist())
            with watched(monkeypatch, stream) as forwards:
                answer = stream.ask(text, float(times[8 * chunks - 1]), max_new_tokens=4)
                list(answer)
            spans = [(times[8 * j], times[8 * j + 7]) for j in best]
            np.testing.assert_allclose(answer.figures.blocks, spans)
            first, blocks = forwards[0], stream.history.chunks()
            preamble = sum(name == "preamble" for name, _ in first.visible)
            assert preamble == len(runner.system_ids())
            body = sum(blocks[j].body_tokens for j in best)
            assert len(first.visible) == preamble + body + 1
            # No marker of a selected chunk, but the end of the last chunk at the question's time.
            last = blocks[chunks - 1]
            pages = first.attend.page_table[0].tolist()
            listed = [p for p in pages if p >= 0]
            expected = stream.history.preamble.pages[:]
            for j in best:
                expected += blocks[j].body.pages
            expected += last.segments[2].pages
            assert listed[: len(expected)] == expected
            # One selection, frozen while decoding: only the answer itself is added.
            for step, forward in enumerate(forwards[1:]):
                assert [t for t in forward.visible if t[0] != "text"] == first.visible
                assert sum(name == "text" for name, _ in forward.visible) == len(ids) + step


def test_full_history_sees_everything(monkeypatch):
    with small_engine("full-history") as made, made.open() as stream:
        with watched(monkeypatch, stream) as forwards:
            stream.ingest(pictures(40))
            list(stream.ask("What?", max_new_tokens=1))
        per_chunk = stream.report()["chunks"][0]["kept"] + 2
        system = len(made.runner.system_ids())
        for i, forward in enumerate(forwards):
            assert blocks_of(forward) == ["sink", *(f"c{j}" for j in range(i))]
            assert len(forward.visible) == system + i * per_chunk
            assert forward.attend.window_start is None


WINDOW = 150


def test_streaming_llm_sees_four_sinks_and_the_newest_tokens(monkeypatch):
    """The cache-relative form: of S tokens so far and n new ones, the new ones see the first 4 and
    the newest WINDOW - n, and the sinks stand right before the oldest block of those."""
    with small_engine("streaming-llm", attention__window=WINDOW) as made, made.open() as stream:
        system = len(made.runner.system_ids())
        with watched(monkeypatch, stream) as forwards:
            stream.ingest(pictures(96))
            list(stream.ask("What?", max_new_tokens=6))
        per_chunk = stream.report()["chunks"][0]["kept"] + 2
        chunks = stream.report()["chunks"]
        assert {chunk["kept"] for chunk in chunks} == {per_chunk - 2}
        # The stream as one row of tokens: (name, offset), sinks first.
        row = [("sink", i) for i in range(4)] + [("preamble", i) for i in range(system - 4)]
        base = {"preamble": 4}
        for i, forward in enumerate(forwards[:12]):
            rest = row[4:]
            expected = row[:4] + rest[max(0, len(rest) - (WINDOW - forward.new)) :]
            assert forward.visible == expected
            assert forward.attend.window == WINDOW and forward.attend.sink_tokens == 4
            first = expected[4][0] if len(expected) > 4 else f"c{i}"
            base[f"c{i}"] = int(forward.positions[0, 0])
            shift = forward.attend.page_shift
            moved = 0 if shift is None else int(shift[0, 0, 0])
            assert moved == base[first] - 4
            if shift is not None:
                assert (shift[0, :1] == moved).all() and (shift[0, 1:] == 0).all()
            row += [(f"c{i}", j) for j in range(per_chunk)]
        question = forwards[12:]
        for step, forward in enumerate(question):
            text = question[0].new + step  # tokens of the question so far, this one included
            rest = row[4:] + [("text", j) for j in range(text - forward.new)]
            expected = row[:4] + rest[max(0, len(rest) - (WINDOW - forward.new)) :]
            assert forward.visible == expected


def test_a_streaming_llm_window_that_holds_all_is_full_history(monkeypatch):
    """Nothing has left the window: no sink is moved, and the logits are those of full history."""
    frames, texts = pictures(40), []
    for preset, changes in (("full-history", {}), ("streaming-llm", {"attention__window": 4000})):
        with small_engine(preset, **changes) as made, made.open() as stream:
            stream.ingest(frames)
            logits = []
            original = made.runner.logits
            made.runner.logits = lambda hidden, out=logits, f=original: (
                out.append(f(hidden)) or out[-1]
            )
            try:
                list(stream.ask("What?", max_new_tokens=4))
            finally:
                del made.runner.logits
            texts.append(torch.cat(logits))
    torch.testing.assert_close(texts[0], texts[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [-1.0, 0.25, 1.0])
def test_no_frame_count_changes_the_window(threshold, monkeypatch):
    """Short chunks (a flush, another size) count as chunks like any other."""
    with small_engine(prune__threshold=threshold) as made, made.open() as stream:
        with watched(monkeypatch, stream) as forwards:
            for count in (8, 1, 3, 8, 2, 8, 5):
                stream.ingest(pictures(count))
                stream.flush()
        expected = [[f"c{j}" for j in range(max(0, i - 4), i)] for i in range(7)]
        got = [[b for b in blocks_of(f) if b != "preamble"] for f in forwards]
        assert got == expected


def test_an_interrupted_window_keeps_the_stream_bounded():
    """Pages in use of a stream that keeps no history do not grow, whatever is asked meanwhile."""
    with small_engine("streaming-llm", attention__window=WINDOW) as made, made.open() as stream:
        used = []
        for start in range(0, 160, 8):
            stream.ingest(pictures(8, start=start))
            list(stream.ask("What?", max_new_tokens=2))
            used.append(made.cache.used_pages)
        assert len(set(used[8:])) == 1 and made.cache.total_pages == 256
        assert len(stream.history.ids) == len(stream.history.cache.blocks)
