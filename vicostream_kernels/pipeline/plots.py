"""One picture of a run: frames per second, latency per stage, memory over the stream."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

_SMOOTH = 8
_COLOURS = {
    "decode": "#999999",
    "preprocess": "#4477aa",
    "encode": "#228833",
    "prune": "#ccbb44",
    "prefill": "#ee6677",
}


def plot_report(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws ``report`` (as ``Recorder.report`` returns it) as a PNG at ``path``."""
    # The object interface: no global state, no window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    rate, latency, memory = figure.subplots(3, 1, sharex=True)
    chunks = report["chunks"]
    times = [chunk["end_s"] for chunk in chunks]

    rate.plot(times, _rates(chunks, 1), color="#bbbbbb", linewidth=0.8, label="per chunk")
    rate.plot(times, _rates(chunks, _SMOOTH), color="#222222", label=f"over {_SMOOTH} chunks")
    rate.set_ylabel("frames/s")
    rate.set_ylim(bottom=0)

    for stage in report["stages_ms"]:
        taken = [chunk["stages_ms"].get(stage, 0.0) for chunk in chunks]
        latency.plot(times, taken, label=stage, color=_COLOURS.get(stage), linewidth=1.0)
    latency.set_ylabel("ms per chunk")
    latency.set_ylim(bottom=0)

    mib = 1 / 2**20
    memory.plot(times, [c["kv_bytes"] * mib for c in chunks], color="#aa3377", label="KV cache")
    memory.set_ylabel("KV cache, MiB")
    memory.set_ylim(bottom=0)
    process = memory.twinx()
    process.plot(times, [c["rss_bytes"] * mib for c in chunks], color="#66ccee", label="process")
    process.set_ylabel("process, MiB")
    process.set_ylim(bottom=0)
    memory.set_xlabel("time of the stream, s")

    for axis in (rate, latency, memory):
        for question in report["questions"]:
            axis.axvline(question["time_s"], color="#bbbbbb", linestyle=":", linewidth=1)
    lines = memory.get_lines()[:1] + process.get_lines()[:1]
    memory.legend(lines, [line.get_label() for line in lines], loc="lower right", fontsize="small")
    if chunks:
        rate.legend(loc="lower right", fontsize="small")
        latency.legend(loc="upper right", fontsize="small", ncols=len(_COLOURS))
    figure.suptitle(_title(report))
    save_picture(figure, path)


def save_picture(figure: Any, path: str | os.PathLike[str], *, dpi: int = 120) -> None:
    """Writes a matplotlib figure as a PNG, whole or not at all; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with warnings.catch_warnings():
            # The font lacks scripts that questions are asked in; a box in the title says as much.
            warnings.filterwarnings("ignore", message="Glyph")
            figure.savefig(partial, format="png", dpi=dpi)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _title(report: dict[str, Any]) -> str:
    fps = report["fps"]["ingest"]
    speed = f"{fps:.0f} frames/s" if fps else "no frames"
    return f"{report['model']['name']}, {report['preset']}, {report['device']['type']}: {speed}"


def _rates(chunks: list[dict[str, Any]], window: int) -> list[float]:
    """Frames per second of work over the last ``window`` chunks, at each chunk."""
    frames = [chunk["frames"] for chunk in chunks]
    spent = [sum(chunk["stages_ms"].values()) / 1e3 for chunk in chunks]
    rates = []
    for end in range(1, len(chunks) + 1):
        part = slice(max(0, end - window), end)
        rates.append(sum(frames[part]) / max(sum(spent[part]), 1e-9))
    return rates
