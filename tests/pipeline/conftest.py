"""The pipeline's tests run thousands of tiny tensors: a second thread only waits for the first."""

from __future__ import annotations

import threading

import pytest
import torch
from pipeline_kit import pictures, tiny_runner, write_video

from vicostream_kernels.models import errors as model_errors
from vicostream_kernels.pipeline import session


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> None:
    torch.set_num_threads(1)


class Broken(RuntimeError):
    """What ``broken_encoder`` raises."""


class BrokenEncoder:
    """Fails at the chunk that begins at ``at`` s, once ``may`` is set."""

    wait_s = 20
    error = Broken

    def __init__(self) -> None:
        self.at, self.may = 0.0, threading.Event()
        self.may.set()

    def has_failed(self, stream: session.Stream) -> None:
        """Waits for the stage to have failed and to have told the belt."""
        thread = stream._way._threads[1]
        thread.join(self.wait_s)
        assert not thread.is_alive()


@pytest.fixture
def broken_encoder(monkeypatch: pytest.MonkeyPatch):
    encoder, run = BrokenEncoder(), session.Encode.run

    def broken(self, chunk):
        if chunk.source.start_s == encoder.at:
            assert encoder.may.wait(encoder.wait_s)
            raise Broken("no such kernel")
        return run(self, chunk)

    monkeypatch.setattr(session.Encode, "run", broken)
    yield encoder
    encoder.may.set()


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "video.mp4", pictures(40))


@pytest.fixture
def loads_at_once(monkeypatch):
    """The one tiny-random of the tests in place of a new one for each run."""

    def load(name, **_):
        if name != "tiny-random":
            raise model_errors.ModelNotFound(f"{name}: no such model")
        return tiny_runner()

    monkeypatch.setattr("vicostream_kernels.models.load_model", load)
