"""Small Qwen2.5-VL checkpoints, and two ways to the logits of a conversation: transformers' own
full-history forward, and ours, segment by segment through the paged cache."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vicostream_kernels.cache import PagedKVCache
from vicostream_kernels.models import Attend, Qwen2_5_VLRunner, named
from vicostream_kernels.models.random_init import fill_

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
OTHER_FILES = ("preprocessor_config.json", "generation_config.json")


def small_config(**changes: Any) -> dict[str, Any]:
    """tiny-random's configuration, with fields changed; ``vision_*`` changes the vision part."""
    config = named.config("tiny-random")
    vision = {
        key.removeprefix("vision_"): changes.pop(key)
        for key in list(changes)
        if key.startswith("vision_")
    }
    return {**config, **changes, "vision_config": {**config["vision_config"], **vision}}


def small_model(seed: int = 0, **changes: Any) -> Any:
    """A transformers module whose every parameter matters: norms are not 1, biases not 0."""
    model = named.build(small_config(**changes), seed=seed, device="cpu", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_q" in name:
            fill_(parameter.data, name, seed, 0.2)
            parameter.data.add_(1.0)
        elif name.endswith("bias"):
            fill_(parameter.data, name, seed, 0.2)
    return model


def save_checkpoint(folder: Path, model: Any, **save: Any) -> Path:
    """What a user has: ``save_pretrained``'s files and the tokenizer's."""
    model.save_pretrained(folder, **save)
    for name in TOKENIZER_FILES + OTHER_FILES:
        shutil.copy(named.HOME / name, folder / name)
    return folder


@dataclass(frozen=True)
class Text:
    """Token ids."""

    ids: Sequence[int]


@dataclass(frozen=True)
class Visual:
    """An image (t = 1) or a video segment, with its markers."""

    patches: torch.Tensor
    grid: tuple[int, int, int]
    seconds_per_step: float = 1.0
    is_image: bool = False


def visual(t: int, h: int, w: int, *, seed: int = 0, **facts: Any) -> Visual:
    noise = torch.Generator().manual_seed(seed)
    return Visual(torch.randn(t * h * w, 3 * 2 * 14 * 14, generator=noise), (t, h, w), **facts)


def position_oracle(segments: Sequence[Text | Visual], tokens_per_second: int) -> torch.Tensor:
    """[3, N] ids, token by token from the rule: everything continues at the largest id + 1."""
    ids: list[tuple[int, int, int]] = []

    def after() -> int:
        return max((max(triple) for triple in ids), default=-1) + 1

    for segment in segments:
        if isinstance(segment, Text):
            for _ in segment.ids:
                ids.append((after(),) * 3)
            continue
        ids.append((after(),) * 3)
        base, (t, h, w) = after(), segment.grid
        ids.extend(
            (
                base + int(step * segment.seconds_per_step * tokens_per_second),
                base + row,
                base + col,
            )
            for step in range(t)
            for row in range(h // 2)
            for col in range(w // 2)
        )
        ids.append((after(),) * 3)
    return torch.tensor(ids).T.contiguous()


@torch.no_grad()
def transformers_logits(model: Any, segments: Sequence[Text | Visual]) -> torch.Tensor:
    """[N, V] of one forward over everything, pictures included, with explicit position ids."""
    config = model.config
    ids: list[int] = []
    images = [s for s in segments if isinstance(s, Visual) and s.is_image]
    videos = [s for s in segments if isinstance(s, Visual) and not s.is_image]
    for segment in segments:
        if isinstance(segment, Text):
            ids.extend(segment.ids)
            continue
        t, h, w = segment.grid
        pad = config.image_token_id if segment.is_image else config.video_token_id
        ids.append(config.vision_start_token_id)
        ids.extend([pad] * (t * h * w // 4))
        ids.append(config.vision_end_token_id)
    given: dict[str, torch.Tensor] = {}
    if images:
        given["pixel_values"] = torch.cat([s.patches for s in images])
        given["image_grid_thw"] = torch.tensor([s.grid for s in images])
    if videos:
        given["pixel_values_videos"] = torch.cat([s.patches for s in videos])
        given["video_grid_thw"] = torch.tensor([s.grid for s in videos])
    positions = position_oracle(segments, config.vision_config.tokens_per_second)
    return model(
        input_ids=torch.tensor([ids]), position_ids=positions[:, None], use_cache=False, **given
    ).logits[0]


class Driver:
    """Feeds a runner segment by segment: full history, nothing pruned, nothing evicted."""

    def __init__(self, runner: Qwen2_5_VLRunner, *, page_size: int = 16, pages: int = 4) -> None:
        self.runner, self.base = runner, 0
        self.cache = PagedKVCache(
            layers=runner.layers,
            pages=pages,
            page_size=page_size,
            kv_heads=runner.kv_heads,
            head_dim=runner.head_dim,
            dtype=runner.dtype,
            grow=True,
        )
        self.stream = self.cache.open()

    def feed(self, segment: Text | Visual, *, padding: int = 0, outputs: str = "all") -> Any:
        """Prefills one segment; logits [n, V] of its real rows (None for outputs="none").

        ``padding`` rows of garbage are added behind, as a length bucket does.
        """
        runner = self.runner
        if isinstance(segment, Text):
            embeds = runner.embed(torch.tensor(list(segment.ids)))
            positions = runner.text_positions(len(segment.ids), self.base)
            self.base += len(segment.ids)
            markers, kind = (0, 0), "text"
        else:
            embeds, positions = self._video(segment)
            markers, kind = (1, 1), "chunk"
        n = embeds.shape[0]
        body = n - sum(markers)
        block = self.stream.reserve(body, kind=kind, markers=markers)
        slots = self.stream.plan(block, torch.tensor(body, dtype=torch.int32), n + padding)
        attend = Attend(
            cache=self.cache,
            slots=slots,
            page_table=self.stream.page_table([*self.stream.blocks, block]),
            cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32),
        )
        if padding:
            embeds = torch.cat((embeds, embeds.new_full((padding, embeds.shape[1]), 3.0)))
            positions = torch.cat((positions, positions.new_full((3, padding), 7)), dim=1)
        hidden = runner.forward(embeds, positions, attend, outputs)
        self.stream.commit(block, body)
        if hidden is None:
            return None
        return runner.logits(hidden if outputs == "last" else hidden[:n])

    def decode(self, id: int) -> torch.Tensor:
        """Appends one token to the last text block; its logits [1, V]."""
        block = self.stream.blocks[-1]
        attend = Attend(
            cache=self.cache,
            slots=self.stream.append_tokens(block, 1),
            page_table=self.stream.page_table(list(self.stream.blocks)),
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
        )
        positions = self.runner.text_positions(1, self.base)
        self.base += 1
        embeds = self.runner.embed(torch.tensor([id]))
        return self.runner.logits(self.runner.forward(embeds, positions, attend))

    def _video(self, segment: Visual) -> tuple[torch.Tensor, torch.Tensor]:
        runner, (t, h, w) = self.runner, segment.grid
        start, end = runner.embed(torch.tensor([runner.vision_start_id, runner.vision_end_id]))
        tokens = runner.encode(segment.patches, segment.grid).flatten(0, 1)
        inside = self.base + 1
        after = inside + runner.video_span(t, h, w, segment.seconds_per_step)
        positions = runner.video_positions(t, h, w, inside, segment.seconds_per_step)
        before, behind = runner.text_positions(1, self.base), runner.text_positions(1, after)
        self.base = after + 1
        embeds = torch.cat((start[None], tokens, end[None]))
        return embeds, torch.cat((before, positions.flatten(1), behind), dim=1)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float((got - expected).abs().max() / expected.abs().max())
