"""What the layers of one cache share: the streams' ring, the plan of the forward under way."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vicostream_kernels.integrations._ring import Piece, SinkWindowRing
from vicostream_kernels.integrations._rotary import Rotation, Watched, rotation_of, watch


class ForwardPlan:
    """Made by the first layer of each forward, read by the others; none waits for the device."""

    def __init__(
        self,
        sink_tokens: int,
        window: int,
        page_size: int,
        chunk_tokens: int,
        model: nn.Module | None,
    ) -> None:
        self.sink_tokens, self.window = sink_tokens, window
        self.page_size, self.chunk_tokens = page_size, chunk_tokens
        self.ring: SinkWindowRing | None = None
        self._watched: Watched | None = None if model is None else watch(model)
        self._rotation: dict[torch.device, Rotation] = {}
        self._pieces: dict[torch.device, list[Piece]] = {}
        self._span = (0, 0)  # the tokens [start, end) of the streams that the pieces are for

    def ring_for(self, batch: int, device: torch.device) -> SinkWindowRing:
        """The ring of this batch; a new one where no token has been seen."""
        if self.ring is None or (self.ring.seen == 0 and self.ring.streams != batch):
            self.ring = SinkWindowRing(
                batch,
                sink_tokens=self.sink_tokens,
                window=self.window,
                page_size=self.page_size,
                chunk_tokens=self.chunk_tokens,
                device=device,
            )
        return self.ring

    def reset(self) -> None:
        """Forgets every token and the plan."""
        if self.ring is not None:
            self.ring.reset()
        self._pieces = {}
        self._span = (0, 0)

    def select(self, index: torch.Tensor) -> None:
        """Stream i becomes a copy of the former stream ``index[i]``."""
        if self.ring is not None:
            self.ring.select(index)

    def rotation(self, config: Any, head_dim: int, device: torch.device) -> Rotation | None:
        """How the model rotates keys; None where no sink is ever moved."""
        if self.sink_tokens == 0:
            return None
        if device not in self._rotation:
            self._rotation[device] = rotation_of(config, self._watched, head_dim, device)
        return self._rotation[device]

    def pieces(
        self,
        seen: int,
        n: int,
        valid: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        device: torch.device,
    ) -> list[Piece]:
        """The calls of a layer that has seen ``seen`` tokens of each row and now gets n more.

        Args:
            seen, n: host counts, padding included.
            valid: [S, n] bool?, False for padding.
            position_ids: [S, n] or [1, n] ints?, what the attention function was told.
            device: the layer's.

        Raises:
            RuntimeError: an earlier forward stopped between layers.
        """
        if self._span != (seen, seen + n):
            if seen != self._span[1]:
                raise RuntimeError(
                    f"SinkWindowCache: a layer has seen {seen} tokens, others {self._span[1]}: an "
                    "earlier forward stopped midway; reset() the cache and start again"
                )
            ring = self.ring
            positions = self._positions(n, position_ids)
            if positions is not None:
                positions = positions.to(ring.device)
            if valid is not None:
                valid = valid.to(ring.device)
            self._pieces = {ring.device: ring.advance(n, valid, positions)}
            self._span = (seen, seen + n)
        if device not in self._pieces:
            here = self._pieces[self.ring.device]
            self._pieces[device] = [piece.to(device) for piece in here]
        return self._pieces[device]

    def _positions(self, n: int, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """[3 or 1, S or 1, n]: the ids with which this forward rotated its keys."""
        if self._watched is not None:
            position_ids = self._watched.take()
            if position_ids is None:
                raise ValueError("SinkWindowCache: model= must be the model that runs")
        if position_ids is None:
            return None
        ids = position_ids if position_ids.dim() == 3 else position_ids[None]
        streams = self.ring.streams
        if ids.shape[0] not in (1, 3) or ids.shape[1] not in (1, streams) or ids.shape[2] != n:
            raise ValueError(
                f"SinkWindowCache: position_ids of shape {list(position_ids.shape)} do not belong "
                f"to {streams} rows of {n} tokens"
            )
        return ids
