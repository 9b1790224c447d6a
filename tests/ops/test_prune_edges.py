"""prune_tokens: masks, groups, capacity, NaN, ties, zero vectors; the op itself."""

from __future__ import annotations

import math

import pytest
import torch
from prune_kit import CHUNK_INTRA, moving, positions_of, run

from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad
from vicostream_kernels import PruneRule, PruneState, prune_tokens

each_backend = pytest.mark.parametrize("backend", backends_of("prune_tokens"))


# External scores, masks, groups.


@each_backend
def test_mask_and_leaves_out_even_step_zero_and_does_not_count(backend):
    x = moving(4, 40, 16)
    spatial = torch.rand(4, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    plain = run(backend, x, CHUNK_INTRA)
    both = run(backend, x, CHUNK_INTRA, external_mask=spatial)
    assert torch.equal(both.mask.cpu(), plain.mask.cpu() & spatial)
    ranked = run(backend, x, PruneRule(k=5), external_mask=spatial)
    assert (ranked.mask.sum(1) == 5).all() and not (ranked.mask.cpu() & ~spatial).any()


def ranked_by_hand(rule, score, groups, broken, mask):
    """What stays by the order of the decision, token by token; ``mask`` is the "and" mask."""
    steps, places = score.shape
    first = torch.zeros_like(mask)
    first[0] = rule.always_keep == "first"
    must = (first | broken) & mask
    chosen = torch.zeros_like(mask)
    units = [[t] for t in range(steps)] if rule.scope == "step" else [range(steps)]
    for unit in units:
        tokens = [(t, n) for t in unit for n in range(places)]
        for group in {int(groups[at]) for at in tokens}:
            members = [at for at in tokens if groups[at] == group]
            quota = rule.k[group] if isinstance(rule.k, tuple) else rule.count(len(members))
            open_to = sorted(
                (at for at in members if mask[at]), key=lambda at: (not must[at], score[at], at)
            )
            for at in open_to[:quota]:
                chosen[at] = True
    if rule.reduce == "any":
        chosen = ((chosen | (broken & mask)) & ~first).any(0).expand(steps, places)
    return (chosen & mask) | must


@each_backend
@pytest.mark.parametrize(
    "rule",
    [
        dict(k=4),
        dict(drop_ratio=0.5, scope="chunk", always_keep="first"),
        dict(k=6, scope="call", reduce="any"),
        dict(ratio=0.2, scope="chunk", always_keep="first", reduce="any"),
        dict(k=(2, 1, 4)),
    ],
)
def test_what_the_mask_leaves_out_takes_no_place_whatever_it_holds(backend, rule):
    """Padding, say: NaN there, or in a step that is always kept, must push out nothing."""
    # Tokens are compared, so that NaN in them is seen, but the external score decides.
    rule = PruneRule(reference="frame_mean", external=1.0, **rule)
    groups = tensors.ints((3, 20), 0, 3, seed=6) if isinstance(rule.k, tuple) else None
    grouped = torch.zeros(3, 20) if groups is None else groups
    given = {} if groups is None else {"group_ids": groups}
    for seed in range(4):
        score = tensors.randn((3, 20), seed=seed)
        mask = tensors.ints((3, 20), 0, 3, seed=10 + seed) > 0
        broken = tensors.ints((3, 20), 0, 5, seed=20 + seed) == 0
        x = torch.ones(3, 20, 8)
        x[broken] = torch.nan
        found = run(backend, x, rule, external_score=score, external_mask=mask, **given).mask.cpu()
        assert torch.equal(found, ranked_by_hand(rule, 1 + score, grouped, broken, mask))


@each_backend
def test_mask_or_keeps_in_addition(backend):
    x = moving(4, 40, 16)
    wanted = torch.zeros(4, 40, dtype=torch.bool)
    wanted[2, 3:9] = True
    rule = PruneRule(threshold=0.25, reduce="any", always_keep="first", mask="or")
    plain = run(backend, x, CHUNK_INTRA)
    both = run(backend, x, rule, external_mask=wanted)
    assert torch.equal(both.mask.cpu(), plain.mask.cpu() | wanted)
    ranked = run(backend, x, PruneRule(k=5, mask="or"), external_mask=wanted)
    assert ranked.mask.sum(1).tolist() == [5, 5, 6, 5] and ranked.mask[2, 3:9].all()


@each_backend
def test_a_rule_without_score_keeps_all_or_the_mask(backend):
    x, mask = moving(2, 9, 8), torch.arange(18).view(2, 9) % 4 == 1
    assert run(backend, x, PruneRule(reference=())).mask.all()
    out = run(backend, x, PruneRule(reference=()), external_mask=mask)
    assert torch.equal(out.mask.cpu(), mask)


@each_backend
def test_quota_per_group(backend):
    """UTPTrack-like: each token type keeps its own number; type -1 is in no group."""
    score = tensors.randn((2, 30), seed=3)
    groups = tensors.ints((2, 30), -1, 3, seed=4)
    rule = PruneRule(reference=(), external=1.0, keep="above", k=(1, 4, 0))
    out = run(backend, tensors.randn((2, 30, 8)), rule, external_score=score, group_ids=groups)
    for t in range(2):
        wanted = []
        for group, k in enumerate((1, 4, 0)):
            members = [i for i in range(30) if groups[t, i] == group]
            wanted += sorted(members, key=lambda i: -float(score[t, i]))[:k]
        assert out.mask[t].nonzero().flatten().tolist() == sorted(wanted)


@each_backend
@pytest.mark.parametrize("ratio", [0.3, 0.5, 1.0])
def test_ratio_per_group_counts_each_group(backend, ratio):
    score = tensors.randn((2, 30), seed=3)
    groups = tensors.ints((2, 30), 0, 4, seed=4)
    x = tensors.randn((2, 30, 8))
    kwargs = dict(external_score=score, group_ids=groups)
    kept = run(backend, x, PruneRule(reference=(), external=1.0, ratio=ratio), **kwargs)
    drop = run(backend, x, PruneRule(reference=(), external=1.0, drop_ratio=ratio), **kwargs)
    for t in range(2):
        for group in range(4):
            inside = groups[t] == group
            size = int(inside.sum())
            assert int(kept.mask[t].cpu()[inside].sum()) == int(size * ratio)
            assert int(drop.mask[t].cpu()[inside].sum()) == size - int(size * ratio)


@each_backend
def test_quotas_from_the_device(backend):
    """StreamingTOM: a budget split between static and dynamic tokens by their numbers."""
    x, score = moving(4, 60, 16), tensors.randn((4, 60), seed=8)
    change = torch.rand(4, 60, generator=torch.Generator().manual_seed(2))
    groups = (change > 0.6).int()
    dynamic = (20 * groups.sum(1) / 60).round().int()
    quota = torch.stack([20 - dynamic, dynamic], dim=1)
    rule = PruneRule(reference=(), external=1.0, keep="above", k=0)
    out = run(backend, x, rule, external_score=score, group_ids=groups, group_k=quota)
    for t in range(4):
        for group in (0, 1):
            members = [i for i in range(60) if groups[t, i] == group]
            best = sorted(members, key=lambda i: -float(score[t, i]))[: int(quota[t, group])]
            assert out.mask[t].cpu()[members].sum() == len(best)
            assert out.mask[t].cpu()[best].all()


# Edges.


@each_backend
@pytest.mark.parametrize("capacity", [1, 100, 239, 240, 241, 600])
def test_capacity_cuts_in_order_and_count_stays_true(backend, capacity):
    x = moving(4, 60, 16)
    score = torch.arange(240.0).view(4, 60)
    rule = PruneRule(reference=(), external=1.0, keep="at_least", threshold=0.0)
    out = run(backend, x, rule, external_score=score, capacity=capacity)
    assert int(out.count) == 240 and out.tokens.shape == (capacity, 16) and out.mask.all()


def test_reference_without_reading_the_count(monkeypatch):
    """As on a GPU, where a read would wait; ``run`` checks the padding."""
    monkeypatch.setattr("vicostream_kernels.reference.prune._known_count", lambda cu_count: None)
    x = moving(4, 60, 16)
    x[0, 0] = math.nan  # row 0 is what the padding is gathered from
    for capacity in (50, 240, 300):
        out = run(("reference", "cpu"), x, CHUNK_INTRA, capacity=capacity)
        assert 60 < int(out.count) < 240


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "rule",
    [
        CHUNK_INTRA,
        PruneRule(threshold=-1.0),
        PruneRule(metric="l1", threshold=1e9, keep="above"),
        PruneRule(reference=("running_mean", "frame_mean"), metric="gaussian", k=2, channels=0.5),
        PruneRule(reference="last_kept", metric="l2", threshold=1e9, keep="above"),
        PruneRule(k=0),
    ],
    ids=lambda rule: rule.text(),
)
def test_tokens_with_nan_or_inf_stay(backend, bad, rule):
    x = moving(3, 12, 16)
    x[1, 5, 7] = bad
    x[2, 11, 0] = bad
    out = run(backend, x, rule)
    assert out.mask[1, 5] and out.mask[2, 11]


@each_backend
def test_means_leave_out_tokens_with_nan(backend):
    """The other tokens are judged as if the broken one were not there, and the stream recovers."""
    x = moving(2, 12, 16)
    broken = x.clone()
    broken[0, 5, 7] = math.inf
    rest = [i for i in range(12) if i != 5]
    for metric, threshold in (("cosine", 0.3), ("gaussian", 2.0), ("l2", 1.1)):
        for reference in ("frame_mean", "running_mean"):
            rule = PruneRule(reference=reference, metric=metric, threshold=threshold)
            # A state without token memory takes steps of any width.
            states = [PruneState.empty(rule, 12, 16, device=backend[1]) for _ in range(2)]
            first = run(backend, broken[:1], rule, state=states[0])
            fewer = run(backend, x[:1, rest], rule, state=states[1])
            assert first.mask[0, 5] and torch.equal(first.mask[:, rest], fewer.mask)
            then = run(backend, x[1:], rule, state=states[0])
            wanted = run(backend, x[1:], rule, state=states[1])
            assert torch.equal(then.mask, wanted.mask)
            decided = torch.cat([fewer.mask.flatten(), wanted.mask.flatten()])
            assert decided.any() and not decided.all(), "the example decides nothing"
            if reference == "running_mean":
                assert states[0].mean.isfinite().all()
                torch.testing.assert_close(states[0].mean, states[1].mean)


@each_backend
def test_nan_scores_come_first(backend):
    score = torch.tensor([[3.0, math.nan, 5.0, -math.inf, math.nan, 4.0]])
    x = tensors.randn((1, 6, 8))
    for keep, wanted in (("below", [1, 3, 4]), ("above", [1, 2, 4])):
        rule = PruneRule(reference=(), external=1.0, keep=keep, k=3)
        out = run(backend, x, rule, external_score=score)
        assert out.index[:3].tolist() == wanted
    rule = PruneRule(reference=(), external=1.0, keep="above", threshold=4.5)
    out = run(backend, x, rule, external_score=score)
    assert out.index[: int(out.count)].tolist() == [1, 2, 4]


@each_backend
def test_zero_vectors_in_a_cosine(backend):
    x = tensors.randn((2, 3, 8))
    x[:, 0] = 0.0  # both zero: unchanged, similarity 1
    x[1, 1] = 0.0  # one zero: similarity 0
    x[1, 2] = x[0, 2]  # equal: exactly 1
    below = run(backend, x, PruneRule(threshold=1.0, always_keep="first"))
    assert below.mask[1].tolist() == [False, True, False]
    assert run(backend, x, PruneRule(threshold=0.0, keep="at_most")).mask[1].tolist() == [
        False, True, False,
    ]  # fmt: skip


@each_backend
@pytest.mark.parametrize("keep", ["below", "above"])
def test_ties_go_to_the_lowest_index(backend, keep):
    score = torch.tensor([[1.0, 0.0, -0.0, 1.0, 0.0, 1.0]])
    rule = PruneRule(reference=(), external=1.0, keep=keep, k=2)
    out = run(backend, tensors.randn((1, 6, 8)), rule, external_score=score)
    assert out.index[:2].tolist() == ([1, 2] if keep == "below" else [0, 3])


@each_backend
def test_ratio_zero_keeps_only_what_must_stay(backend):
    x = moving(3, 10, 8)
    assert int(run(backend, x, PruneRule(ratio=0.0)).count) == 0
    first = run(backend, x, PruneRule(ratio=0.0, scope="call", always_keep="first"))
    assert int(first.count) == 10 and first.mask[0].all()


@each_backend
def test_one_token(backend):
    x = tensors.randn((1, 1, 1))
    for rule in (CHUNK_INTRA, PruneRule(k=1), PruneRule(reference="frame_mean", threshold=0.5)):
        out = run(backend, x, rule)
        assert int(out.count) == (0 if rule.reference == "frame_mean" else 1)


def test_rows_of_another_buffer_are_not_touched():
    x, positions = moving(2, 6, 8), positions_of(2, 6)
    before = x.clone()
    prune_tokens(x, positions, CHUNK_INTRA)
    assert_same_bits(x.contiguous(), before.contiguous())


# The op.


def raw_arguments(rule, state=None):
    x, positions = moving(3, 11, 16), positions_of(3, 11)
    out = (
        torch.zeros(20, 16),
        torch.zeros(3, 20, dtype=torch.int32),
        torch.zeros(20, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(3, 11, dtype=torch.bool),
    )
    carried = (None,) * 5
    if state is not None:
        carried = (state.steps, state.previous, state.last_kept, state.mean, state.mean_count)
    return x, positions, rule.text(), None, *out, *carried


@pytest.mark.parametrize(
    "rule",
    [CHUNK_INTRA, PruneRule(reference=("previous", "running_mean"), k=4)],
    ids=lambda rule: rule.text(),
)
def test_op_is_well_behaved(rule):
    op = torch.ops.vicostream.prune_tokens.default
    check_op(op, raw_arguments(rule, PruneState.empty(rule, 11, 16)))
    check_refuses_grad(op, raw_arguments(rule))


def test_fullgraph_with_a_state():
    rule = PruneRule(reference=("previous", "running_mean"), ratio=0.4)

    def call(x, positions, steps, previous, mean, mean_count):
        state = PruneState(steps=steps, previous=previous, mean=mean, mean_count=mean_count)
        return tuple(prune_tokens(x, positions, rule, state=state, capacity=9))

    state = PruneState.empty(rule, 7, 16)
    check_fullgraph(
        call, moving(3, 7, 16), positions_of(3, 7), state.steps, state.previous, state.mean,
        state.mean_count,
    )  # fmt: skip


def test_fullgraph_packed():
    def call(x, positions):
        return tuple(prune_tokens(x, positions, CHUNK_INTRA, shapes=((2, 5), (1, 4))))

    check_fullgraph(call, tensors.randn((14, 8)), tensors.ints((3, 14), 0, 9))
