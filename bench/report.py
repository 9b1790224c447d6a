"""The table a person reads: times, rates, percent of the floor, ratios; geomeans at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vicostream_kernels.bench.environment import busy
from vicostream_kernels.bench.results import Document, Row

_COLUMNS = tuple("provider|cache|µs|p20-p80|GB/s|TFLOP/s|% floor|ratio|95 %|match".split("|"))

#: Narrower than this the table would cut its numbers; a file or a small terminal wraps instead.
_WIDTH = 120


class Screen:
    """Prints with rich where it is installed, else as plain text: a case as soon as it is done, so
    that a stop loses nothing, and at the end what holds for all of them."""

    def __init__(self) -> None:
        self._console = None
        try:
            from rich.console import Console
        except ImportError:
            return
        console = Console()
        self._console = console if console.width >= _WIDTH else Console(width=_WIDTH)

    def case(self, rows: Sequence[Row]) -> None:
        """All rows of one case."""
        if self._console is None:
            print("\n".join(_plain_case(rows)), flush=True)
            return
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=rows[0].case, title_justify="left", title_style="bold", box=None)
        for column in _COLUMNS:
            left = column in ("provider", "cache", "match")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for row in rows:
            style = "red" if not row.match else "bold" if row.provider.startswith("ours:") else ""
            table.add_row(*(escape(cell) for cell in cells(row)), style=style)
        self._console.print(table)
        for reason in dict.fromkeys(f"{row.provider}: {row.reason}" for row in rows if row.reason):
            self._line(f"  {reason}", style="red")

    def end(self, document: Document) -> None:
        """Where it ran, what the ceilings were, geomeans and what was wrong."""
        for line in (headline(document), *summary_lines(document)):
            self._line(line)

    def _line(self, text: str, style: str | None = None) -> None:
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, style=style, highlight=False, markup=False)


def print_report(document: Document) -> None:
    """All of it at once."""
    screen = Screen()
    for rows in by_case(document).values():
        screen.case(rows)
    screen.end(document)


def _plain_case(rows: Sequence[Row]) -> Iterator[str]:
    widths = [max(len(c), 8) for c in _COLUMNS]
    widths[0] = max([len(row.provider) for row in rows] + [8])
    widths[3] = widths[8] = 13
    yield f"\n{rows[0].case}"
    yield "  ".join(c.ljust(w) for c, w in zip(_COLUMNS, widths))
    for row in rows:
        yield "  ".join(c.ljust(w) for c, w in zip(cells(row), widths))
        if row.reason:
            yield f"  {row.provider}: {row.reason}"


def headline(document: Document) -> str:
    facts, roof = document.environment, document.roofline
    commit = (facts.get("commit") or "no commit")[:12] + (" dirty" if facts.get("dirty") else "")
    rates = ", ".join(f"{k} {v:g}" for k, v in roof.get("matmul_tflop_s", {}).items())
    reads = roof.get("read_gb_s") or {}
    read = f"read {reads[max(reads, key=int)]} GB/s, " if reads else ""
    return (
        f"{facts.get('device_name')}, {facts.get('threads')} threads, torch {facts.get('torch')}, "
        f"commit {commit}; measured here: copy {roof.get('copy_gb_s')} GB/s, "
        f"{read}matmul TFLOP/s {rates}"
    )


def by_case(document: Document) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in document.rows:
        grouped.setdefault(row.case, []).append(row)
    return grouped


def cells(row: Row) -> tuple[str, ...]:
    tick = "yes" if row.match else "NO"
    if row.p50_us is None:
        return (row.provider, row.cache, *("-" for _ in range(7)), tick)
    if row.provider == row.baseline:
        ratio, interval = "1 (base)", ""
    else:
        ratio = f"{row.ratio:.2f}x" + ("" if row.significant else " ?")
        interval = f"{row.ratio_low:.2f}-{row.ratio_high:.2f}"
    return (
        row.provider,
        row.cache,
        _number(row.p50_us),
        f"{_number(row.p20_us)}-{_number(row.p80_us)}",
        _number(row.gb_s),
        _number(row.tflop_s),
        f"{row.floor_pct:.0f} %",
        ratio,
        interval,
        tick,
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def summary_lines(document: Document) -> Iterator[str]:
    for (provider, cache), (mean, count) in document.geomeans().items():
        yield f"geomean of {count} ratios, {provider}, {cache}: {mean:.2f}x"
    for name, reason in document.left_out.items():
        yield f"left out: {name}: {reason}"
    for name, reason in document.failed.items():
        yield f"FAILED: {name}: {reason}"
    if busy(document.environment):
        yield busy(document.environment)
    wrong = [row for row in document.rows if not row.match]
    for row in {(row.case, row.provider): row for row in wrong}.values():
        yield f"WRONG, no speed shown: {row.provider} on {row.case}: {row.reason}"
