"""Published pruning rules: each recomputed by its own formula, in float64 with plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from prune_kit import moving, positions_of, run

from kit import tensors
from kit.backends import backends_of
from vicostream_kernels import PruneState, methods, prune_tokens
from vicostream_kernels.methods import attention_scores, prune_rules, spatial
from vicostream_kernels.methods.pixel import PixelDifference
from vicostream_kernels.methods.scorer import ScoredChunk
from vicostream_kernels.methods.spatial import SpatialPool
from vicostream_kernels.methods.stc import AsReleased
from vicostream_kernels.methods.streamingtom import StaticDynamic
from vicostream_kernels.models.vision import vision_grid

each_backend = pytest.mark.parametrize("backend", backends_of("prune_tokens"))


def cosine(a, b):
    """Of two lists of floats."""
    dot = sum(p * q for p, q in zip(a, b))
    return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def rows(x):
    """Nested lists of a tensor, in float64."""
    return x.double().tolist()


def smallest(values, k):
    """Indices of the k smallest, ties to the lowest index."""
    return set(sorted(range(len(values)), key=lambda i: (values[i], i))[:k])


def assert_decided(mask, wanted):
    """Equal, and the example has both kinds of tokens after the first step."""
    wanted = torch.tensor(wanted)
    differs = (mask.cpu() != wanted).nonzero().tolist()
    assert not differs, f"differs at {differs[:5]}"
    assert wanted.any() and not wanted.all()


# -- ViCoStream ----------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("dataset", ["streamingbench", "ovo-bench", "vstream-ego4d"])
def test_chunk_intra(backend, dataset):
    eps = {"streamingbench": 0.25, "ovo-bench": 0.15, "vstream-ego4d": 0.5}[dataset]
    x = moving(4, 60, 24)
    z, wanted = rows(x), [[True] * 60 for _ in range(4)]
    for n in range(60):
        changed = any(cosine(z[t - 1][n], z[t][n]) < eps for t in (1, 2, 3))
        for t in (1, 2, 3):
            wanted[t][n] = changed
    rule = prune_rules.chunk_intra(dataset)
    out = run(backend, x, rule)
    assert_decided(out.mask, wanted)
    changed = sum(wanted[1])
    assert int(out.count) == 60 + 3 * changed and not rule.causal


def test_every_benchmark_has_its_threshold():
    eps = {name: prune_rules.chunk_intra(name).threshold for name in prune_rules.CHUNK_INTRA_EPS}
    assert sorted(set(eps.values())) == [0.15, 0.25, 0.5]
    assert [name for name, value in eps.items() if value == 0.5] == ["vstream-ego4d"]
    assert eps["streamingbench"] == 0.25 and list(eps.values()).count(0.15) == 4
    with pytest.raises(ValueError, match="'mvbench' is not one of streamingbench, ovo-bench"):
        prune_rules.chunk_intra("mvbench")


def pooled(x, t, height, width, kind):
    """Tokens [T][N][D] pooled in blocks of 2 x 2, outside the grid zeros; and their mask."""
    z, d = rows(x), x.shape[-1]
    out = [[[0.0] * d for _ in range(height * width)] for _ in range(t)]
    mask = [[False] * (height * width) for _ in range(t)]
    for step in range(t):
        for top in range(0, height, 2):
            for left in range(0, width, 2):
                cells = [
                    z[step][i * width + j] if i < height and j < width else [0.0] * d
                    for i in (top, top + 1)
                    for j in (left, left + 1)
                ]
                for c in range(d):
                    values = [cell[c] for cell in cells]
                    both = {"avg": sum(values) / 4, "max": max(values)}
                    out[step][top * width + left][c] = both[kind]
                mask[step][top * width + left] = True
    return out, mask


@each_backend
@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7)])
def test_spatial_pooling_and_chunk_intra(backend, kind, height, width):
    """Combined keep = spatial AND temporal, the temporal stage seeing the pooled values."""
    n = height * width
    x = moving(4, n, 16)
    values, mask = pooled(x, 4, height, width, kind)
    method = methods.get(f"vicostream-{kind}")
    given = method.scorer(ScoredChunk(x, (4, height, width)), {})
    torch.testing.assert_close(given.tokens.double(), torch.tensor(values).double())
    assert given.mask.tolist() == mask
    wanted = [[False] * n for _ in range(4)]
    for i in range(n):
        if mask[0][i]:
            pairs = [(values[t - 1][i], values[t][i]) for t in (1, 2, 3)]
            changed = any(cosine(a, b) < 0.25 for a, b in pairs)
            for t in range(4):
                wanted[t][i] = t == 0 or changed
    out = run(backend, given.tokens, method.prune, external_mask=given.mask)
    assert_decided(out.mask, wanted)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_spatial_entropy_with_the_window_order_undone(share):
    """Top patches of each raster frame by entropy of softmax over channels; then 2 x 2 max-pool."""
    t, h, w, c = 2, 12, 20, 24  # in patches
    features = tensors.randn((t, h, w, c), seed=3) * 2
    # As the ViT leaves them: merge squares in window order, four patches each.
    grid = vision_grid(t, h, w, 2, 4, "cpu")
    squares = features.view(t, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4 * c)
    windowed = squares[grid.order]
    assert not torch.equal(windowed, squares)
    wanted = [[False] * (h * w // 4) for _ in range(t)]
    for step, frame in enumerate(rows(features)):
        entropy = {}
        for i in range(h):
            for j in range(w):
                top = max(frame[i][j])
                weights = [math.exp(v - top) for v in frame[i][j]]
                p = [v / sum(weights) for v in weights]
                entropy[i, j] = -sum(v * math.log(v) for v in p)
        best = sorted(entropy, key=lambda at: -entropy[at])[: max(1, int(share * h * w))]
        for i, j in best:
            wanted[step][i // 2 * (w // 2) + j // 2] = True
    raster = windowed[grid.raster].view(-1, c)
    mask = spatial.entropy_mask(raster, (t, h // 2, w // 2), share)
    assert_decided(mask, wanted)
    kept = prune_tokens(
        tensors.randn((t, h * w // 4, 8)), positions_of(t, h * w // 4),
        prune_rules.CHUNK_INTRA_PER_CHUNK, external_mask=mask,
    )  # fmt: skip
    assert not (kept.mask & ~mask).any() and kept.mask[0].equal(mask[0])


# -- TimeChat-Online -----------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("tau", [0.5, 0.25])
def test_dtd_feature(backend, tau):
    x = moving(6, 40, 24)
    z, wanted = rows(x), [[True] * 40 for _ in range(6)]
    for t in range(1, 6):
        for i in range(40):
            wanted[t][i] = not cosine(z[t - 1][i], z[t][i]) > tau
    rule = methods.get("timechat-online", {"prune.threshold": tau}).prune
    assert rule.causal
    assert_decided(run(backend, x, rule).mask, wanted)
    assert prune_rules.DTD_FEATURE.threshold == 0.5


@each_backend
@pytest.mark.parametrize(("share", "n"), [(0.85, 50), (0.3, 47), (1.0, 10), (0.0, 10)])
def test_dtd_relative_and_its_copy(backend, share, n):
    """TimeChat-Online: share to drop. ViCoStream's copy: share to keep, an even number dropped."""
    x = moving(4, n, 24)
    z = rows(x)
    for rule, dropped in (
        (prune_rules.dtd_relative(share), int(n * share)),
        (prune_rules.dtd_relative_vicostream(share), int(n * (1 - share)) // 2 * 2),
    ):
        wanted = [[True] * n for _ in range(4)]
        for t in range(1, 4):
            similar = [-cosine(z[t - 1][i], z[t][i]) for i in range(n)]
            for i in smallest(similar, dropped):
                wanted[t][i] = False
        out = run(backend, x, rule)
        assert out.mask.tolist() == wanted
        assert int(out.count) == n + 3 * (n - dropped)


def test_the_two_relative_forms_differ():
    """0.3 drops 15 of 50 in one and 34 (not 35) in the other: the figures can't be compared."""
    assert prune_rules.dtd_relative(0.3).count(50) == 35
    assert prune_rules.dtd_relative_vicostream(0.3).count(50) == 16


def video_patches(frames, height, width, seed=0):
    """Raw RGB frames [F, 28 * height, 28 * width, 3] in [0, 1], and their patches as the
    preprocessor orders them, normalised."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(1, height, width, 3, generator=generator).repeat(frames, 1, 1, 1)
    for f in range(1, frames):
        changed = torch.rand(height, width, generator=generator) < 0.4
        raw[f:, changed] = torch.rand(int(changed.sum()), 3, generator=generator)
    raw = raw.repeat_interleave(28, 1).repeat_interleave(28, 2)
    raw = (raw + 0.05 * torch.rand(raw.shape, generator=generator)).clamp(0, 1)
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
    x = (raw - torch.tensor(mean)) / torch.tensor(std)
    # [t, temporal, gh, merge, 14, gw, merge, 14, c] -> [t, gh, gw, merge, merge, c, temporal, ...]
    x = x.view(frames // 2, 2, height, 2, 14, width, 2, 14, 3)
    patches = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * 14 * 14)
    return raw, patches, mean, std


def pixel_differences(raw, t, height, width):
    """Mean absolute RGB difference of each 28 x 28 square: first raw frame of step t-1 with the
    last of step t."""
    changes = (raw[2 * t - 2].double() - raw[2 * t + 1].double()).abs()
    squares = changes.view(height, 28, width, 28, 3)
    return [float(squares[i, :, j].mean()) for i in range(height) for j in range(width)]


@each_backend
@pytest.mark.parametrize("drop", [None, 0.6])
def test_dtd_pixel(backend, drop):
    raw, patches, mean, std = video_patches(8, 3, 5)
    n = 15
    chunk = ScoredChunk(moving(4, n, 8), (4, 3, 5), patches, mean, std)
    given = PixelDifference()(chunk, {})
    rule = prune_rules.DTD_PIXEL if drop is None else prune_rules.dtd_relative_pixel(drop)
    out = run(backend, chunk.tokens, rule, external_score=given.score)
    wanted = [[True] * n for _ in range(4)]
    for t in range(1, 4):
        difference = pixel_differences(raw, t, 3, 5)
        torch.testing.assert_close(given.score[t].tolist(), difference, rtol=1e-4, atol=1e-5)
        for i in range(n):
            if drop is None:
                wanted[t][i] = not difference[i] < rule.threshold
        if drop is not None:
            for i in smallest(difference, int(n * drop)):
                wanted[t][i] = False
    assert_decided(out.mask, wanted)


# -- STC-Pruner ----------------------------------------------------------------------------------


def mean_of(vectors):
    return [sum(values) / len(vectors) for values in zip(*vectors)]


def unit(a):
    length = math.sqrt(sum(v * v for v in a))
    return [v / length for v in a]


def gaussians(a, b):
    distance = sum((p - q) ** 2 for p, q in zip(a, b))
    return sum(math.exp(-distance / (2 * 2.0**k)) for k in range(-3, 2))


def quiet(tokens, share=0.5):
    """Channels of the lowest variance over all tokens, in the order of their variance."""
    centre = mean_of(tokens)
    spread = [sum((v[c] - centre[c]) ** 2 for v in tokens) for c in range(len(centre))]
    return sorted(range(len(spread)), key=lambda c: (spread[c], c))[: int(len(spread) * share)]


def stc_scores(frames, history, channels, form, alpha=0.5):
    """Similarities to history and frame; ``history`` over the channels compared."""
    pick = [[[v[c] for c in channels] for v in frame] for frame in frames]
    scores = []
    for frame in pick:
        if form == "gaussian":
            spatial, temporal = mean_of([unit(v) for v in frame]), unit(history)
            scores.append(
                [gaussians(unit(v), temporal) + gaussians(unit(v), spatial) for v in frame]
            )
        else:
            spatial = mean_of(frame)
            scores.append(
                [alpha * cosine(v, history) + (1 - alpha) * cosine(v, spatial) for v in frame]
            )
    return scores


@each_backend
@pytest.mark.parametrize("form", ["gaussian", "dual_anchor"])
@pytest.mark.parametrize("history", ["intended", "as_released"])
def test_stc_pruner(backend, form, history):
    """Three chunks of two frames; the history is bounded: a running mean and its count."""
    name = {"gaussian": "stc-pruner", "dual_anchor": "stc-pruner-dual-anchor"}[form]
    method = methods.get(name, {"prune.k": 9})
    if history == "as_released":
        method = methods.get("stc-pruner-as-released", {"prune.k": 9, "scorer.form": form})
    n, d = 30, 24
    rule, carried, past = method.prune, {}, []
    state = PruneState.empty(rule, n, d, device=backend[1])
    assert not rule.causal or method.scorer is not None
    for call in range(3):
        x = moving(2, n, d, seed=call) + 2 * tensors.randn((d,), seed=77)
        frames = rows(x)
        tokens = [v for frame in frames for v in frame]
        channels = quiet(tokens)
        centre = mean_of(tokens)
        if history == "as_released":
            past.append([centre[c] for c in channels])
            mean = mean_of(past)
        else:
            past.append(centre)
            mean = [mean_of(past)[c] for c in channels]
        wanted = [[False] * n for _ in range(2)]
        for f, scores in enumerate(stc_scores(frames, mean, channels, form)):
            for i in smallest(scores, 9):
                wanted[f][i] = True
        score = None
        if method.scorer is not None:
            score = method.scorer(ScoredChunk(x, (2, 5, 6)), carried).score
        out = run(backend, x, rule, state=state, external_score=score)
        assert_decided(out.mask, wanted)


def test_the_released_history_keeps_other_tokens():
    """Why both are offered: over different channels the mean is another one."""
    kept = {}
    for name in ("stc-pruner", "stc-pruner-as-released"):
        method, carried = methods.get(name, {"prune.k": 12}), {}
        state, kept[name] = PruneState.empty(method.prune, 36, 24), []
        for call in range(4):
            x = moving(1, 36, 24, seed=call) + 2 * tensors.randn((24,), seed=77)
            score = None
            if method.scorer is not None:
                score = method.scorer(ScoredChunk(x, (1, 6, 6)), carried).score
            out = prune_tokens(
                x, positions_of(1, 36), method.prune, state=state, external_score=score
            )
            kept[name].append(out.mask)
    first, later = (
        int((torch.stack(kept["stc-pruner"][a:b]) & ~torch.stack(
            kept["stc-pruner-as-released"][a:b])).sum()) for a, b in ((0, 1), (1, 4))
    )  # fmt: skip
    assert first == 0 and later > 0


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


@pytest.mark.parametrize("scorer", [PixelDifference(), StaticDynamic(budget=9), SpatialPool("max")])
@pytest.mark.parametrize("cut", [[0, 1, 2, 3, 4, 5, 6], [0, 2, 5, 6]])
def test_causal_scorers_give_the_bits_of_one_call(scorer, cut):
    _, patches, mean, std = video_patches(12, 3, 5, seed=4)
    x = moving(6, 15, 16, noise=0.2)

    def scored(a, b, state):
        part = patches.view(6, -1, patches.shape[-1])[a:b].flatten(0, 1)
        return scorer(ScoredChunk(x[a:b], (b - a, 3, 5), part, mean, std), state)

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
