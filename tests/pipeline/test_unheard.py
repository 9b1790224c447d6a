"""Errors of stages that no call has raised when a stream ends; what the command makes of them is
in ``test_run``."""

from __future__ import annotations

import pytest
from pipeline_kit import pictures, small_engine

from vicostream_kernels.pipeline.errors import PipelineError, chunk_time, date, surface


def test_closing_raises_it_when_all_is_given_back(broken_encoder):
    with small_engine(engine__overlap=True) as made:
        stream = made.open(fps=2)
        stream.ingest(pictures(8))
        broken_encoder.has_failed(stream)
        with pytest.raises(broken_encoder.error) as raised:
            stream.close()
        assert chunk_time(raised.value) == 0.0
        assert made.cache.streams == [] and made.cache.used_pages == 0
        stream.close()
        with pytest.raises(PipelineError, match="closed"):
            stream.flush()
        assert stream.report()["frames"]["processed"] == 0


@pytest.mark.parametrize("whose", ["stream", "engine"])
def test_leaving_the_with_block_raises_it(broken_encoder, whose):
    with pytest.raises(broken_encoder.error):
        with small_engine(engine__overlap=True) as made:
            stream = made.open(fps=2)
            stream.ingest(pictures(8))
            broken_encoder.has_failed(stream)
            if whose == "stream":
                with stream:
                    pass
                pytest.fail("the stream said nothing")
    stream.close()


@pytest.mark.parametrize("whose", ["stream", "engine"])
@pytest.mark.parametrize("users", [KeyError, KeyboardInterrupt])
def test_an_exception_of_the_users_own_goes_on_and_has_it_as_context(broken_encoder, whose, users):
    def frames():
        yield pictures(8)
        broken_encoder.has_failed(stream)
        try:
            raise ValueError("the first cause")
        except ValueError as error:
            raise users("the user's") from error

    with pytest.raises(users, match="the user's") as raised:
        with small_engine(engine__overlap=True) as made:
            stream = made.open(fps=2)
            if whose == "engine":
                for part in frames():
                    stream.ingest(part)
            with stream:
                for part in frames():
                    stream.ingest(part)
    cause = raised.value.__cause__
    assert str(cause) == "the first cause" and isinstance(cause.__context__, broken_encoder.error)
    stream.close()


def test_what_was_raised_once_is_not_raised_at_the_end(broken_encoder):
    with small_engine(engine__overlap=True) as made, made.open(fps=2) as stream:
        stream.ingest(pictures(8))
        with pytest.raises(broken_encoder.error):
            stream.flush()


@pytest.mark.parametrize("closes", ["stream", "engine"])
def test_a_callback_that_closes_its_own_stream_does_not_lose_what_follows(closes):
    """It may not, and the next call says so: frames that come after must not go nowhere."""
    stream = None

    def close(mask):
        (stream if closes == "stream" else made).close()

    with small_engine(engine__overlap=True) as made:
        stream = made.open(fps=2, on_pruned=close)
        with pytest.raises(RuntimeError, match="its own stream"):
            stream.ingest(pictures(16))
            stream.flush()
        with pytest.raises(PipelineError, match="failed before"):
            stream.ingest(pictures(8))


def test_exceptions_of_any_kind_may_be_dated_and_surface():
    class Sealed(Exception):
        def __setattr__(self, name, value):
            raise AttributeError(name)

    error = Sealed("sealed")
    date(error, 1.0)
    assert chunk_time(error) is None
    with pytest.raises(Sealed) as raised:
        surface([None, error, error])
    assert raised.value.__context__ is None
