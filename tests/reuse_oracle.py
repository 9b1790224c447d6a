"""STC-Cacher over Qwen2.5-VL's ViT in plain float64 torch, step by step, in raster order.

Reads transformers' own module; shares nothing with the package but the published algorithm. Window
order appears only where a rule speaks of it (whose turn it is by ``max_age``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F


class CacherOracle:
    """One stream. ``log`` has, call by call, the sets of computed patches: [layer][step]."""

    def __init__(
        self,
        visual: Any,
        *,
        ratio: float | None = 0.25,
        threshold: float | None = None,
        max_ratio: float | None = None,
        interval: int | None = 4,
        selection: str = "layer",
        max_age: int | None = None,
    ) -> None:
        self.visual, self.config = copy.deepcopy(visual).double(), visual.config
        self.ratio, self.threshold, self.max_ratio = ratio, threshold, max_ratio
        self.interval, self.shared, self.max_age = interval, selection == "shared", max_age
        self.calls = self.selective = 0
        self.reference: list[dict[str, torch.Tensor]] = []
        self.log: list[list[list[list[int]]]] = []

    @torch.no_grad()
    def encode(self, patches: torch.Tensor, t: int, h: int, w: int) -> torch.Tensor:
        """[t, n, D] float64."""
        visual, n = self.visual, h * w
        self._place(h, w)
        full = self.calls == 0 if self.interval is None else self.calls % self.interval == 0
        weight = visual.patch_embed.proj.weight.flatten(1)
        x = (patches.double() @ weight.T).view(t, n, -1)
        sets: list[list[list[int]]] = []
        reference = []
        for layer, block in enumerate(visual.blocks):
            size = x.shape[-1]
            w_qkv, b_qkv = block.attn.qkv.weight, block.attn.qkv.bias
            h1 = self._norm(x, block.norm1)
            q, k, v = (
                (h1 @ w_qkv[i * size :][:size].T + b_qkv[i * size :][:size]) for i in range(3)
            )
            a, m = torch.zeros_like(x), torch.zeros_like(x)
            chosen = []
            for step in range(t):
                if full:
                    own = list(range(n))
                elif self.shared and layer:
                    own = sets[0][step]
                else:
                    own = self._choose(k[step], self.reference[layer]["k"])
                chosen.append(own)
                values = v[step] if full else self.reference[layer]["v"].clone()
                values[own] = v[step][own]
                if not full:
                    a[step], m[step] = self.reference[layer]["a"], self.reference[layer]["m"]
                a[step][own] = self._attend(layer, q[step][own], k[step], values, own, block)
                x[step] = x[step] + a[step]
                fed = self._norm(x[step], block.norm2)
                gate = F.silu(fed @ block.mlp.gate_proj.weight.T + block.mlp.gate_proj.bias)
                up = fed @ block.mlp.up_proj.weight.T + block.mlp.up_proj.bias
                fed = (gate * up) @ block.mlp.down_proj.weight.T + block.mlp.down_proj.bias
                m[step][own] = fed[own]
                x[step] = x[step] + m[step]
            sets.append(chosen)
            fresh = {"k": k[-1], "v": v[-1], "a": a[-1], "m": m[-1]}
            if full:
                reference.append({name: part.clone() for name, part in fresh.items()})
            elif self.max_age is not None:
                for i in self._turn():
                    for name, part in fresh.items():
                        self.reference[layer][name][i] = part[i]
        self.reference = reference or self.reference
        self.log.append(sets)
        self.calls += 1
        self.selective += not full
        merged = self._norm(x, visual.merger.ln_q).view(t, n // 4, -1)
        return visual.merger.mlp(merged)

    def _place(self, h: int, w: int) -> None:
        """Row, column and window of each patch; patches come merge square by merge square."""
        side = self.config.window_size // 14 // 2
        self.at = [
            (2 * (s // (w // 2)) + p // 2, 2 * (s % (w // 2)) + p % 2)
            for s in range(h * w // 4)
            for p in range(4)
        ]
        self.window = [(r // 2 // side, c // 2 // side) for r, c in self.at]
        self.order = sorted(range(h * w), key=lambda i: (self.window[i], i))

    def _norm(self, x: torch.Tensor, norm: Any) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight

    def _turn(self) -> list[int]:
        return [
            i for p, i in enumerate(self.order) if (p - self.selective) % (self.max_age + 1) == 0
        ]

    def _choose(self, keys: torch.Tensor, reference: torch.Tensor) -> list[int]:
        n = len(keys)
        alike = [float(F.cosine_similarity(keys[i], reference[i], dim=0)) for i in range(n)]
        turn = [] if self.max_age is None else self._turn()
        ranked = turn + sorted(set(range(n)) - set(turn), key=lambda i: alike[i])
        least = int(n * (self.ratio or 0.0))
        if self.threshold is None:
            return sorted(ranked[: max(1, least, len(turn))])
        below = {i for i in range(n) if alike[i] < self.threshold}
        listed = [i for i in ranked if i in below or i in turn or i in ranked[:least]]
        most = n if self.max_ratio is None else max(1, int(n * self.max_ratio))
        if self.max_age is not None:
            most = max(most, -(-n // (self.max_age + 1)))
        return sorted(listed[:most])

    def _attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        own: list[int],
        block: Any,
    ) -> torch.Tensor:
        """The attention branch of the patches ``own``, whose queries are ``q``."""
        n, heads = len(k), self.config.num_heads
        everywhere = layer in self.config.fullatt_block_indexes
        names = torch.tensor([r * n + c for r, c in self.window])
        seen = (names[own][:, None] == names) | everywhere
        d = k.shape[-1] // heads
        parts = []
        for head in range(heads):
            cut = slice(head * d, (head + 1) * d)
            queries = self._rotate(q[:, cut], [self.at[i] for i in own])
            scores = queries @ self._rotate(k[:, cut], self.at).T / d**0.5
            weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
            parts.append(weights @ v[:, cut])
        return torch.cat(parts, 1) @ block.attn.proj.weight.T + block.attn.proj.bias

    def _rotate(self, x: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
        half = x.shape[-1] // 2
        frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
        at = torch.tensor(places, dtype=torch.float64)
        angles = torch.cat((at[:, :1] * frequencies, at[:, 1:] * frequencies), 1).repeat(1, 2)
        turned = torch.cat((-x[:, half:], x[:, :half]), 1)
        return x * angles.cos() + turned * angles.sin()
