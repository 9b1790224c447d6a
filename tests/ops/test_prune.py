"""prune_tokens: published rules recomputed step by step, compaction, edges, the op itself."""

from __future__ import annotations

import math

import pytest
import torch

from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad
from vicostream_kernels import PrunedTokens, PruneRule, PruneState, prune_tokens

CHUNK_INTRA = PruneRule(
    reference="previous", metric="cosine", threshold=0.25, reduce="any", always_keep="first"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_backend = pytest.mark.parametrize("backend", backends_of("prune_tokens"))


def moving(t, n, d, *, dtype=torch.float32, seed=0, device="cpu", noise=0.6):
    """Tokens of a static scene in which a third of the places change at each step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, d, generator=generator).repeat(t, 1, 1)
    for step in range(1, t):
        changed = torch.rand(n, generator=generator) < 1 / 3
        x[step:, changed] = torch.randn(int(changed.sum()), d, generator=generator)
    x += noise * torch.randn(t, n, d, generator=generator)
    return tensors.strided(x.to(dtype)).to(device)


def positions_of(t, n, device="cpu"):
    return tensors.ints((3, t, n), 0, 100_000, seed=9).to(device)


def run(backend, x, rule, **kwargs):
    name, device = backend
    kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    if "shapes" in kwargs:
        positions = tensors.ints((3, x.shape[0]), 0, 100_000, seed=9, device=device)
    else:
        positions = positions_of(*x.shape[:2], device=device)
    out = prune_tokens(x.to(device), positions, rule, backend=name, **kwargs)
    assert_compacted(out, x.to(device), positions)
    return out


def assert_compacted(out: PrunedTokens, x, positions):
    """tokens, positions and index are those of the mask, in order, padded."""
    flat_mask = out.mask.flatten()
    kept = flat_mask.nonzero().flatten()
    capacity = out.index.numel()
    assert int(out.count) == kept.numel() == int(out.cu_count[-1])
    kept, used = kept[:capacity], min(kept.numel(), capacity)
    assert out.index[:used].tolist() == kept.tolist()
    assert (out.index[used:] == -1).all()
    assert_same_bits(out.tokens[:used], x.reshape(-1, x.shape[-1])[kept], name="tokens")
    assert_same_bits(out.positions[:, :used], positions.reshape(3, -1)[:, kept], name="positions")
    assert (out.tokens[used:] == 0).all() and (out.positions[:, used:] == 0).all()


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def assert_mask(mask, wanted, margin=None):
    """Equal, except where ``margin`` [T, N] says that the decision hangs on round-off."""
    differs = mask.cpu() != wanted
    if margin is not None:
        differs &= margin > 1e-5
    assert not differs.any(), f"differs at {differs.nonzero().tolist()[:5]}"


# Published rules, each recomputed in float64 by its own formula.


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "d"), [(4, 13, 33), (4, 135, 64), (1, 7, 8), (3, 1, 17)])
@pytest.mark.parametrize("eps", [0.25, 0.15, 0.5, 0.9])
def test_chunk_intra(backend, dtype, t, n, d, eps):
    """ViCoStream: step 0 whole; a column stays if one adjacent cosine in it is below eps."""
    x = moving(t, n, d, dtype=dtype)
    rule = PruneRule(threshold=eps, reduce="any", always_keep="first")
    out = run(backend, x, rule)
    z = x.double()
    wanted = torch.zeros(t, n, dtype=torch.bool)
    margin = torch.ones(t, n)
    wanted[0] = True
    for place in range(n):
        s = [cosine(z[step - 1, place], z[step, place]) for step in range(1, t)]
        wanted[1:, place] = any(value < eps for value in s)
        margin[:, place] = min((abs(value - eps) for value in s), default=1.0)
    assert_mask(out.mask, wanted, margin)
    assert margin.min() > 1e-5 or t == 1
    if (t, n, eps) == (4, 135, 0.25):
        assert n < int(out.count) < t * n, "the example decides nothing"


@each_backend
def test_dtd_absolute(backend):
    """TimeChat-Online feature mode: drop where the cosine with the previous step is above tau."""
    x = moving(6, 50, 31)
    rule = PruneRule(threshold=0.5, keep="at_most", always_keep="first_of_stream")
    out = run(backend, x, rule)
    z = x.double()
    wanted = torch.ones(6, 50, dtype=torch.bool)
    for t in range(1, 6):
        for i in range(50):
            wanted[t, i] = not cosine(z[t - 1, i], z[t, i]) > 0.5
    assert_mask(out.mask, wanted)
    assert not wanted[1:].all() and wanted[1:].any()


@each_backend
@pytest.mark.parametrize("t", [0.3, 0.7, 0.85, 1.0])
@pytest.mark.parametrize("even", [False, True])
def test_dtd_relative(backend, t, even):
    """TimeChat-Online drops int(N t) a step; ViCoStream's copy keeps t, drops an even number."""
    n = 50
    x = moving(5, n, 24)
    if even:
        rule = PruneRule(drop_ratio=1 - t, drop_multiple=2, always_keep="first_of_stream")
        dropped = int(n * (1 - t)) // 2 * 2
    else:
        rule = PruneRule(drop_ratio=t, always_keep="first_of_stream")
        dropped = int(n * t)
    out = run(backend, x, rule)
    z = x.double()
    wanted = torch.ones(5, n, dtype=torch.bool)
    for step in range(1, 5):
        s = [cosine(z[step - 1, i], z[step, i]) for i in range(n)]
        for i in sorted(range(n), key=lambda i: -s[i])[:dropped]:
            wanted[step, i] = False
    assert_mask(out.mask, wanted)


def gaussian(a, b):
    return sum(math.exp(-float((a - b).square().sum()) / (2 * 2.0**k)) for k in range(-3, 2))


def stc_channels(z):
    """The half of the channels with the lowest variance over all tokens of the call."""
    order = z.flatten(0, 1).var(dim=0).argsort(stable=True)
    return order[: int(z.shape[-1] * 0.5)].sort().values


@each_backend
@pytest.mark.parametrize("seed", [0, 1])
def test_stc_gaussian_with_history(backend, seed):
    """STC-Pruner: g(x, history) + g(x, frame), the smallest a frame; history over all channels."""
    rule = PruneRule(
        reference=("running_mean", "frame_mean"), metric="gaussian", k=9, channels=0.5,
        history="chunk",
    )  # fmt: skip
    state = PruneState.empty(rule, 30, 24, device=backend[1])
    history = []
    for call in range(3):
        x = moving(2, 30, 24, seed=10 * seed + call)
        x += 2 * tensors.randn((24,), seed=77)
        out = run(backend, x, rule, state=state)
        z = x.double()
        history.append(z.flatten(0, 1).mean(0))
        channels = stc_channels(z)
        normed = torch.nn.functional.normalize(z[..., channels], dim=-1)
        temporal = torch.nn.functional.normalize(torch.stack(history).mean(0)[channels], dim=0)
        wanted = torch.zeros(2, 30, dtype=torch.bool)
        for f in range(2):
            spatial = normed[f].mean(0)
            s = [gaussian(token, temporal) + gaussian(token, spatial) for token in normed[f]]
            wanted[f, sorted(range(30), key=s.__getitem__)[:9]] = True
        assert_mask(out.mask, wanted)
    assert state.mean_count.tolist() == [3] and state.steps.tolist() == [6]
    torch.testing.assert_close(
        state.mean[0].cpu().double(), torch.stack(history).mean(0), rtol=1e-5, atol=1e-6
    )


@each_backend
def test_stc_dual_anchor(backend):
    """The paper's score: alpha (1 - cos to history) + (1 - alpha) (1 - cos to frame), largest."""
    alpha = 0.3
    rule = PruneRule(
        reference=("running_mean", "frame_mean"), weights=(alpha, 1 - alpha), k=11, keep="below"
    )
    x = moving(4, 40, 21) + 0.5
    out = run(backend, x, rule)
    z = x.double()
    wanted = torch.zeros(4, 40, dtype=torch.bool)
    for f in range(4):
        history, frame = z[: f + 1].mean((0, 1)), z[f].mean(0)
        s = [alpha * (1 - cosine(v, history)) + (1 - alpha) * (1 - cosine(v, frame)) for v in z[f]]
        wanted[f, sorted(range(40), key=lambda i: -s[i])[:11]] = True
    assert_mask(out.mask, wanted)


@each_backend
@pytest.mark.parametrize("q", [0.2, 0.75, 0.99])
def test_evs_ratio_over_the_call(backend, q):
    """EVS: the max(N, int(M (1-q))) least similar of the call; frame 0 counts as most changed."""
    t, n = 5, 21
    x = moving(t, n, 16)
    rule = PruneRule(ratio=1 - q, scope="call", always_keep="first")
    out = run(backend, x, rule)
    z = x.double()
    change = torch.full((t, n), 255.0, dtype=torch.float64)
    for step in range(1, t):
        change[step] = 1 - torch.nn.functional.cosine_similarity(z[step - 1], z[step], dim=-1)
    kept = max(n, int(t * n * (1 - q)))
    wanted = torch.zeros(t * n, dtype=torch.bool)
    wanted[change.flatten().argsort(descending=True, stable=True)[:kept]] = True
    assert_mask(out.mask, wanted.view(t, n))
    assert int(out.count) == kept


@each_backend
@pytest.mark.parametrize("metric", ["cosine", "l1", "l2", "gaussian"])
@pytest.mark.parametrize("reference", ["previous", "last_kept", "chunk_first", "frame_mean"])
def test_threshold_of_every_metric_and_reference(backend, metric, reference):
    t, n, d = 5, 17, 19
    x = moving(t, n, d, noise=0.3)
    threshold = {"cosine": 0.6, "l1": 0.6, "l2": 0.7, "gaussian": 2.5}[metric]
    if reference == "frame_mean":
        threshold = {"cosine": 0.2, "l1": 0.8, "l2": 1.0, "gaussian": 2.0}[metric]
    keep = "above" if metric in ("l1", "l2") else "below"
    rule = PruneRule(reference=reference, metric=metric, threshold=threshold, keep=keep)
    out = run(backend, x, rule)
    z = x.double()
    unit = torch.nn.functional.normalize(z, dim=-1) if metric == "gaussian" else z
    wanted = torch.ones(t, n, dtype=torch.bool)
    margin = torch.ones(t, n, dtype=torch.float64)
    last = list(unit[0])
    for step in range(t):
        for i in range(n):
            if step == 0 and reference != "frame_mean":
                continue  # nothing to compare with: kept
            other = {
                "previous": unit[step - 1, i],
                "last_kept": last[i],
                "chunk_first": unit[0, i],
                "frame_mean": unit[step].mean(0),
            }[reference]
            here = unit[step, i]
            value = {
                "cosine": lambda a, b: cosine(a, b),
                "l1": lambda a, b: float((a - b).abs().mean()),
                "l2": lambda a, b: float((a - b).square().mean().sqrt()),
                "gaussian": gaussian,
            }[metric](here, other)
            margin[step, i] = abs(value - threshold)
            wanted[step, i] = value > threshold if keep == "above" else value < threshold
            if wanted[step, i]:
                last[i] = here
    assert margin.min() > 1e-5, "choose another seed: a decision hangs on round-off"
    assert_mask(out.mask, wanted)
    assert wanted[1:].any() and not wanted[1:].all(), "the example decides nothing"


@each_backend
@pytest.mark.parametrize(
    ("keep", "wanted"),
    [("below", [0]), ("at_most", [0, 1]), ("above", [2]), ("at_least", [1, 2])],
)
def test_threshold_bounds(backend, keep, wanted):
    rule = PruneRule(reference=(), external=1.0, threshold=0.5, keep=keep)
    score = torch.tensor([[0.25, 0.5, 0.75]])
    out = run(backend, tensors.randn((1, 3, 8)), rule, external_score=score)
    assert out.index[: int(out.count)].tolist() == wanted


# External scores, masks, groups.


@each_backend
def test_external_score_joins_a_term(backend):
    """Relevance minus correlation with the previous frame, as EchoPrune sums them."""
    x, n = moving(3, 20, 15), 20
    relevance = tensors.randn((3, n), torch.float16, seed=5)
    rule = PruneRule(weights=(-1.0,), external=2.0, keep="above", k=6, always_keep="first")
    out = run(backend, x, rule, external_score=relevance)
    z = x.double()
    for t in (1, 2):
        s = [2 * float(relevance[t, i]) - cosine(z[t - 1, i], z[t, i]) for i in range(n)]
        best = sorted(sorted(range(n), key=lambda i: -s[i])[:6])
        assert out.mask[t].nonzero().flatten().tolist() == best
    assert out.mask[0].all()


@each_backend
def test_mask_and_leaves_out_even_step_zero_and_does_not_count(backend):
    x = moving(4, 40, 16)
    spatial = torch.rand(4, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    plain = run(backend, x, CHUNK_INTRA)
    both = run(backend, x, CHUNK_INTRA, external_mask=spatial)
    assert torch.equal(both.mask.cpu(), plain.mask.cpu() & spatial)
    ranked = run(backend, x, PruneRule(k=5), external_mask=spatial)
    assert (ranked.mask.sum(1) == 5).all() and not (ranked.mask.cpu() & ~spatial).any()


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
    if "mean" in rule.needs:
        # Means leave them out: the other tokens are judged as if they were not there.
        assert out.mask[1].sum() == 2 and out.mask[0].sum() == 2


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
