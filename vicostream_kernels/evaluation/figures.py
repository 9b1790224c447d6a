"""Figures of an evaluation, as PNG: accuracy against what was spent, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#444444")
_GREY = "#888888"
#: What nothing clever should lose to is drawn grey and dashed, what nothing can beat black.
_STYLES = {
    "random": {"color": _GREY, "linestyle": "--"},
    "oracle": {"color": "#222222"},
    "all tokens": {"color": "#222222", "marker": "*", "markersize": 11},
    "full-history": {"color": "#222222", "marker": "*", "markersize": 13},
}

Lines = Mapping[str, Sequence[Mapping[str, Any]]]


def draw(figures: Mapping[str, Lines], folder: Path, keys: str = "") -> list[str]:
    """Draws each figure of ``figures`` (figure -> line -> rows, as ``summarize`` makes them) into
    ``folder``; returns the names of the files. ``keys`` are what a free sweep went over."""
    made = []
    for name, lines in figures.items():
        path = folder / f"{name}.png"
        if name == "plane":
            _plane(lines, path)
        elif name == "models":
            _bars(lines, path)
        elif name == "dropping":
            _panels(lines, path, lambda row: 100 * row["kept"], "tokens kept, %", "Dropping tokens")
        elif name == "window":
            _panels(
                lines,
                path,
                lambda row: row["overrides"]["engine.window_chunks"],
                "chunks before it that a chunk sees",
                "Windowed attention",
            )
        elif name == "live":
            _panels(
                lines,
                path,
                lambda row: row["overrides"]["retrieve.k"],
                "chunks that a question reads",
                "Choosing live",
                log=True,
            )
        elif name == "retrieval":
            _panels(
                lines,
                path,
                lambda row: row["overrides"]["retrieve.k"] - 1,
                "chunks retrieved, the newest aside",
                "Retrieval",
                log=True,
            )
        else:
            _sweep(lines, path, keys)
        made.append(path.name)
    return made


def _canvas(columns: int, rows: int = 1, size: tuple[float, float] = (3.3, 3.4)) -> Any:
    # The object interface: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _legend(figure: Any, panels: Any) -> None:
    """One for all panels, below them, in as many rows as their width asks for."""
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(len(labels), max(2, round(1.6 * len(panels))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")


def _panels(
    lines: Lines,
    path: Path,
    x: Callable[[Mapping[str, Any]], float],
    xlabel: str,
    title: str,
    *,
    log: bool = False,
) -> None:
    """A panel for each kind of question."""
    kinds = list(_first(lines)["kinds"])
    figure = _canvas(len(kinds))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for kind, panel in zip(kinds, panels):
        for index, (line, rows) in enumerate(lines.items()):
            ordered = sorted(rows, key=x)
            _points(
                panel, [x(r) for r in ordered], [r["kinds"][kind] for r in ordered], line, index
            )
        _floor(panel, _first(lines)["kinds"][kind])
        panel.set_title(kind)
        panel.set_xlabel(xlabel)
        if log:
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panels[0].set_ylabel("right, %")
    panels[0].set_ylim(-3, 103)
    _legend(figure, panels)
    _save(figure, path, title)


def _points(panel: Any, xs: list[float], shares: list[Any], line: str, index: int) -> None:
    style = {"color": _COLOURS[index % len(_COLOURS)], "marker": "o", "markersize": 4}
    if index >= len(_COLOURS):  # the second time round
        style |= {"marker": "s", "linestyle": "-."}
    style |= _STYLES.get(line, {})
    y = [100 * share["accuracy"] for share in shares]
    reach = [
        [v - 100 * share["low"] for v, share in zip(y, shares)],
        [100 * share["high"] - v for v, share in zip(y, shares)],
    ]
    panel.errorbar(xs, y, yerr=reach, label=line or None, elinewidth=0.7, capsize=1.5, **style)


def _floor(panel: Any, share: Mapping[str, Any]) -> None:
    panel.axhline(100 * share["constant_share"], color=_GREY, linestyle=":", linewidth=1)
    panel.grid(alpha=0.25)


def _bars(lines: Lines, path: Path) -> None:
    """Two checkpoints side by side under each preset."""
    kinds = list(_first(lines)["kinds"])
    presets = [row["preset"] for row in next(iter(lines.values()))]
    figure = _canvas(len(presets), size=(4.2, 3.4))
    panels = figure.subplots(1, len(presets), sharey=True, squeeze=False)[0]
    width = 0.8 / len(lines)
    for number, (preset, panel) in enumerate(zip(presets, panels)):
        for index, (line, rows) in enumerate(lines.items()):
            shares = [rows[number]["kinds"][kind] for kind in kinds]
            heights = [100 * share["accuracy"] for share in shares]
            reach = [
                [h - 100 * s["low"] for h, s in zip(heights, shares)],
                [100 * s["high"] - h for h, s in zip(heights, shares)],
            ]
            places = [i + (index - (len(lines) - 1) / 2) * width for i in range(len(kinds))]
            panel.bar(
                places, heights, width, yerr=reach, label=line, color=_COLOURS[index],
                error_kw={"elinewidth": 0.7, "capsize": 1.5},
            )  # fmt: skip
        for i, kind in enumerate(kinds):
            floor = 100 * rows[number]["kinds"][kind]["constant_share"]
            panel.hlines(floor, i - 0.45, i + 0.45, color=_GREY, linestyle=":", linewidth=1)
        panel.set_xticks(range(len(kinds)), kinds)
        panel.set_title(preset)
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_ylabel("right, %")
    panels[0].set_ylim(0, 103)
    _legend(figure, panels)
    _save(figure, path, "Trained with full history only, and tuned with the streaming mask")


def _plane(lines: Lines, path: Path) -> None:
    """Accuracy against speed: each method as it is used."""
    figure = _canvas(1, size=(7.2, 4.8))
    panel = figure.subplots()
    for index, (line, rows) in enumerate(lines.items()):
        style = {"color": _COLOURS[index % len(_COLOURS)], "marker": "o", "linestyle": "none"}
        style |= {k: v for k, v in _STYLES.get(line, {}).items() if k != "linestyle"}
        panel.plot(
            [r["frames_per_s"] for r in rows], [100 * r["mean"] for r in rows], label=line, **style
        )
        for row in rows:
            panel.annotate(
                row["name"], (row["frames_per_s"], 100 * row["mean"]), fontsize="x-small",
                xytext=(4, 4), textcoords="offset points",
            )  # fmt: skip
    first = _first(lines)["kinds"].values()
    floor = sum(share["constant_share"] for share in first) / len(first)
    panel.axhline(100 * floor, color=_GREY, linestyle=":", linewidth=1, label="constant answer")
    panel.set_xlabel("frames/s of ingested video, questions aside")
    panel.set_ylabel("right, %, mean over the kinds of question")
    panel.margins(x=0.15)
    panel.grid(alpha=0.25)
    panel.legend(fontsize="small", loc="lower left")
    _save(figure, path, "Accuracy and speed")


def _sweep(lines: Lines, path: Path, keys: str) -> None:
    """One line for each kind of question, over the values of a sweep."""
    rows = [row for line in lines.values() for row in line]
    figure = _canvas(1, size=(7.2, 4.4))
    panel = figure.subplots()
    for index, kind in enumerate(rows[0]["kinds"]):
        shares = [row["kinds"][kind] for row in rows]
        _points(panel, list(range(len(rows))), shares, kind, index)
    panel.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=30, ha="right")
    panel.set_ylabel("right, %")
    panel.set_ylim(-3, 103)
    panel.grid(alpha=0.25)
    panel.legend(fontsize="small")
    _save(figure, path, keys)


def _first(lines: Lines) -> Mapping[str, Any]:
    return next(row for rows in lines.values() for row in rows)


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title)
    # No date and no version in the file: the same figures give the same bytes.
    figure.savefig(path, dpi=110, metadata={"Software": None})
