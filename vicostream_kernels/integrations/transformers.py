"""transformers: ``attn_implementation="vicostream"`` and `SinkWindowCache` for ``generate``.

    from vicostream_kernels.integrations.transformers import SinkWindowCache, register

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="vicostream")
    cache = SinkWindowCache(sink_tokens=4, window=1024)
    model.generate(**inputs, cache=cache)  # before transformers 5.24: past_key_values=cache

A cache's ``update`` gets keys, values and a layer index, and attention functions get no cache: so
``update`` hands on keys that carry their layer, the mask function hands on which new tokens are
padding, and the attention function appends and attends. Without a `SinkWindowCache` both functions
are transformers' own for "sdpa", so such a model works as always (also its vision tower, which has
no cache, and training).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vicostream_kernels.integrations._ring import Piece
from vicostream_kernels.integrations._rotary import Rotation
from vicostream_kernels.integrations._sink_window_cache import (
    CarriedKeys,
    SinkWindowCache,
    SinkWindowLayer,
    below_zero,
    working_dtype,
)
from vicostream_kernels.ops.append import rope_append
from vicostream_kernels.ops.attention import sink_window_attention

__all__ = ["NAME", "SinkWindowCache", "register"]

#: What ``attn_implementation`` is called.
NAME = "vicostream"

#: The oldest transformers that was tested; 5.0 to 5.8 call masks and caches in other ways.
OLDEST = (5, 17)


def register() -> None:
    """Adds ``attn_implementation="vicostream"`` to transformers; doing it again changes nothing.

    Raises:
        ImportError: transformers is older than 5.17.
    """
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ImportError(
            f"attn_implementation={NAME!r} needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, "
            f"found {transformers.__version__}"
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """With our cache: which of the new tokens are not padding, [S, n] bool, or None for all."""
    if isinstance(kv_offset, torch.Tensor) or kv_offset >= 0:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if mask_function is not causal_mask_function:
        raise ValueError(
            "SinkWindowCache: mask_function must be the causal one; layers with a sliding window "
            "or chunks of their own, packed sequences and bidirectional parts are not served"
        )
    if attention_mask is None:
        return None
    seen = below_zero(kv_offset)
    expected = (batch_size, seen + q_length)
    if tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"SinkWindowCache: attention_mask has shape {list(attention_mask.shape)}, allowed: "
            f"{list(expected)}, all tokens so far and the new ones (or None: nothing is padding)"
            + ("; or reset() the cache to begin other sequences" if seen else "")
        )
    return attention_mask[:, seen:]


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [S, H, n, d], key and value [S, G, n, d] -> [S, n, H, d], no weights."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME} attention does not support {name}, got {kwargs[name]!r}")
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{NAME} attention makes no attention weights: output_attentions=True needs "
            "attn_implementation='eager'"
        )
    if not isinstance(key, CarriedKeys):
        _refuse_unused(kwargs)
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    return _streamed(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
    ), None


@torch.compiler.disable
def _streamed(
    module: nn.Module,
    query: torch.Tensor,
    carried: CarriedKeys,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Out of torch.compile's sight: plan and counts change with each call, and it would recompile.

    Returns what the attention function does, [S, n, H, d].
    """
    layer = carried.cache.layer(carried.index)
    _refuse(module, query, attention_mask, dropout, is_causal, kwargs)
    layer.prepare(carried.keys, value)
    rotation = layer.plan.rotation(module.config, query.shape[-1], query.device)
    n = query.shape[2]
    pieces = layer.plan.pieces(
        layer.seen, n, attention_mask, kwargs.get("position_ids"), query.device
    )
    out = _append_and_attend(layer, pieces, rotation, query, carried.keys, value, scaling)
    layer.seen += n
    return out


def _refuse_unused(kwargs: dict[str, Any]) -> None:
    """Raises TypeError for a cache under a name that nobody took: it would only do nothing."""
    for name, given in kwargs.items():
        if isinstance(given, SinkWindowCache):
            raise TypeError(
                f"SinkWindowCache: this model does not know {name}=; transformers takes cache= "
                "since 5.24, past_key_values= before"
            )


def _refuse(
    module: nn.Module,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    """Raises ValueError for what can't be done right with a SinkWindowCache."""
    if torch.is_grad_enabled() and query.requires_grad:
        raise ValueError(
            "SinkWindowCache has no backward: call the model under torch.no_grad() or "
            "torch.inference_mode(), and train without this cache"
        )
    if dropout > 0:
        raise ValueError(f"SinkWindowCache: attention dropout must be 0, got {dropout}: eval()")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("SinkWindowCache: attention must be causal, got is_causal=False")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"SinkWindowCache: attention_mask must be 2D (1 for tokens, 0 for padding), got "
            f"shape {list(attention_mask.shape)}"
        )
    for name in ("sliding_window", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"SinkWindowCache: {name} is not supported, got a layer that has it")


def _append_and_attend(
    layer: SinkWindowLayer,
    pieces: list[Piece],
    rotation: Rotation | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    streams, heads, n, d = query.shape
    result = working_dtype(query)
    # One dtype, that of the pages: parts of a stream may come with autocast and without.
    query, key, value = (x.to(layer.k_pages.dtype) for x in (query, key, value))
    whole = len(pieces) == 1 and pieces[0].home is None
    # One row more than there are: where results of rows that belong to nobody go.
    out = query.new_zeros(0 if whole else streams * n + 1, heads, d)
    for piece in pieces:
        q, k, v = (_rows(x, piece) for x in (query, key, value))
        # Keys come rotated: at position 0 (cos 1, sin 0) the op only scatters, bit for bit.
        q = rope_append(
            q, k, v, piece.origin, layer.no_turn, None, layer.k_pages, layer.v_pages, piece.slots
        )
        moved = piece.page_shift is not None
        got = sink_window_attention(
            q,
            layer.k_pages,
            layer.v_pages,
            piece.page_table,
            piece.cu_seqlens_q,
            page_fill=piece.page_fill,
            sink_tokens=layer.plan.sink_tokens,
            window_start=piece.window_start,
            sm_scale=scaling,
            page_shift=piece.page_shift,
            inv_freq=rotation.inv_freq if moved else None,
            mrope_section=rotation.mrope_section if moved else None,
            max_seqlen_q=piece.max_seqlen_q,
        )
        if whole:
            return got.view(streams, n, heads, d).to(result)
        if piece.home is not None:
            out.index_copy_(0, piece.home, got)
        else:
            columns = out[:-1].view(streams, n, heads, d)[:, piece.columns]
            columns.copy_(got.view(columns.shape))
    return out[:-1].view(streams, n, heads, d).to(result)


def _rows(x: torch.Tensor, piece: Piece) -> torch.Tensor:
    """[S, heads, n, d] -> [N, heads, d], the tokens of a piece in its order."""
    packed = x.transpose(1, 2)
    if piece.rows is None:
        return packed[:, piece.columns].flatten(0, 1)
    return packed.flatten(0, 1)[piece.rows]
