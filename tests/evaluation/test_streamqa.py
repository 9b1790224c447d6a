"""The synthetic task: the same everywhere, true by an independent count, balanced, populated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vicostream_kernels.evaluation import streamqa
from vicostream_kernels.evaluation._draw import CELL, FRAME, SPLIT_VARIANTS, masks
from vicostream_kernels.evaluation._questions import FORMS
from vicostream_kernels.evaluation._world import COLOURS, MOST, PLACES, SHAPES
from vicostream_kernels.evaluation.streamqa import (
    KINDS,
    Clip,
    Question,
    best_constant,
    is_correct,
    make_clip,
)

NUMBERS = ("zero", "one", "two", "three", "four")


def history(clip: Clip) -> list[dict[int, tuple[str, str]]]:
    """The board after each step, {cell: (shape, colour)}, from the log's cells alone."""
    log = clip.log
    return [
        {
            cell: (SHAPES[log.shape[step, cell]], COLOURS[log.colour[step, cell]])
            for cell in range(9)
            if log.shape[step, cell] >= 0
        }
        for step in range(log.steps)
    ]


def sightings(boards: list[dict], shape: str) -> list[tuple[int, int, str]]:
    """(step, cell, colour) of a shape, oldest first."""
    return [
        (step, cell, colour)
        for step, board in enumerate(boards)
        for cell, (name, colour) in board.items()
        if name == shape
    ]


def appearances(boards: list[dict], shape: str) -> list[tuple[int, int]]:
    """(first step, last step) of each unbroken stay."""
    spans: list[tuple[int, int]] = []
    for step, _, _ in sightings(boards, shape):
        if spans and spans[-1][1] == step - 1:
            spans[-1] = (spans[-1][0], step)
        else:
            spans.append((step, step))
    return spans


def words_of(question: Question) -> list[str]:
    """What the question is about, read from its text."""
    words = question.text.lower().replace("?", "").replace(",", "").split()
    return [word for word in words if word in SHAPES or word in PLACES]


def truth(clip: Clip, question: Question) -> str:
    """The answer by brute force over what had been shown when the question was asked."""
    shown = int(question.time_s * clip.fps) // 2 + 1
    boards = history(clip)[:shown]
    about = words_of(question)
    if question.form == "count":
        return NUMBERS[len(boards[-1])]
    if question.kind == "now":
        held = boards[-1].get(PLACES.index(about[0]))
        return "nothing" if held is None else held[question.form == "color"]
    seen = sightings(boards, about[0])
    if question.form == "order":
        stays = {shape: appearances(boards, shape)[-1] for shape in about}
        (a, one), (b, two) = stays.items()
        assert (one[0] - two[0]) * (one[1] - two[1]) > 0, "which came last must be beyond doubt"
        return a if one > two else b
    if question.form == "motion":
        for (before, cell, _), (after, other, _) in zip(seen[-2::-1], seen[:0:-1]):
            if after == before + 1 and cell != other:
                down, right = other // 3 - cell // 3, other % 3 - cell % 3
                ways = {(0, 1): "right", (0, -1): "left", (1, 0): "down", (-1, 0): "up"}
                return ways[down, right]
        return "never"
    if not seen:
        return "never"
    return PLACES[seen[-1][1]] if question.form == "last_place" else seen[-1][2]


@pytest.mark.parametrize("steps", [4, 37, 96, 400])
def test_answers_are_those_of_a_second_count(steps: int) -> None:
    for seed in range(6):
        clip = make_clip(seed, steps, questions=40, frames=False)
        assert clip.questions
        for question in clip.questions:
            assert question.answer == truth(clip, question), question


def test_every_kind_and_form_is_asked() -> None:
    clip = make_clip(0, 96, questions=40, frames=False)
    assert {q.kind for q in clip.questions} == set(KINDS)
    assert {q.form for q in clip.questions} == set(FORMS)
    only = make_clip(0, 96, kinds=("past",), frames=False)
    assert {q.kind for q in only.questions} == {"past"}


def test_evidence_shows_the_answer_and_nothing_newer_does() -> None:
    for seed in range(20):
        clip = make_clip(seed, 64, questions=30, frames=False)
        boards = history(clip)
        for q in clip.questions:
            spans = [(int(a * clip.fps) // 2, int(b * clip.fps) // 2) for a, b in q.evidence]
            assert all(0 <= a <= b <= q.time_s * clip.fps / 2 for a, b in spans)
            if q.answer == "never":
                assert not spans
                continue
            if q.kind in ("now", "count"):
                assert spans == [(int(q.time_s * clip.fps) // 2,) * 2]
                continue
            asked = int(q.time_s * clip.fps) // 2
            for shape, (first, last) in zip(words_of(q), spans):
                if q.kind == "past":
                    facts = sightings(boards[: asked + 1], shape)
                    assert facts[-1][0] == last
                    which = 1 if q.form == "last_place" else 2
                    inside = {fact[which] for fact in facts if first <= fact[0] <= last}
                    assert len(inside) == 1
                    before = [fact for fact in facts if fact[0] == first - 1]
                    assert not before or before[0][which] not in inside
                if q.kind == "motion":
                    assert last == first + 1
                    cells = {fact[:2] for fact in sightings(boards, shape)}
                    assert len({cell for step, cell in cells if step in (first, last)}) == 2
            if q.kind == "order":
                stays = [appearances(boards[: asked + 1], shape)[-1] for shape in words_of(q)]
                assert sorted(stays) == spans


def test_past_is_not_in_the_newest_chunk() -> None:
    for seed in range(10):
        for q in make_clip(seed, 96, kinds=("past",), age=12, frames=False).questions:
            if q.evidence:
                assert q.evidence[-1][1] <= q.time_s - 12 * 2 / streamqa.FPS + 0.5


def test_questions_come_when_a_chunk_is_over() -> None:
    clip = make_clip(3, 64, frames=False)
    for q in clip.questions:
        frames_before = int(np.floor(q.time_s * clip.fps)) + 1
        assert frames_before % 8 == 0
    assert [q.time_s for q in clip.questions] == sorted(q.time_s for q in clip.questions)
    end = make_clip(3, 64, at="end", frames=False)
    assert {q.time_s for q in end.questions} == {64 * 2 / 4.0 - 0.125}
    assert end.log.shape[-1].max() >= 0
    timed = make_clip(3, 64, at=[7.9, 15.875], frames=False)
    assert {q.time_s for q in timed.questions} <= {7.875, 15.875}


def test_same_arguments_same_bits() -> None:
    one, two = make_clip(11, 20), make_clip(11, 20)
    assert np.array_equal(one.frames, two.frames) and one.questions == two.questions
    assert not np.array_equal(one.frames, make_clip(12, 20).frames)
    bare = make_clip(11, 20, frames=False)
    assert bare.frames is None and bare.questions == one.questions and bare.seconds == one.seconds
    assert one.frames.shape == (40, FRAME, FRAME, 3) and one.frames.dtype == np.uint8


def test_pictures_do_not_change() -> None:
    """Values noted once: other pictures would need another model."""
    clip = make_clip(0, 16)
    noted = [[54, 143, 56], [92, 130, 86], [141, 95, 80]]
    assert abs(clip.frames[0, 0, ::28].astype(int) - noted).max() <= 2
    assert np.allclose(clip.frames.mean((0, 1, 2)), (117.638, 119.740, 118.504), atol=0.05)
    answers = [q.answer for q in clip.questions[:7]]
    assert answers == ["heart", "orange", "nothing", "triangle", "two", "triangle", "left"]


def test_splits_share_neither_seeds_nor_variants() -> None:
    clips = {split: make_clip(5, 64, split=split, frames=False) for split in streamqa.SPLITS}
    used = {}
    for split, clip in clips.items():
        variants = clip.log.variant[clip.log.variant >= 0]
        used[split] = set(variants.tolist())
        assert used[split] <= set(SPLIT_VARIANTS[split])
        for other in clips:
            if other != split:
                assert not np.array_equal(clips[other].log.shape, clip.log.shape)
    assert not (used["train"] & used["test"] or used["val"] & used["test"])
    ranges = [set(r) for r in SPLIT_VARIANTS.values()]
    assert sum(map(len, ranges)) == len(set.union(*ranges)) == masks().shape[1]


def test_best_constant_answer_is_weak() -> None:
    questions = [
        q for s in range(60) for q in make_clip(s, 64, questions=25, frames=False).questions
    ]
    best = best_constant(questions)
    limits = {"now": 0.40, "past": 0.16, "count": 0.34, "order": 0.12, "motion": 0.32}
    assert set(best) == set(limits)
    for kind, (answer, share) in best.items():
        assert share <= limits[kind], (kind, answer, share)
        answers = [q.answer for q in questions if q.kind == kind]
        assert share == answers.count(answer) / len(answers)
    # Neither named shape is the likelier one.
    order = [q for q in questions if q.kind == "order"]
    first_named = sum(words_of(q)[0] == q.answer for q in order) / len(order)
    assert 0.4 < first_named < 0.6


def test_long_streams_stay_populated() -> None:
    clip = make_clip(2, 1600, frames=False)
    counts = (clip.log.place >= 0).sum(1)
    for part in counts.reshape(8, 200):
        assert 1.0 < part.mean() < 3.0 and part.max() <= MOST
    assert (clip.log.place >= 0).any(0).sum() == 20, "four shapes stay away for 'never'"
    quarter = make_clip(2, 1600, at="end", frames=False).questions
    assert {q.kind for q in quarter} == set(KINDS)
    # Fewer than two in five tokens are new to their column: what pruning can leave.
    changed = (clip.log.shape[1:] != clip.log.shape[:-1]) | (
        clip.log.colour[1:] != clip.log.colour[:-1]
    )
    changed = np.concatenate((np.zeros((1, 9), bool), changed)).reshape(-1, 4, 9)
    changed[:, 0] = False
    assert 0.28 < (9 + 3 * changed.any(1).sum(1).mean()) / 36 < 0.40


def test_shapes_and_colours_can_be_told_apart() -> None:
    """Every mask is nearer to the others of its shape than to those of any other shape."""
    bank = masks().reshape(len(SHAPES), -1, CELL * CELL)
    mean = bank.mean(1)
    distance = ((bank[:, :, None] - mean[None, None]) ** 2).sum(-1)
    right = distance.argmin(-1) == np.arange(len(SHAPES))[:, None]
    assert right.mean() > 0.9


def test_light_drifts_and_noise_differs_inside_a_step() -> None:
    frames = make_clip(4, 64).frames.astype(np.int32)
    assert not np.array_equal(frames[0], frames[1])
    assert abs(frames[0] - frames[1]).mean() < 12
    west, east = frames[:, :, :9, 0].mean(), frames[:, :, -9:, 0].mean()
    north, south = frames[:, :9, :, 2].mean(), frames[:, -9:, :, 2].mean()
    assert east - west > 40 and south - north > 40, "the gradient that shows places"


def test_video_file_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("av")
    clip = make_clip(6, 16)
    path = clip.save(tmp_path / "folder" / "clip.mp4")
    again = Clip.load(path)
    assert again.questions == clip.questions and (again.seed, again.split) == (6, "test")
    assert again.frames.shape == (32, 4 * FRAME, 4 * FRAME, 3)
    small = again.frames.reshape(32, FRAME, 4, FRAME, 4, 3).mean((2, 4))
    assert abs(small - clip.frames).mean() < 5
    assert again.seconds == clip.seconds


def test_bad_input(tmp_path: Path) -> None:
    for wrong, told in (
        ({"steps": 3}, "at least one chunk"),
        ({"split": "dev"}, "none of train, val, test"),
        ({"kinds": ("when",)}, "allowed: now, past"),
        ({"kinds": ()}, "allowed"),
        ({"at": "sometimes"}, "spread"),
        ({"at": [99.0]}, "outside the clip"),
        ({"fps": 0}, "positive"),
        ({"pool": 30}, "5 .. 24"),
    ):
        with pytest.raises(ValueError, match=told):
            make_clip(0, **{"steps": 16, "frames": False, **wrong})
    with pytest.raises(ValueError, match="seed=-1"):
        make_clip(-1)
    with pytest.raises(ValueError, match="without frames"):
        make_clip(0, 8, frames=False).save(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="expected a.json"):
        Clip.load(tmp_path / "a.mp4")
    (tmp_path / "a.json").write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="this reader knows 1"):
        Clip.load(tmp_path / "a.mp4")


def test_scoring_forgives_case_and_a_full_stop() -> None:
    question = Question(1.0, "past", "last_color", "What color was the star?", "red", ())
    assert is_correct(" Red. ", question) and is_correct("red", question)
    assert not is_correct("red star", question) and not is_correct("", question)
