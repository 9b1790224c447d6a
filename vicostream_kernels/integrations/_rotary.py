"""How a transformers model rotates its keys: what moving the sinks to the window needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

#: Models whose rotation (rotate_half over the whole head) was checked, True: M-RoPE in sections.
#: A wrong pairing would give wrong numbers and no error, so others are refused.
ROTATE_HALF = {
    "llama": False,
    "mistral": False,
    "qwen2": False,
    "qwen3": False,
    "qwen2_5_vl_text": True,
}

#: Frequencies that stay the same however long the sequence gets ("dynamic", "longrope" don't).
_FIXED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rotation:
    """inv_freq [d/2] float32 in radians per position; (t, h, w) shares of it or None."""

    inv_freq: torch.Tensor
    mrope_section: tuple[int, ...] | None


class Watched:
    """The rotary module of one model's decoder and the position ids of its latest forward."""

    def __init__(self, rotary: nn.Module) -> None:
        self.position_ids: torch.Tensor | None = None
        self.inv_freq: torch.Tensor = rotary.inv_freq
        rotary.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        self.inv_freq = module.inv_freq

    def take(self) -> torch.Tensor | None:
        """The ids of the forward under way, once: none are left for another model's forward."""
        ids, self.position_ids = self.position_ids, None
        return ids

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        return self  # a copied cache follows the same model


_watched: WeakKeyDictionary[nn.Module, Watched] = WeakKeyDictionary()


def watch(model: nn.Module) -> Watched:
    """Follows the position ids of a model's decoder; one hook a model, however often it is asked.

    Raises:
        ValueError: the model has no decoder with a ``rotary_emb``.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    rotary = getattr(decoder, "rotary_emb", None)
    if not isinstance(rotary, nn.Module) or not hasattr(rotary, "inv_freq"):
        raise ValueError(
            f"SinkWindowCache: model must have a decoder with a rotary_emb, got "
            f"{type(model).__name__}"
        )
    if rotary not in _watched:
        _watched[rotary] = Watched(rotary)
    return _watched[rotary]


def rotation_of(
    config: Any, watched: Watched | None, head_dim: int, device: torch.device
) -> Rotation:
    """The rotation of the decoder that ``config`` describes, with the watched model's frequencies.

    Raises:
        ValueError: a model that is not in `ROTATE_HALF`, M-RoPE that is not watched, or a rope
            whose frequencies depend on the sequence length or cover only a part of the head.
    """
    kind = config.model_type
    if kind not in ROTATE_HALF:
        raise ValueError(
            f"SinkWindowCache: moving sink tokens needs to know how keys are rotated; model_type "
            f"{kind!r} was not checked, allowed: {', '.join(sorted(ROTATE_HALF))}. "
            "sink_tokens=0 works with every model"
        )
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type not in _FIXED:
        raise ValueError(
            f"SinkWindowCache: rope_type {rope_type!r} changes its frequencies with the sequence "
            f"length, allowed: {', '.join(_FIXED)}. sink_tokens=0 works with every model"
        )
    if ROTATE_HALF[kind] and watched is None:
        raise ValueError(
            f"SinkWindowCache: attention does not learn the (t, h, w) positions of a {kind!r} "
            "model: make the cache with model=your_model"
        )
    if watched is not None:
        inv_freq = watched.inv_freq
    elif rope_type == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        inv_freq = 1.0 / (rope["rope_theta"] ** exponent)
    else:
        inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or 2 * inv_freq.shape[0] != head_dim:
        raise ValueError(
            f"SinkWindowCache: keys must be rotated over the whole head_dim={head_dim}, got "
            f"{2 * inv_freq.shape[0]} channels (partial_rotary_factor="
            f"{rope.get('partial_rotary_factor', 1.0)})"
        )
    section = None
    if ROTATE_HALF[kind]:
        section = tuple(rope.get("mrope_section", (16, 24, 24)))
    return Rotation(inv_freq.to(device=device, dtype=torch.float32), section)
