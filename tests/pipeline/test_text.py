"""Text in pieces, and questions as typed."""

from __future__ import annotations

import random

import pytest
from pipeline_kit import tiny_runner

from vicostream_kernels.pipeline.errors import InputError
from vicostream_kernels.pipeline.text import Question, TextStream, parse_question


def pieces_of(ids):
    stream = TextStream(tiny_runner().tokenizer)
    return [stream.push(token) for token in ids] + [stream.finish()]


@pytest.mark.parametrize(
    "text", ["plain words", "añ 日本語 🎬🎬 mixed 漢", "  spaces\n\nand\ttabs "]
)
def test_the_pieces_are_the_text_and_none_is_broken(text):
    ids = tiny_runner().tokenizer.encode(text, add_special_tokens=False)
    pieces = pieces_of(ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_with_its_last_byte():
    ids = tiny_runner().tokenizer.encode("🎬", add_special_tokens=False)
    assert len(ids) == 4
    assert pieces_of(ids) == ["", "", "", "🎬", ""]


def test_bytes_that_never_became_a_character_are_left_out():
    ids = tiny_runner().tokenizer.encode("ok 🎬", add_special_tokens=False)
    assert "".join(pieces_of(ids[:-1])) == "ok "


def test_any_ids_give_what_decoding_at_once_gives():
    tokenizer = tiny_runner().tokenizer
    for seed in range(50):
        rng = random.Random(seed)
        ids = [rng.randrange(len(tokenizer) + 5) for _ in range(120)]
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(pieces_of(ids)) == whole.removesuffix("\ufffd")


@pytest.mark.parametrize(
    ("words", "time_s", "text"),
    [
        ("12.5 What happened?", 12.5, "What happened?"),
        ("0 What?", 0.0, "What?"),
        ("1:05 What?", 65.0, "What?"),
        ("1:01:05.5 What?", 3665.5, "What?"),
        ("end  What  now? ", None, "What  now?"),
        ("END What?", None, "What?"),
        ("7s What?", 7.0, "What?"),
        ("-1 What?", -1.0, "What?"),
    ],
)
def test_questions_as_typed(words, time_s, text):
    assert parse_question(words) == Question(time_s, text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "give a time and a question"),
        ("12", "the question after the time is empty"),
        ("end   ", "the question after the time is empty"),
        ("What happened?", "'What' is not a time"),
        ("nan What?", "'nan' is not a time"),
        ("1:75 What?", "'1:75' is not a time"),
        ("1:61:00 What?", "is not a time"),
        ("inf What?", "is not a time"),
    ],
)
def test_what_cannot_be_asked(words, said):
    with pytest.raises(InputError, match=said) as caught:
        parse_question(words)
    assert caught.value.exit_code == 2
