"""Pictures: of a results document, percent of the floor and ratio over size; of reuse, error
over ratio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vicostream_kernels.bench.results import Document, Row

if TYPE_CHECKING:
    from vicostream_kernels.bench.reuse_error import Point

#: Formats savefig can write without more packages.
FORMATS = (".png", ".svg", ".pdf")


def check_path(path: Path) -> None:
    """Raises ValueError for a suffix that can't be written."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"plot file {str(path)!r} must end in one of {', '.join(FORMATS)}")


def plot(document: Document, path: Path) -> None:
    """Writes one figure to ``path``; raises ValueError for no timed rows or an unknown suffix."""
    check_path(path)
    rows = [row for row in document.rows if row.p50_us is not None]
    if not rows:
        raise ValueError("nothing to plot: no provider was timed")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row.case, row.cache) for row in rows))
    figure = Figure(figsize=(11, 3.5 + 0.45 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    bars, lines = figure.subplots(2, 1, height_ratios=[max(2, 0.45 * len(cases)), 3])
    _floor_bars(bars, rows, cases)
    _ratio_lines(lines, rows)
    facts = document.environment
    figure.suptitle(f"{facts.get('device_name')}, commit {(facts.get('commit') or 'none')[:12]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_reuse_error(points: Sequence[Point], title: str, path: Path) -> None:
    """Error over ratio, one line a clip and selection; dashed: the worst step's."""
    check_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for curve in dict.fromkeys((point.clip, point.selection) for point in points):
        own = sorted((p for p in points if (p.clip, p.selection) == curve), key=lambda p: p.ratio)
        ratios = [p.ratio for p in own]
        (line,) = axes.plot(
            ratios, [100 * p.error for p in own], marker="o", label=", ".join(curve)
        )
        axes.plot(ratios, [100 * p.worst for p in own], "--", color=line.get_color(), alpha=0.5)
    axes.set_xlabel("ratio: share of a step's patches computed between full calls")
    axes.set_ylabel("error of merged features, %; dashed: worst step")
    axes.set_title(title, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _floor_bars(axes, rows: list[Row], cases: list[tuple[str, str]]) -> None:
    providers = list(dict.fromkeys(row.provider for row in rows))
    height = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        own = {(row.case, row.cache): row.floor_pct for row in rows if row.provider == provider}
        places = [i + index * height for i, key in enumerate(cases) if key in own]
        axes.barh(places, [own[key] for key in cases if key in own], height, label=provider)
    axes.set_yticks(
        [i + 0.4 - height / 2 for i in range(len(cases))],
        [f"{case} ({cache})" for case, cache in cases],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of the measured floor (higher is better)")
    axes.legend(fontsize=7)


def _ratio_lines(axes, rows: list[Row]) -> None:
    """One line per provider and everything but the size: ratio over bytes moved."""
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row.provider != row.baseline:
            label = f"{row.provider}, {row.word}, {row.dtype}, {row.cache}"
            series.setdefault(label, []).append(row)
    for label, own in series.items():
        own.sort(key=lambda row: row.bytes)
        middle = [row.ratio for row in own]
        spread = [
            [max(0.0, row.ratio - row.ratio_low) for row in own],
            [max(0.0, row.ratio_high - row.ratio) for row in own],
        ]
        axes.errorbar([row.bytes for row in own], middle, spread, marker="o", label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("bytes moved")
    axes.set_ylabel("times faster than the baseline")
    if series:
        axes.legend(fontsize=6)
