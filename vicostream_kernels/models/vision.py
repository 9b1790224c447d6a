"""The ViT: windowed and full attention over packed frames, rotary ids, merger, raster order.

Patches arrive merge square by merge square (four patches of a 2 x 2 square in a row), squares in
raster order. Inside the ViT the squares of one attention window stand together, so that a window
is a run of rows. Everything that depends on the grid alone is a ``VisionGrid``, made once per
shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vicostream_kernels.models.positions import merged_grid
from vicostream_kernels.models.weights import VisionWeights
from vicostream_kernels.ops.append import rope_append
from vicostream_kernels.ops.attention import varlen_attention


@dataclass(frozen=True)
class VisionShape:
    """What the ViT's configuration fixes."""

    heads: int
    head_dim: int
    merge_size: int
    window: int  # side of an attention window, in merge squares
    full_layers: frozenset[int]
    rope_theta: float = 10000.0

    @property
    def section(self) -> tuple[int, int, int]:
        """The ViT's axial rotary embedding is M-RoPE with no third axis: half of the frequencies
        turn with the row, half with the column."""
        return self.head_dim // 4, self.head_dim // 4, 0

    def inv_freq(self) -> torch.Tensor:
        """[head_dim / 2] float32: the same frequencies for rows, then for columns."""
        half = self.head_dim // 2
        one = 1.0 / (self.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float) / half))
        return torch.cat((one, one))


@dataclass(frozen=True)
class VisionGrid:
    """Indices of one grid shape; N patches, all tensors on the model's device.

    Attributes:
        order: [N / 4] int64, the merge square at each place in window order.
        raster: [N / 4] int64, the inverse permutation.
        positions: [3, N] int32, row, column and 0 of each patch, in window order.
        slots: [N] int32, 0 .. N-1: every patch is a slot of the block's K and V.
        windows, frames: [W + 1] int32, cumulative lengths of windows and of full frames.
        longest_window, longest_frame: their longest lengths.
    """

    order: torch.Tensor
    raster: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    windows: torch.Tensor
    frames: torch.Tensor
    longest_window: int
    longest_frame: int


def vision_grid(
    t: int, h: int, w: int, merge: int, window: int, device: torch.device | str
) -> VisionGrid:
    """The indices for ``t`` steps of ``h x w`` patches; ``window`` is in merge squares."""
    rows, columns = merged_grid(h, w, merge)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    across = -(-columns // window)
    window_of = ((row // window) * across + column // window).flatten()
    # Stable: inside a window the squares keep their raster order.
    order = torch.argsort(window_of, stable=True)
    lengths = torch.bincount(window_of) * merge * merge

    steps = torch.arange(t)[:, None]
    all_order = (steps * (rows * columns) + order).flatten()
    inside = torch.arange(merge)
    patch_row = (row[..., None, None] * merge + inside[:, None]).expand(-1, -1, -1, merge)
    patch_column = (column[..., None, None] * merge + inside).expand(-1, -1, merge, -1)
    axes = torch.stack((patch_row, patch_column)).reshape(2, rows * columns, merge * merge)
    positions = torch.zeros(3, t * h * w, dtype=torch.int32)
    positions[:2] = axes[:, order].flatten(1).repeat(1, t)
    return VisionGrid(
        order=all_order.to(device),
        raster=torch.argsort(all_order).to(device),
        positions=positions.to(device),
        slots=torch.arange(t * h * w, dtype=torch.int32, device=device),
        windows=_cumulative(lengths.repeat(t)).to(device),
        frames=_cumulative(torch.full((t,), h * w)).to(device),
        longest_window=int(lengths.max()),
        longest_frame=h * w,
    )


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    total[1:] = lengths.cumsum(0)
    return total


#: Sees layer, K before rotation [N, H, d], V [N, H, d], attention and MLP branch [N, H * d].
Keep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
#: Sees the last hidden states [N, C] before the merger, merge square by merge square in raster
#: order.
Watch = Callable[[torch.Tensor], None]


def vision_forward(
    weights: VisionWeights,
    shape: VisionShape,
    inv_freq: torch.Tensor,
    patches: torch.Tensor,
    grid: VisionGrid,
    backend: str,
    keep: Keep | None = None,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Encodes ``patches`` [N, 3*2*14*14] to LLM tokens [N / 4, D] in raster order; ``keep`` is
    shown what every layer computed, in window order, ``watch`` what the merger reads."""
    n, heads, d = patches.shape[0], shape.heads, shape.head_dim
    x = embed_patches(weights, shape, patches, grid)
    # One page that holds the whole call: rope_append rotates the keys into it.
    k_page, v_page = x.new_empty(2, 1, n, heads, d).unbind(0)
    for layer, block in enumerate(weights.blocks):
        q, k, v = block.qkv(block.attention_norm(x)).view(n, 3, heads, d).unbind(1)
        q = rope_append(
            q, k, v, grid.positions, inv_freq, shape.section, k_page, v_page, grid.slots,
            backend=backend,
        )  # fmt: skip
        full = layer in shape.full_layers
        ends = grid.frames if full else grid.windows
        longest = grid.longest_frame if full else grid.longest_window
        attended = varlen_attention(
            q, k_page[0], v_page[0], ends, ends,
            max_seqlen_q=longest, max_seqlen_k=longest, backend=backend,
        )  # fmt: skip
        attended = block.out(attended.view(n, heads * d))
        x = x + attended
        fed = block.mlp(block.mlp_norm(x))
        x = x + fed
        if keep is not None:
            keep(layer, k, v, attended, fed)
    return merge_patches(weights, shape, x, grid, watch)


def embed_patches(
    weights: VisionWeights, shape: VisionShape, patches: torch.Tensor, grid: VisionGrid
) -> torch.Tensor:
    """The first hidden states [N, C], in window order."""
    n, square = patches.shape[0], shape.merge_size**2
    x = weights.patch(patches)
    return x.view(n // square, -1).index_select(0, grid.order).view(n, -1)


def merge_patches(
    weights: VisionWeights,
    shape: VisionShape,
    x: torch.Tensor,
    grid: VisionGrid,
    watch: Watch | None = None,
) -> torch.Tensor:
    """LLM tokens [N / 4, D] in raster order, of hidden states [N, C] in window order."""
    if watch is not None:
        watch(x.view(grid.order.numel(), -1).index_select(0, grid.raster).view_as(x))
    merged = weights.merger(weights.merger_norm(x).view(grid.order.numel(), -1))
    return merged.index_select(0, grid.raster)
