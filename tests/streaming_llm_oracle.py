"""StreamingLLM written down densely: every chunk recomputed in float64 from un-rotated keys.

Shares nothing with the integration but the model's own projections, norms and MLPs: keys are kept
as they come out of the projection, and each chunk rotates all it can see by their places in the
cache (arXiv 2309.17453, section 3.2; eviction makes room for the chunk before it comes).
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn


def _rotate(x: torch.Tensor, positions: torch.Tensor, config) -> torch.Tensor:
    """x [heads, T, d] at positions [3, T]; M-RoPE takes each frequency's share of (t, h, w)."""
    rope, half = config.rope_parameters, x.shape[-1] // 2
    inv_freq = rope["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    section = rope.get("mrope_section", [half, 0, 0])
    axis = torch.tensor([a for a, size in enumerate(section) for _ in range(size)])
    angle = positions.double()[axis].T * inv_freq
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class DenseStreamingLLM:
    """One sequence; ``feed`` takes a chunk and gives the logits of its tokens, [n, V] float64.

    Args:
        model: a causal LM of the Llama family, or Qwen2.5-VL's.
        sink, window: tokens kept; ``window`` counts the chunk.
        image_ids: positions are (t, h, w) ids given to ``feed`` and not the places in the cache:
            tokens in the window stand where they are, sinks as far before the oldest of them as
            they stood before the token after them.
    """

    def __init__(self, model: nn.Module, sink: int, window: int, *, image_ids: bool = False):
        model = deepcopy(model).double()
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.config = self.decoder.config
        self.sink, self.window, self.image_ids = sink, window, image_ids
        self.keys: list[torch.Tensor | None] = [None] * len(self.decoder.layers)
        self.values: list[torch.Tensor | None] = [None] * len(self.decoder.layers)
        self.ids = torch.empty(3, 0, dtype=torch.long)

    @torch.no_grad()
    def feed(
        self,
        tokens: torch.Tensor | None = None,
        *,
        embeds: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = self.decoder.embed_tokens(tokens) if embeds is None else embeds.double()
        n, before = hidden.shape[0], self.ids.shape[1]
        end = before + n
        new_ids = torch.arange(before, end).expand(3, n) if ids is None else ids
        self.ids = torch.cat([self.ids, new_ids], dim=1)
        kept = torch.arange(end)
        if end > self.sink + self.window:
            kept = torch.cat([kept[: self.sink], kept[end - self.window :]])
        positions = torch.arange(len(kept)).expand(3, -1)
        if self.image_ids:
            positions = self.ids[:, kept].clone()
            if len(kept) < end:
                follower, oldest = self.ids[:, self.sink], self.ids[:, end - self.window]
                positions[:, : self.sink] += (oldest - follower)[:, None]
        visible = kept[None, :] <= torch.arange(before, end)[:, None]
        for index, layer in enumerate(self.decoder.layers):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attend(index, layer.self_attn, normed, kept, positions, visible)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.head(self.decoder.norm(hidden))

    def _attend(self, index, attn, x, kept, positions, visible) -> torch.Tensor:
        n, d = x.shape[0], attn.head_dim
        q = attn.q_proj(x).view(n, -1, d)
        k = attn.k_proj(x).view(n, -1, d)
        v = attn.v_proj(x).view(n, -1, d).transpose(0, 1)
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = q.transpose(0, 1), k.transpose(0, 1)
        if self.keys[index] is not None:
            k = torch.cat([self.keys[index], k], dim=1)
            v = torch.cat([self.values[index], v], dim=1)
        self.keys[index], self.values[index] = k, v
        q = _rotate(q, positions[:, -n:], self.config)
        k = _rotate(k[:, kept], positions, self.config)
        groups = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(groups, 0), v[:, kept].repeat_interleave(groups, 0)
        scores = (q @ k.transpose(1, 2)) * d**-0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return attn.o_proj((weights @ v).transpose(0, 1).reshape(n, -1))

    def greedy(self, prompt: torch.Tensor, chunks: list[int], new_tokens: int) -> list[int]:
        """Feeds the prompt in chunks, then decodes token by token."""
        assert sum(chunks) == len(prompt)
        logits = [self.feed(part) for part in prompt.split(chunks)][-1]
        made = [int(logits[-1].argmax())]
        while len(made) < new_tokens:
            made.append(int(self.feed(torch.tensor(made[-1:]))[-1].argmax()))
        return made
