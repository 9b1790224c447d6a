"""What a run shows."""

from __future__ import annotations

import io

from vicostream_kernels.pipeline.screen import Screen, clock, mib


def test_control_characters_do_not_reach_the_terminal():
    out = io.StringIO()
    Screen(out, io.StringIO()).piece("a\x1b[2J\x07\x9bé\tb\nc")
    assert out.getvalue() == "a␛[2J␇\ufffdé\tb\n    c"


def test_what_fails_does_not_take_the_progress_away():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    err = Terminal()
    screen = Screen(io.StringIO(), err)
    screen.start(10.0, "a.mp4")
    try:
        screen.question(1.0, "What?")
        screen.unanswered()
        screen.error("[bold]no luck[/bold]")
        assert screen._progress.live.is_started
        assert "vicostream: error: [bold]no luck[/bold]" in err.getvalue()
    finally:
        screen.stop()


def test_numbers_as_people_read_them():
    assert [clock(t) for t in (0, 65.25, 3600, -1.5, 59.99)] == [
        "00:00.0",
        "01:05.2",
        "1:00:00.0",
        "-00:01.5",
        "01:00.0",
    ]
    assert (mib(2**20), mib(3 * 2**29)) == ("1.0 MiB", "1.50 GiB")
