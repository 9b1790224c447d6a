"""The LLM: transformers' weights, our paged attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch

from vicostream_kernels.models.weights import Block, TextWeights
from vicostream_kernels.ops.append import rope_append
from vicostream_kernels.ops.attention import sink_window_attention

#: Which rows of the last hidden state a forward returns.
Outputs = Literal["all", "last", "none"]


class PageList(NamedTuple):
    """Pages in logical order, ``table`` [1, L] or [1, heads, L] int32, and by how much each has
    moved, ``shift`` [*table.shape, 3] int32 or None."""

    table: torch.Tensor
    shift: torch.Tensor | None = None


class PageChoice(Protocol):
    """Finds the pages that a layer reads when its queries are known."""

    def __call__(self, layer: int, query: torch.Tensor, rotated: torch.Tensor) -> PageList:
        """``query`` and ``rotated`` [N, H, d]: the layer's queries before and after rotation."""
        ...


@dataclass(frozen=True)
class Attend:
    """What one forward of one stream writes and reads.

    Attributes:
        cache: the paged cache; K and V of every layer are written to it.
        slots: [N] int32, where each token's K and V go (``page * page_size + offset``, -1 skips).
        page_table: [1, L] int32, pages visible to these tokens, in logical order, the pages just
            written last; a list of one table per layer, or a ``PageChoice``, where a method
            chooses per layer (its ``shift`` takes the place of ``page_shift``).
        cu_seqlens_q: [2] int32, 0 and the number of real tokens (rows beyond it are padding).
        sink_tokens, window, window_start, page_shift: as ``sink_window_attention`` has them.
        keys: where ``rope_append`` summarises what it writes (``CacheStream.keys``), or None.
    """

    cache: Any
    slots: torch.Tensor
    page_table: torch.Tensor | Sequence[torch.Tensor] | PageChoice
    cu_seqlens_q: torch.Tensor
    sink_tokens: int = 0
    window: int | None = None
    window_start: torch.Tensor | None = None
    page_shift: torch.Tensor | None = None

    keys: Any = None

    def pages(self, layer: int, query: torch.Tensor, rotated: torch.Tensor) -> PageList:
        """What ``layer`` reads."""
        if callable(self.page_table):
            return self.page_table(layer, query, rotated)
        one = isinstance(self.page_table, torch.Tensor)
        return PageList(self.page_table if one else self.page_table[layer], self.page_shift)


@dataclass(frozen=True)
class Heads:
    """Head counts and rotary frequencies of the LLM's attention."""

    heads: int
    kv_heads: int
    head_dim: int
    inv_freq: torch.Tensor
    mrope_section: tuple[int, int, int]


def text_forward(
    weights: TextWeights,
    heads: Heads,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
    outputs: Outputs,
    backend: str,
) -> torch.Tensor | None:
    """Runs all layers on ``embeds`` [N, D]; see ``Qwen2_5_VLRunner.forward``."""
    cache = attend.cache
    raw = [None] * len(weights.blocks) if cache.raw_k_pages is None else cache.raw_k_pages.unbind()
    pages = zip(cache.k_pages.unbind(), cache.v_pages.unbind(), raw)
    hidden = embeds
    final = len(weights.blocks) - 1
    for layer, (block, pools) in enumerate(zip(weights.blocks, pages)):
        wanted = outputs if layer == final else "all"
        attended = _attention(
            block, heads, hidden, positions, attend, layer, pools, wanted, backend
        )  # fmt: skip
        if attended is None:
            return None
        if wanted == "last":
            hidden = hidden[-1:]
        hidden = hidden + block.out(attended)
        hidden = hidden + block.mlp(block.mlp_norm(hidden))
    return weights.norm(hidden)


def _attention(
    block: Block,
    heads: Heads,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    attend: Attend,
    layer: int,
    pools: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    wanted: Outputs,
    backend: str,
) -> torch.Tensor | None:
    n, d = hidden.shape[0], heads.head_dim
    k_pages, v_pages, raw_k_pages = pools
    normed = block.attention_norm(hidden)
    if wanted == "none":
        # Nobody reads the last layer's output of a video chunk, only its K and V; k stands in for
        # the queries that rope_append rotates.
        k, v = block.qkv.rows(heads.heads * d)(normed).view(n, 2, heads.kv_heads, d).unbind(1)
        q = k
    else:
        q, k, v = (
            block.qkv(normed)
            .view(n, heads.heads + 2 * heads.kv_heads, d)
            .split([heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
        )
    keys = attend.keys
    # A page that was fetched and left again may have a new owner before its copy has come.
    attend.cache.ready(layer)
    rotated = rope_append(
        q,
        k,
        v,
        positions,
        heads.inv_freq,
        heads.mrope_section,
        k_pages,
        v_pages,
        attend.slots,
        raw_k_pages=raw_k_pages,
        summary=None if keys is None else keys.of_layer(layer),
        block_of_page=None if keys is None else keys.block_of_page,
        backend=backend,
    )
    if wanted == "none":
        return None
    table, shift = attend.pages(layer, q, rotated)
    attend.cache.ready(layer)
    q = rotated
    cu_seqlens_q = attend.cu_seqlens_q
    if wanted == "last" and n > 1:
        # The queries of a stream are its last logical positions, so fewer of them need no mask.
        q, cu_seqlens_q = q[-1:], cu_seqlens_q.clamp(max=1)
    out = sink_window_attention(
        q,
        k_pages,
        v_pages,
        table,
        cu_seqlens_q,
        page_fill=attend.cache.page_fill,
        sink_tokens=attend.sink_tokens,
        window=attend.window,
        window_start=attend.window_start,
        page_shift=shift,
        inv_freq=heads.inv_freq if shift is not None else None,
        mrope_section=heads.mrope_section if shift is not None else None,
        max_seqlen_q=q.shape[0],
        backend=backend,
    )
    return out.view(q.shape[0], heads.heads * d)
