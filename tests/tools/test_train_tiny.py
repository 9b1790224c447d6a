"""The trainer sees what the runner sees: same numbers, same ids, same prompts; runs resume."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vicostream_kernels.evaluation._world import COLOURS
from vicostream_kernels.models import load_model, named
from vicostream_kernels.ops.preprocess import preprocess_frames

TOOLS = Path(__file__).resolve().parents[2] / "tools"
if not TOOLS.exists():
    pytest.skip("the tools are not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(TOOLS))

import gradient_share  # noqa: E402

import train_tiny  # noqa: E402
from tiny import batches, files, losses, recipe, workers  # noqa: E402
from tiny.losses import similarity  # noqa: E402
from tiny.muon import Muon  # noqa: E402
from tiny.net import Net  # noqa: E402


@pytest.fixture(scope="module")
def model():
    """As it starts, with every norm and bias mattering."""
    torch.manual_seed(0)
    model = train_tiny.new_model().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def runner():
    return load_model("tiny-full")


def small_batch(steps: int = 12, videos: int = 2) -> batches.Batch:
    return batches.make_batch(np.random.Generator(np.random.PCG64(3)), videos, steps, 4)


@torch.no_grad()
def test_the_encoder_is_transformers_own(model) -> None:
    batch, net = small_batch(4), Net(model, torch.float32)
    net.refresh()
    ours = net.encode(batch.frames)
    patches, grid = preprocess_frames(
        batch.frames.repeat_interleave(2, 0),
        min_pixels=84 * 84,
        max_pixels=84 * 84,
        mean=files.MEAN,
        std=files.STD,
    )
    assert grid == (8, 6, 6), "frames pass preprocessing as they are"
    theirs = model.model.visual(patches, grid_thw=torch.tensor([grid]))
    theirs = getattr(theirs, "pooler_output", theirs)
    theirs = theirs[0] if isinstance(theirs, (tuple, list)) else theirs
    torch.testing.assert_close(ours, theirs.view_as(ours), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bounded", [False, True])
@torch.no_grad()
def test_a_branch_is_a_run_of_its_own(model, bounded: bool) -> None:
    """Every question of the tree against transformers' LLM, masked row by row."""
    batch, net = small_batch(), Net(model, torch.float32)
    net.refresh()
    tokens = net.encode(batch.frames).view(*batch.shapes.shape, -1)
    rng = np.random.Generator(np.random.PCG64(1))
    views = train_tiny.see(rng, bounded, batch, tokens)
    logits = net.logits(tokens.flatten(1, 2), views.trunk, views.branches).logits
    embed = model.get_input_embeddings()
    for video in range(2):
        for quest in range(4):
            n = int(views.branches.length[video, quest])
            rows = embed(views.trunk.ids.clamp(min=0))
            rows[views.trunk.ids < 0] = tokens.flatten(1, 2)[video]
            rows = torch.cat((rows, embed(views.branches.ids[video, quest, :n])))[None]
            places = torch.cat(
                (
                    views.trunk.positions[:, video],
                    views.branches.positions[video, quest, :n].expand(3, -1),
                ),
                dim=1,
            )
            count = len(views.trunk.ids)
            mask = torch.zeros(count + n, count + n, dtype=torch.bool)
            mask[:count, :count] = views.trunk.mask[video if bounded else 0]
            mask[count:, :count] = views.branches.mask[video, quest]
            mask[count:, count:] = torch.ones(n, n, dtype=torch.bool).tril()
            bias = torch.zeros(1, 1, count + n, count + n).masked_fill_(~mask, -1e9)
            out = model.model.language_model(
                inputs_embeds=rows,
                position_ids=places[:, None],
                attention_mask={"full_attention": bias},
            )
            expected = model.lm_head(out.last_hidden_state)[0, -n:]
            torch.testing.assert_close(logits[video, quest, :n], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interval", [1, 2])
def test_positions_and_prompts_are_the_runners(runner, interval: int) -> None:
    place = batches.layout(12)
    ids, after = batches.positions(place, interval)
    seconds = interval / runner.tokens_per_second
    expected = [runner.text_positions(2, 0)]
    free = 2
    for chunk in range(3):
        expected.append(runner.text_positions(1, free))
        expected.append(runner.video_positions(4, 6, 6, free + 1, seconds).flatten(1))
        free += 1 + runner.video_span(4, 6, 6, seconds)
        expected.append(runner.text_positions(1, free))
        free += 1
        assert after[chunk] == free
    assert torch.equal(torch.from_numpy(ids).int(), torch.cat(expected, dim=1))
    assert runner.system_ids() == place.ids[:2].tolist()
    markers = [runner.vision_start_id, *[-1] * 36, runner.vision_end_id]
    assert place.ids[2:40].tolist() == markers
    batch = small_batch()
    for questions in batch.questions:
        for q in questions:
            assert runner.question_ids(q.text) == [*batches.question_ids(q.text), *batches.AFTER]
            word = runner.tokenizer.decode([batches.IDS[q.answer]])
            assert word == q.answer


def test_chunks_of_a_long_stream_have_their_ids_or_stand_without_gaps() -> None:
    rng = np.random.Generator(np.random.PCG64(7))
    batch = batches.make_batch(rng, 8, 48, 8, sparse=True)
    styles = set()
    assert batch.numbers.shape == (8, 12) and (np.diff(batch.numbers) > 0).all()
    assert batch.numbers.max() > 40, "much longer streams"
    for b, number in enumerate(batch.numbers):
        whole = batches.layout(4 * (int(number[-1]) + 1))
        found = [batches.positions(whole, interval) for interval in (1, 2)]
        read = np.isin(whole.chunk, (-1, *number))
        ids, nexts = batch.positions[:, b].numpy(), batch.next_ids[b]
        there = any(
            (at[:, read] == ids).all() and (after[number] == nexts).all() for at, after in found
        )
        gapless = [batches.positions(batch.layout, interval) for interval in (1, 2)]
        closed = any((at == ids).all() and (after == nexts).all() for at, after in gapless)
        assert there != closed
        styles.add(there)
        # What the pictures show is what the answers are about.
        log, truth = batch.logs[b], batch.truths[b]
        assert (batch.shapes[b].numpy() % 24 == log.shape % 24)[log.shape >= 0].all()
        for q in batch.questions[b]:
            if q.form == "last_color" and q.evidence:
                step = np.flatnonzero(log.place[: q.step + 1, q.about[0]] >= 0)[-1]
                cell = log.place[step, q.about[0]]
                assert COLOURS[log.colour[step, cell]] == q.answer
        for step, shape in zip(*np.nonzero(log.moved >= 0)):
            assert step % 4 or number[step // 4] == number[step // 4 - 1] + 1
            assert truth.log.life[step - 1, shape] == log.life[step, shape]
    assert styles == {False, True}


def test_masks_of_a_bounded_stream() -> None:
    rng = np.random.Generator(np.random.PCG64(5))
    batch = batches.make_batch(rng, 12, 24, 8)
    similar = rng.uniform(0.3, 1.0, (12, 24, 9))
    similar[:, 0] = 1
    views = batches.bounded_views(rng, batch, similar)
    place = batch.layout
    chunk, step = torch.from_numpy(place.chunk), torch.from_numpy(place.step)
    body = step >= 0
    assert not torch.triu(views.trunk.mask, diagonal=1).any(), "nothing sees what comes later"
    kept = views.kept.flatten(1)
    assert views.kept[:, ::4].all(), "the first step of a chunk stays"
    assert 0.3 < views.kept.float().mean() < 1
    dropped = ~kept
    columns = views.trunk.mask[:, :, body]
    seen = columns.any(1) & dropped
    own = torch.zeros_like(seen)
    own[:] = dropped  # a dropped row sees itself, so that no row is empty, and nothing reads it
    assert torch.equal(seen, own)
    assert not views.branches.mask[:, :, body][dropped[:, None].expand(-1, 8, -1)].any()
    for video, questions in enumerate(batch.questions):
        for i, q in enumerate(questions):
            read = views.branches.mask[video, i]
            assert read[chunk < 0].all(), "the system prompt is always there"
            assert not read[chunk > q.step // 4].any(), "nothing newer than the question"
            newest = (chunk == q.step // 4) & body & kept[video][step.clamp(min=0) * 9]
            assert read[newest & (step % 4 == 0)].all(), "the newest chunk is"
            if views.answers[video, i] >= 0 and q.kind in ("now", "count"):
                assert views.answers[video, i] == batches.IDS[q.answer]


def test_a_question_that_cannot_see_answers_never() -> None:
    rng = np.random.Generator(np.random.PCG64(9))
    batch = batches.make_batch(rng, 6, 32, 24)
    asked = 0
    for truth, questions in zip(batch.truths, batch.questions):
        for q in questions:
            if q.form not in ("last_color", "last_place") or not q.evidence:
                continue
            chunks = q.step // 4 + 1
            shown = truth.log.place[: q.step + 1, q.about[0]] >= 0
            holding = np.array([shown[4 * c : 4 * c + 4].any() for c in range(chunks)])
            assert batches._still_true(truth, q, ~holding, 4) == "never"
            assert batches._still_true(truth, q, np.ones(chunks, bool), 4) == q.answer
            asked += 1
    assert asked > 20


def test_a_trail_is_how_a_shape_came_as_far_as_its_token_sees() -> None:
    rng = np.random.Generator(np.random.PCG64(11))
    truth = batches.make_batch(rng, 1, 240, 4).truths[0]
    log, seen = truth.log, set()
    for window in (-1, 0, 1):
        ways = losses._ways(truth, window, np.arange(60))
        assert (ways[log.shape < 0] == -100).all()
        for step, cell in zip(*np.nonzero(log.shape >= 0)):
            shape, first, expected = log.shape[step, cell], step, len(losses.WAYS)
            at = cell
            # Back through its life, to the last move or to where it came.
            while first and log.life[first - 1, shape] == log.life[step, shape]:
                if log.place[first - 1, shape] != at:
                    delta = int(at) - int(log.place[first - 1, shape])
                    expected = {-1: 0, 1: 1, -3: 2, 3: 3}[delta]
                    first -= 1
                    break
                first -= 1
            if window >= 0 and step // 4 - first // 4 > window:
                expected = -100
            assert ways[step, cell] == expected
            seen.add(expected)
    assert seen == {-100, 0, 1, 2, 3, 4}


def test_a_token_that_moved_is_shown_the_place_that_its_shape_left() -> None:
    batch = batches.make_batch(np.random.Generator(np.random.PCG64(11)), 1, 48, 4)
    views, log = batches.full_views(batch), batch.logs[0]
    row = {(s, c): i for i, (s, c) in enumerate(zip(batch.layout.step, batch.layout.cell))}
    followed = torch.zeros(1, len(row) + 100, len(batch.layout.ids))
    moved = 0
    for step, cell in zip(*np.nonzero(log.shape >= 0)):
        shape, was = log.shape[step, cell], step
        alive = [s for s in range(step) if (log.life[s:step, shape] == log.life[step, shape]).all()]
        elsewhere = [s for s in alive if log.place[s, shape] != cell]
        if not elsewhere:
            continue
        was = max(elsewhere)
        left = log.place[was, shape]
        stay = [s for s in elsewhere if (log.place[s : was + 1, shape] == left).all()]
        for s in stay:
            followed[0, row[step, cell], row[s, left]] = 1 / len(stay)
        moved += 1
    assert moved > 10
    assert losses.follow_loss(followed, batch, views) < 1e-3
    assert losses.follow_loss(followed.roll(1, dims=2), batch, views) > 1


def test_a_token_knows_another_colour_of_its_shape_as_far_as_it_sees() -> None:
    rng = np.random.Generator(np.random.PCG64(13))
    truth = batches.make_batch(rng, 1, 240, 4).truths[0]
    log, seen = truth.log, set()
    for window in (-1, 0):
        hues = losses._hues(truth, window, np.arange(60))
        assert (hues[log.shape < 0] == -100).all()
        for step, cell in zip(*np.nonzero(log.shape >= 0)):
            shape, expected = log.shape[step, cell], 0
            for first in range(step, -1, -1):
                if log.life[first, shape] != log.life[step, shape]:
                    break
                if truth.colour[first, shape] != log.colour[step, cell]:
                    expected = 1
                    break
                start = first
            if window == 0 and (first if expected else start) // 4 != step // 4:
                expected = -100
            assert hues[step, cell] == expected
            seen.add(expected)
    assert seen == {-100, 0, 1}


def test_the_token_before_the_answer_is_shown_the_shape_that_came_last() -> None:
    batch = batches.make_batch(np.random.Generator(np.random.PCG64(17)), 2, 48, 12)
    views = batches.full_views(batch)
    row = {(s, c): i for i, (s, c) in enumerate(zip(batch.layout.step, batch.layout.cell))}
    shape = (2, 4, 12, batches.LONGEST, len(batch.layout.ids))
    again, orders = torch.zeros(shape), 0
    for b, questions in enumerate(batch.questions):
        for i, q in enumerate(questions):
            where = int(views.branches.length[b, i]) - 2
            assert views.branches.ids[b, i, where] == batches.IDS["assistant"]
            for about in q.about:
                if q.form == "order" and losses.SHAPES[about] != q.answer:
                    continue
                orders += q.form == "order"
                sights = losses._sights(batch.truths[b], q, about)
                for at in sights:
                    again[b, losses._ANSWERING, i, where, row[at]] = 1 / len(sights)
    assert orders
    assert losses.answering_loss(again, batch, views) < 1e-3
    assert losses.answering_loss(again.roll(1, dims=1), batch, views) > 5


def test_muon_steps_are_orthogonal_and_as_large_as_adams() -> None:
    torch.manual_seed(0)
    tall, wide = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((96, 32), (32, 64)))
    optimizer = Muon([tall, wide], lr=0.5)
    for p in (tall, wide):
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in (tall, wide):
        scale = 0.2 * max(p.shape) ** 0.5
        values = torch.linalg.svdvals(-p.detach() / (0.5 * scale))
        assert 0.6 < values.min() and values.max() < 1.3
        assert float((p.detach() * p.grad).sum()) < 0, "downhill"


def test_similarity_is_the_cosine_with_the_step_before() -> None:
    tokens = torch.randn(2, 5, 9, 16)
    cosine = torch.nn.functional.cosine_similarity(tokens[:, 1:], tokens[:, :-1], dim=-1)
    torch.testing.assert_close(similarity(tokens)[:, 1:], cosine)
    assert bool((similarity(tokens)[:, 0] == 1).all())


@pytest.mark.parametrize("name", ["tiny", "tiny-full"])
def test_embedded_files_are_what_the_tool_writes(name: str) -> None:
    folder = named.FOLDERS[name]
    for file, text in files.side_files().items():
        assert (folder / file).read_text(encoding="utf-8") == text, file
    assert json.loads((folder / "config.json").read_text()) == files.config()


def test_processes_take_the_mean_gradient(tmp_path: Path) -> None:
    workers.run(2, gradient_share.share, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["total"] == 2.0 and (tmp_path / f"{rank}.apart").exists()
        assert torch.equal(found["grads"][0], torch.full((3, 2), 1.5))
        assert found["grads"][1].tolist() == [6.0, 5.5, 1.5, 1.5, 1.5]


def test_a_recipe_names_every_step() -> None:
    for stage in (recipe.FULL, recipe.BOUNDED):
        ends = [phase.end for phase in stage.phases]
        assert ends == sorted(ends) and ends[-1] == 1.0
        for phase in stage.phases:
            assert sum(phase.shares.values()) == pytest.approx(1.0)
            rng = np.random.Generator(np.random.PCG64(1))
            drawn = [train_tiny.length(rng, phase) for _ in range(200)]
            assert max(steps for steps, _ in drawn) <= phase.longest
            assert all(steps <= 4 or steps % 4 == 0 for steps, _ in drawn)
            assert any(sparse for _, sparse in drawn) == (phase.sparse > 0)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tiny, "BUDGET", 32)
    monkeypatch.setattr(train_tiny, "MOST_VIDEOS", 2)
    monkeypatch.setattr(train_tiny, "QUESTIONS", 2)
    monkeypatch.setattr(train_tiny, "evaluate", lambda *_: {})
    monkeypatch.setattr(train_tiny.curve, "plot", lambda *_: None)


@pytest.mark.usefixtures("short_steps")
def test_a_resumed_run_is_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--full-steps=2", "--bounded-steps=2", "--eval-every=2", "--workers=1"]
    whole = train(tmp_path / "whole", flags)
    calls = {"left": 3}
    learn = train_tiny.Training._learn

    def stops(self, *rest):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt
        return learn(self, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tiny.Training, "_learn", stops)
        train(tmp_path / "parts", flags)
    assert train_tiny.torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 2
    parts = train(tmp_path / "parts", [*flags, "--resume"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, parts.model.state_dict()[name]), name
    steps = [json.loads(x)["step"] for x in (tmp_path / "parts" / "log.jsonl").open()]
    assert steps == [0, 1, 2, 3]


@pytest.mark.usefixtures("short_steps")
def test_files_name_the_time_with_their_own_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*_) -> dict:
        until = time.process_time() + 1.0
        while time.process_time() < until:
            pass
        return {}

    monkeypatch.setattr(train_tiny, "evaluate", evaluate)
    steps = {"cpu": 0.0}
    total = workers.total

    def counted(value: float, count: int) -> float:
        steps["cpu"] += value
        return total(value, count)

    monkeypatch.setattr(workers, "total", counted)
    flags = ["--full-steps=2", "--bounded-steps=1", "--eval-every=2", "--workers=1"]
    train(tmp_path, flags)
    state = train_tiny.torch.load(tmp_path / "state.pt", weights_only=True)
    line = [json.loads(x) for x in (tmp_path / "log.jsonl").open()][-1]
    assert state["cpu_s"] >= steps["cpu"] + 2.0 and state["wall_s"] >= 2.0
    assert line["cpu_s"] == round(state["cpu_s"], 1)


def train(out: Path, flags: list[str]) -> train_tiny.Training:
    out.mkdir(exist_ok=True)
    training = train_tiny.Training(train_tiny.arguments(["--out", str(out), *flags]))
    training.run()
    return training
