"""A question: a fork of the stream that reads what it may, and leaves no trace when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch

from vicostream_kernels.cache import Block
from vicostream_kernels.methods import Method
from vicostream_kernels.models import Sampler
from vicostream_kernels.pipeline.llm import LLMSteps
from vicostream_kernels.pipeline.reading import Reading
from vicostream_kernels.pipeline.report import BlockRead, QuestionFigures, Recorder
from vicostream_kernels.pipeline.selection import Selector
from vicostream_kernels.pipeline.text import TextStream
from vicostream_kernels.pipeline.turn import Turn
from vicostream_kernels.pipeline.visibility import (
    History,
    View,
    Window,
    question_window,
    window_view,
)


class Answer:
    """The answer to one question; iterate over it for the text, piece by piece as it is decoded.

    What it sees, and which token comes first, is settled when it is made; video that is ingested
    afterwards changes nothing. Its pages go back at its end, at ``close``, or with the ``with``
    block. ``figures`` says how it went, ``text`` what has been said so far.
    """

    def __init__(
        self,
        llm: LLMSteps,
        method: Method,
        history: History,
        recorder: Recorder,
        *,
        ids: list[int],
        text: str,
        time_s: float,
        asking: slice,
        max_new_tokens: int,
        sampler: Sampler,
        selector: Selector | None = None,
        turn: Turn,
        began: float,
    ) -> None:
        self._llm, self._method, self._history, self._recorder = llm, method, history, recorder
        self._runner, self._sampler = llm.runner, sampler
        self._prompt, self._time_s, self._limit = ids, time_s, max_new_tokens
        self._asking, self._selector, self._turn = asking, selector, turn
        self._reading: Reading | None = None
        self.figures = QuestionFigures(time_s, text)
        self._pieces = TextStream(self._runner.tokenizer)
        self._tokens: list[int] = []
        self._block: Block | None = None
        self._held = ExitStack()
        history._kept.add(self._held)
        self._first, self._preamble = history.fork_id(time_s), history.preamble
        self._trace = recorder.trace
        self._decoding_s = 0.0
        recorder.questions.append(self.figures)
        try:
            with torch.no_grad():
                self._next = self._prefill()
        except BaseException:
            self._let_go("failed")
            raise
        self.figures.ttft_ms = round(1e3 * (time.perf_counter() - began), 3)

    @property
    def text(self) -> str:
        """What has been said so far."""
        return self.figures.answer

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the answer's pages back; a second close does nothing."""
        self._let_go("closed")

    def __del__(self) -> None:
        # `for piece in stream.ask(...)` that was left early must not keep its pages. The garbage
        # collector comes in any thread, also in the middle of what that does at the cache.
        if getattr(self, "_block", None) is not None:
            self._turn.later(self.close)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        """The next piece of text that is certain; raises StopIteration at the end."""
        while self._block is not None:
            try:
                span = self._trace.span("decode_text", host=True)
                with torch.no_grad(), self._turn, span as span:
                    piece, finish = self._advance()
            except BaseException:
                self._let_go("failed")
                raise
            self.figures.answer += piece
            self._decoding_s += span.seconds
            if finish:
                self._let_go(finish)
            if piece:
                return piece
        raise StopIteration

    # -- parts -----------------------------------------------------------------------------------

    def _prefill(self) -> int:
        with self._trace.span("answer", question=self.figures.text):
            with self._llm.reserved(len(self._prompt), kind="text") as block:
                # What there is now, when the reservation may have evicted some; chunks that come
                # later may have the same times.
                self._chunks = self._history.chunks(self._time_s)
                embeds = self._runner.embed(self._llm.ids(self._prompt))
                with self._trace.span("retrieve"):
                    self._view = self._select(embeds)
                self._held.enter_context(self._history.hold(self._view.blocks))
                positions = self._runner.text_positions(len(self._prompt), self._first)
                hidden = self._llm.write(
                    block, len(self._prompt), embeds, positions, self._view, "last"
                )
            self._block = block
            self._settle()
            return self._sample(hidden)

    def _select(self, embeds: torch.Tensor) -> View:
        """What the prompt sees; with retrieval, layers may choose while they read."""
        if self._method.retrieve is None:
            return self._windowed(len(self._prompt))
        self._reading = reading = Reading(
            self._method.retrieve,
            self._selector,
            self._history,
            time_s=self._time_s,
            first_id=self._first,
            asking=self._asking,
            backend=self._runner.backend,
        )
        self._history._kept.add(reading)
        pages = reading.begin(embeds)
        if pages is None:
            empty = torch.empty(1, 0, dtype=torch.int32, device=embeds.device)
            return View(empty, reading.blocks(), (), choice=reading, windowed=False)
        return View(pages.table, reading.blocks(), (), shift=pages.shift, windowed=False)

    def _settle(self) -> None:
        """The prompt has been read: notes what it read, and lets go of what no token will."""
        if self._reading is None:
            self.figures.blocks = list(self._view.spans)
            return
        self._account()
        if self._reading.frozen and self._view.choice is not None:
            candidates = self._held.pop_all()
            self._held.enter_context(self._history.hold(self._reading.blocks()))
            candidates.close()

    def _account(self) -> None:
        """What was read so far, for the report."""
        seen = [
            BlockRead(
                entry.block.start_s,
                entry.block.end_s,
                entry.score,
                entry.share,
                self._reading.tier(entry.block),
            )
            for entry in self._reading.relevance()
        ]
        self.figures.reads = [block for block in seen if block.share and block.tier != "lost"]
        read = seen if self._reading.everything else self.figures.reads
        self.figures.blocks = [(b.start_s, b.end_s) for b in read if b.tier != "lost"]
        if self._recorder.explain:
            self.figures.relevance = seen

    def _windowed(self, new_tokens: int) -> View:
        window = question_window(self._method, self._preamble, self._chunks, new_tokens)
        cache = self._history.cache
        if cache.cache.tiers is not None and None in cache.fetch(window.blocks):
            window = Window(tuple(b for b in window.blocks if b.state == "committed"))
        return window_view(self._method, self._history, window, self._first)

    def _advance(self) -> tuple[str, str | None]:
        """Says the token that is due and finds the one after it."""
        token = self._next
        if token in self._runner.eos_ids:
            return self._pieces.finish(), "stop"
        self._tokens.append(token)
        self.figures.tokens += 1
        piece = self._pieces.push(token)
        if len(self._tokens) >= self._limit:
            return piece + self._pieces.finish(), "length"
        written = len(self._prompt) + len(self._tokens)
        if self._reading is not None:
            self._reading.step()
        elif self._method.attention.window is not None:
            # The window slides over the answer too; what it leaves was held from the start.
            self._view = self._windowed(written)
        hidden = self._llm.append(self._block, token, self._first + written - 1, self._view)
        self._next = self._sample(hidden)
        return piece, None

    def _sample(self, hidden: torch.Tensor) -> int:
        seen: Any = self._llm.ids([*self._prompt, *self._tokens])
        return self._sampler.next_token(seen, self._runner.logits(hidden))

    def _let_go(self, finish: str) -> None:
        with self._turn:
            if self.figures.finish == "open":
                self._end(finish)

    def _end(self, finish: str) -> None:
        self.figures.finish = finish
        if self._tokens and self._decoding_s:
            self.figures.tokens_per_s = round(len(self._tokens) / self._decoding_s, 3)
        cache = self._history.cache
        if self._reading is not None and not self._reading.frozen and finish != "failed":
            self._account()  # what later tokens read besides
        if self._block is not None and not cache.closed:
            cache.free(self._block)
        self._block = None
        self._held.close()
        if self._reading is not None:
            self._reading.close()
        self._history._kept -= {self._held, self._reading}
