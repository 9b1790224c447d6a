"""The gate: on questions about a stream, nothing may quietly go wrong.

The logits behind the answers must be those of ``dense_oracle``, which knows the methods' words and
none of our code.
``MUTATIONS`` are real faults, each tried here: the gate must be red for every one of them.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest
import torch
from dense_oracle import expected_logits

from vicostream_kernels import methods
from vicostream_kernels.evaluation.streamqa import make_clip
from vicostream_kernels.models import load_model
from vicostream_kernels.pipeline.engine import StreamEngine

#: The share of a logit vector's length by which rounding may move it: the engine adds keys page by
#: page, transformers adds all at once.
ROUNDING = 1e-5
MODEL = "tiny-random"
#: Fewer chunks are read than there are, and the window is shorter than the clip.
SMALL = {"engine.pixels": 7056, "retrieve.k": 5, "engine.window_chunks": 2}


@lru_cache(maxsize=2)
def runner(name: str = MODEL):
    return load_model(name)


class Listening:
    """A sampler that takes the most probable token and remembers the first logits."""

    def __init__(self) -> None:
        self.first = None

    def next_token(self, ids, logits) -> int:
        if self.first is None:
            self.first = logits.flatten().clone()
        return int(logits.argmax())


@lru_cache(maxsize=8)
def truth(preset: str, number: int, steps: int = 48):
    """(frames, questions at the end, the logits that they should have) of a clip."""
    clip = make_clip(900 + number, steps, questions=5, at="end")
    frames = torch.from_numpy(clip.frames)
    method = methods.get(preset, SMALL)
    return clip, [expected_logits(runner(), method, frames, q.text) for q in clip.questions]


def deviation(preset: str, clips: int = 1) -> float:
    """The largest relative error of the engine's logits over the questions of some clips."""
    worst = 0.0
    for number in range(clips):
        clip, expected = truth(preset, number)
        with (
            StreamEngine(runner(), methods.get(preset, SMALL)) as engine,
            engine.open(fps=4) as stream,
        ):
            stream.ingest(clip.frames)
            for question, logits in zip(clip.questions, expected):
                heard = Listening()
                list(stream.ask(question.text, sampler=heard, max_new_tokens=1))
                worst = max(worst, float((heard.first - logits).norm() / logits.norm()))
    return worst


@pytest.mark.parametrize("preset", ["live", "vicostream"])
def test_the_logits_are_those_of_one_dense_pass(preset):
    assert deviation(preset, clips=2) <= ROUNDING


# -- faults ----------------------------------------------------------------------------------------


def window_off_by_one(patch) -> None:
    from vicostream_kernels.pipeline import stages

    right = stages.chunk_window

    def wrong(method, history, new_tokens):
        engine = dataclasses.replace(method.engine, window_chunks=method.engine.window_chunks - 1)
        return right(dataclasses.replace(method, engine=engine), history, new_tokens)

    patch.setattr(stages, "chunk_window", wrong)


def wrong_axis(patch) -> None:
    right = runner().video_positions
    patch.setattr(runner(), "video_positions", lambda *a: right(*a)[[0, 2, 1]])


def text_not_after_the_video(patch) -> None:
    from vicostream_kernels.pipeline.visibility import History

    # transformers' own continuation: after the larger side of the board, not after the last step.
    patch.setattr(History, "fork_id", lambda self, time_s: 6)


def one_chunk_too_few(patch) -> None:
    from vicostream_kernels.methods import RetrieveRule

    right = RetrieveRule.kwargs
    patch.setattr(RetrieveRule, "kwargs", lambda self: {**right(self), "k": self.k - 1})


def page_listed_twice(patch) -> None:
    from vicostream_kernels.pipeline import reading

    right = reading.select_pages

    def wrong(*args, **kwargs):
        table = right(*args, **kwargs)
        return torch.cat((table[:, :2], table[:, 1:]), dim=1)

    patch.setattr(reading, "select_pages", wrong)


MUTATIONS = (
    window_off_by_one, wrong_axis, text_not_after_the_video, one_chunk_too_few, page_listed_twice,
)  # fmt: skip


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_fault_turns_the_gate_red(fault, monkeypatch):
    fault(monkeypatch)
    assert deviation("live") > 3 * ROUNDING
