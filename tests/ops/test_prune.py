"""prune_tokens: published rules, each recomputed in float64 by its own formula."""

from __future__ import annotations

import math

import pytest
import torch
from prune_kit import moving, run

from kit import tensors
from kit.backends import backends_of
from vicostream_kernels import PruneRule, PruneState

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_backend = pytest.mark.parametrize("backend", backends_of("prune_tokens"))


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def assert_mask(mask, wanted, margin=None):
    """Equal, except where ``margin`` [T, N] says that the decision hangs on round-off."""
    differs = mask.cpu() != wanted
    if margin is not None:
        differs &= margin > 1e-5
    assert not differs.any(), f"differs at {differs.nonzero().tolist()[:5]}"


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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
