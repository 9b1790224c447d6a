"""What an evaluation shows: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO


class Console:
    """Rich progress where stderr is a terminal, single lines elsewhere."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr

    def say(self, text: str) -> None:
        """A remark."""
        self._err.write(f"vicostream: {text}\n")
        self._err.flush()

    def error(self, text: str) -> None:
        """What went wrong, on one line."""
        self.say(f"error: {text}")

    @contextmanager
    def progress(self, total: int, what: str) -> Iterator[Any]:
        """Yields ``advance(count, note)``; the bar goes away at the end."""
        if not self._err.isatty():
            yield lambda count, note="": None
            return
        from rich import progress as bars
        from rich.console import Console as RichConsole

        bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[note]}"),
            console=RichConsole(file=self._err),
            transient=True,
        )
        task = bar.add_task(what, total=total, note="")
        with bar:
            yield lambda count, note="": bar.update(task, advance=count, note=note)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others stand to the right."""
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        # Never narrower than its content: a cut figure is worse than a long line.
        width = max(RichConsole(file=self._out).width, 40 + 14 * len(columns))
        RichConsole(file=self._out, width=width, highlight=False).print(table)
        self._out.flush()


def percent(share: float | None) -> str:
    """A share as ``93.8``; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"


def interval(low: float, high: float) -> str:
    """A 95 % interval in percent."""
    return f"{100 * low:.0f}-{100 * high:.0f}"
