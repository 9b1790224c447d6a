"""Published pruning rules that compare tokens, each by its own formula: float64, plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from prune_kit import cosine, moving, positions_of, rows, run, smallest, video_patches

from kit import tensors
from kit.backends import backends_of
from vicostream_kernels import PruneState, methods, prune_tokens
from vicostream_kernels.methods import prune_rules, spatial
from vicostream_kernels.methods.pixel import PixelDifference
from vicostream_kernels.methods.scorer import ScoredChunk
from vicostream_kernels.models.vision import vision_grid

each_backend = pytest.mark.parametrize("backend", backends_of("prune_tokens"))


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
