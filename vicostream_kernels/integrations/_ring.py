"""Where the tokens of each stream stand in the pages: pinned sink pages, then a ring of pages.

Every stream owns its pages for good, so nothing is allocated and nothing needs the host: how many
tokens of a row are padding is known on the device only, and all places follow from counts there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

MAX_SLOTS = 2**31 - 1  # slots are int32


@dataclass(frozen=True)
class Piece:
    """One append and one attention call in each layer: tokens that share one window start.

    Attributes:
        columns: the tokens of each row that take part, where ``rows`` is None.
        rows: [M] int64?, rows of the packed [S * n] tokens: the valid ones of each stream in order,
            then others that fill up to M, a size the host knows.
        home: [M] int64?, the row where each result belongs; S * n for those that fill up.
        slots: [N] int32, where each token's key and value go; -1 nowhere.
        origin: [3, N] int32 zeros, the positions that leave keys as they are.
        cu_seqlens_q, page_table, page_fill, window_start, page_shift: as `sink_window_attention`
            takes them; page_shift is None while no token can have left the window.
        max_seqlen_q: the most queries of one stream.
    """

    columns: slice
    rows: torch.Tensor | None
    home: torch.Tensor | None
    slots: torch.Tensor
    origin: torch.Tensor
    cu_seqlens_q: torch.Tensor
    page_table: torch.Tensor
    page_fill: torch.Tensor
    window_start: torch.Tensor
    page_shift: torch.Tensor | None
    max_seqlen_q: int

    def to(self, device: torch.device) -> Piece:
        """The same on another device, for models that are spread over several."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: t.to(device) for k, t in values.items() if isinstance(t, torch.Tensor)}
        return replace(self, **moved)


class SinkWindowRing:
    """Counts and positions of S streams, which keep their first tokens and the last ``window``.

    Args:
        streams: S.
        sink_tokens: first valid tokens of a stream, kept for good on pages of their own.
        window: tokens a query can see beside them, itself included.
        page_size: slots a page.
        chunk_tokens: valid tokens of a stream that share one window start, at most ``window``.
        device: where the counts live.

    Attributes:
        tokens: [S] int32, valid tokens so far.
        seen: host int, tokens so far with padding: what no stream's count exceeds.
    """

    def __init__(
        self,
        streams: int,
        *,
        sink_tokens: int,
        window: int,
        page_size: int,
        chunk_tokens: int,
        device: torch.device,
    ) -> None:
        self.streams, self.sink_tokens, self.window = streams, sink_tokens, window
        self.page_size, self.chunk_tokens, self.device = page_size, chunk_tokens, device
        self.sink_pages = -(-sink_tokens // page_size)
        # The window may begin in the middle of a page: one page more than its tokens fill.
        self.ring_pages = -(-(window - 1) // page_size) + 1
        self.ring_slots = self.ring_pages * page_size
        self.pages_per_stream = self.sink_pages + self.ring_pages
        self.pages = streams * self.pages_per_stream
        if self.pages * page_size > MAX_SLOTS:
            raise ValueError(
                f"SinkWindowCache: {streams} streams of sink_tokens={sink_tokens} and "
                f"window={window} need {self.pages * page_size} slots, allowed: {MAX_SLOTS}"
            )
        self.reset()

    @torch.inference_mode(False)  # state that forwards of either kind may update
    def reset(self) -> None:
        """Forgets every token."""
        self.tokens = torch.zeros(self.streams, dtype=torch.int32, device=self.device)
        # Ids of the window's tokens, of the first token after the sinks, and a place for the rest.
        shape = (3, self.streams, self.ring_slots + 2)
        self.ids = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.seen = 0

    @torch.inference_mode(False)
    def select(self, index: torch.Tensor) -> None:
        """Stream i becomes a copy of the former stream ``index[i]``."""
        index = index.to(self.device)
        self.tokens = self.tokens[index]
        self.ids = self.ids[:, index]
        self.streams = index.shape[0]
        self.pages = self.streams * self.pages_per_stream

    def advance(
        self, n: int, valid: torch.Tensor | None, positions: torch.Tensor | None
    ) -> list[Piece]:
        """Takes n more tokens a stream, padding included, and says where everything goes.

        Args:
            n: tokens of each row.
            valid: [S, n] bool?, False for padding, which leaves no trace; wherever it stands.
            positions: [3, S, n] (or broadcast to it) ints?, the (t, h, w) ids with which the keys
                were rotated; the count of valid tokens when None.
        """
        before = self.tokens.long()[:, None]
        if valid is None:
            rank = torch.arange(n, device=self.device).expand(self.streams, n)
        else:
            rank = valid.cumsum(1) - 1
        index = before + rank
        if positions is None:
            positions = index
        positions = positions.to(torch.int32).expand(3, self.streams, n)
        pieces = []
        for start in range(0, n, self.chunk_tokens):
            end = min(start + self.chunk_tokens, n)
            self.seen += end - start
            if valid is None:
                columns, member = slice(start, end), None
                self.tokens = self.tokens + (end - start)
            else:
                # By rank, not by column: a stream's windows don't depend on its batch's padding.
                columns, member = slice(0, n), valid & (rank >= start) & (rank < end)
                self.tokens = self.tokens + member.sum(1, dtype=torch.int32)
            pieces.append(self._piece(columns, member, index, positions, end - start))
        return pieces

    def _piece(
        self,
        columns: slice,
        member: torch.Tensor | None,
        index: torch.Tensor,
        positions: torch.Tensor,
        longest: int,
    ) -> Piece:
        index, positions = index[:, columns], positions[:, :, columns]
        n = index.shape[1]
        stream = torch.arange(self.streams, device=self.device)[:, None]
        at = index - self.sink_tokens  # place in the stream behind the sinks
        place = torch.where(at < 0, index, self.sink_pages * self.page_size + at % self.ring_slots)
        slots = place + stream * (self.pages_per_stream * self.page_size)
        if member is not None:
            slots = torch.where(member, slots, -1)
        if self.sink_tokens:
            self._note_ids(at, member, positions)

        rows = home = None
        if member is None or n == 1:
            # One padded row in a decode step: its query reads what stands there, nobody reads it.
            starts = torch.arange(self.streams + 1, device=self.device) * n
            slots = slots.flatten()
        else:
            flat = member.flatten()
            total = min(self.streams * longest, flat.shape[0])
            rows = torch.argsort((~flat).to(torch.uint8), stable=True)[:total]
            home = torch.where(flat[rows], rows, flat.shape[0])
            starts = torch.zeros(self.streams + 1, dtype=torch.int64, device=self.device)
            torch.cumsum(member.sum(1), 0, out=starts[1:])
            slots = slots.flatten()[rows]
        table, fill, window_start, shift = self._visible(stream)
        return Piece(
            columns=columns,
            rows=rows,
            home=home,
            slots=slots.to(torch.int32),
            origin=torch.zeros(3, slots.shape[0], dtype=torch.int32, device=self.device),
            cu_seqlens_q=starts.to(torch.int32),
            page_table=table.to(torch.int32),
            page_fill=fill.flatten().to(torch.int32),
            window_start=window_start.flatten().to(torch.int32),
            page_shift=shift,
            max_seqlen_q=min(longest, n),
        )

    def _note_ids(
        self, at: torch.Tensor, member: torch.Tensor | None, positions: torch.Tensor
    ) -> None:
        follower, nowhere = self.ring_slots, self.ring_slots + 1
        written = at >= 0 if member is None else member & (at >= 0)
        for place in (
            torch.where(written, at % self.ring_slots, nowhere),
            torch.where(written & (at == 0), follower, nowhere),
        ):
            self.ids.scatter_(2, place.expand_as(positions), positions)

    def _visible(
        self, stream: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Table [S, L], fill [S, pages], window start [S, 1], shift [S, L, 3] after a piece."""
        size, tokens = self.page_size, self.tokens.long()[:, None]
        sinks = tokens.clamp(max=self.sink_tokens)
        behind = tokens - sinks
        first = (behind - self.window).clamp(min=0)  # oldest token in the window

        sink_page = torch.arange(self.sink_pages, device=self.device)
        ring_page = torch.arange(self.ring_pages, device=self.device)
        listed = first // size + ring_page
        base = stream * self.pages_per_stream
        ring = base + self.sink_pages + listed % self.ring_pages
        table = torch.cat([base + sink_page, torch.where(listed * size < behind, ring, -1)], dim=1)

        last = (behind - 1) // size
        holds = last - (last - ring_page) % self.ring_pages  # newest page of the stream in each
        fill = torch.cat(
            [
                (sinks - sink_page * size).clamp(0, size),
                torch.where(holds < 0, 0, (behind - holds * size).clamp(0, size)),
            ],
            dim=1,
        )
        window_start = sinks + first % size

        if self.sink_tokens == 0 or self.seen <= self.sink_tokens + self.window:
            return table, fill, window_start, None
        oldest = (first % self.ring_slots).expand(3, -1, 1)
        moved = self.ids.gather(2, oldest) - self.ids[:, :, self.ring_slots, None]
        moved = torch.where(first > 0, moved, 0).permute(1, 2, 0)
        shift = torch.zeros(*table.shape, 3, dtype=torch.int32, device=self.device)
        shift[:, : self.sink_pages] = moved
        return table, fill, window_start, shift
