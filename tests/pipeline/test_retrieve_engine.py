"""Retrieval presets in the engine: all blocks are full attention, choices hold, bad input."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from pipeline_kit import pictures, small_engine

from vicostream_kernels import checks
from vicostream_kernels.pipeline.visibility import View

QUESTION = "What color is the square?"
#: Every preset that retrieves, with budgets for streams of a few small chunks.
SMALLER = {
    "vicostream": {"retrieve__k": 3},
    "rekv": {"retrieve__k": 3},
    "livevlm": {"engine__page_size": 8},
    "quest": {"engine__page_size": 8, "retrieve__token_budget": 32},
    "lserve": {"engine__page_size": 8, "retrieve__token_budget": 32},
    "streamingtom": {"scorer__budget": 4, "retrieve__token_budget": 12},
}
#: The same with room for everything, at the positions that keys were written with.
EVERYTHING = {
    "vicostream": {"retrieve__k": 99},
    "rekv": {"retrieve__k": 99, "retrieve__positions": "absolute"},
    "livevlm": {"engine__page_size": 8, "retrieve__ratio": 1.0},
    "quest": {"engine__page_size": 8, "retrieve__token_budget": 9999},
    "lserve": {"engine__page_size": 8, "retrieve__token_budget": 9999},
    "streamingtom": {"scorer__budget": 4, "retrieve__token_budget": 9999},
}


def ask(stream, tokens=5, **options):
    """(tokens of the answer, logits of each step, figures)."""
    runner, logits = stream._engine.runner, []
    original = runner.logits

    def spying(hidden):
        logits.append(original(hidden))
        return logits[-1]

    runner.logits = spying
    try:
        answer = stream.ask(QUESTION, max_new_tokens=tokens, **options)
        list(answer)
    finally:
        del runner.logits
    return answer._tokens, torch.cat(logits), answer.figures


def full_attention(stream, tokens):
    """Logits over plain pages of the system prompt, every chunk's body and the last end marker."""
    history, llm, runner = stream.history, stream._llm, stream._engine.runner
    chunks = history.chunks()
    parts = [history.cache.page_table([b]) for b in (history.sink, history.preamble) if b]
    parts += [history.cache.page_table([chunk], markers=False) for chunk in chunks]
    parts.append(torch.tensor([chunks[-1].segments[2].pages], dtype=torch.int32))
    view = View(torch.cat(parts, dim=1), (), (), windowed=False)
    ids, first, logits = runner.question_ids(QUESTION), history.next_id, []
    with torch.no_grad(), llm.reserved(len(ids), kind="text") as block:
        embeds = runner.embed(llm.ids(ids))
        positions = runner.text_positions(len(ids), first)
        logits.append(runner.logits(llm.write(block, len(ids), embeds, positions, view, "last")))
        for n, token in enumerate(tokens[:-1]):
            hidden = llm.append(block, token, first + len(ids) + n, view)
            logits.append(runner.logits(hidden))
        history.cache.free(block)
    return torch.cat(logits)


@pytest.mark.parametrize("preset", EVERYTHING)
def test_all_blocks_are_full_attention(preset):
    with small_engine(preset, **EVERYTHING[preset]) as made, made.open() as stream:
        stream.ingest(pictures(43))
        stream.flush()
        tokens, logits, figures = ask(stream)
        expected = full_attention(stream, tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        spans = [(c.start_s, c.end_s) for c in stream.history.chunks()]
        assert figures.blocks == spans and all(read.share == 1 for read in figures.reads)


@pytest.mark.parametrize("preset", SMALLER)
def test_fewer_blocks_are_not(preset):
    """The comparison above can fail; and a question leaves nothing behind."""
    with small_engine(preset, **SMALLER[preset]) as made, made.open() as stream:
        stream.ingest(pictures(56))
        used = made.cache.used_pages
        tokens, logits, figures = ask(stream)
        assert not torch.allclose(logits, full_attention(stream, tokens), rtol=1e-3, atol=1e-3)
        assert figures.reads and made.cache.used_pages == used
        assert ask(stream)[0] == tokens
        for read in stream.report()["questions"][0]["reads"]:
            assert math.isfinite(read["score"]) and 0 < read["share"] <= 1
            assert read["tier"] == "memory"  # on a GPU: device


@pytest.mark.parametrize("preset", ["quest", "lserve"])
def test_layers_that_read_everything_are_accounted_for(preset):
    """`reads` has what was chosen, `blocks` what was read."""
    with small_engine(preset, **SMALLER[preset]) as made, made.open() as stream:
        stream.ingest(pictures(56))
        spans = [(c.start_s, c.end_s) for c in stream.history.chunks()]
        figures = ask(stream, tokens=1)[2]
        assert figures.blocks == spans and figures.reads == [], "the prompt is dense"
        figures = ask(stream)[2]
        assert figures.blocks == spans and figures.reads


@pytest.mark.parametrize("preset", [p for p in SMALLER if p != "vicostream"])
def test_video_that_comes_while_an_answer_is_decoded_changes_nothing(preset):
    """Also where later tokens choose anew: the summaries that they see are those of the fork."""
    frames = pictures(80)
    with small_engine(preset, **SMALLER[preset]) as made, made.open() as stream:
        stream.ingest(frames[:40])
        whole = "".join(stream.ask(QUESTION))
        answer, text = stream.ask(QUESTION), ""
        for start in range(40, 80, 8):
            text += next(answer, "")
            stream.ingest(frames[start : start + 8])
        assert text + "".join(answer) == whole
        now, later = ask(stream)[2], ask(stream, time_s=stream.history.chunks()[1].end_s)[2]
        assert now.blocks != later.blocks and len(later.blocks) <= 2


@pytest.mark.parametrize("preset", SMALLER)
def test_frames_may_come_in_any_cut(preset):
    answers = []
    for sizes in ([43], [5, 11, 8, 16, 3]):
        with small_engine(preset, **SMALLER[preset]) as made, made.open() as stream:
            at = 0
            for size in sizes:
                stream.ingest(pictures(43)[at : at + size])
                at += size
            answers.append(ask(stream)[0])
    assert answers[0] == answers[1]


def test_only_what_may_still_be_read_is_held():
    """A frozen choice lets go of the rest; choices to come keep all candidates."""
    for preset, all_held in (("rekv", False), ("quest", True)):
        with small_engine(preset, **SMALLER[preset]) as made, made.open() as stream:
            stream.ingest(pictures(56))
            answer = stream.ask(QUESTION)
            held = [c for c in stream.history.chunks() if c._holds]
            chunks = stream.history.chunks()
            assert (held == chunks) == all_held
            read = {span for span in answer.figures.blocks}
            assert all(c in held for c in chunks if (c.start_s, c.end_s) in read)
            answer.close()
            assert not any(c._holds for c in chunks)


@pytest.mark.parametrize("preset", ["livevlm", "quest", "streamingtom"])
def test_a_bounded_history_has_flat_memory(preset):
    changes = {**SMALLER[preset], "engine__max_pages": 60}
    with small_engine(preset, **changes) as made, made.open() as stream:
        sizes = []
        for start in range(0, 240, 8):
            stream.ingest(pictures(8, start=start))
            ask(stream, tokens=2)
            sizes.append(made.cache.summary_bytes)
        assert stream.history.cache.forgotten.chunks > 5
        assert len(set(sizes[15:])) == 1 and sizes[-1] > 0
        stream.ingest(pictures(8, start=240))  # the account is made while no question is open
        kv = stream.report()["kv"]
        assert kv["summary_bytes"] == sizes[-1] == stream.history.cache.keys.bytes
        assert kv["bytes"] == made.cache.bytes + sizes[-1] <= kv["peak_bytes"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", SMALLER)
def test_no_blocks_and_more_than_there_are(preset):
    with small_engine(preset, **SMALLER[preset]) as made, made.open() as stream:
        assert ask(stream)[2].reads == [] and ask(stream)[2].blocks == []
        stream.ingest(pictures(8))
        figures = ask(stream)[2]
        assert 1 <= len(figures.blocks) <= len(stream.history.chunks())


def poison(stream, row, value):
    """Overwrites a chunk's summary in all layers."""
    cache = stream.history.cache
    if cache.keys is None:
        width = stream._engine.runner.hidden_size
        cache.set_summary(cache.chunks[row], torch.full((width,), value))
        return
    for tensor in cache.keys._tensors.values():
        if tensor.is_floating_point():
            tensor[:, row] = value


@pytest.mark.parametrize("preset", ["vicostream", "rekv", "streamingtom"])
def test_a_nan_summary_ranks_last(preset, monkeypatch):
    with small_engine(preset, **SMALLER[preset]) as made, made.open() as stream:
        stream.ingest(pictures(40))
        chunks = stream.history.chunks()
        poison(stream, 1, math.nan)
        bad = (chunks[1].start_s, chunks[1].end_s)
        figures = ask(stream)[2]
        assert figures.blocks and bad not in figures.blocks
        monkeypatch.setattr(checks, "CHECK_VALUES", True)
        with pytest.warns(RuntimeWarning, match=r"score NaN .* \[\[0, 1\]\]"):
            checked = ask(stream)[2]
        assert checked.blocks == figures.blocks
        # Where there is nothing better it is read, and the report has no number for it.
        only = ask(stream, time_s=chunks[0].end_s)[2]
        assert only.blocks == [(chunks[0].start_s, chunks[0].end_s)]
        poison(stream, 0, math.nan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            none = ask(stream, time_s=chunks[0].end_s)[2]
        assert none.blocks == only.blocks
        assert stream.report()["questions"][-1]["reads"][0]["score"] is None


@pytest.mark.parametrize("preset", ["vicostream", "rekv"])
def test_equal_scores_go_to_the_oldest(preset):
    with small_engine(preset, **SMALLER[preset]) as made, made.open() as stream:
        stream.ingest(pictures(40))
        for row in range(len(stream.history.chunks())):
            poison(stream, row, 0.0)
        chunks = stream.history.chunks()
        assert ask(stream)[2].blocks == [(c.start_s, c.end_s) for c in chunks[:3]]


def test_a_nan_query_reads_the_oldest(monkeypatch):
    """No score is a number: the order of time decides, and check mode says so."""
    with small_engine("vicostream", **SMALLER["vicostream"]) as made, made.open() as stream:
        stream.ingest(pictures(40))
        embed = made.runner.embed
        monkeypatch.setattr(made.runner, "embed", lambda ids: embed(ids) * math.nan)
        monkeypatch.setattr(checks, "CHECK_VALUES", True)
        with pytest.warns(RuntimeWarning, match="5 blocks score NaN"):
            answer = stream.ask(QUESTION, max_new_tokens=1)
        chunks = stream.history.chunks()
        assert answer.figures.blocks == [(c.start_s, c.end_s) for c in chunks[:3]]
        answer.close()
