"""M-RoPE ids of a stream: one rule, in one place.

Every token has three ids (time, height, width). Text has the same id three times and counts up.
A video segment that starts at ``base`` has ``t = base + int(step * seconds_per_step *
tokens_per_second)``, ``h = base + row`` and ``w = base + column`` on the merged grid. Whatever
follows continues at the largest id so far + 1, the rule that the released checkpoints were trained
with (transformers >= 5 continues at ``base + max(h, w) / merge`` instead, which lets the text
after a long video fall back into the video's own ids).
"""

from __future__ import annotations

import torch


def text_positions(n: int, base: int, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """Ids of ``n`` text tokens that start at ``base``: int32 ``[3, n]`` on ``device``."""
    return torch.arange(base, base + n, dtype=torch.int32, device=device).repeat(3, 1)


def step_ids(steps: int, seconds_per_step: float, tokens_per_second: float) -> list[int]:
    """Time ids of ``steps`` temporal steps, relative to the segment's base."""
    return [int(step * seconds_per_step * tokens_per_second) for step in range(steps)]


def video_positions(
    t: int,
    h: int,
    w: int,
    base: int,
    seconds_per_step: float,
    *,
    tokens_per_second: float,
    merge_size: int = 2,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Ids of a video segment: int32 ``[3, t, (h / merge_size) * (w / merge_size)]`` on ``device``.

    ``t, h, w`` are the patch grid as preprocessing returns it (``grid_thw``), tokens are in raster
    order. Raises ``ValueError`` for a grid that does not divide into merge squares.
    """
    rows, columns = merged_grid(h, w, merge_size)
    ids = torch.empty(3, t, rows, columns, dtype=torch.int32)
    times = torch.tensor(step_ids(t, seconds_per_step, tokens_per_second), dtype=torch.int32)
    ids[0] = times[:, None, None]
    ids[1] = torch.arange(rows, dtype=torch.int32)[:, None]
    ids[2] = torch.arange(columns, dtype=torch.int32)
    return ids.add_(base).view(3, t, rows * columns).to(device)


def video_span(
    t: int,
    h: int,
    w: int,
    seconds_per_step: float,
    *,
    tokens_per_second: float,
    merge_size: int = 2,
) -> int:
    """How many ids a video segment uses up: its largest id - base + 1, so that the next token has
    id ``base + span``. Pruning does not change it: dropped tokens keep their ids reserved."""
    rows, columns = merged_grid(h, w, merge_size)
    return 1 + max(step_ids(t, seconds_per_step, tokens_per_second)[-1], rows - 1, columns - 1)


def merged_grid(h: int, w: int, merge_size: int) -> tuple[int, int]:
    """Rows and columns of LLM tokens for a grid of ``h x w`` patches."""
    if h < 1 or w < 1 or h % merge_size or w % merge_size:
        raise ValueError(
            f"grid_thw: {h} x {w} patches do not divide into squares of {merge_size} x {merge_size}"
        )
    return h // merge_size, w // merge_size
