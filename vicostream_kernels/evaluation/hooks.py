"""What no method may know or do: oracles, chance, and dropping at random, to compare methods with.

Selectors go to ``Stream.ask(selector=...)``, scorers into a ``Method``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vicostream_kernels.evaluation._world import SHAPES
from vicostream_kernels.evaluation.streamqa import FRAMES_PER_STEP, Clip, Question
from vicostream_kernels.methods import External, Method, RetrieveRule, ScoredChunk, Scorer
from vicostream_kernels.ops.prune import PruneRule
from vicostream_kernels.ops.retrieve import TopBlocks
from vicostream_kernels.pipeline.selection import Asked, Rows, Selector, chosen_rows

#: Selectors by name; ``rule`` is the method's own, ``missing`` reads all but the evidence.
SELECTORS = ("rule", "oracle", "random", "missing")


def overlaps(block: Any, spans: Sequence[tuple[float, float]]) -> bool:
    """Whether a chunk (``start_s``, ``end_s``) holds a frame of one of the spans."""
    return any(block.start_s <= end and block.end_s >= start for start, end in spans)


@dataclass(frozen=True)
class Oracle:
    """Reads the chunks that hold the evidence, newest first, and the newest ``last`` in any case;
    ``k`` in all, as the rules count."""

    spans: tuple[tuple[float, float], ...]
    k: int
    last: int = 0
    per_layer: bool = field(default=False, init=False)

    def select(self, asked: Asked) -> TopBlocks:
        blocks = asked.rows.blocks
        forced = _newest(asked.rows, min(self.last, self.k))
        evidence = [n for n in range(len(blocks)) if overlaps(blocks[n], self.spans)]
        free = [n for n in reversed(evidence) if n not in forced]
        return chosen_rows([*forced, *free[: self.k - len(forced)]], asked.rows)


@dataclass(frozen=True)
class Chance:
    """Reads ``k`` chunks at random, the newest ``last`` among them."""

    seed: int
    k: int
    last: int = 0
    per_layer: bool = field(default=False, init=False)

    def select(self, asked: Asked) -> TopBlocks:
        forced = _newest(asked.rows, min(self.last, self.k))
        order = torch.randperm(
            len(asked.rows), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        free = [n for n in order if n not in forced]
        return chosen_rows([*forced, *free[: self.k - len(forced)]], asked.rows)


@dataclass(frozen=True)
class Missing:
    """Reads everything but the chunks that hold the evidence."""

    spans: tuple[tuple[float, float], ...]
    per_layer: bool = field(default=False, init=False)

    def select(self, asked: Asked) -> TopBlocks:
        rows = [n for n, b in enumerate(asked.rows.blocks) if not overlaps(b, self.spans)]
        return chosen_rows(rows, asked.rows)


def _newest(rows: Rows, count: int) -> list[int]:
    return list(range(len(rows)))[max(0, len(rows) - count) :] if count else []


def selector(
    name: str, rule: RetrieveRule | None, question: Question, seed: int
) -> Selector | None:
    """The selector ``name`` for one question, with the rule's own k; None is the rule itself.

    Raises ``ValueError`` for an unknown name, and where the method retrieves nothing by number.
    """
    if name not in SELECTORS:
        raise ValueError(f"selector={name!r}: one of {', '.join(SELECTORS)}")
    if name == "rule":
        return None
    if rule is None or rule.k is None:
        raise ValueError(f"selector={name!r}: needs a method with retrieve.k")
    if name == "missing":
        return Missing(question.evidence)
    if name == "oracle":
        return Oracle(question.evidence, rule.k, rule.force_last)
    return Chance(seed, rule.k, rule.force_last)


@dataclass(frozen=True)
class RandomScore(Scorer):
    """A score by chance, new for each chunk of a stream; the same in every run."""

    gives = frozenset({"score"})
    name = "random"
    seed: int = 0

    def __call__(self, chunk: ScoredChunk, state: dict[str, Any]) -> External:
        state["chunk"] = number = state.get("chunk", -1) + 1
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
        score = torch.rand(chunk.tokens.shape[:2], generator=generator)
        return External(score=score.to(chunk.tokens.device))


def drop_at_random(method: Method, keep: float) -> Method:
    """``method`` with its pruning replaced: of every chunk the share ``keep`` stays, by chance."""
    rule = PruneRule(reference=(), external=1.0, keep="above", ratio=keep, scope="chunk")
    return dataclasses.replace(method, prune=rule, scorer=RandomScore())


@dataclass(frozen=True)
class Erase(Scorer):
    """Leaves out single tokens: ``gone`` holds (step of the stream, location)."""

    gives = frozenset({"mask"})
    name = "erase"
    gone: frozenset[tuple[int, int]] = frozenset()

    def __call__(self, chunk: ScoredChunk, state: dict[str, Any]) -> External:
        steps, locations = chunk.tokens.shape[:2]
        first = state.get("steps", 0)
        state["steps"] = first + steps
        mask = torch.ones(steps, locations, dtype=torch.bool)
        for step, location in self.gone:
            if first <= step < first + steps:
                mask[step - first, location] = False
        return External(mask=mask.to(chunk.tokens.device))


def without_tokens(method: Method, gone: frozenset[tuple[int, int]]) -> Method:
    """``method`` with no other pruning than that the tokens ``gone`` never enter the model."""
    return dataclasses.replace(method, prune=PruneRule(reference=()), scorer=Erase(gone))


def evidence_tokens(clip: Clip, question: Question) -> frozenset[tuple[int, int]]:
    """(step, location) of the tokens that show the shapes which a question names, while its
    evidence lasts. Needs a clip with its log."""
    named = [n for n, shape in enumerate(SHAPES) if re.search(rf"\b{shape}\b", question.text)]
    gone = set()
    for start, end in question.evidence:
        first = int(start * clip.fps) // FRAMES_PER_STEP
        last = int(end * clip.fps) // FRAMES_PER_STEP
        for step in range(first, last + 1):
            gone |= {(step, int(c)) for c in clip.log.place[step, named] if c >= 0}
    return frozenset(gone)
