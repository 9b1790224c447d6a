"""What a bounded method means, written down once more: one dense pass of transformers' own model.

No pages, no tables, no kernels of ours: every chunk is encoded by transformers, what is kept,
where it stands and who sees whom follow from the method's words token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vicostream_kernels.methods import Method
from vicostream_kernels.ops.preprocess import preprocess_frames


@dataclass
class _Stream:
    """The tokens so far: embeddings, ids (t, h, w), and who each is."""

    embeds: list[torch.Tensor]
    ids: list[tuple[int, int, int]]
    who: list[tuple[str, int]]

    def add(self, embed: torch.Tensor, ids: tuple[int, int, int], who: tuple[str, int]) -> None:
        self.embeds.append(embed)
        self.ids.append(ids)
        self.who.append(who)

    def next_id(self) -> int:
        return max((max(triple) for triple in self.ids), default=-1) + 1


@torch.no_grad()
def expected_logits(runner: Any, method: Method, frames: torch.Tensor, text: str) -> torch.Tensor:
    """Logits [V] of the first token of an answer to ``text``, asked after ``frames`` [F, H, W, 3]
    (whole chunks)."""
    model, engine = runner.model, method.engine
    embed = model.get_input_embeddings()
    stream = _Stream([], [], [])
    for token in runner.system_ids():
        stream.add(embed(torch.tensor(token)), (stream.next_id(),) * 3, ("system", -1))
    means, count = [], engine.frames_per_chunk
    for number, chunk in enumerate(frames.split(count)):
        means.append(_chunk(runner, method, stream, embed, chunk, number))
    question = runner.question_ids(text)
    asking = torch.stack([embed(torch.tensor(token)) for token in question])
    for row in asking:
        stream.add(row, (stream.next_id(),) * 3, ("question", -1))
    read = _read(method, means, asking.mean(0))
    visible = _visible(method, stream.who, read, len(means))
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
    with _as_the_question_sees(model, stream, _moved(method, stream, read)):
        hidden = model.model.language_model(
            inputs_embeds=torch.stack(stream.embeds)[None],
            position_ids=torch.tensor(stream.ids).T[:, None],
            attention_mask={"full_attention": mask[None, None]},
            use_cache=False,
        ).last_hidden_state[0, -1]
    return model.lm_head(hidden).float()


def _moved(method: Method, stream: _Stream, read: set[int]) -> torch.Tensor | None:
    """[N]: by how much a question sees each token moved; None where it sees them as they stand.

    From the back: the newest chunk that is read ends where the last chunk's end marker stands, each
    one before it where the next begins, the system prompt before the first.
    """
    if method.retrieve is None or method.retrieve.positions == "absolute":
        return None
    moved = torch.zeros(len(stream.who))
    behind = next(ids[0] for ids, who in zip(stream.ids, stream.who) if who[0] == "question") - 1
    for number in sorted(read, reverse=True):
        first = stream.ids[stream.who.index(("start", number))][0] + 1
        behind -= stream.ids[stream.who.index(("end", number))][0] - first
        rows = [row for row, who in enumerate(stream.who) if who == ("video", number)]
        moved[rows] = float(behind - first)
    system = [row for row, who in enumerate(stream.who) if who[0] == "system"]
    moved[system] = float(behind - len(system))
    return moved


@contextmanager
def _as_the_question_sees(
    model: Any, stream: _Stream, moved: torch.Tensor | None
) -> Iterator[None]:
    """In transformers' own layers the rows of the question see the keys moved: a move by one number
    in all three axes turns every frequency by that number."""
    if moved is None:
        yield
        return
    text = model.model.language_model
    asks = torch.tensor([who[0] == "question" for who in stream.who])
    angle = (moved[:, None] * text.rotary_emb.inv_freq).repeat(1, 2)

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        one, two = key.chunk(2, -1)
        turned = key * angle.cos() + torch.cat((-two, one), -1) * angle.sin()
        scores = [query @ k.transpose(-1, -2) * scaling for k in (key, turned)]
        shares = (torch.where(asks[:, None], *scores[::-1]) + attention_mask).softmax(-1)
        return (shares @ value).transpose(1, 2).contiguous(), None

    before, name = text.config._attn_implementation, "as_the_question_sees"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    text.config._attn_implementation = name
    try:
        yield
    finally:
        text.config._attn_implementation = before


def _chunk(runner, method, stream: _Stream, embed, frames: torch.Tensor, number: int):
    """Adds a chunk; returns the mean of its kept tokens."""
    patches, grid = preprocess_frames(
        frames,
        min_pixels=min(max(method.engine.pixels, runner.min_pixels), runner.max_pixels),
        max_pixels=min(max(method.engine.pixels, runner.min_pixels), runner.max_pixels),
        mean=runner.image_mean,
        std=runner.image_std,
        patch=14,
        merge=2,
        temporal=2,
        resizes=method.engine.resizes,
        backend="reference",
    )
    steps, height, width = (int(size) for size in grid)
    rows, columns = height // 2, width // 2
    found = runner.model.model.get_video_features(patches, torch.tensor([[steps, height, width]]))
    tokens = torch.cat(list(found.pooler_output)).view(steps, rows * columns, -1)
    kept = _kept(method, tokens)
    per_step = int(method.engine.seconds_per_step * runner.tokens_per_second)
    stream.add(
        embed(torch.tensor(runner.vision_start_id)), (stream.next_id(),) * 3, ("start", number)
    )
    base = stream.next_id()
    for step in range(steps):
        for place in range(rows * columns):
            if kept[step, place]:
                ids = (step * per_step, place // columns, place % columns)
                stream.add(tokens[step, place], tuple(base + i for i in ids), ("video", number))
    # Dropped tokens keep their ids: what follows stands behind the last of them.
    end = base + max((steps - 1) * per_step, rows - 1, columns - 1) + 1
    stream.add(embed(torch.tensor(runner.vision_end_id)), (end,) * 3, ("end", number))
    return tokens[kept].mean(0)


def _kept(method: Method, tokens: torch.Tensor) -> torch.Tensor:
    """Chunk-intra: step 0, and every column in which some step differs from the one before."""
    kept = torch.ones(tokens.shape[:2], dtype=torch.bool)
    if method.prune is not None:
        similar = torch.cosine_similarity(tokens[1:], tokens[:-1], dim=-1)
        kept[1:] = (similar < method.prune.threshold).any(0)
    return kept


def _read(method: Method, means: list[torch.Tensor], query: torch.Tensor) -> set[int]:
    """The chunks that the question reads."""
    rule = method.retrieve
    if rule is None:
        return set(range(len(means)))
    newest = list(range(len(means)))[len(means) - rule.force_last :] if rule.force_last else []
    scores = torch.cosine_similarity(torch.stack(means), query[None], dim=-1).tolist()
    if rule.relevant is not None:
        middle = sorted(scores)[(len(scores) - 1) // 2]
        away = sorted(abs(score - middle) for score in scores)[(len(scores) - 1) // 2]
        least = middle + rule.relevant * away
        scores = [10.0 + n if score >= least else score for n, score in enumerate(scores)]
    others = sorted((n for n in range(len(means)) if n not in newest), key=lambda n: -scores[n])
    return {*newest, *others[: rule.k - len(newest)]}


def _visible(
    method: Method, who: list[tuple[str, int]], read: set[int], chunks: int
) -> torch.Tensor:
    """[N, N] bool: the row sees the column."""
    reach = method.engine.window_chunks
    number = torch.tensor([n for _, n in who])
    is_ = {
        kind: torch.tensor([k == kind for k, _ in who])
        for kind in ("system", "start", "video", "end", "question")
    }
    asked_about = is_["video"] & torch.isin(number, torch.tensor(sorted(read)))
    asked_about |= is_["end"] & (number == chunks - 1)
    visible = torch.ones(len(who), len(who), dtype=torch.bool).tril()
    for row, (kind, mine) in enumerate(who):
        if kind == "question" and method.retrieve is not None:
            visible[row] &= is_["system"] | is_["question"] | asked_about
        elif kind not in ("question", "system") and reach is not None:
            system = is_["system"] & (method.engine.system_prompt == "always" or mine < reach)
            visible[row] &= system | (~is_["system"] & (mine - number <= reach))
    return visible
