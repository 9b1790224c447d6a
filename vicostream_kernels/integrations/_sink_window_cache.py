"""SinkWindowCache: the transformers cache whose layers are pages of `sink_window_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from vicostream_kernels._huge_pages import empty_pool
from vicostream_kernels._pages import check_int
from vicostream_kernels.checks import check_head_dim
from vicostream_kernels.integrations._plan import ForwardPlan


def below_zero(seen: int) -> int:
    """How a SinkWindowCache tells the mask function of its own: by an offset no other cache has.

    Counts back too. An int of another class would say it plainer, but torch.compile makes none.
    """
    return -1 - seen


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """What `torch.nn.functional.scaled_dot_product_attention` would turn ``x`` into and return.

    Under autocast a rotation leaves keys in float32 and values in the lower dtype.
    """
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class CarriedKeys:
    """The new keys of one call, on their way from ``update`` to the attention function.

    They stand for all keys in the cache, so any other attention that would take them for keys is
    stopped at its first operation. No tensor subclass: torch.compile asks a tensor for more than
    such a refusal can tell from use.
    """

    def __init__(self, keys: torch.Tensor, cache: SinkWindowCache, index: int) -> None:
        self.keys, self.cache, self.index = keys, cache, index

    @property
    def shape(self) -> torch.Size:
        return self.keys.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise _handed_to(getattr(func, "__name__", func))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python and its tools ask of any object
            raise AttributeError(name)
        raise _handed_to(name)

    def __getitem__(self, index: Any) -> Any:
        raise _handed_to("__getitem__")


def _handed_to(name: Any) -> TypeError:
    return TypeError(
        "SinkWindowCache works with attn_implementation='vicostream' only, after "
        "vicostream_kernels.integrations.transformers.register(): its keys were handed to "
        f"{name} instead"
    )


class SinkWindowLayer(CacheLayerMixin):
    """The pages of one layer.

    Attributes:
        k_pages, v_pages: [P, B, G, d], once initialised; pages of a stream stand together.
        no_turn: [d/2] float32 zeros, the frequencies that leave keys as they are.
        seen: tokens appended so far, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False  # what transformers knows as sliding has no sinks and another mask

    def __init__(self, plan: ForwardPlan) -> None:
        super().__init__()
        self.plan = plan
        self.seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        check_head_dim("SinkWindowCache", dim)
        if value_states.shape != key_states.shape:
            raise ValueError(
                f"SinkWindowCache: values must have the shape of the keys "
                f"{list(key_states.shape)}, got {list(value_states.shape)}"
            )
        ring = self.plan.ring_for(batch, key_states.device)
        shape = (ring.pages, ring.page_size, heads, dim)
        with torch.inference_mode(False):  # both kinds of forward may write them
            kind = {"dtype": working_dtype(key_states), "device": key_states.device}
            self.k_pages, self.v_pages = empty_pool(shape, **kind), empty_pool(shape, **kind)
            self.no_turn = torch.zeros(dim // 2, device=key_states.device)
        self.batch_size = batch
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Raises: the cache's own ``update`` hands keys on, and the attention appends them."""
        raise NotImplementedError("SinkWindowLayer: call the cache's update")

    def prepare(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes pages for this batch, if they are not there; as long as they are empty, others."""
        streams, dtype = key_states.shape[0], working_dtype(key_states)
        if not self.is_initialized or (
            self.seen == 0 and (self.batch_size, self.k_pages.dtype) != (streams, dtype)
        ):
            self.lazy_initialization(key_states, value_states)
        if self.batch_size != streams:
            raise ValueError(
                f"SinkWindowCache: holds {self.batch_size} streams, got a batch of {streams}; "
                "reset() it or make another"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, below_zero(self.seen)

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1  # a stream may be endless

    def reset(self) -> None:
        self.seen = 0

    @torch.inference_mode(False)
    def select(self, index: torch.Tensor) -> None:
        """Stream i gets a copy of the pages of the former stream ``index[i]``."""
        if self.is_initialized:
            index = index.to(self.k_pages.device)
            for name in ("k_pages", "v_pages"):
                pages = getattr(self, name)
                chosen = pages.unflatten(0, (self.batch_size, -1)).index_select(0, index)
                setattr(self, name, chosen.flatten(0, 1))
            self.batch_size = index.shape[0]


class SinkWindowCache(Cache):
    """Keeps the first tokens and a window of the last ones of each sequence; memory never grows.

    For ``model.generate(..., cache=SinkWindowCache(...))`` (before transformers 5.24:
    ``past_key_values=``) and for forward calls of models loaded with
    ``attn_implementation="vicostream"`` (see `register`). While a sequence has at most
    ``sink_tokens + window`` tokens, results are those of a full cache. Beyond, they are
    StreamingLLM's: a chunk of new tokens sees the sinks and the last ``window`` tokens up to its
    own end, causally, at the positions that tokens have in the cache. Padding (zeros of a 2D
    attention mask, wherever they stand) takes no place.

    A forward call of more than ``chunk_tokens`` tokens a sequence is worked off in chunks of that
    many, so prompts of any length fit, whole or by ``prefill_chunk_size``.

    Args:
        sink_tokens: first tokens that stay, >= 0.
        window: last tokens that stay, the newest included, >= 1.
        page_size: slots a page of the paged KV cache, 1 to 256.
        chunk_tokens: the most tokens that share one window start, 1 to ``window``; half the window
            by default, so that every token sees at least the other half before it.
        model: the model, whose rotary module then tells positions and frequencies. M-RoPE
            (Qwen2.5-VL) needs it; so do models whose ``inv_freq`` is not what the config says.

    Raises:
        ValueError, TypeError: an argument out of range. At the first forward: head_dim not a
            multiple of 8 up to 256; with ``sink_tokens`` a model whose rotation is not known.

    Batches hold all streams in one set of pools per layer,
    ``batch * (ceil(sink_tokens / B) + ceil((window - 1) / B) + 1)`` pages of B slots, allocated at
    the first forward. `reset` keeps them. Beam search works (`reorder_cache` copies pages, as
    transformers' own caches do); `crop` does not: tokens that left the window can't come back.

    Source: StreamingLLM (arXiv 2309.17453, section 3.2). Keys stay in the pages as the model
    rotated them; the sinks are turned when they are read, by as many positions as the window moved.
    With M-RoPE that is, for each of (t, h, w), from the token after the sinks to the oldest token
    in the window.
    """

    def __init__(
        self,
        sink_tokens: int = 4,
        window: int = 1024,
        page_size: int = 16,
        *,
        chunk_tokens: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        me = "SinkWindowCache"
        check_int(me, "sink_tokens", sink_tokens, 0)
        check_int(me, "window", window, 1)
        check_int(me, "page_size", page_size, 1, 256)
        if chunk_tokens is None:
            chunk_tokens = max(1, window // 2)
        check_int(me, "chunk_tokens", chunk_tokens, 1, window)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"{me}: model must be a torch.nn.Module, got {type(model).__name__}")
        super().__init__(layers=[])
        self._plan = ForwardPlan(sink_tokens, window, page_size, chunk_tokens, model)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the new keys and values on to the registered attention, which appends them.

        Touches no layer: torch.compile would then compile for each number of layers there are.
        """
        return CarriedKeys(key_states, self, layer_idx), value_states

    def layer(self, index: int) -> SinkWindowLayer:
        """The layer of this index, made where it is new."""
        while len(self.layers) <= index:
            self.layers.append(SinkWindowLayer(self._plan))
        return self.layers[index]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, below_zero(self.get_seq_length(layer_idx))

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reset(self) -> None:
        """Forgets every token and keeps the memory."""
        super().reset()
        self._plan.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Raises: this cache can't go back (assisted generation needs one that can)."""
        raise ValueError(
            "SinkWindowCache can't be cropped: tokens that left the window can't come back. "
            "Generate without an assistant model, or with a DynamicCache"
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Stream i becomes a copy of the former stream ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each stream becomes ``repeats`` equal streams next to each other."""
        streams = torch.arange(max(self.batch_size, 0))
        self.batch_select_indices(streams.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Stream i becomes a copy of the former stream ``indices[i]``."""
        for layer in self.layers:
            layer.select(indices)
        self._plan.select(indices)
