"""What a model's layers computed and read, taken at the ops, to recompute their selections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vicostream_kernels.models import text


@dataclass
class LayerCall:
    """One layer of one forward: queries before and after rotation, and what attention was given."""

    query: torch.Tensor
    rotated: torch.Tensor
    table: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def pages(self) -> list[list[int]]:
        """Pages of each list, without padding."""
        lists = self.table.view(-1, self.table.shape[-1]).tolist()
        return [[page for page in row if page >= 0] for row in lists]


@dataclass
class Watched:
    """forwards[i][layer]; raw[layer][slot] is the key [G, d] of a slot before rotation."""

    layers: int
    forwards: list[list[LayerCall]] = field(default_factory=list)
    raw: list[dict[int, torch.Tensor]] = field(default_factory=list)


@contextlib.contextmanager
def watched(monkeypatch, layers: int) -> Iterator[Watched]:
    seen = Watched(layers, raw=[{} for _ in range(layers)])
    append, attention = text.rope_append, text.sink_window_attention

    def rope_append(q, k, v, positions, inv_freq, section, k_pages, v_pages, slots, **options):
        rotated = append(
            q, k, v, positions, inv_freq, section, k_pages, v_pages, slots, **options
        )  # fmt: skip
        if not seen.forwards or len(seen.forwards[-1]) == layers:
            seen.forwards.append([])
        layer = len(seen.forwards[-1])
        seen.forwards[-1].append(LayerCall(q.clone(), rotated.clone()))
        for slot, key in zip(slots.tolist(), k):
            if slot >= 0:
                seen.raw[layer][slot] = key.clone()
        return rotated

    def sink_window_attention(q, k_pages, v_pages, table, cu, *, page_shift=None, **options):
        call = seen.forwards[-1][-1]
        call.table = table.clone()
        call.shift = None if page_shift is None else page_shift.clone()
        return attention(q, k_pages, v_pages, table, cu, page_shift=page_shift, **options)

    with monkeypatch.context() as patch:
        patch.setattr(text, "rope_append", rope_append)
        patch.setattr(text, "sink_window_attention", sink_window_attention)
        yield seen


def slots_of(cache, pages: list[int]) -> list[int]:
    """The filled slots of pages, in order."""
    fill = cache.page_fill.tolist()
    return [page * cache.page_size + i for page in pages for i in range(fill[page])]


def keys_at(cache, layer: int, slots: list[int]) -> torch.Tensor:
    """Keys as cached, [n, G, d] float64."""
    return cache.k_pages[layer].flatten(0, 1)[slots].double()
