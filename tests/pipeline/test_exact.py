"""The whole way, from frames to logits, against transformers' own forward: one dense pass over all
tokens with a mask that is written down from the method's words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipeline_kit import pictures, small_engine

CHUNKS, K = 9, 3


def one_pass(runner, embeds, positions, visible):
    """Logits of transformers on ``embeds`` [N, D] under the boolean mask ``visible`` [N, N]."""
    model = runner.model.model.language_model
    mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None, None]
    with torch.no_grad():
        hidden = model(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None].long(),
            attention_mask={"full_attention": mask},
            use_cache=False,
        ).last_hidden_state[0]
        return runner.model.lm_head(hidden).float()


@pytest.mark.parametrize("preset", ["vicostream", "full-history"])
def test_logits_are_those_of_one_masked_pass(preset, monkeypatch):
    bounded = preset == "vicostream"
    changes = {"retrieve__k": K, "prune__threshold": 0.9} if bounded else {}
    text = "What happened?"
    kept, logits = [], []
    with small_engine(preset, **changes, engine__seconds_per_step=1.0) as made:
        with made.open() as stream:
            runner = made.runner
            prune, head = stream._prune.run, runner.logits

            def remember(chunk):
                done = prune(chunk)
                count = done.count.get()
                kept.append((done.tokens[:count].clone(), done.positions[:, :count].clone(),
                             chunk.grid))  # fmt: skip
                return done

            def keep(hidden):
                logits.append(head(hidden))
                return logits[-1]

            monkeypatch.setattr(stream._prune, "run", remember)
            monkeypatch.setattr(runner, "logits", keep)
            stream.ingest(pictures(8 * CHUNKS))
            answer = stream.ask(text, max_new_tokens=1)
            list(answer)
            spans = answer.figures.blocks
            system, question = runner.system_ids(), runner.question_ids(text)

    # The stream as one row of tokens: who each is, its embedding and its ids.
    markers = runner.embed(torch.tensor([runner.vision_start_id, runner.vision_end_id]))
    owner = [("system", -1)] * len(system)
    parts = [runner.embed(torch.tensor(system))]
    ids = [torch.arange(len(system)).repeat(3, 1)]
    base = len(system)
    for i, (tokens, places, (t, h, w)) in enumerate(kept):
        owner += [("start", i), *[("chunk", i)] * len(tokens), ("end", i)]
        parts += [markers[:1], tokens, markers[1:]]
        end = base + 1 + max(2 * (t - 1), h // 2 - 1, w // 2 - 1) + 1
        ids += [torch.full((3, 1), base), places.long() + base + 1, torch.full((3, 1), end)]
        base = end + 1
    owner += [("question", -1)] * len(question)
    parts.append(runner.embed(torch.tensor(question)))
    ids.append(torch.arange(base, base + len(question)).repeat(3, 1))
    embeds, positions = torch.cat(parts), torch.cat(ids, 1)

    # Who sees whom.
    visible = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    if bounded:
        query = runner.embed(torch.tensor(question)).mean(0)
        means = torch.stack([tokens.mean(0) for tokens, _, _ in kept])
        best = torch.cosine_similarity(means, query[None]).topk(K).indices.sort().values.tolist()
        entries = stream.report()["chunks"]
        expected = [(entries[j]["start_s"], entries[j]["end_s"]) for j in best]
        np.testing.assert_allclose(spans, expected, atol=1e-6)
        name = np.array([who for who, _ in owner])
        number = np.array([i for _, i in owner])
        for row, (who, i) in enumerate(owner):
            if who == "question":
                seen = (name == "system") | (name == "question")
                seen |= (name == "chunk") & np.isin(number, best)
                seen |= (name == "end") & (number == CHUNKS - 1)
            elif who == "system":
                continue
            else:
                seen = (number >= max(0, i - 4)) & (number <= i)
                seen |= (name == "system") & (i < 4)
            visible[row] &= torch.from_numpy(seen)
    reference = one_pass(runner, embeds, positions, visible)[-1]
    error = (logits[0][0] - reference).norm() / reference.norm()
    assert error <= 1e-5, error
    if bounded:  # the mask matters
        unmasked = one_pass(runner, embeds, positions, torch.ones_like(visible).tril())[-1]
        assert (unmasked - reference).norm() / reference.norm() > 1e-3
