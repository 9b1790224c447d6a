"""Batches of videos with questions, laid out exactly as the runner lays them out in a stream.

Per chunk ``vision_start``, video tokens, ``vision_end``; ids continue at the largest so far + 1; a
step counts 1 or 2 ids, as clips of two steps a second do when their rate is measured or fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tiny import files
from tiny.net import Branches, Trunk
from tiny.recipe import PLACE_SHARES, SHARES
from vicostream_kernels.evaluation._draw import SPLIT_VARIANTS, draw
from vicostream_kernels.evaluation._questions import CHUNK, NEVER, Asked, Truth
from vicostream_kernels.evaluation._world import CELLS, COLOURS, SHAPES, Log, simulate

IDS = files.ids()
#: What a question is followed by, and the tokens of the longest question with its answer.
AFTER = (IDS["<|im_end|>"], IDS["assistant"])
LONGEST = 7 + len(AFTER) + 1
#: Ids of a stream of 300 chunks, which is as far as ids left out reach on average.
_LONGEST_STREAM = 1800
#: Steps of the longest streams that chunks are taken from.
_LONGEST_PARENT = 1600


@dataclass
class Batch:
    """``frames`` uint8 [B * T, 84, 84, 3], one a step; ``layout`` of the trunk; questions.

    ``answers`` [B, Q] ids (-100: no target), ``shapes``, ``colours`` [B, T, 9] int64 with the
    index of "nothing" behind the last name; ``numbers`` [B, chunks]: which chunk of its stream each
    is.
    """

    frames: torch.Tensor
    layout: Layout
    positions: torch.Tensor
    next_ids: np.ndarray
    questions: list[list[Asked]]
    logs: list[Log]
    truths: list[Truth]
    shapes: torch.Tensor
    colours: torch.Tensor
    numbers: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Trunk of T steps: ``ids`` [L] (video -1), ``chunk`` [L] (prefix -1), ``step`` [L] (text -1),
    ``cell`` [L]."""

    steps: int
    ids: np.ndarray
    chunk: np.ndarray
    step: np.ndarray
    cell: np.ndarray

    @property
    def chunks(self) -> int:
        return -(-self.steps // CHUNK)


def layout(steps: int) -> Layout:
    rows = [(IDS["<|im_start|>"], -1, -1, -1), (IDS["user"], -1, -1, -1)]
    for chunk in range(-(-steps // CHUNK)):
        rows.append((IDS["<|vision_start|>"], chunk, -1, -1))
        for step in range(chunk * CHUNK, min(steps, (chunk + 1) * CHUNK)):
            rows += [(-1, chunk, step, cell) for cell in range(CELLS)]
        rows.append((IDS["<|vision_end|>"], chunk, -1, -1))
    return Layout(steps, *(np.array(column) for column in zip(*rows)))


def positions(
    place: Layout, interval: int, jumps: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [3, L] of the trunk and the next free id after each chunk [chunks].

    ``jumps`` [chunks]: ids left out before each chunk, as if more video had been there.
    """
    out = np.zeros((3, len(place.ids)), np.int64)
    out[:, :2] = (0, 1)
    after, free = np.zeros(place.chunks, np.int64), 2
    for chunk in range(place.chunks):
        free += 0 if jumps is None else int(jumps[chunk])
        where = np.flatnonzero(place.chunk == chunk)
        body = where[1:-1]
        step = place.step[body] - chunk * CHUNK
        out[:, where[0]] = free
        out[0, body] = free + 1 + step * interval
        out[1, body] = free + 1 + place.cell[body] // 3
        out[2, body] = free + 1 + place.cell[body] % 3
        span = 1 + max(int(step[-1]) * interval, 2)
        out[:, where[-1]] = free + 1 + span
        free += span + 2
        after[chunk] = free
    return out, after


def make_batch(
    rng: np.random.Generator,
    videos: int,
    steps: int,
    questions: int,
    shares: dict[str, float] = SHARES,
    *,
    split: str = "train",
    at_end: bool = False,
    sparse: bool = False,
) -> Batch:
    """A batch of ``videos`` of ``steps`` steps with ``questions`` each, at chunk ends. ``sparse``:
    their chunks are what questions read of streams that are much longer."""
    place = layout(steps)
    train = split == "train"
    logs, frames, ids, nexts, asked, truths, numbers = [], [], [], [], [], [], []
    for _ in range(videos):
        pace = 1.0
        if train:
            pace = rng.uniform(0.2, 0.5) if steps <= CHUNK else rng.choice((0.4, 0.7, 1.0, 1.0))
        pool = int(rng.integers(5, 22)) if train else 20
        length = steps
        if sparse:
            length = int(np.exp(rng.uniform(np.log(2 * steps), np.log(_LONGEST_PARENT))))
            length = max(length // CHUNK, place.chunks) * CHUNK
        log = simulate(rng, length, variants=SPLIT_VARIANTS[split], pool=pool, pace=float(pace))
        number = np.arange(place.chunks)
        if sparse:
            number = _read(rng, log, place.chunks)
            log = _excerpt(log, number)
        numbers.append(number)
        logs.append(log)
        pictures = draw(rng, log, 1)
        frames.append(_soften(pictures) if train and rng.random() < 0.3 else pictures)
        jumps = _jumps(rng, place.chunks) if train and not sparse else None
        interval = int(rng.integers(1, 3))
        # What was read stands without gaps, or where it stood in the stream.
        if sparse and rng.random() < 0.3:
            jumps = (np.diff(number, prepend=-1) - 1) * (3 * interval + 3)
        at, after = positions(place, interval, jumps)
        ids.append(at)
        nexts.append(after)
        truth = Truth(log)
        truths.append(truth)
        asked.append(_questions(rng, truth, questions, shares, at_end))
    pixels = np.concatenate(frames)
    shapes = np.stack([log.shape for log in logs]).astype(np.int64)
    colours = np.stack([log.colour for log in logs]).astype(np.int64)
    shapes[shapes < 0] = len(SHAPES)
    colours[colours < 0] = len(COLOURS)
    return Batch(
        frames=torch.from_numpy(pixels),
        layout=place,
        positions=torch.from_numpy(np.stack(ids, 1)),
        next_ids=np.stack(nexts),
        questions=asked,
        logs=logs,
        truths=truths,
        shapes=torch.from_numpy(shapes),
        colours=torch.from_numpy(colours),
        numbers=np.stack(numbers),
    )


def _read(rng: np.random.Generator, log: Log, count: int) -> np.ndarray:
    """Chunks of a stream, ascending: the newest; of one to four shapes the latest, as many as
    there is room for, or some of each and some of before; and any others."""
    seen = (log.place >= 0).reshape(-1, CHUNK, len(SHAPES)).any(1)
    chosen = np.zeros(len(seen), bool)
    chosen[-1] = True
    known = rng.permutation(np.flatnonzero(seen.any(0)))
    if rng.random() < 0.6:
        where = np.flatnonzero(seen[:, known[: rng.integers(1, 3)]].any(1))
        chosen[where[max(0, len(where) - count + 1) :]] = True
    else:
        for shape in known[: rng.integers(2, 5)]:
            where = np.flatnonzero(seen[:, shape])
            late, early = where[-4:], where[:-4]
            share = rng.choice((0.3, 0.6, 1.0))
            for chunk in (*late[::-1], *rng.permutation(early)[: int(share * len(early))]):
                if chosen.sum() < count:
                    chosen[chunk] = True
    others = rng.permutation(np.flatnonzero(~chosen))
    chosen[others[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def _excerpt(log: Log, number: np.ndarray) -> Log:
    """The log as if nothing but these chunks had been; what moved between two is not known."""
    steps = (number[:, None] * CHUNK + np.arange(CHUNK)).flatten()
    parts = {name: getattr(log, name)[steps] for name in log.__dataclass_fields__}
    alone = np.flatnonzero(np.diff(number, prepend=-2) > 1) * CHUNK
    parts["moved"][alone] = -1
    return Log(**parts)


def _soften(frames: np.ndarray) -> np.ndarray:
    """Less sharp and less noisy, as lossy compression and resizing leave a picture."""
    x = frames.astype(np.uint16)
    x[:, :, 1:-1] = (x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]) >> 2
    x[:, 1:-1] = (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) >> 2
    return x.astype(np.uint8)


def _jumps(rng: np.random.Generator, chunks: int) -> np.ndarray:
    """Ids left out: a short training video looks like pieces of a long stream. Two places are
    left out, or something before every chunk, as when a question reads few of many."""
    jumps = np.zeros(chunks)
    style = rng.random()
    if chunks < 2 or style < 0.35:
        return jumps
    if style < 0.65:
        mean = 60 if rng.random() < 0.7 else 500
        for _ in range(2):
            jumps[rng.integers(0, chunks)] += int(rng.exponential(mean))
        return jumps
    mean = np.exp(rng.uniform(np.log(3), np.log(_LONGEST_STREAM / chunks)))
    return np.floor(rng.exponential(mean, chunks))


def _questions(
    rng: np.random.Generator, truth: Truth, count: int, shares: dict[str, float], at_end: bool
) -> list[Asked]:
    steps = truth.log.steps
    ends = [steps - 1] if steps <= CHUNK or at_end else list(range(CHUNK - 1, steps, CHUNK))
    forms = rng.choice(list(shares), size=3 * count, p=list(shares.values()))
    asked: list[Asked] = []
    for form in forms:
        step = ends[int(rng.integers(len(ends)))]
        if form in ("last_color", "last_place"):
            age = CHUNK if steps > CHUNK and rng.random() < 0.7 else 0
            q = truth.pick(rng, form, step, age=age)
            # Half are about shapes that looked or stood otherwise before: the rare, hard ones.
            for _ in range(4 if rng.random() < 0.5 else 0):
                if q is None or _changed(truth, q):
                    break
                q = truth.pick(rng, form, step, age=age)
        else:
            q = truth.pick(rng, form, step, nothing=0.2 if shares is PLACE_SHARES else 0.35)
        if q is not None:
            asked.append(q)
            if len(asked) == count:
                return asked
    while len(asked) < count:
        asked.append(truth.ask("count", (), steps - 1))
    return asked


def _changed(truth: Truth, q: Asked) -> bool:
    """Whether the evidence is only part of what was seen of the shape."""
    first = np.flatnonzero(truth.log.place[: q.step + 1, q.about[0]] >= 0)
    return bool(q.evidence) and q.evidence[0][0] > first[0]


# -- what sees what ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """Masks of a batch and the targets that go with them."""

    trunk: Trunk
    branches: Branches
    answers: torch.Tensor
    kept: torch.Tensor
    #: [B] chunks before its own that a chunk sees; -1: all.
    windows: np.ndarray


def full_views(batch: Batch) -> Views:
    """Everything sees everything before it."""
    place = batch.layout
    count = len(place.ids)
    causal = torch.ones(1, count, count, dtype=torch.bool).tril()
    chunk = torch.from_numpy(place.chunk)
    asked = torch.tensor([[q.step // CHUNK for q in qs] for qs in batch.questions])
    mask = chunk <= asked[..., None]
    answers = torch.tensor([[IDS[q.answer] for q in qs] for qs in batch.questions])
    kept = torch.ones(len(batch.logs), place.steps, CELLS, dtype=torch.bool)
    return _views(batch, causal, mask, answers, kept, np.full(len(batch.logs), -1))


def bounded_views(rng: np.random.Generator, batch: Batch, similar: np.ndarray) -> Views:
    """Random pruning, window and retrieval for each video, with the answers that remain true.

    ``similar`` [B, T, 9]: cosine of each visual token with the one a step before.
    """
    place = batch.layout
    videos = len(batch.logs)
    chunk, step, cell = place.chunk, place.step, place.cell
    body = step >= 0
    kept = np.stack([_kept(rng, similar[b]) for b in range(videos)])
    alive = np.ones((videos, len(chunk)), bool)
    alive[:, body] = kept[:, step[body], cell[body]]
    trunk = np.empty((videos, len(chunk), len(chunk)), bool)
    causal = np.tril(np.ones((len(chunk), len(chunk)), bool))
    windows = []
    for b in range(videos):
        number = np.where(chunk < 0, -1, batch.numbers[b][chunk])
        reach = number[:, None] - number[None]
        window = int(rng.choice((-1, 0, 1, 2, 4, 4, 4)))
        windows.append(window)
        see = causal
        if window >= 0:
            near = (reach <= window) & (chunk >= 0)
            # The system prompt: for good, or as long as the window covers the first chunk.
            prefix = True if rng.random() < 0.5 else number[:, None] <= window
            see = causal & (near | ((chunk < 0)[None] & prefix))
        trunk[b] = see & alive[b]
        np.fill_diagonal(trunk[b], True)
    mask = np.zeros((videos, len(batch.questions[0]), len(chunk)), bool)
    answers = np.full(mask.shape[:2], -100)
    for b, qs in enumerate(batch.questions):
        style = rng.random()  # everything, or retrieval
        for i, q in enumerate(qs):
            last = q.step // CHUNK
            if style < 0.3:
                mask[b, i] = alive[b] & (chunk <= last)
                answers[b, i] = IDS[q.answer]
                continue
            chosen = _chosen(rng, q, last, batch.logs[b].place)
            answer = _still_true(batch.truths[b], q, chosen, windows[b])
            if answer is not None:
                answers[b, i] = IDS[answer]
            listed = np.isin(chunk, np.flatnonzero(chosen)) & body
            end = (chunk == last) & (place.ids == IDS["<|vision_end|>"])
            mask[b, i] = alive[b] & (listed | end | (chunk < 0))
    return _views(
        batch,
        torch.from_numpy(trunk),
        torch.from_numpy(mask),
        torch.from_numpy(answers),
        torch.from_numpy(kept),
        np.array(windows),
    )


def _kept(rng: np.random.Generator, similar: np.ndarray) -> np.ndarray:
    """Tokens [T, 9] that dropping leaves: the first step of a chunk, columns in which something
    changed, and a random part of the others (no looser threshold leaves anything else)."""
    steps = similar.shape[0]
    kept = np.ones((steps, CELLS), bool)
    style = rng.random()
    if style < 0.15:
        return kept
    threshold = rng.choice((0.4, 0.6, 0.8, 0.9))
    extra = 0.0 if style < 0.7 else rng.uniform(0, 0.6)
    for first in range(0, steps, CHUNK):
        part = slice(first + 1, min(first + CHUNK, steps))
        changed = (similar[part] < threshold).any(0) | (rng.random(CELLS) < extra)
        kept[part] = changed
    return kept


def _chosen(rng: np.random.Generator, q: Asked, last: int, place: np.ndarray) -> np.ndarray:
    """Chunks [last + 1] that a question reads. The newest, and of those that show its shapes the
    newest (what a rule by relevance and age finds, which now and then misses one); or the newest,
    mostly one with the evidence, and others. ``place``: of the log."""
    if q.kind in ("past", "order", "motion") and rng.random() < 0.5:
        shown = (place[: (last + 1) * CHUNK, list(q.about)] >= 0).any(1)
        where = np.flatnonzero(np.add.reduceat(shown, np.arange(0, len(shown), CHUNK)) > 0)
        where = where[rng.random(len(where)) > 0.05][-int(rng.integers(2, 9)) :]
        chosen = np.zeros(last + 1, bool)
        chosen[where] = True
        chosen[rng.integers(0, last + 1, rng.integers(0, 3))] = True
        chosen[last] = True
        return chosen
    chosen = rng.random(last + 1) < rng.choice((0.1, 0.3, 0.6))
    chosen[last] = True
    lost = rng.random() < 0.2
    for first, end in q.evidence:
        chunks = np.arange(first // CHUNK, end // CHUNK + 1)
        chunks = chunks[chunks < last]
        if lost:
            chosen[chunks] = False
        elif chunks.size and not chosen[chunks].any():
            chosen[rng.choice(chunks)] = True
    return chosen


def _still_true(truth: Truth, q: Asked, chosen: np.ndarray, window: int) -> str | None:
    """The answer from the chosen chunks alone; None where they leave it open."""
    if q.form in ("shape", "color", "count") or q.answer == NEVER:
        return q.answer
    steps = np.repeat(chosen, CHUNK)[: q.step + 1]
    if q.form == "motion":
        ((before, when),) = q.evidence
        if not steps[when]:
            place = truth.log.place[: q.step + 1, q.about[0]]
            # Later chunks may have seen it through the window, earlier moves may be the last read.
            return None if (steps & (place >= 0)).any() else NEVER
        # Across chunks the earlier one must be read, or have been seen by the later.
        joined = before // CHUNK == when // CHUNK or steps[before] or window != 0
        return q.answer if joined else None
    place = truth.log.place[: q.step + 1]
    seen = [np.flatnonzero(steps & (place[:, shape] >= 0)) for shape in q.about]
    if q.form == "order":
        # One that nothing read shows is taken to be older: the newest are what is read.
        newest = [times[-1] if times.size else -1 for times in seen]
        if max(newest) < 0:
            return None
        later = SHAPES[q.about[int(newest[1] > newest[0])]]
        return q.answer if later == q.answer else None
    if not seen[0].size:
        return NEVER
    return truth.ask(q.form, q.about, int(seen[0][-1])).answer


def _views(
    batch: Batch,
    trunk: torch.Tensor,
    mask: torch.Tensor,
    answers: torch.Tensor,
    kept: torch.Tensor,
    windows: np.ndarray,
) -> Views:
    ids, length, at = _tokens(batch)
    return Views(
        Trunk(torch.from_numpy(batch.layout.ids), batch.positions, trunk),
        Branches(ids, at, length, mask),
        answers,
        kept,
        windows,
    )


def _tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [B, Q, N] of questions, template and answer, their lengths, and positions."""
    videos, quests = len(batch.questions), len(batch.questions[0])
    ids = np.zeros((videos, quests, LONGEST), np.int64)
    length = np.zeros((videos, quests), np.int64)
    start = np.zeros((videos, quests), np.int64)
    for b, qs in enumerate(batch.questions):
        for i, q in enumerate(qs):
            row = [*question_ids(q.text), *AFTER, IDS[q.answer]]
            ids[b, i, : len(row)] = row
            length[b, i] = len(row)
            start[b, i] = batch.next_ids[b, q.step // CHUNK]
    at = start[..., None] + np.arange(LONGEST)
    return torch.from_numpy(ids), torch.from_numpy(length), torch.from_numpy(at)


def question_ids(text: str) -> list[int]:
    """As the tokenizer has them; a test holds it to that."""
    return [IDS[word] for word in text.lower().replace("?", " ?").replace(",", " ").split()]
