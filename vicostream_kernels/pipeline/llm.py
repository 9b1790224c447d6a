"""One step of the LLM on a stream: pages are taken, rows placed, keys and values written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vicostream_kernels.cache import Block, CacheStream
from vicostream_kernels.methods import Method
from vicostream_kernels.models import Attend, Qwen2_5_VLRunner
from vicostream_kernels.models.text import PageChoice, PageList
from vicostream_kernels.pipeline.visibility import View


class LLMSteps:
    """Runs ``runner`` on the pages of one cache stream; used for chunks, prompts and answers."""

    def __init__(self, runner: Qwen2_5_VLRunner, cache: CacheStream, method: Method) -> None:
        self.runner, self._cache, self._attention = runner, cache, method.attention

    @contextmanager
    def reserved(self, bucket: int, **block: Any) -> Iterator[Block]:
        """Pages for a block that :meth:`write` fills; given back when the body raises before."""
        reserved = self._cache.reserve(bucket, **block)
        try:
            yield reserved
        except BaseException:
            if reserved.state == "reserved":
                self._cache.rollback(reserved)
            raise

    def write(
        self,
        block: Block,
        count: int,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        view: View,
        outputs: str,
    ) -> torch.Tensor | None:
        """Runs rows ``embeds`` ``[N, D]``: the block's markers and ``count`` body tokens, then
        padding; commits the block. ``outputs`` as the runner's ``forward`` has it."""
        slots = self._cache.plan(block, count, embeds.shape[0])
        keys = self._cache.keys if block.kind == "chunk" else None
        attend = self._attend(view, block, slots, count + sum(block.markers), keys)
        hidden = self.runner.forward(embeds, positions, attend, outputs)
        self._cache.commit(block, count)
        return hidden

    def append(self, block: Block, token: int, position: int, view: View) -> torch.Tensor:
        """Adds one decoded token to a text block; the hidden state ``[1, D]`` that follows it."""
        slots = self._cache.append_tokens(block, 1)
        embeds = self.runner.embed(self.ids([token]))
        positions = self.runner.text_positions(1, position)
        return self.runner.forward(embeds, positions, self._attend(view, block, slots, 1), "last")

    def _attend(
        self, view: View, block: Block, slots: torch.Tensor, new_tokens: int, keys: Any = None
    ) -> Attend:
        own = self._cache.page_table([block])
        table: Any = torch.cat((view.table, own), dim=1)
        start = shift = None
        if view.window_start is not None:
            start = self._int32([view.window_start])
        if view.choice is not None:
            table = _Followed(view.choice, own)
        elif view.shift is not None:
            shift = _behind(view.shift, own)
        elif view.sink_shift:
            shift = table.new_zeros((1, table.shape[1], 3))
            shift[:, : view.sink_pages] = view.sink_shift
        return Attend(
            cache=self._cache.cache,
            slots=slots,
            page_table=table,
            cu_seqlens_q=self._int32([0, new_tokens]),
            sink_tokens=view.sink_tokens,
            window=self._attention.window if view.windowed else None,
            window_start=start,
            page_shift=shift,
            keys=keys,
        )

    def ids(self, ids: Sequence[int]) -> torch.Tensor:
        """Token ids as int64 on the model's device."""
        return self._to_device(ids, torch.int64)

    def _int32(self, values: Sequence[int]) -> torch.Tensor:
        return self._to_device(values, torch.int32)

    def _to_device(self, values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        device = self.runner.device
        if device.type != "cuda":
            return torch.tensor(values, dtype=dtype)
        # From pinned memory the copy needs no wait.
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class _Followed:
    """A choice of pages with the pages of the new tokens themselves behind it."""

    def __init__(self, choice: PageChoice, own: torch.Tensor) -> None:
        self._choice, self._own = choice, own

    def __call__(self, layer: int, query: torch.Tensor, rotated: torch.Tensor) -> PageList:
        table, shift = self._choice(layer, query, rotated)
        own = self._own.expand(*table.shape[:-1], -1)
        if shift is not None:
            shift = _behind(shift, self._own)
        return PageList(torch.cat((table, own), dim=-1), shift)


def _behind(shift: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """``shift`` [1, (R,) L, 3] with rows for pages that have not moved."""
    return torch.cat((shift, shift.new_zeros(*shift.shape[:-2], own.shape[1], 3)), dim=-2)
