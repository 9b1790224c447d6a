"""Published pruning rules with a score from elsewhere, by plain loops; and all rules as streams."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from prune_kit import cosine, moving, positions_of, rows, run, smallest, video_patches

from kit import tensors
from kit.backends import backends_of
from vicostream_kernels import PruneState, methods, prune_tokens
from vicostream_kernels.methods import attention_scores, prune_rules
from vicostream_kernels.methods.pixel import PixelDifference
from vicostream_kernels.methods.scorer import ScoredChunk
from vicostream_kernels.methods.spatial import SpatialEntropy, SpatialPool
from vicostream_kernels.methods.stc import AsReleased
from vicostream_kernels.methods.streamingtom import StaticDynamic

each_backend = pytest.mark.parametrize("backend", backends_of("prune_tokens"))


# -- EVS, StreamingTOM, and rules with a score from elsewhere ------------------------------------


@each_backend
@pytest.mark.parametrize("q", [0.3, 0.75, 0.9])
def test_evs(backend, q):
    """The first frame counts as changed by 255; the most changed of the call stay."""
    t, n = 6, 20
    x = moving(t, n, 24)
    z = rows(x)
    change = [255.0] * n
    for step in range(1, t):
        change += [1 - cosine(z[step - 1][i], z[step][i]) for i in range(n)]
    kept = max(n, int(t * n * (1 - q)))
    best = smallest([-c for c in change], kept)
    rule = prune_rules.evs_per_call(q)
    out = run(backend, x, rule)
    assert out.mask.flatten().nonzero().flatten().tolist() == sorted(best)
    assert int(out.count) == kept and not rule.causal
    if q == 0.75:
        assert methods.get("evs").prune == rule


@each_backend
@pytest.mark.parametrize("budget", [12, 50])
def test_streamingtom(backend, budget):
    """Each step: static by tau, the budget split in proportion, the most attended of both."""
    t, n, d = 5, 30, 16
    x = moving(t, n, d, noise=0.2)
    method = methods.get("streamingtom-ctr", {"scorer.budget": budget})
    given = method.scorer(ScoredChunk(x, (t, 5, 6)), {})
    out = run(
        backend, x, method.prune, external_score=given.score, group_ids=given.group_ids,
        group_k=given.group_k,
    )  # fmt: skip
    z, mixed = rows(x), False
    for step in range(t):
        static = [step > 0 and cosine(z[step - 1][i], z[step][i]) > 0.9 for i in range(n)]
        mixed |= 0 < sum(static) < n
        received = [0.0] * n
        for a in z[step]:
            weights = [math.exp(sum(p * q for p, q in zip(a, b)) / math.sqrt(d)) for b in z[step]]
            for i in range(n):
                received[i] += weights[i] / sum(weights) / n
        of_static = budget * sum(static) // n
        wanted = []
        for kind, quota in ((True, of_static), (False, budget - of_static)):
            members = [i for i in range(n) if static[i] == kind]
            wanted += sorted(members, key=lambda i: -received[i])[:quota]
        assert out.mask[step].nonzero().flatten().tolist() == sorted(wanted)
        assert len(wanted) == min(budget, n)
    assert mixed, "the example has no step with both kinds"


@each_backend
def test_streamingtom_keeps_broken_tokens_first(backend):
    x = moving(3, 30, 16)
    x[1, 7, 3], x[2, 4, 0] = math.nan, math.inf
    given = StaticDynamic(budget=10)(ScoredChunk(x, (3, 5, 6)), {})
    out = run(
        backend, x, prune_rules.STREAMINGTOM, external_score=given.score,
        group_ids=given.group_ids, group_k=given.group_k,
    )  # fmt: skip
    assert out.mask[1, 7] and out.mask[2, 4] and (out.mask.sum(1) == 10).all()


@each_backend
@pytest.mark.parametrize("budget", [1, 10])
def test_streamingtom_keeps_broken_tokens_of_a_scene_that_stands_still(backend, budget):
    """A quota for what moves, in proportion, has no room for two."""
    x = tensors.randn((1, 40, 16), seed=3).repeat(2, 1, 1) + 0.01 * tensors.randn((2, 40, 16))
    x[1, 5, 3], x[1, 27, 0] = math.nan, math.inf
    given = StaticDynamic(budget=budget)(ScoredChunk(x, (2, 5, 8)), {})
    out = run(
        backend, x, prune_rules.STREAMINGTOM, external_score=given.score,
        group_ids=given.group_ids, group_k=given.group_k,
    )  # fmt: skip
    assert out.mask[1, 5] and out.mask[1, 27]
    assert out.mask.sum(1).tolist() == [budget, max(budget, 2)]


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_linear_head_keeps_broken_tokens(backend, bad, sign):
    x, head = moving(3, 40, 16), tensors.randn((16,), seed=8)
    head[3] = sign * head[3].abs()
    x[1, 7, 3] = bad
    score = attention_scores.linear_score(x, head)
    out = run(backend, x, prune_rules.MIXTURE_OF_DEPTHS, external_score=score)
    assert out.mask[1, 7] and (out.mask.sum(1) == 8).all()


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_attention_keeps_broken_keys_and_the_order_of_the_others(backend, bad):
    q, k = tensors.randn((2, 3, 16), seed=1), tensors.randn((2, 20, 16), seed=2)
    k[1, 7, 3] = bad
    rest = [n for n in range(20) if n != 7]
    score = attention_scores.attention_received(q, k)
    torch.testing.assert_close(score[rest], attention_scores.attention_received(q, k[:, rest]))
    asked = torch.cat((q, torch.full((2, 1, 16), bad)), dim=1)
    torch.testing.assert_close(attention_scores.attention_received(asked, k), score, equal_nan=True)
    x = moving(1, 20, 16)
    out = run(backend, x, prune_rules.most_attended(0.2), external_score=score[None])
    wanted = [7, *score[rest].topk(3).indices.apply_(lambda n: rest[n]).tolist()]
    assert out.mask[0].nonzero().flatten().tolist() == sorted(wanted)


def test_stc_as_released_leaves_broken_tokens_out_of_its_means():
    x = moving(2, 30, 24) + 1
    broken = x.clone()
    broken[0, 3, 5], broken[1, 8, 2] = math.nan, -math.inf
    state = {}
    score = AsReleased()(ScoredChunk(broken, (2, 5, 6)), state).score
    assert score[0, 3].isnan() and score[1, 8].isnan() and int(score.isnan().sum()) == 2
    assert state["mean"].isfinite().all()


@each_backend
def test_mixture_of_depths(backend):
    """The fifth of a frame that a trained linear head scores highest."""
    x, head = moving(3, 40, 16), tensors.randn((16,), seed=8)
    score = attention_scores.linear_score(x, head, 0.5)
    out = run(backend, x, prune_rules.MIXTURE_OF_DEPTHS, external_score=score)
    for t, frame in enumerate(rows(x)):
        s = [sum(p * q for p, q in zip(v, rows(head))) + 0.5 for v in frame]
        assert set(out.mask[t].nonzero().flatten().tolist()) == smallest([-v for v in s], 8)


def received(q, k):
    """Mean over heads and queries of the softmax weight of each key."""
    heads, queries, n = len(q), len(q[0]), len(k[0])
    total = [0.0] * n
    for head in range(heads):
        for a in q[head]:
            products = [sum(p * r for p, r in zip(a, b)) / math.sqrt(len(a)) for b in k[head]]
            weights = [math.exp(v - max(products)) for v in products]
            for i in range(n):
                total[i] += weights[i] / sum(weights) / (heads * queries)
    return total


@each_backend
def test_most_attended(backend):
    """miniReranker: visual tokens by the attention that text queries give them."""
    q, k = tensors.randn((2, 5, 8), seed=1), tensors.randn((2, 24, 8), seed=2)
    score = attention_scores.attention_received(q, k)
    expected = received(rows(q), rows(k))
    torch.testing.assert_close(score.tolist(), expected, rtol=1e-5, atol=1e-6)
    out = run(
        backend, moving(1, 24, 8), prune_rules.most_attended(0.25), external_score=score[None]
    )
    kept = set(out.mask[0].nonzero().flatten().tolist())
    assert kept == smallest([-v for v in expected], 6)


@each_backend
def test_quota_per_token_type(backend):
    """UTPTrack: search region, dynamic and static template, each with its own quota, by attention
    of the static template's centre token."""
    lengths, quotas = (20, 9, 9), (7, 3, 5)
    n = sum(lengths)
    k = tensors.randn((2, n, 8), seed=4)
    centre = n - 5  # of the static template, which stands last
    score = attention_scores.attention_received(k[:, centre : centre + 1], k)
    expected = received([[h[centre]] for h in rows(k)], rows(k))
    out = run(
        backend, moving(1, n, 8), prune_rules.quota_per_type(quotas), external_score=score[None],
        group_ids=attention_scores.type_ids(lengths),
    )  # fmt: skip
    wanted, start = [], 0
    for length, quota in zip(lengths, quotas):
        wanted += [
            start + i for i in smallest([-v for v in expected[start : start + length]], quota)
        ]
        start += length
    assert out.mask[0].nonzero().flatten().tolist() == sorted(wanted)


# -- Streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scorer", [PixelDifference(), StaticDynamic(budget=9), SpatialPool("max"), SpatialEntropy()]
)
@pytest.mark.parametrize("cut", [[0, 1, 2, 3, 4, 5, 6], [0, 2, 5, 6]])
def test_causal_scorers_give_the_bits_of_one_call(scorer, cut):
    _, patches, mean, std = video_patches(12, 3, 5, seed=4)
    x, features = moving(6, 15, 16, noise=0.2), tensors.randn((6, 60, 24), seed=5)

    def scored(a, b, state):
        part = patches.view(6, -1, patches.shape[-1])[a:b].flatten(0, 1)
        chunk = ScoredChunk(x[a:b], (b - a, 3, 5), part, mean, std)
        return scorer(replace(chunk, features=features[a:b].flatten(0, 1)), state)

    whole, state = scored(0, 6, {}), {}
    pieces = [scored(a, b, state) for a, b in zip(cut, cut[1:])]
    for name, value in whole._asdict().items():
        if value is not None:
            joined = torch.cat([getattr(piece, name) for piece in pieces])
            assert torch.equal(joined.nan_to_num(9), value.nan_to_num(9)), name


def named_rules():
    """Every rule that needs no score from outside."""
    found = {n: v for n, v in vars(prune_rules).items() if isinstance(v, methods.rules.PruneRule)}
    found["dtd_relative"] = prune_rules.dtd_relative(0.6)
    found["dtd_relative_vicostream"] = prune_rules.dtd_relative_vicostream(0.4)
    return {name: rule for name, rule in found.items() if not rule.external}


@each_backend
@pytest.mark.parametrize("name", named_rules())
def test_a_stream_gives_the_bits_of_one_call(backend, name):
    """Causal rules in any pieces; the others chunk by chunk, as the packed call has them."""
    rule = named_rules()[name]
    t, n, d = 8, 70, 40
    x, positions = moving(t, n, d, noise=0.4), positions_of(t, n)
    cuts = [0, 1, 4, 5, 8] if rule.causal else [0, 4, 8]
    states = [PruneState.empty(rule, n, d, device=backend[1]) for _ in range(2)]
    pieces = [
        prune_tokens(
            x[a:b].to(backend[1]), positions[:, a:b].to(backend[1]), rule, state=states[0],
            backend=backend[0],
        )
        for a, b in zip(cuts, cuts[1:])
    ]  # fmt: skip
    tokens = torch.cat([p.tokens[: int(p.count)] for p in pieces])
    mask = torch.cat([p.mask for p in pieces])
    assert mask.any() and not mask.all()
    if rule.causal:
        whole = run(backend, x, rule, state=states[1])
        assert torch.equal(whole.mask, mask)
        assert torch.equal(whole.tokens[: int(whole.count)], tokens)
        for name in rule.needs | {"steps"}:
            assert torch.equal(getattr(states[0], name), getattr(states[1], name))
    elif not rule.needs:  # the packed form has a state for each of its segments
        packed = run(backend, x.reshape(-1, d), rule, shapes=((4, n), (4, n)))
        assert torch.equal(packed.mask, mask.flatten())
        assert torch.equal(packed.tokens[: int(packed.count)], tokens)


def test_broken_tokens_stay_whatever_their_picture():
    _, patches, mean, std = video_patches(4, 3, 5)
    x = moving(2, 15, 8)
    x[1, 6, 2] = math.nan
    still = patches[:60].repeat(2, 1)
    given = PixelDifference()(ScoredChunk(x, (2, 3, 5), still, mean, std), {})
    out = prune_tokens(x, positions_of(2, 15), prune_rules.DTD_PIXEL, external_score=given.score)
    assert out.mask[1, 6] and given.score[1, 6].isnan()


def test_names_say_which_rules_are_not_causal():
    for name, value in vars(prune_rules).items():
        if isinstance(value, methods.rules.PruneRule):
            alone = name != "STC_AS_RELEASED_PER_CHUNK"  # its scorer counts by chunk
            assert value.causal != (alone and name.endswith(("_PER_CHUNK", "_PER_CALL"))), name
    assert not prune_rules.evs_per_call(0.5).causal
    assert prune_rules.dtd_relative(0.5).causal and prune_rules.dtd_relative_pixel(0.5).causal
    assert "Not causal" in AsReleased.__doc__ and "Causal." in PixelDifference.__doc__
