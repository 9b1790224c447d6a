"""Asks the questions of clips under one arm, and turns the answers into figures."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vicostream_kernels.evaluation.arms import Arm
from vicostream_kernels.evaluation.hooks import overlaps, selector
from vicostream_kernels.evaluation.scoring import best_constant, wilson
from vicostream_kernels.evaluation.streamqa import KINDS, Clip, Question, is_correct, make_clip


@dataclass(frozen=True)
class ClipSet:
    """Which clips are asked about: ``clips`` seeds from ``seed`` on, else as ``make_clip`` has
    them."""

    clips: int = 24
    steps: int = 96
    seed: int = 0
    split: str = "test"
    questions: int = 24
    kinds: tuple[str, ...] = KINDS
    at: str = "spread"

    def make(self, number: int, *, frames: bool = True) -> Clip:
        """Clip ``number``. Raises ``ValueError`` for arguments that ``make_clip`` refuses."""
        return make_clip(
            self.seed + number,
            self.steps,
            split=self.split,
            questions=self.questions,
            kinds=self.kinds,
            at=self.at,
            frames=frames,
        )

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def ask_clip(engine: Any, arm: Arm, clip: Clip, number: int = 0) -> dict[str, Any]:
    """Streams a clip and asks its questions, each with every frame up to its time.

    Returns plain data: ``questions`` (kind, form, said, answer, right, hit: whether a chunk with
    the evidence was read, ttft_ms, blocks) and the stream's figures.
    """
    greedy = engine.runner.sampler(do_sample=False)
    rule, times = engine.method.retrieve, [i / clip.fps for i in range(len(clip.frames))]
    rows, at = [], 0
    with engine.open(fps=clip.fps) as stream:
        for index, question in enumerate(clip.questions):
            upto = at
            while upto < len(times) and times[upto] <= question.time_s:
                upto += 1
            stream.ingest(clip.frames[at:upto], times[at:upto])
            at = upto
            stream.flush()
            chosen = selector(arm.selector, rule, question, 1000 * number + index)
            with stream.ask(
                question.text, question.time_s, sampler=greedy, selector=chosen, max_new_tokens=4
            ) as answer:
                for _ in answer:
                    pass
            rows.append(_row(question, answer.text, answer.figures))
        stream.ingest(clip.frames[at:], times[at:])
        stream.flush()
        recorder = stream.recorder
        figures = {
            "frames": recorder.frames_processed,
            "ingest_s": recorder.ingest_s,
            "seen": recorder.tokens_seen,
            "kept": recorder.tokens_kept,
            "kv_bytes": recorder.kv["bytes"],
        }
    return {"clip": number, "questions": rows, **figures}


def _row(question: Question, said: str, figures: Any) -> dict[str, Any]:
    blocks = [_Span(*span) for span in figures.blocks]
    return {
        "kind": question.kind,
        "form": question.form,
        "time_s": question.time_s,
        "text": question.text,
        "answer": question.answer,
        "said": said.strip(),
        "right": is_correct(said, question),
        "hit": any(overlaps(block, question.evidence) for block in blocks)
        if question.evidence
        else None,
        "blocks": len(blocks),
        "ttft_ms": figures.ttft_ms,
    }


@dataclass(frozen=True)
class _Span:
    start_s: float
    end_s: float


def summarize(arm: Arm, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by kind (and over ``past`` by hit and miss) with 95 % intervals, what the best
    constant answer would score, and the costs: medians over clips and questions."""
    questions = [row for clip in results for row in clip["questions"]]
    by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in questions:
        by_kind[row["kind"]].append(row)
    return {
        "name": arm.name,
        "model": arm.model,
        "preset": arm.preset,
        "overrides": dict(arm.overrides),
        "selector": arm.selector,
        "keep": arm.keep,
        "clips": len(results),
        "kinds": {kind: accuracy(by_kind[kind]) for kind in KINDS if kind in by_kind},
        "mean": statistics.fmean(accuracy(rows)["accuracy"] for rows in by_kind.values()),
        "past_hit": accuracy([r for r in by_kind["past"] if r["hit"]]),
        "past_miss": accuracy([r for r in by_kind["past"] if r["hit"] is False]),
        "kept": sum(c["kept"] for c in results) / max(1, sum(c["seen"] for c in results)),
        "kv_bytes": statistics.median(c["kv_bytes"] for c in results),
        "frames_per_s": statistics.median(c["frames"] / c["ingest_s"] for c in results),
        "ttft_ms": statistics.median(row["ttft_ms"] for row in questions),
        "blocks": statistics.fmean(row["blocks"] for row in questions),
    }


def accuracy(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """``asked``, ``right``, ``accuracy`` (None: nothing was asked), its 95 % interval, and the best
    constant answer with its share."""
    rows = list(rows)
    right = sum(row["right"] for row in rows)
    low, high = wilson(right, len(rows))
    constant, share = best_constant(row["answer"] for row in rows)
    return {
        "asked": len(rows),
        "right": right,
        "accuracy": right / len(rows) if rows else None,
        "low": low,
        "high": high,
        "constant": constant,
        "constant_share": share,
    }


def evaluate(engine: Any, arm: Arm, clips: ClipSet) -> dict[str, Any]:
    """An arm on a set of clips, without files: what tests and the gate use."""
    return summarize(arm, list(each_clip(engine, arm, clips, range(clips.clips))))


def each_clip(
    engine: Any, arm: Arm, clips: ClipSet, numbers: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """``ask_clip`` for each of ``numbers``."""
    for number in numbers:
        yield ask_clip(engine, arm, clips.make(number), number)
