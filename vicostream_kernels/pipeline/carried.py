"""A chunk on its way through the stages, and what every stage does around its own work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vicostream_kernels.pipeline.belt import Stage
from vicostream_kernels.pipeline.errors import date
from vicostream_kernels.pipeline.report import Recorder
from vicostream_kernels.pipeline.stages import ChunkFrames, Encode, Preprocess, Prune
from vicostream_kernels.pipeline.trace import Span


class Carried(NamedTuple):
    """What a stage made of a chunk, and where the time went so far."""

    source: ChunkFrames
    value: Any
    spans: tuple[Span, ...]


def timed(recorder: Recorder, name: str, stage: Preprocess | Encode | Prune) -> Stage:
    """The stage, its time noted."""

    def run(chunk: Carried) -> Carried:
        source = chunk.source
        span = recorder.trace.span(name, start_s=source.start_s)
        with recorder.taking_in(), torch.no_grad(), span as span:
            value = stage.run(chunk.value)
        return Carried(source, value, (*chunk.spans, span))

    return run


def counted(prune: Stage) -> Stage:
    """Waits for the count of what was kept, where nobody else waits: the last stage has the turn
    at the cache."""

    def run(chunk: Carried) -> Carried:
        carried = prune(chunk)
        carried.value.count.get()
        return carried

    return run


def dated(stage: Stage) -> Stage:
    """What it raises says of which chunk it is."""

    def run(chunk: Carried) -> Any:
        try:
            return stage(chunk)
        except Exception as error:
            date(error, chunk.source.start_s)
            raise

    return run


def dropped(chunk: Carried) -> None:
    """The last stage where nobody has the stream any more: nobody misses the chunk."""
