"""Which blocks topk_blocks chooses from given scores, against the rules written as plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vicostream_kernels as vico
from kit import tensors
from kit.backends import backends_of
from kit.topk import assert_valid_topk
from vicostream_kernels import backends

BACKENDS = backends_of("topk_blocks")
NAN, INF = math.nan, math.inf
#: Eighths: sums of them are exact, so that a mass is reached or not, without rounding.
VALUES = st.sampled_from([NAN, -INF, -1.0, -0.0, 0.0, 0.125, 0.25, 0.25, 0.5, 1.0, 3.0])


def choose_by_hand(scores, n, tokens, rule, value, min_k, group, first, last, capacity):
    """The chosen blocks of one row, by the words of the contract."""
    units = [list(range(a, min(a + group, n))) for a in range(0, n, group)]

    def unit_score(unit):
        numbers = [scores[b] for b in unit if not math.isnan(scores[b])]
        return sum(numbers) / len(numbers) if numbers else NAN

    def preference(i):
        forced = any(b < first or b >= n - last for b in units[i])
        value = unit_score(units[i])
        if forced:
            return (0, 0, i)
        return (2, 0, i) if math.isnan(value) else (1, -value, i)

    order = sorted(range(len(units)), key=preference)
    forced = sum(preference(i)[0] == 0 for i in order)

    def weight(i):
        each = [b for b in units[i] if scores[b] > 0]
        return sum(scores[b] * (1 if tokens is None else tokens[b]) for b in each)

    if rule == "k":
        wanted = value // group
    elif rule == "ratio":
        wanted = int(n * value) // group
    elif rule == "token_budget" and isinstance(tokens, int):
        wanted = value // tokens // group
    elif rule == "token_budget":
        wanted, used = 0, 0
        for i in order:
            used += sum(tokens[b] for b in units[i])
            if used > value:
                break
            wanted += 1
    else:
        total, reached, wanted = sum(map(weight, order)), 0.0, 0
        while total > 0 and reached < value * total:
            reached += weight(order[wanted])
            wanted += 1
    wanted = max(wanted, math.ceil(min_k / group), forced)
    chosen = order[: min(wanted, capacity // group)]
    return sorted(b for i in chosen for b in units[i])


@st.composite
def cases(draw):
    streams, blocks = draw(st.integers(1, 2)), draw(st.integers(0, 14))
    scope = draw(st.sampled_from(["stream", "kv_head"]))
    rows = 1 if scope == "stream" else 2
    group = draw(st.integers(1, 3))
    rule = draw(st.sampled_from(["k", "ratio", "mass", "token_budget"]))
    value = {
        "k": st.integers(1, 5).map(lambda i: i * group),
        "ratio": st.sampled_from([0.1, 0.25, 0.4, 0.5, 0.7, 1.0]),
        "mass": st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]),
        "token_budget": st.integers(0, 40),
    }[rule]
    table = st.lists(VALUES, min_size=blocks, max_size=blocks)
    sizes = st.lists(st.integers(0, 9), min_size=blocks, max_size=blocks)
    tokens = None
    if rule == "token_budget" and draw(st.booleans()):
        tokens = draw(st.integers(1, 8))
    elif rule == "token_budget" or (rule == "mass" and draw(st.booleans())):
        tokens = [draw(sizes) for _ in range(streams)]
    # Mostly nothing is forced, and most streams are full: else few blocks are left to choose from.
    first, last = (draw(st.sampled_from([0, 0, 0, 1, 2, 3])) for _ in range(2))
    max_blocks = None
    if draw(st.booleans()):
        max_blocks = group * draw(st.integers(8, 16))
    return {
        "scores": [[draw(table) for _ in range(rows)] for _ in range(streams)],
        "blocks": blocks,
        "num": [draw(st.just(blocks) | st.integers(0, blocks)) for _ in range(streams)],
        "scope": scope, "group": group, "rule": rule, "value": draw(value), "tokens": tokens,
        "min_k": draw(st.sampled_from([0, 1, 1, 3, 5])), "first": first, "last": last,
        "max_blocks": max_blocks,
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15 if backends.INTERPRET else 400, deadline=None)
@given(case=cases())
def test_choice_by_the_words_of_the_contract(backend, case):
    name, device = backend
    assume(name != "cuda" or case["rule"] != "mass")  # declined: it would skip the whole test
    streams, rows = len(case["scores"]), len(case["scores"][0])
    scores = torch.tensor(case["scores"], dtype=torch.float32).view(streams, rows, case["blocks"])
    tokens, whole = case["tokens"], isinstance(case["tokens"], int)
    if tokens is not None and not whole:
        tokens = torch.tensor(tokens, dtype=torch.int32).view(streams, -1).to(device)
    external = (scores[:, 0] if case["scope"] == "stream" else scores).to(device)
    got = vico.topk_blocks(
        None, None, external_score=external,
        scope=case["scope"], **{case["rule"]: case["value"]}, block_tokens=tokens,
        min_k=case["min_k"], group=case["group"], force_first=case["first"],
        force_last=case["last"], max_blocks=case["max_blocks"], backend=name,
        num_blocks=torch.tensor(case["num"], dtype=torch.int32, device=device),
    )  # fmt: skip
    index = got.block_index.cpu().reshape(streams, rows, -1)
    count = got.count.cpu().reshape(streams, rows)
    kept = got.scores.cpu().reshape(streams, rows, -1)
    for s in range(streams):
        n = case["num"][s]
        mine = case["tokens"] if whole or tokens is None else case["tokens"][s]
        for r in range(rows):
            wanted = choose_by_hand(
                case["scores"][s][r], n, mine, case["rule"], case["value"], case["min_k"],
                case["group"], case["first"], case["last"], index.shape[-1],
            )  # fmt: skip
            assert index[s, r].tolist() == wanted + [-1] * (index.shape[-1] - len(wanted))
            assert count[s, r] == len(wanted)
            torch.testing.assert_close(kept[s, r, :n], scores[s, r, :n], equal_nan=True)
            assert (kept[s, r, n:] == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks,k", [(1, 1), (64, 64), (300, 64), (5000, 1024), (40, 50)])
def test_top_k_of_many(blocks, k, backend):
    name, device = backend
    query = tensors.randn((2, 4, 8), seed=blocks).to(device)
    summary = tensors.randn((2, blocks, 2, 8), torch.bfloat16, seed=k).to(device)
    got = vico.topk_blocks(query, summary, k=k, scope="query_head", backend=name)
    assert got.block_index.shape == (2, 4, k) and got.block_index.dtype == torch.int32
    for s in range(2):
        for h in range(4):
            assert_valid_topk(got.block_index[s, h].cpu(), got.scores[s, h].cpu(), k)
    assert (got.count == min(k, blocks)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(backend):
    name, device = backend
    scores = torch.zeros(1, 700, device=device)
    scores[0, 651] = 1
    scores[0, ::2] *= -1  # -0.0 ties with 0.0
    got = vico.topk_blocks(None, None, external_score=scores, k=5, backend=name)
    assert got.block_index.tolist() == [[0, 1, 2, 3, 651]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_ranks_after_minus_infinity_and_leaves_its_group_alone(backend):
    name, device = backend
    scores = torch.tensor([[NAN, -INF, -5.0, NAN, NAN, NAN, 1.0, NAN]], device=device)

    def chosen(**options):
        found = vico.topk_blocks(None, None, external_score=scores, backend=name, **options)
        return found.block_index.tolist()[0]

    assert chosen(k=3) == [1, 2, 6]
    assert chosen(k=4) == [0, 1, 2, 6]
    # Pairs score -inf, -5, NaN, 1.
    assert chosen(k=2, group=2) == [6, 7]
    assert chosen(k=6, group=2) == [0, 1, 2, 3, 6, 7]
    assert chosen(k=1, force_first=1) == [0], "a forced block may score NaN"


def _hard_to_choose() -> dict[str, torch.Tensor]:
    rising = torch.arange(1003.0) - 500
    few = tensors.randn((1003,), seed=5).round()
    holes = few.clone()
    holes[::3], holes[1::7], holes[2::11] = float("nan"), -float("inf"), float("inf")
    only = torch.full((1003,), float("nan"))
    only[500:507] = -1.0
    return {
        "rising": rising, "falling": -rising, "equal": 0 * rising, "few": few, "holes": holes,
        "only": only,
    }  # fmt: skip


@pytest.mark.parametrize("k", [1, 7, 40, 200, 1002])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_in_order_alike_or_missing(backend, k):
    name, device = backend
    for what, scores in _hard_to_choose().items():
        found = vico.topk_blocks(
            None, None, external_score=scores[None].to(device), k=k, backend=name
        )
        ranked = sorted(
            range(1003),
            key=lambda i: (
                bool(scores[i].isnan()),
                -float(scores[i].nan_to_num(0, posinf=1e30, neginf=-1e30)),
                i,
            ),
        )
        assert found.block_index[0].tolist() == sorted(ranked[:k]), what


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_blocks_permutes_the_choice(backend):
    name, device = backend
    scores = tensors.randn((3, 50), seed=3).to(device)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    for rule in ({"k": 7}, {"ratio": 0.3}, {"mass": 0.6}, {"token_budget": 90, "block_tokens": 9}):
        if name == "cuda" and "mass" in rule:
            continue
        got = vico.topk_blocks(None, None, external_score=scores, **rule, backend=name)
        moved = vico.topk_blocks(
            None, None, external_score=scores[:, order.to(device)], **rule, backend=name
        )
        for s in range(3):
            chosen = {int(order[i]) for i in moved.block_index[s] if i >= 0}
            assert chosen == {int(i) for i in got.block_index[s] if i >= 0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_of_the_mass_leaves_what_weighs_nothing(backend):
    """Sums of one order may stay below those of another by a bit, which must not choose all."""
    name, device = backend
    scores = torch.softmax(2 * tensors.randn((32, 300), seed=8), -1)
    scores[:, 250:270] = 0.0
    scores[:, 270:] = NAN
    scores[::2, 0] = 0.0  # forced, and weighs nothing: those behind it count as before
    got = vico.topk_blocks(
        None, None, external_score=scores.to(device), mass=1.0, force_first=1, backend=name
    )
    heavy = (scores > 0).sum(-1) + (scores[:, 0] == 0)
    # The lightest may be too light to show in a sum.
    assert ((heavy - 2 <= got.count.view(-1).cpu()) & (got.count.view(-1).cpu() <= heavy)).all()
    assert int(got.block_index.max()) < 250


@pytest.mark.parametrize(
    "options,width",
    [
        ({"k": 64}, 64),
        ({"k": 2, "min_k": 5}, 5),
        ({"k": 2, "force_first": 2, "force_last": 3}, 5),
        ({"k": 64, "max_blocks": 32}, 32),
        ({"ratio": 0.4}, 8),
        ({"ratio": 0.01}, 1),
        ({"mass": 0.5}, 20),
        ({"mass": 0.5, "max_blocks": 6}, 6),
        ({"token_budget": 100, "block_tokens": 16}, 6),
        ({"token_budget": 10, "block_tokens": 16, "min_k": 3}, 3),
        ({"token_budget": 100, "block_tokens": torch.full((1, 20), 16, dtype=torch.int32)}, 20),
        ({"mass": 0.5, "group": 3}, 21),
        ({"k": 4, "group": 4, "force_last": 2}, 8),  # the last two may stand in two groups
    ],
    ids=str,
)
def test_the_width_follows_from_shapes_and_options(options, width):
    scores = torch.arange(20.0).view(1, 20)
    got = vico.topk_blocks(None, None, external_score=scores, **options)
    assert got.block_index.shape == (1, width)
    assert (got.block_index >= 0).sum() == got.count


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_blocks(backend):
    name, device = backend
    pool, rules = "softmax", ({"mass": 0.5}, {"ratio": 0.5})
    if name == "cuda":  # serves neither
        pool, rules = "max", rules[1:]
    for summary in (torch.zeros(2, 0, 2, 8), torch.zeros(2, 3, 2, 8)):
        got = vico.topk_blocks(
            torch.zeros(2, 4, 8, device=device), summary.to(device), k=2, pool=pool,
            num_blocks=torch.zeros(2, dtype=torch.int32, device=device), backend=name,
        )  # fmt: skip
        assert got.block_index.tolist() == [[-1, -1]] * 2 and got.count.tolist() == [0, 0]
        for rule in rules:
            score = torch.zeros(2, summary.shape[1], device=device)
            got = vico.topk_blocks(
                None, None, external_score=score, **rule, backend=name,
                num_blocks=torch.zeros(2, dtype=torch.int32, device=device),
            )  # fmt: skip
            assert got.count.tolist() == [0, 0] and (got.block_index == -1).all()
