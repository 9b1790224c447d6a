"""The order that lanes give to CUDA streams, on stand-ins: which event is waited for, and where."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from vicostream_kernels.pipeline import stages
from vicostream_kernels.pipeline.lanes import CudaLane, tensors_of
from vicostream_kernels.pipeline.turn import Turn

DEVICE = torch.device("cuda", 0)


class Stream:
    """Work that was given to a stream, in order."""

    current: Stream

    def __init__(self, device=None):
        self.log = []

    def wait_event(self, event):
        self.log.append(("waits", *event.at))

    def wait_stream(self, stream):
        self.log.append(("waits", stream, len(stream.log)))


class Event:
    def record(self, stream):
        self.at = stream, len(stream.log)


class OnDevice(torch.Tensor):
    """Says that it is on a GPU, and who reads it."""

    is_cuda = True

    def record_stream(self, stream):
        self.readers = [*getattr(self, "readers", []), stream]


@pytest.fixture
def main(monkeypatch):
    Stream.current = Stream()

    @contextlib.contextmanager
    def stream(entered):
        before, Stream.current = Stream.current, entered
        try:
            yield
        finally:
            Stream.current = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream.current)
    return Stream.current


def test_a_lane_begins_behind_what_was_there_and_waits_for_what_it_takes(main):
    main.log += ["weights", "cache"]
    lanes = CudaLane(DEVICE), CudaLane(DEVICE)
    tensor = torch.zeros(2).as_subclass(OnDevice)
    frames = stages.ChunkFrames(tensor, 0.0, 1.0, 1.0)
    handed = lanes[0].leave(frames)  # by the caller, on its own stream
    main.log.append("the caller's next work")
    with lanes[0]:
        taken = lanes[0].take(handed)
        Stream.current.log.append("encode")
        handed = lanes[0].leave(taken)
        Stream.current.log.append("the next chunk")
    with lanes[1]:
        assert lanes[1].take(handed) is frames
        Stream.current.log.append("prefill")
    first, second = lanes[0]._stream, lanes[1]._stream
    assert Stream.current is main
    assert first.log == [("waits", main, 2), ("waits", main, 2), "encode", "the next chunk"]
    # Behind the encoding, not behind the chunk after it.
    assert second.log == [("waits", main, 2), ("waits", first, 3), "prefill"]
    assert tensor.readers == [first, second]
    lanes[1].join()
    assert main.log[-1] == ("waits", second, 3)


def test_whoever_has_the_turn_works_on_its_lane_and_leaves_it_once(main):
    """A stage by way of the stages' turn; an answer nested in it; what waited for the turn."""
    lane = CudaLane(DEVICE)
    turn = Turn(lane)
    stages_turn, order = Turn(turn), []

    def note(what):
        order.append((what, Stream.current is lane._stream))

    with stages_turn:
        note("stage")
        with turn:
            turn.later(lambda: note("later"))
        note("stage again")
    assert Stream.current is main
    turn.later(lambda: note("at once"))
    assert order == [("stage", True), ("stage again", True), ("later", True), ("at once", True)]
    assert Stream.current is main
    handed = stages_turn.leave(1)
    assert stages_turn.take(handed) == 1 and lane._stream.log[-1] == ("waits", main, 0)


def test_every_tensor_that_stages_pass_on_is_found():
    """A new field of theirs must not slip past the allocator."""
    frames = stages.ChunkFrames(torch.zeros(1), 0.0, 1.0, 1.0)
    x = [torch.zeros(1) for _ in range(3)]
    passed = {
        stages.ChunkPatches(frames, x[0], (1, 1, 1)): x[:1],
        stages.ChunkTokens(frames, (1, 1, 1), *x): x,
        stages.ChunkKept(frames, x[0], x[1], stages.HostCount(1), 1, 1): x[:2],
    }
    for value, own in passed.items():
        carried = SimpleNamespace(value=value)
        found = list(tensors_of((carried.value, [])))
        assert {id(t) for t in found} == {id(t) for t in (frames.images, *own)}
