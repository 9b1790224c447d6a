"""What the network is taught: answers, names of what each visual token shows, and retrieval."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from tiny.batches import CHUNK, IDS, Batch, Layout, Views, question_ids
from vicostream_kernels.evaluation._questions import (
    FORMS,
    NEVER,
    NOTHING,
    Asked,
    Truth,
    _latest,
)
from vicostream_kernels.evaluation._world import CELLS, COLOURS, MOVES, PLACES, SHAPES

_NOTHING_WEIGHT, _UNMOVED_WEIGHT = 0.15, 0.3
WAYS = tuple(name for name, _, _ in MOVES)
#: The head that counts; the first one looks up. They share no keys.
_COUNTING = 2
#: The head of the next layer by which the token before the answer looks.
_ANSWERING = 3
#: Targets of the cosine between a token and the one a step before.
_SAME, _OTHER, _RECOLOURED = 0.97, 0.15, 0.5
#: Cosines of a question with chunks that answer it, and with those that do not show its shapes.
_RELEVANT, _IRRELEVANT = 0.25, 0.03


def answer_loss(
    logits: torch.Tensor, views: Views
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy of the answer, of the end after it, and what was answered [B, Q]."""
    length = views.branches.length
    rows = logits.flatten(0, 1).float()
    ends = length.flatten()
    index = torch.arange(len(ends))
    answer, after = rows[index, ends - 2], rows[index, ends - 1]
    loss = F.cross_entropy(answer, views.answers.flatten(), ignore_index=-100)
    stop = F.cross_entropy(after, torch.full_like(ends, IDS["<|im_end|>"]))
    return loss, stop, answer.argmax(-1).view(length.shape)


def lookup_loss(looked: torch.Tensor, batch: Batch, views: Views) -> torch.Tensor:
    """One head looks from the word for a place or a shape at the tokens that show it: the newest
    of a place, the last sightings of a shape.

    Without it the model names whatever is visible, for thousands of steps: nothing rewards the
    first half of a lookup. ``looked`` [B, H, Q, N, L]. What a question can't see is left out.
    """
    layout = batch.layout
    at = _rows(layout)
    visible = views.branches.mask.numpy()
    rows, shown = [], []
    for b, questions in enumerate(batch.questions):
        for i, q in enumerate(questions):
            ids = question_ids(q.text)
            names = PLACES if q.kind == "now" else SHAPES
            for index in q.about:
                mask = np.zeros(len(layout.ids), bool)
                mask[[at[step, cell] for step, cell in _sights(batch.truths[b], q, index)]] = True
                mask &= visible[b, i]
                if mask.any():
                    rows.append((b, i, ids.index(IDS[names[index]])))
                    shown.append(mask)
    if not rows:
        return looked.new_zeros(())
    b, i, word = torch.tensor(rows).T
    mass = (looked[b, 0, i, word].float() * torch.from_numpy(np.stack(shown))).sum(-1)
    return -(mass + 1e-4).log().mean()


def answering_loss(again: torch.Tensor, batch: Batch, views: Views) -> torch.Tensor:
    """From the token before the answer one head looks straight at what the answer is about: of two
    shapes at the one that came last. Which of two times is later has to be read off the rotary
    angles there; taught by the answers alone it comes slowly. ``again`` [B, H, Q, N, L]."""
    at = _rows(batch.layout)
    visible, length = views.branches.mask.numpy(), views.branches.length
    rows, shown = [], []
    for b, questions in enumerate(batch.questions):
        for i, q in enumerate(questions):
            if not q.about or views.answers[b, i] != IDS[q.answer]:
                continue
            about = q.about[0] if q.form != "order" else SHAPES.index(q.answer)
            mask = np.zeros(len(batch.layout.ids), bool)
            mask[[at[step, cell] for step, cell in _sights(batch.truths[b], q, about)]] = True
            mask &= visible[b, i]
            if mask.any():
                rows.append((b, i, int(length[b, i]) - 2))
                shown.append(mask)
    if not rows:
        return again.new_zeros(())
    b, i, last = torch.tensor(rows).T
    mass = (again[b, _ANSWERING, i, last].float() * torch.from_numpy(np.stack(shown))).sum(-1)
    return -(mass + 1e-4).log().mean()


def counting_loss(looked: torch.Tensor, batch: Batch, views: Views, bounded: bool) -> torch.Tensor:
    """Another head looks from "shapes" in "How many shapes now?" at all cells of the newest step
    alike: how much of what it brings back is a shape is the number.

    In a bounded stream the newest step is not whole: there the head looks at the first step of the
    newest chunk, which is, and at what is left of the last: the number then and what changed.
    """
    layout = batch.layout
    ids = question_ids(FORMS["count"][1])
    word = ids.index(IDS["shapes"])
    visible = views.branches.mask.numpy()
    rows, shown = [], []
    for b, questions in enumerate(batch.questions):
        for i, q in enumerate(questions):
            if q.form == "count":
                wanted = layout.step == q.step
                if bounded:
                    wanted = wanted | (layout.step == q.step // CHUNK * CHUNK)
                rows.append((b, i))
                shown.append(wanted & visible[b, i])
    if not rows:
        return looked.new_zeros((), dtype=torch.float32)
    b, i = torch.tensor(rows).T
    there = torch.from_numpy(np.stack(shown))
    number = there.sum(-1, keepdim=True)
    share = looked[b, _COUNTING, i, word].float() * number
    return -((share + 1e-3).log() * there / number).sum(-1).mean()


def _sights(truth: Truth, q: Asked, index: int) -> list[tuple[int, int]]:
    """(step, cell) of the tokens that show what a question asks about one of its words."""
    log = truth.log
    if q.kind == "now":
        first = q.step
        while first % CHUNK and (
            log.shape[first - 1, index] == log.shape[q.step, index]
            and log.colour[first - 1, index] == log.colour[q.step, index]
        ):
            first -= 1
        return [(step, index) for step in range(first, q.step + 1)]
    if not q.evidence:
        return []
    if q.form == "order":
        span = (int(truth.start[q.step, index]), int(truth.last[q.step, index]))
    elif q.form == "motion":
        # Where it went to: those tokens know where it came from.
        ((_, when),) = q.evidence
        life = log.life[: q.step + 1, index] == log.life[when, index]
        span = (when, int(np.flatnonzero(life)[-1]))
    else:
        (span,) = q.evidence
    return [(step, int(log.place[step, index])) for step in range(span[0], span[1] + 1)]


def follow_loss(
    followed: torch.Tensor, batch: Batch, views: Views, hues: bool = False
) -> torch.Tensor:
    """One head looks from a token of a shape that moved at those of the place that it left: nothing
    else makes a token find its former self. ``followed`` [B, L, L]. ``hues``: and from one that
    only changed its colour at those of the colour before."""
    at = _rows(batch.layout)
    visible = views.trunk.mask.numpy()
    where, shown = [], []
    for b, (truth, window) in enumerate(zip(batch.truths, views.windows)):
        ways = _ways(truth, window, batch.numbers[b])
        place = truth.log.place
        for step, cell in zip(*np.nonzero((ways >= 0) & (ways < len(WAYS)))):
            shape = truth.log.shape[step, cell]
            last = int(truth.moved[step, shape]) - 1
            first, start = last, truth.start[step, shape]
            while first > start and place[first - 1, shape] == place[last, shape]:
                first -= 1
            mask = np.zeros(len(batch.layout.ids), bool)
            mask[at[first : last + 1, place[last, shape]]] = True
            mask &= visible[b % len(visible), at[step, cell]]
            if mask.any() and views.kept[b, step, cell]:
                where.append((b, at[step, cell]))
                shown.append(mask)
        if not hues:
            continue
        only = (_hues(truth, window, batch.numbers[b]) == 1) & (ways == len(WAYS))
        for step, cell in zip(*np.nonzero(only)):
            shape = truth.log.shape[step, cell]
            life = np.arange(truth.start[step, shape], step)
            others = life[truth.colour[life, shape] != truth.colour[step, shape]]
            mask = np.zeros(len(batch.layout.ids), bool)
            mask[at[others, cell]] = True
            mask &= visible[b % len(visible), at[step, cell]]
            if mask.any() and views.kept[b, step, cell]:
                where.append((b, at[step, cell]))
                shown.append(mask)
    if not where:
        return followed.new_zeros((), dtype=torch.float32)
    b, row = torch.tensor(where).T
    mass = (followed[b, row].float() * torch.from_numpy(np.stack(shown))).sum(-1)
    return -(mass + 1e-4).log().mean()


def _rows(layout: Layout) -> np.ndarray:
    """[T, 9]: where in the trunk the token of a step and a cell lies."""
    at = np.zeros((layout.steps, CELLS), np.int64)
    body = np.flatnonzero(layout.step >= 0)
    at[layout.step[body], layout.cell[body]] = body
    return at


def trail_loss(
    trails: torch.Tensor, words: torch.Tensor, batch: Batch, views: Views
) -> torch.Tensor:
    """A token that shows a shape says which way the shape came: its last move since it appeared, as
    far as the token can see back. That is what questions about motion are answered from, and how a
    place that was left can be told from the one that was taken. ``trails`` [2, B, T * 9, D]."""
    target = torch.from_numpy(
        np.stack([_ways(*of) for of in zip(batch.truths, views.windows, batch.numbers)])
    )
    target = target.masked_fill(~views.kept, -100).flatten()
    table = F.normalize(words[[IDS[name] for name in (*WAYS, NEVER)]].float(), dim=-1)
    weight = torch.ones(len(table))
    weight[-1] = _UNMOVED_WEIGHT
    loss = trails.new_zeros((), dtype=torch.float32)
    if bool((target < 0).all()):
        return loss
    for x in trails:
        cosine = F.normalize(x.float().flatten(0, 1), dim=-1) @ table.T
        loss = loss + F.cross_entropy(16 * cosine, target, weight) / len(trails)
    return loss


def _ways(truth: Truth, window: int, numbers: np.ndarray) -> np.ndarray:
    """[T, 9]: the index in ``WAYS`` of how the shape in a cell moved last since it came, their
    number where it did not, -100 where nothing is or where a window of so many chunks (-1: no
    limit) hides it. ``numbers``: of the chunks in the stream."""
    log = truth.log
    out = np.full(log.shape.shape, -100)
    step, cell = np.nonzero(log.shape >= 0)
    shape = log.shape[step, cell]
    start, when = truth.start[step, shape], truth.moved[step, shape]
    moved = when >= start
    # The step before the move must be seen as well.
    first = np.where(moved, when - 1, start)
    reach = numbers[step // CHUNK] - numbers[first // CHUNK]
    hidden = (window >= 0) & (reach > window)
    way = np.where(moved, log.moved[when.clip(0), shape], len(WAYS))
    out[step, cell] = np.where(hidden, -100, way)
    return out


def hue_loss(trails: torch.Tensor, words: torch.Tensor, batch: Batch, views: Views) -> torch.Tensor:
    """A token that shows a shape says whether that had another colour before, as far as the token
    can see back: what its last colour is told by. ``trails`` [2, B, T * 9, D]."""
    target = torch.from_numpy(
        np.stack([_hues(*of) for of in zip(batch.truths, views.windows, batch.numbers)])
    )
    target = target.masked_fill(~views.kept, -100).flatten()
    if bool((target < 0).all()):
        return trails.new_zeros((), dtype=torch.float32)
    table = F.normalize(words[[IDS[NEVER], IDS["color"]]].float(), dim=-1)
    cosine = F.normalize(trails[-1].float().flatten(0, 1), dim=-1) @ table.T
    return F.cross_entropy(16 * cosine, target, torch.tensor([_UNMOVED_WEIGHT, 1.0]))


def _hues(truth: Truth, window: int, numbers: np.ndarray) -> np.ndarray:
    """[T, 9]: whether the shape in a cell had another colour since it came; -100 as in `_ways`."""
    log = truth.log
    here = (log.life[1:] >= 0) & (log.life[1:] == log.life[:-1])
    changes = np.zeros(log.life.shape, bool)
    changes[1:] = here & (truth.colour[1:] != truth.colour[:-1])
    latest = _latest(changes, np.arange(log.steps, dtype=np.int32)[:, None])
    out = np.full(log.shape.shape, -100)
    step, cell = np.nonzero(log.shape >= 0)
    shape = log.shape[step, cell]
    start, when = truth.start[step, shape], latest[step, shape]
    changed = when > start
    first = np.where(changed, when - 1, start)
    reach = numbers[step // CHUNK] - numbers[first // CHUNK]
    out[step, cell] = np.where((window >= 0) & (reach > window), -100, changed)
    return out


def naming_loss(tokens: torch.Tensor, words: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Each visual token [B, T, 9, D] lies near the words for its shape, colour and place.

    It trains the encoder directly, and gives retrieval by embedding cosine its meaning.
    """
    x = F.normalize(tokens.float().flatten(0, 2), dim=-1)
    loss = x.new_zeros(())
    place = torch.arange(CELLS).expand(batch.shapes.shape)
    for names, target, scale in (
        ((*SHAPES, NOTHING), batch.shapes, 16),
        ((*COLOURS, NOTHING), batch.colours, 16),
        (PLACES, place, 8),  # a smaller scale: more of the token says where it lies
    ):
        table = F.normalize(words[[IDS[name] for name in names]].float(), dim=-1)
        weight = torch.ones(len(names))
        if names[-1] == NOTHING:
            weight[-1] = _NOTHING_WEIGHT
        loss = loss + F.cross_entropy(scale * x @ table.T, target.flatten(), weight)
    return loss


def change_loss(tokens: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Tokens of a cell in which nothing happens stay alike, others turn away: what pruning by
    similarity reads."""
    cosine = similarity(tokens)[:, 1:]
    before, after = batch.shapes[:, :-1], batch.shapes[:, 1:]
    other = before != after
    recoloured = ~other & (batch.colours[:, :-1] != batch.colours[:, 1:])
    same = ~other & ~recoloured
    loss = F.relu(_SAME - cosine)[same].mean()
    for which, limit in ((other, _OTHER), (recoloured, _RECOLOURED)):
        if which.any():
            loss = loss + F.relu(cosine - limit)[which].mean()
    return loss


def similarity(tokens: torch.Tensor) -> torch.Tensor:
    """Cosine [B, T, 9] of each token with the one a step before; 1 at step 0."""
    x = F.normalize(tokens.float(), dim=-1)
    out = torch.ones(x.shape[:3])
    out[:, 1:] = (x[:, 1:] * x[:, :-1]).sum(-1)
    return out


def retrieval_loss(
    tokens: torch.Tensor, words: torch.Tensor, batch: Batch, views: Views
) -> tuple[torch.Tensor, float]:
    """The mean of a question's embeddings finds the chunks with its evidence, by cosine, among
    those of all videos in which its shapes are not; returns the loss and how often it does."""
    videos, steps = tokens.shape[:2]
    chunks = batch.layout.chunks
    kept = views.kept.float()[..., None]
    pad = chunks * CHUNK - steps
    summed = F.pad(tokens.float() * kept, (0, 0, 0, 0, 0, pad)).view(videos, chunks, -1, 128).sum(2)
    number = F.pad(kept, (0, 0, 0, 0, 0, pad)).view(videos, chunks, -1).sum(-1, keepdim=True)
    means = F.normalize(summed / number, dim=-1).flatten(0, 1)

    seen = torch.stack([torch.from_numpy(log.place >= 0) for log in batch.logs])
    seen = F.pad(seen, (0, 0, 0, pad)).view(videos, chunks, CHUNK, -1).any(2).flatten(0, 1)
    who, good, near = [], [], []
    for b, questions in enumerate(batch.questions):
        for i, q in enumerate(questions):
            if q.kind not in ("past", "order", "motion") or q.answer == NEVER:
                continue
            shown = torch.zeros(videos * chunks, dtype=torch.bool)
            for first, last in q.evidence:
                shown[b * chunks + first // CHUNK : b * chunks + last // CHUNK + 1] = True
            who.append((b, i))
            good.append(shown)
            near.append(seen[:, list(q.about)].any(-1) | shown)
    if not who:
        return tokens.new_zeros(()), 1.0
    rows = torch.tensor(who)
    ids = views.branches.ids[rows[:, 0], rows[:, 1]]
    # Without the answer: the prompt is what retrieval knows.
    inside = torch.arange(ids.shape[1]) < views.branches.length[rows[:, 0], rows[:, 1], None] - 1
    query = (words[ids].float() * inside[..., None]).sum(1)
    cosine = F.normalize(query, dim=-1) @ means.T
    good, near = torch.stack(good), torch.stack(near)
    # Every chunk with evidence should stand above all chunks without the shape.
    away = (30 * cosine).masked_fill(near, -1e4).logsumexp(-1)
    worst = (30 * cosine).masked_fill(~good, 1e4).min(-1).values
    best = (30 * cosine).masked_fill(~good, -1e4).max(-1).values
    loss = F.softplus(away - best).mean() + 0.5 * F.softplus(away - worst).mean()
    # And so that "relevant" is a matter of size, not of rank alone.
    loss = loss + 4 * F.relu(_RELEVANT - cosine)[good].mean()
    if not near.all():
        loss = loss + 4 * F.relu(cosine - _IRRELEVANT)[~near].mean()
    hit = float((best > (30 * cosine).masked_fill(near, -1e4).max(-1).values).float().mean())
    return loss, hit
