"""The learning curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def plot(log: Path, picture: Path) -> None:
    """Accuracy by form against minutes, from ``log.jsonl``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not log.exists():
        return
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "eval" in line]
    panels = ("full32", "full96", "bounded32", "bounded96")
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharex=True, sharey=True)
    for panel, axis in zip(panels, axes.flat):
        points = [line for line in lines if panel in line["eval"]]
        forms = sorted({form for line in points for form in line["eval"][panel]})
        for form in forms:
            found = [p for p in points if form in p["eval"][panel]]
            minutes = [p["wall_s"] / 60 for p in found]
            axis.plot(minutes, [p["eval"][panel][form] for p in found], label=form)
        axis.set(title=f"{panel.rstrip('0123456789')}, {panel[-2:]} steps", ylim=(0, 101))
        axis.grid(alpha=0.3)
        if forms:
            axis.legend(fontsize=7, loc="lower right")
    for axis in axes[-1]:
        axis.set_xlabel("minutes of training")
    for axis in axes[:, 0]:
        axis.set_ylabel("right answers, %")
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)
