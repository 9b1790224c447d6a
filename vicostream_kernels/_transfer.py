"""Copies keys and values between the pages and host memory.

On the CPU a copy is made at once. On a GPU it goes over a CUDA stream of its own: nothing waits on
the host, pages are free for their next owner as soon as they were gathered, and what comes up
arrives layer by layer, so that the first layers compute while the last ones travel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vicostream_kernels._blocks import to_device
from vicostream_kernels._tensor_file import raw

#: (first slot, tokens) of the runs in which a block's tokens lie, see `runs_of`.
Runs = Sequence[tuple[int, int]]


def slots_in(runs: Runs, device: torch.device) -> torch.Tensor:
    """The slots of ``runs``, [n] int64 on the device."""
    slots: list[int] = []
    for first, n in runs:
        slots.extend(range(first, first + n))
    return to_device(slots, torch.int64, device)


class Transfer:
    """Moves records [layers, pools, n, G, d] (host) from and to ``pools``, each [layers, P, B, G,
    d]; ``runs`` say which n tokens."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.on_gpu = device.type == "cuda"
        self._copying: Any = torch.cuda.Stream(device) if self.on_gpu else None
        self._arrivals: list[list[Any]] = []  # of each upward copy still to be waited for, a layer

    def buffer(self, nbytes: int) -> torch.Tensor:
        """Host memory, uint8 [nbytes]; pinned where there is a GPU."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.on_gpu)

    def down(self, pools: Sequence[torch.Tensor], runs: Runs, record: torch.Tensor) -> None:
        """Copies tokens out of the pages. The pages may be given back right afterwards; on a GPU
        the record is complete after `mark`."""
        if not self.on_gpu:
            for there, here in _pairs(pools, runs, record):
                here.copy_(there)
            return
        self.wait()
        slots = slots_in(runs, self._device)
        gathered = torch.stack([pool.flatten(1, 2).index_select(1, slots) for pool in pools], dim=1)
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            record.copy_(gathered, non_blocking=True)
        gathered.record_stream(self._copying)

    def mark(self) -> Any:
        """An event after all downward copies so far; None on the CPU, where they are complete."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event()
        event.record(self._copying)
        return event

    def up(
        self,
        pools: Sequence[torch.Tensor],
        arriving: Sequence[tuple[Runs, torch.Tensor]],
    ) -> None:
        """Copies ``arriving``, pairs of runs and record, into pages that they own already."""
        if not self.on_gpu:
            for runs, record in arriving:
                for there, here in _pairs(pools, runs, record):
                    there.copy_(here)
            return
        if not arriving:
            return
        slots = slots_in([run for runs, _ in arriving for run in runs], self._device)
        try:
            self._queue(pools, arriving, slots)
        except BaseException:
            self.settle()  # the pages will be given back
            raise

    def settle(self) -> None:
        """Waits on the host until no copy is on its way."""
        if self.on_gpu:
            self._copying.synchronize()

    def _queue(
        self,
        pools: Sequence[torch.Tensor],
        arriving: Sequence[tuple[Runs, torch.Tensor]],
        slots: torch.Tensor,
    ) -> None:
        # The pages' previous owners may still be read by what is queued.
        self._copying.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copying):
            layers, _, _, heads, width = arriving[0][1].shape
            events, first = [], 0
            while first < layers:
                # One layer, two, four: the first is soon there, and a record is a few copies.
                some = slice(first, min(2 * first + 1, layers))
                shape = (some.stop - first, len(pools), len(slots), heads, width)
                staged = torch.empty(shape, dtype=pools[0].dtype, device=self._device)
                parts = staged.split([record.shape[2] for _, record in arriving], dim=2)
                for part, (_, record) in zip(parts, arriving):
                    part.copy_(record[some], non_blocking=True)
                for layer, tokens in enumerate(staged, first):
                    for pool, new in zip(pools, tokens):
                        _tokens(pool, layer).index_copy_(0, slots, new)
                    event = torch.cuda.Event()
                    event.record(self._copying)
                    events.append(event)
                first = some.stop
        slots.record_stream(self._copying)
        self._arrivals.append(events)

    def ready(self, layer: int) -> None:
        """What the current CUDA stream does next finds everything that was fetched, in this layer
        and those before it."""
        if not self._arrivals:
            return
        current = torch.cuda.current_stream(self._device)
        for events in self._arrivals:
            current.wait_event(events[layer])
        if layer == len(self._arrivals[0]) - 1:
            self._arrivals.clear()

    def wait(self) -> None:
        """As `ready`, for all layers."""
        if self._arrivals:
            self.ready(len(self._arrivals[0]) - 1)


class PageBytes:
    """The bytes of ``pools``, on the CPU."""

    def __init__(self, pools: Sequence[torch.Tensor]) -> None:
        layers, pages, size, heads, width = pools[0].shape
        self._token = heads * width * pools[0].itemsize
        self._layers = [layer * pages * size * self._token for layer in range(layers)]
        self._pools = [raw(pool) for pool in pools]

    def of(self, runs: Runs) -> Iterator[memoryview]:
        """Those of some tokens, in the order of their record."""
        token = self._token
        for at in self._layers:
            for pool in self._pools:
                for first, n in runs:
                    yield pool[at + first * token : at + (first + n) * token]


def _pairs(
    pools: Sequence[torch.Tensor], runs: Runs, record: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each run in the pages and in the record, [layers, n, G, d]; views."""
    for p, pool in enumerate(pools):
        tokens, at = pool.flatten(1, 2), 0
        for first, n in runs:
            yield tokens[:, first : first + n], record[:, p, at : at + n]
            at += n


def _tokens(pool: torch.Tensor, layer: int) -> torch.Tensor:
    """A layer's tokens by slot, [P * B, G, d]; a view."""
    return pool[layer].flatten(0, 1)
