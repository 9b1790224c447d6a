"""The two trained models in the package: transformers loads them, and they answer truly.

Bounds have slack below what ``docs/accuracy.md`` shows: a fault breaks them, noise does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from model_kit import relative_error

from vicostream_kernels import methods
from vicostream_kernels.evaluation._draw import draw
from vicostream_kernels.evaluation.streamqa import Clip, Question, is_correct, make_clip
from vicostream_kernels.models import load_model, named
from vicostream_kernels.pipeline.engine import StreamEngine

#: What the published pipeline lacks for questions about now: the newest chunk is always read.
NEWEST = {"retrieve.force_last": 1}
SHORT = {"engine.max_new_tokens": 4}


@pytest.fixture(scope="module")
def runners():
    return {name: load_model(name) for name in named.FOLDERS}


def engine(runner, preset: str, **overrides) -> StreamEngine:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return StreamEngine(runner, methods.get(preset, {**SHORT, **dotted}))


def ask(made: StreamEngine, clip: Clip, questions: Iterable[Question]) -> tuple[list[str], dict]:
    """Answers to questions in the order of their times, and the stream's report."""
    said, taken = [], 0
    with made.open(fps=clip.fps) as stream:
        for question in questions:
            upto = int(question.time_s * clip.fps) + 1
            stream.ingest(clip.frames[taken:upto])
            taken = max(taken, upto)
            said.append("".join(stream.ask(question.text, question.time_s)))
        return said, stream.report()


def shares(made: StreamEngine, clips: Iterable[Clip]) -> tuple[dict[str, float], float]:
    """Share of right answers for each kind, and of the tokens that entered the LLM."""
    right, asked, seen, kept = Counter(), Counter(), 0, 0
    for clip in clips:
        said, report = ask(made, clip, clip.questions)
        for answer, question in zip(said, clip.questions):
            right[question.kind] += is_correct(answer, question)
            asked[question.kind] += 1
        seen += sum(chunk["seen"] for chunk in report["chunks"])
        kept += sum(chunk["kept"] for chunk in report["chunks"])
    return {kind: right[kind] / asked[kind] for kind in asked}, kept / seen


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [make_clip(900 + seed, 48, questions=40) for seed in range(3)]


def test_sizes() -> None:
    folders = [folder for folder in named.FOLDERS.values()]
    total = sum(file.stat().st_size for folder in folders for file in folder.iterdir())
    assert total < 10 * 2**20
    for folder in folders:
        assert {file.suffix for file in folder.iterdir()} <= {
            ".json",
            ".jinja",
            ".md",
            ".safetensors",
        }


@pytest.mark.parametrize("name", named.FOLDERS)
@torch.no_grad()
def test_transformers_alone_answers_the_same(runners, name: str) -> None:
    """Stock classes, one forward over prompt, video and question with explicit ids, then greedy."""
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = named.FOLDERS[name]
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 0.9e6 < sum(p.numel() for p in stock.parameters()) < 1.3e6
    runner = runners[name]
    clip = make_clip(31, 12, questions=8, at="end")
    made = engine(runner, "full-history", engine__seconds_per_step=0.5)
    said, _ = ask(made, clip, clip.questions)
    for answer, question in zip(said, clip.questions):
        ids, positions, patches = conversation(runner, clip, question)
        embeds = stock.get_input_embeddings()(ids)
        visual = stock.model.visual(patches, grid_thw=torch.tensor([[12, 6, 6]]))
        visual = getattr(visual, "pooler_output", visual)
        visual = visual[0] if isinstance(visual, (tuple, list)) else visual
        embeds[ids == runner.video_id] = visual
        words = []
        for _ in range(3):
            at = torch.cat((positions, runner.text_positions(len(words), 0)), dim=1)
            at[:, positions.shape[1] :] += int(positions.max()) + 1
            out = stock.model.language_model(inputs_embeds=embeds[None], position_ids=at[:, None])
            logits = stock.lm_head(out.last_hidden_state[0, -1])
            words.append(int(logits.argmax()))
            if words[-1] in runner.eos_ids:
                break
            embeds = torch.cat((embeds, stock.get_input_embeddings()(torch.tensor(words[-1:]))))
        assert words[-1] in runner.eos_ids, "an answer ends"
        assert tokenizer.decode(words, skip_special_tokens=True).strip() == answer.strip()


def conversation(runner, clip: Clip, question: Question):
    """Ids [N], positions [3, N] and patches of the whole clip with a question, as one prompt."""
    from vicostream_kernels.ops.preprocess import preprocess_frames

    patches, grid = preprocess_frames(
        torch.from_numpy(clip.frames),
        min_pixels=runner.min_pixels,
        max_pixels=runner.max_pixels,
        mean=runner.image_mean,
        std=runner.image_std,
    )
    assert grid == (24, 6, 6) or grid == (12, 6, 6)
    ids = list(runner.system_ids())
    parts, free = [runner.text_positions(len(ids), 0)], len(ids)
    for _ in range(grid[0] // 4):
        ids += [runner.vision_start_id, *[runner.video_id] * 36, runner.vision_end_id]
        parts.append(runner.text_positions(1, free))
        parts.append(runner.video_positions(4, 6, 6, free + 1, 0.5).flatten(1))
        free += 1 + runner.video_span(4, 6, 6, 0.5)
        parts.append(runner.text_positions(1, free))
        free += 1
    text = runner.question_ids(question.text)
    parts.append(runner.text_positions(len(text), free))
    return torch.tensor(ids + text), torch.cat(parts, dim=1), patches


def test_half_precision_storage_is_what_was_evaluated(runners) -> None:
    """bfloat16 on disk, float32 in use: nothing is rounded twice."""
    for runner in runners.values():
        assert runner.dtype == torch.float32
        for p in runner.model.parameters():
            assert torch.equal(p, p.to(torch.bfloat16).float())


def test_full_history_answers(runners, clips) -> None:
    right, kept = shares(engine(runners["tiny-full"], "full-history"), clips)
    assert kept == 1.0
    # Of about 24 questions a kind: floors leave room for one to three more.
    floors = {"now": 0.95, "past": 0.92, "count": 0.92, "order": 0.85, "motion": 0.78}
    for kind, floor in floors.items():
        assert right[kind] >= floor, right


def test_bounded_answers(runners, clips) -> None:
    made = engine(runners["tiny"], "vicostream", prune__threshold=0.5, **_dots(NEWEST))
    right, kept = shares(made, clips)
    assert kept <= 0.40
    floors = {"now": 0.92, "past": 0.92, "count": 0.92, "order": 0.80, "motion": 0.85}
    for kind, floor in floors.items():
        assert right[kind] >= floor, right


def test_without_the_evidence_chunk_the_past_is_gone(runners, clips) -> None:
    """Reading the newest chunk alone: what left it more than a window ago can't be known."""
    made = engine(
        runners["tiny"], "vicostream", prune__threshold=0.5, retrieve__k=1, retrieve__force_last=1
    )
    asked = right = 0
    for clip in clips:
        questions = [
            q
            for q in make_clip(clip.seed, 48, questions=40, kinds=("past",), age=24).questions
            if q.evidence
        ]
        said, _ = ask(made, clip, questions)
        asked += len(questions)
        right += sum(map(is_correct, said, questions))
    assert asked >= 60 and right / asked <= 0.05, (right, asked)


def test_without_the_evidence_tokens_answers_are_chance(runners, clips) -> None:
    """The same clip drawn without the shape that is asked about."""
    made = engine(runners["tiny"], "full-history")
    asked = right = 0
    for clip in clips[:2]:
        for q in clip.questions:
            if q.kind != "past" or not q.evidence:
                continue
            said, _ = ask(made, without(clip, q), [q])
            asked += 1
            right += is_correct(said[0], q)
    assert asked >= 10 and right / asked <= 0.15, (right, asked)


def without(clip: Clip, question: Question) -> Clip:
    """``clip`` up to the question as if the shape had never come."""
    from vicostream_kernels.evaluation._world import SHAPES

    words = question.text.lower().replace("?", "").split()
    (shape,) = [SHAPES.index(word) for word in words if word in SHAPES]
    cells = clip.log.shape.copy()
    cells[cells == shape] = -1
    frames = draw(np.random.Generator(np.random.PCG64(clip.seed)), replace(clip.log, shape=cells))
    return replace(clip, frames=frames)


def _dots(overrides: dict) -> dict:
    return {key.replace(".", "__"): value for key, value in overrides.items()}


def test_any_frame_size_is_brought_to_the_trained_one(runners, clips) -> None:
    """Presets ask for more pixels than this checkpoint takes; its own limits win."""
    clip = clips[0]
    big = replace(clip, frames=clip.frames[:16].repeat(3, 1).repeat(3, 2))
    runner = runners["tiny"]
    for preset in ("full-history", "vicostream"):
        with engine(runner, preset).open(fps=clip.fps) as stream:
            stream.ingest(big.frames)
            assert [chunk["seen"] for chunk in stream.report()["chunks"]] == [36, 36]


def test_logits_do_not_depend_on_the_chunk_cut(runners) -> None:
    """One chunk of eight steps or its ids given at once: the encoder sees each step alone."""
    runner = runners["tiny-full"]
    patches = torch.randn(8 * 36, 1176, generator=torch.Generator().manual_seed(0))
    whole = runner.encode(patches, (8, 6, 6))
    parts = torch.cat([runner.encode(patches[i : i + 144], (4, 6, 6)) for i in (0, 144)])
    assert relative_error(parts, whole) < 1e-5
