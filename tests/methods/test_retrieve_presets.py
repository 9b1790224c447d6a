"""The published selectors in the engine: every layer's choice, recomputed by plain loops in float64
from the queries and keys that the model really had."""

from __future__ import annotations

import math

import pytest
import torch
from pipeline_kit import pictures, small_engine
from retrieve_kit import keys_at, slots_of, watched

QUESTION = "What color is the square?"


# --- the publications' words, as loops -----------------------------------------------------------


def dot(a, b) -> float:
    return math.fsum(x * y for x, y in zip(a, b))


def best(scores: list[float], k: int) -> list[int]:
    """The k largest, the earlier of equals, in order of time."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def concatenated(keys: torch.Tensor, heads: int) -> list[float]:
    """One vector of all query heads: the mean of ``keys`` [n, G, d], KV heads repeated."""
    mean = [[math.fsum(c) / len(c) for c in zip(*head)] for head in keys.transpose(0, 1).tolist()]
    return [x for h in range(heads) for x in mean[h * len(mean) // heads]]


def mean_query(query: torch.Tensor) -> list[float]:
    """[n, H, d] -> the mean over n, heads concatenated."""
    return [math.fsum(column) / len(column) for column in zip(*query.flatten(1).tolist())]


def bounds(query: torch.Tensor, blocks: list[list[torch.Tensor]]) -> list[list[float]]:
    """[H][blocks]: sum over channels of max(q * min, q * max), the largest of a block's parts."""
    result = []
    for h, q in enumerate(query.tolist()):
        row = []
        for parts in blocks:
            found = []
            for keys in parts:
                columns = list(zip(*keys[:, h * keys.shape[1] // len(query)].tolist()))
                found.append(math.fsum(max(x * min(c), x * max(c)) for x, c in zip(q, columns)))
            row.append(max(found))
        result.append(row)
    return result


# --- what the engine did -------------------------------------------------------------------------


class Run:
    """A small stream, one question, and everything its layers computed."""

    def __init__(self, monkeypatch, preset, frames, tokens=4, **overrides):
        self.engine = made = small_engine(preset, **overrides)
        self.heads, self.layers = made.runner.heads, made.runner.layers
        self.stream = stream = made.open()
        with watched(monkeypatch, self.layers) as seen:
            stream.ingest(pictures(frames))
            video = len(seen.forwards)
            self.answer = stream.ask(QUESTION, max_new_tokens=tokens)
            self.text = self.answer._block.pages[:]
            list(self.answer)
        self.raw, self.question = seen.raw, seen.forwards[video:]
        self.chunks = stream.history.chunks()
        self.cache = made.cache

    def always(self):
        """Pages before and after what is chosen."""
        history = self.stream.history
        front = [b for b in (history.sink, history.preamble) if b is not None]
        return [p for b in front for p in b.pages], self.chunks[-1].segments[2].pages

    def check(self, call, wanted: list[list[list[int]]]) -> None:
        """``wanted``: for each list the pages of each chosen block."""
        front, back = self.always()
        got = call.pages()
        assert len(got) == len(wanted)
        for row, blocks in zip(got, wanted):
            expected = front + [page for pages in blocks for page in pages] + back
            assert row[: len(expected)] == expected
            assert row[len(expected) :][: len(self.text)] == self.text

    def asking(self, query):
        """Rows of the question's own words."""
        return query[self.engine.runner.prompt.question_slice(range(len(query)))]

    def raw_keys(self, layer, pages):
        return torch.stack([self.raw[layer][s] for s in slots_of(self.cache, pages)]).double()


def test_rekv(monkeypatch):
    """Per layer: mean un-rotated keys, dot with the mean un-rotated query of the question."""
    run = Run(monkeypatch, "rekv", 26, retrieve__k=4, attention__window=60)
    assert len(run.chunks) == 13
    bodies = [chunk.body.pages for chunk in run.chunks]
    choices = []
    for layer in range(run.layers):
        call = run.question[0][layer]
        query = mean_query(run.asking(call.query).double())
        scores = [dot(query, concatenated(run.raw_keys(layer, p), run.heads)) for p in bodies]
        choices.append(best(scores, 4))
        for forward in run.question:  # frozen
            run.check(forward[layer], [[bodies[i] for i in choices[-1]]])
    assert len({tuple(c) for c in choices}) > 1, "layers should differ here"
    union = sorted({i for c in choices for i in c})
    spans = [(c.start_s, c.end_s) for c in run.chunks]
    assert run.answer.figures.blocks == [spans[i] for i in union]
    shares = [read.share for read in run.answer.figures.reads]
    assert shares == [sum(i in c for c in choices) / run.layers for i in union]


def test_rekv_positions_are_consecutive(monkeypatch):
    """As if the system prompt and the chosen chunks were all there was: one gap-free run of ids,
    ending at the question's first."""
    run = Run(monkeypatch, "rekv", 26, retrieve__k=4)
    history, cache = run.stream.history, run.cache
    first = history.next_id
    front, back = run.always()
    moved_somewhere = 0
    for call in run.question[0]:
        shift = dict(zip(call.table[0].tolist(), call.shift[0].tolist()))
        at = first - 1  # the end marker of the last chunk is right before the question
        assert shift[back[0]] == [0, 0, 0]
        chosen = [c for c in run.chunks if c.body.pages[0] in shift]
        assert len(chosen) == 4
        for chunk in reversed(chosen):
            begin, after = (history.ids[chunk][0] + 1, history.ids[chunk][1] - 1)
            for page in chunk.body.pages:
                assert shift[page] == [at - after] * 3
            moved_somewhere += at != after
            at -= after - begin
        for page in front:
            assert shift[page] == [at - history.ids[history.sink][1]] * 3
        for page in run.text:
            assert shift[page] == [0, 0, 0]
    assert moved_somewhere
    assert cache.page_fill[back].tolist() == [1]


def test_livevlm(monkeypatch):
    """Attention of every prompt token and head over mean un-rotated keys of pages; 40 % of them."""
    run = Run(monkeypatch, "livevlm", 43, engine__page_size=8)
    pages = [[page] for chunk in run.chunks for page in chunk.body.pages]
    take = math.floor(0.4 * len(pages))
    scale = run.engine.runner.head_dim**-0.5
    for layer in range(run.layers):
        call = run.question[0][layer]
        means = [run.raw_keys(layer, p).mean(0).tolist() for p in pages]
        total = [0.0] * len(pages)
        for token in call.query.double().tolist():
            for h, q in enumerate(token):
                logits = [scale * dot(q, m[h * len(m) // run.heads]) for m in means]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                for i, w in enumerate(weights):
                    total[i] += w / math.fsum(weights)
        wanted = [pages[i] for i in best(total, take)]
        for forward in run.question:
            run.check(forward[layer], [wanted])
            assert forward[layer].shift is None


@pytest.mark.parametrize("force_last", [0, 1])
def test_quest(monkeypatch, force_last):
    """Per query head and decoded token: q+ . max + q- . min of rotated keys; two dense layers."""
    run = Run(
        monkeypatch, "quest", 43, engine__page_size=8, retrieve__token_budget=32,
        retrieve__force_last=force_last,
    )  # fmt: skip
    pages = [[page] for chunk in run.chunks for page in chunk.body.pages]
    assert len(pages) > 6
    for step, forward in enumerate(run.question):
        for layer, call in enumerate(forward):
            if step == 0 or layer < 2:
                run.check(call, [pages])
                continue
            blocks = [[keys_at(run.cache, layer, slots_of(run.cache, p))] for p in pages]
            wanted = []
            for row in bounds(call.rotated[0].double(), blocks):
                chosen = best(row[:-1], 3) + [len(pages) - 1] if force_last else best(row, 4)
                wanted.append([pages[i] for i in chosen])
            run.check(call, wanted)


def test_lserve(monkeypatch):
    """Four parts of a page, the best counts; the last page always; one choice for four tokens."""
    run = Run(
        monkeypatch, "lserve", 43, tokens=7, engine__page_size=12, retrieve__token_budget=36,
        engine__pixels=56 * 140,
    )  # fmt: skip
    pages = [[page] for chunk in run.chunks for page in chunk.body.pages]
    assert len(pages) > 5 and len(run.question) == 7
    choices: dict[int, list] = {}
    for step, forward in enumerate(run.question):
        for layer, call in enumerate(forward):
            if step == 0:
                run.check(call, [pages])
                continue
            if step in (1, 5):
                blocks = []
                for (page,) in pages:
                    keys = keys_at(run.cache, layer, slots_of(run.cache, [page]))
                    parts = [
                        keys[[i for i in range(len(keys)) if i * 4 // 12 == part]]
                        for part in range(4)
                    ]
                    blocks.append([part for part in parts if len(part)])
                choices[layer] = [
                    [pages[i] for i in best(row[:-1], 2) + [len(pages) - 1]]
                    for row in bounds(call.rotated[0].double(), blocks)
                ]
            run.check(call, choices[layer])


def test_streamingtom(monkeypatch):
    """Groups of a step's tokens: cosine of mean key and mean query; as many as the budget holds."""
    run = Run(
        monkeypatch, "streamingtom", 30, scorer__budget=5, retrieve__token_budget=20
    )  # fmt: skip
    bodies = [chunk.body.pages for chunk in run.chunks]
    assert [chunk.body_tokens for chunk in run.chunks] == [5] * 15
    for layer in range(run.layers):
        call = run.question[0][layer]
        query = mean_query(call.rotated.double())
        scores = []
        for pages in bodies:
            keys = keys_at(run.cache, layer, slots_of(run.cache, pages))
            mean = concatenated(keys, run.heads)
            scores.append(dot(query, mean) / math.sqrt(dot(query, query) * dot(mean, mean)))
        wanted = [bodies[i] for i in best(scores, 4)]
        for forward in run.question:
            run.check(forward[layer], [wanted])


def test_one_choice_may_serve_all_layers(monkeypatch):
    """layers=shared: the first layer that is not dense chooses for those behind it."""
    run = Run(
        monkeypatch, "rekv", 26, retrieve__k=2, retrieve__layers="shared",
        retrieve__dense_layers=1, retrieve__positions="absolute",
    )  # fmt: skip
    bodies = [chunk.body.pages for chunk in run.chunks]
    run.check(run.question[0][0], [bodies])
    query = mean_query(run.asking(run.question[0][1].query).double())
    scores = [dot(query, concatenated(run.raw_keys(1, p), run.heads)) for p in bodies]
    wanted = [bodies[i] for i in best(scores, 2)]
    for layer in range(1, run.layers):
        run.check(run.question[0][layer], [wanted])
