"""A picture of each question: how relevant every chunk was to it, and which ones it read."""

from __future__ import annotations

import math
from pathlib import Path

from vicostream_kernels.pipeline.plots import save_picture
from vicostream_kernels.pipeline.report import BlockRead, QuestionFigures

_READ, _SCORE, _ASKED = "#ee6677", "#222222", "#4477aa"
_LONGEST_TITLE = 90


def picture_name(number: int) -> str:
    """File name for the ``number``-th question, from 1."""
    return f"relevance-{number:03d}.png"


def plot_relevance(figures: QuestionFigures, path: str | Path) -> None:
    """Draws ``figures.relevance`` over time as a PNG at ``path``.

    Above: the score of each chunk, as a dot in its middle, what was read in colour, the deeper the
    more of the choices took it. Below: their share (of layers, heads, decoded tokens). A chunk
    whose score is not a number has no dot above. Raises ValueError where the
    question could not have read anything.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chunks = figures.relevance
    if not chunks:
        raise ValueError("plot_relevance: the question had no chunks to choose from")
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    score, share = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    read = [chunk for chunk in chunks if chunk.share]
    for chunk in read:
        for axis in (score, share):
            depth = 0.05 + 0.25 * chunk.share
            axis.axvspan(chunk.start_s, _end(chunk), color=_READ, alpha=depth, linewidth=0)
    score.plot(_middles(chunks), [_number(c) for c in chunks], color=_SCORE, linewidth=0.8)
    for some, colour, label in ((chunks, _SCORE, "candidates"), (read, _READ, "read")):
        score.scatter(
            _middles(some), [_number(c) for c in some], color=colour, s=14, zorder=3,
            label=f"{label}: {len(some)}",
        )  # fmt: skip
    score.set_ylabel("relevance")
    score.legend(loc="best", fontsize="small")
    widths = [_end(chunk) - chunk.start_s for chunk in chunks]
    share.bar(
        [chunk.start_s for chunk in chunks], [100 * chunk.share for chunk in chunks], widths,
        align="edge", color=_READ,
    )  # fmt: skip
    share.set_ylabel("read by, %")
    share.set_ylim(0, 105)
    share.set_xlabel("time of the stream, s")
    for axis in (score, share):
        axis.axvline(figures.time_s, color=_ASKED, linestyle=":", linewidth=1)
    # Mathematics and line breaks are matplotlib's to interpret, not the asker's.
    said = " ".join(figures.text.split()).replace("$", r"\$")
    said = said if len(said) <= _LONGEST_TITLE else said[:_LONGEST_TITLE] + "..."
    figure.suptitle(f"{figures.time_s:g} s: {said}")
    save_picture(figure, path)


def _end(chunk: BlockRead) -> float:
    """A chunk of one frame is drawn all the same."""
    return max(chunk.end_s, chunk.start_s + 1e-3)


def _middles(chunks: list[BlockRead]) -> list[float]:
    return [(chunk.start_s + chunk.end_s) / 2 for chunk in chunks]


def _number(chunk: BlockRead) -> float:
    return chunk.score if math.isfinite(chunk.score) else math.nan
