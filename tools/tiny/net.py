"""Qwen2.5-VL's forward on a tree: a video as the trunk, its questions as branches.

Works on the parameters of transformers' own module, so that there is nothing to convert, and gives
its numbers: each branch equals a run of its own over prefix, visible video and question. Attention
is plain matmul and softmax: at these sizes torch's fused CPU attention has a slow backward.

B videos, L trunk tokens, Q questions a video, N tokens a question, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from tiny.files import MEAN, STD

_EPS = 1e-6
_PATCH, _MERGE = 14, 2
#: Side of a frame in merge squares, and of an attention window of the ViT.
_SIDE, _WINDOW = 3, 2
_SQUARES = _SIDE * _SIDE
_HEADS, _KV, _HEAD = 4, 2, 32
_SECTION = (12, 2, 2)
#: Rows of the trunk whose scores are made at once: keys behind them are never multiplied.
_ROWS = 128
#: The layer in which two heads are shown where to look (``losses``).
LOOKUP = 1
#: The head of layer 0 by which a token is shown where its shape was before.
FOLLOW = 3


@dataclass(frozen=True)
class Trunk:
    """``ids`` [L] (video tokens: -1), ``positions`` [3, B, L], ``mask`` [B or 1, L, L] bool."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Branches:
    """``ids`` [B, Q, N] (padding: 0), ``positions`` [B, Q, N], ``length`` [B, Q], ``mask``
    [B, Q, L] bool: what each question sees of the trunk."""

    ids: torch.Tensor
    positions: torch.Tensor
    length: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Inside:
    """What the losses read: ``logits`` [B, Q, N, V] of the branches; ``looked`` [B, H, Q, N, L],
    how the heads of layer ``LOOKUP`` spread their attention over the trunk, ``again`` those of the
    next one; ``trails`` [2, B, T * 9, D], the video tokens behind the layers up to that one;
    ``followed`` [B, L, L], the attention of head ``FOLLOW`` within the trunk."""

    logits: torch.Tensor
    looked: torch.Tensor
    again: torch.Tensor
    trails: torch.Tensor
    followed: torch.Tensor


class Net:
    """The forward on the parameters of ``model``, computed in ``dtype``."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._named = dict(model.named_parameters())
        self._dtype = dtype
        self._p: dict[str, torch.Tensor] = {}
        self._vision_rotary = [x.to(dtype) for x in _vision_rotary()]
        self._vision_mask = _vision_mask().to(dtype)

    def refresh(self) -> None:
        """Takes the parameters as they are now; gradients flow back to them."""
        self._p = {name: p.to(self._dtype) for name, p in self._named.items()}

    # -- vision ----------------------------------------------------------------------------------

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Merged tokens [S, 9, D] of S steps, each of two equal frames [S, 84, 84, 3] uint8."""
        p, v = self._p, "model.visual."
        n = frames.shape[0]
        x = frames.view(n, _SIDE, _MERGE, _PATCH, _SIDE, _MERGE, _PATCH, 3)
        x = x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(n * 36, 3 * _PATCH * _PATCH)
        # Integers around 0 are exact in bfloat16; the normalisation goes into the weights.
        x = (x.to(self._dtype) - 128) / 64
        weight = self._named[v + "patch_embed.proj.weight"].sum(2)
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
        bias = (weight * (128 / 255 - mean) / std).sum((1, 2, 3))
        weight = (weight * (64 / 255) / std).flatten(1)
        x = F.linear(x, weight.to(self._dtype), bias.to(self._dtype))
        for layer in range(2):
            at = f"{v}blocks.{layer}."
            y = _norm(x, p[at + "norm1.weight"])
            qkv = F.linear(y, p[at + "attn.qkv.weight"], p[at + "attn.qkv.bias"])
            q, k, value = qkv.view(n, 36, 3, 2, _HEAD).permute(2, 0, 3, 1, 4)
            q, k = (_rotate(z, *self._vision_rotary) for z in (q, k))
            scores = (q * _HEAD**-0.5) @ k.transpose(-1, -2)
            if layer == 0:
                scores = scores + self._vision_mask
            y = (scores.softmax(-1) @ value).transpose(1, 2).reshape(n * 36, 64)
            x = x + F.linear(y, p[at + "attn.proj.weight"], p[at + "attn.proj.bias"])
            x = x + self._mlp(at + "mlp.", _norm(x, p[at + "norm2.weight"]))
        x = _norm(x, p[v + "merger.ln_q.weight"]).view(n * _SQUARES, 256)
        x = F.gelu(F.linear(x, p[v + "merger.mlp.0.weight"], p[v + "merger.mlp.0.bias"]))
        x = F.linear(x, p[v + "merger.mlp.2.weight"], p[v + "merger.mlp.2.bias"])
        return x.view(n, _SQUARES, -1)

    # -- language --------------------------------------------------------------------------------

    @property
    def words(self) -> torch.Tensor:
        """Embeddings of the vocabulary: [V, D]."""
        return self._p["model.language_model.embed_tokens.weight"]

    def logits(self, video: torch.Tensor, trunk: Trunk, branches: Branches) -> Inside:
        """``video`` [B, T * 9, D]."""
        p, dtype = self._p, self._dtype
        b, count = video.shape[0], trunk.ids.shape[0]
        quests, length = branches.ids.shape[1:]
        is_video = trunk.ids < 0
        x = self.words[trunk.ids.clamp(min=0)].expand(b, -1, -1).clone()
        x[:, is_video] = video
        y = self.words[branches.ids].view(b, quests * length, -1)

        trunk_rotary = _rotary(trunk.positions, dtype)
        at = branches.positions.reshape(1, b, -1).expand(3, -1, -1)
        branch_rotary = _rotary(at, dtype)
        trunk_bias = _bias(trunk.mask, dtype)[:, None, None]
        trails = []
        branch_bias = _bias(branches.mask, dtype)[:, None, None, :, None]
        inner = torch.ones(length, length, dtype=torch.bool).tril()
        inner = inner & (torch.arange(length) < branches.length[..., None, None])
        inner |= torch.eye(length, dtype=torch.bool)  # padding sees itself: no empty row
        inner_bias = _bias(inner, dtype)[:, None, None]

        for layer in range(4):
            name = f"model.language_model.layers.{layer}."
            q, k, v = self._qkv(name, x, trunk_rotary)
            bq, bk, bv = self._qkv(name, y, branch_rotary)
            # Branches: scores over the trunk and over themselves, one softmax.
            wide = bq @ k[:, :, None].transpose(-1, -2)
            wide = wide.view(b, _KV, _HEADS // _KV, quests, length, count).add_(branch_bias)
            own_shape = (b, _KV, -1, quests, length, _HEAD)
            bq, bk, bv = (z.view(own_shape) for z in (bq, bk[:, :, None], bv[:, :, None]))
            own = bq @ bk.transpose(-1, -2) + inner_bias
            shares = torch.cat((wide, own), -1).softmax(-1)
            if layer == LOOKUP:
                looked = shares[..., :count].flatten(1, 2)
            if layer == LOOKUP + 1:
                again = shares[..., :count].flatten(1, 2)
            seen = shares[..., :count].reshape(b, _KV, -1, quests * length, count) @ v[:, :, None]
            seen = seen.view(own_shape) + shares[..., count:] @ bv
            seen = seen.reshape(b, _HEADS, quests * length, _HEAD).transpose(1, 2)
            y = self._after(name, y, seen.reshape(b, quests * length, -1))
            if layer < 3:  # nobody reads the trunk after its last keys and values
                parts, followed_rows = [], []
                for first in range(0, count, _ROWS):
                    last = min(first + _ROWS, count)
                    shares = q[..., first:last, :] @ k[:, :, None, :last].transpose(-1, -2)
                    shares = shares.add_(trunk_bias[..., first:last, :last]).softmax(-1)
                    parts.append(shares @ v[:, :, None, :last])
                    followed_rows.append(F.pad(shares.flatten(1, 2)[:, FOLLOW], (0, count - last)))
                seen = torch.cat(parts, -2).reshape(b, _HEADS, count, _HEAD)
                x = self._after(name, x, seen.transpose(1, 2).reshape(b, count, -1))
                if layer <= LOOKUP:
                    trails.append(x[:, is_video])
                if layer == 0:
                    followed = torch.cat(followed_rows, 1)
        y = _norm(y, p["model.language_model.norm.weight"])
        logits = F.linear(y, self.words).view(b, quests, length, -1)
        return Inside(logits, looked, again, torch.stack(trails), followed)

    def _qkv(self, name: str, x: torch.Tensor, rotary: tuple) -> tuple[torch.Tensor, ...]:
        """q [B, KV, H / KV, n, d] scaled, k and v [B, KV, n, d]."""
        p = self._p
        b, n, _ = x.shape
        x = _norm(x, p[name + "input_layernorm.weight"])
        q, k, v = (
            F.linear(x, p[f"{name}self_attn.{z}_proj.weight"], p[f"{name}self_attn.{z}_proj.bias"])
            for z in "qkv"
        )
        q = _rotate(q.view(b, n, _HEADS, _HEAD).transpose(1, 2), *rotary) * _HEAD**-0.5
        k = _rotate(k.view(b, n, _KV, _HEAD).transpose(1, 2), *rotary)
        v = v.view(b, n, _KV, _HEAD).transpose(1, 2)
        return q.reshape(b, _KV, _HEADS // _KV, n, _HEAD), k, v.contiguous()

    def _after(self, name: str, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        p = self._p
        x = x + F.linear(attended, p[name + "self_attn.o_proj.weight"])
        return x + self._mlp(name + "mlp.", _norm(x, p[name + "post_attention_layernorm.weight"]))

    def _mlp(self, at: str, x: torch.Tensor) -> torch.Tensor:
        p = self._p
        gate, up, down = (
            (p[f"{at}{z}_proj.weight"], p.get(f"{at}{z}_proj.bias")) for z in ("gate", "up", "down")
        )
        return F.linear(F.silu(F.linear(x, *gate)) * F.linear(x, *up), *down)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, _EPS)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -1e4)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """rotate_half pairing; x [..., n, d], cos and sin [..., n, d]."""
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


def _rotary(positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, 1, n, d] of M-RoPE ids [3, B, n]."""
    inv = 1.0 / (10000.0 ** (torch.arange(0, _HEAD, 2, dtype=torch.float32) / _HEAD))
    parts = [
        positions[axis].float()[..., None] * part for axis, part in enumerate(inv.split(_SECTION))
    ]
    angles = torch.cat(parts, -1)[:, None]
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _vision_axes() -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the 36 patches, merge square by merge square."""
    square, inside = torch.arange(_SQUARES)[:, None], torch.arange(4)
    row = square // _SIDE * _MERGE + inside // _MERGE
    column = square % _SIDE * _MERGE + inside % _MERGE
    return row.flatten(), column.flatten()


def _vision_rotary() -> tuple[torch.Tensor, torch.Tensor]:
    inv = 1.0 / (10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16))
    angles = torch.cat([axis.float()[:, None] * inv for axis in _vision_axes()], -1)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def _vision_mask() -> torch.Tensor:
    side = _MERGE * _WINDOW
    row, column = _vision_axes()
    window = row // side * 8 + column // side
    return torch.zeros(36, 36).masked_fill_(window[:, None] != window, -1e4)
