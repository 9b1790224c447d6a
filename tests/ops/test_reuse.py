"""select_changed, gather_rows, merge_rows: what changed, and putting it back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_matches, assert_same_bits
from kit.ops import check_fullgraph, check_op, check_refuses_grad
from kit.topk import assert_valid_topk
from vicostream_kernels import gather_rows, merge_rows, select_changed
from vicostream_kernels.reference import reuse as truth
from vicostream_kernels.reference._precision import accumulate_in

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
METRICS = ["cosine", "dot", "l1", "l2"]


def each_backend(op):
    return pytest.mark.parametrize("backend", backends_of(op))


def pair(frames, places, width, *, dtype=torch.float32, seed=0, shared=True, device="cpu"):
    """A reference and features that differ from it by place-dependent amounts."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(places, width, generator=generator)
    if not shared:
        reference = torch.randn(frames, places, width, generator=generator)
    amount = torch.rand(frames, places, 1, generator=generator) * 2
    feature = reference + amount * torch.randn(frames, places, width, generator=generator)
    made = (tensors.strided(t.to(dtype)).to(device) for t in (feature, reference))
    return tuple(made)


def least_similar(similarity, k):
    """The k places of lowest similarity, NaN first, ties to the lowest index."""
    values = similarity.double().cpu().nan_to_num(nan=-math.inf, neginf=-math.inf).tolist()
    return sorted(sorted(range(len(values)), key=lambda i: values[i])[:k])


def similarity_of(a, b, metric):
    if metric == "dot":
        return float(a @ b)
    if metric == "l1":
        return -float((a - b).abs().mean())
    if metric == "l2":
        return -float((a - b).square().mean().sqrt())
    return float(a @ b / (a.norm() * b.norm()))


@each_backend("select_changed")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_similarity(backend, metric, dtype, shared):
    name, device = backend
    feature, reference = pair(3, 21, 45, dtype=dtype, shared=shared, device=device)
    got = select_changed(feature, reference, ratio=0.5, metric=metric, backend=name)
    f, r = feature.cpu().double(), reference.cpu().double().expand(3, 21, 45)
    wanted = torch.tensor(
        [[similarity_of(f[i, n], r[i, n], metric) for n in range(21)] for i in range(3)],
        dtype=torch.float64,
    )
    with accumulate_in(torch.float32):
        plain = truth.similarity(feature.cpu(), r.to(dtype), metric)
    assert got.similarity.dtype == torch.float32
    assert_matches(got.similarity, wanted, plain, name="similarity")


@each_backend("select_changed")
@pytest.mark.parametrize(
    ("frames", "places", "width"), [(4, 540, 64), (1, 1, 8), (2, 7, 1), (1, 33, 80)]
)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.3, 0.85, 1.0])
def test_ratio_alone(backend, frames, places, width, ratio):
    """STC-Cacher: exactly max(1, int(N ratio)) a frame, the least similar, ascending."""
    name, device = backend
    feature, reference = pair(frames, places, width, device=device)
    out = select_changed(feature, reference, ratio=ratio, backend=name)
    k = max(1, int(places * ratio))
    assert out.index.shape == (frames, k) and out.index.dtype == torch.int32
    assert out.count.tolist() == [k] * frames and out.count.dtype == torch.int32
    for index, similarity in zip(out.index, out.similarity):
        assert_valid_topk(index, -similarity, k)


@each_backend("select_changed")
@pytest.mark.parametrize("max_changed", [None, 1, 5, 40])
def test_threshold_alone(backend, max_changed):
    name, device = backend
    feature, reference = pair(3, 40, 32, device=device)
    out = select_changed(feature, reference, threshold=0.6, max_changed=max_changed, backend=name)
    capacity = max_changed or 40
    assert out.index.shape == (3, capacity)
    for index, count, similarity in zip(out.index, out.count, out.similarity):
        below = [i for i in range(40) if float(similarity[i]) < 0.6]
        assert int(count) == len(below) and 5 < len(below) < 40
        listed = least_similar(similarity, min(capacity, len(below)))
        assert set(listed) <= set(below)
        assert index.tolist() == listed + [-1] * (capacity - len(listed))


@each_backend("select_changed")
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9])
def test_both_take_the_union(backend, ratio):
    name, device = backend
    feature, reference = pair(3, 40, 32, device=device)
    out = select_changed(feature, reference, ratio=ratio, threshold=0.6, backend=name)
    assert out.index.shape == (3, 40)
    for index, count, similarity in zip(out.index, out.count, out.similarity):
        below = {i for i in range(40) if float(similarity[i]) < 0.6}
        wanted = sorted(below | set(least_similar(similarity, int(40 * ratio))))
        assert int(count) == len(wanted)
        assert index.tolist() == wanted + [-1] * (40 - len(wanted))


@each_backend("select_changed")
def test_forced_rows_come_first(backend):
    name, device = backend
    feature, reference = pair(2, 20, 16, device=device)
    feature[:] = reference  # all alike: only the forced rows and the lowest indices remain
    force = torch.zeros(2, 20, dtype=torch.bool, device=device)
    force[0, [4, 17]] = True
    force[1, [3, 5, 8, 9, 11]] = True
    out = select_changed(feature, reference, ratio=0.2, force=force, backend=name)
    assert out.index.tolist() == [[0, 1, 4, 17], [3, 5, 8, 9]]
    assert out.count.tolist() == [4, 5]
    room = select_changed(feature, reference, ratio=0.2, force=force, max_changed=6, backend=name)
    assert room.index.tolist() == [[0, 1, 4, 17, -1, -1], [3, 5, 8, 9, 11, -1]]
    shared = select_changed(
        feature, reference, threshold=-1.0, force=force[0], max_changed=3, backend=name
    )
    assert shared.index.tolist() == [[4, 17, -1]] * 2


@each_backend("select_changed")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_changed(backend, bad):
    name, device = backend
    feature, reference = pair(1, 9, 8, device=device)
    feature[:] = reference
    feature[0, 6, 3] = bad
    out = select_changed(feature, reference, threshold=-1.0, backend=name)
    assert out.index[0, :2].tolist() == [6, -1] and out.count.tolist() == [1]
    assert select_changed(feature, reference, ratio=0.12, backend=name).index.tolist() == [[6]]


@each_backend("select_changed")
def test_zero_rows_and_equal_rows(backend):
    name, device = backend
    feature, reference = pair(1, 4, 8, device=device)
    feature[0, :2] = 0.0
    reference[[0, 2]] = 0.0
    feature[0, 3] = reference[3]
    out = select_changed(feature, reference, threshold=1.0, backend=name)
    assert out.similarity.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    assert out.index.tolist() == [[1, 2, -1, -1]]


@each_backend("select_changed")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, math.nan]), min_size=1, max_size=12),
    ratio=st.one_of(st.none(), st.floats(0, 1)),
    threshold=st.one_of(st.none(), st.floats(-1, 1)),
    capacity=st.one_of(st.none(), st.integers(1, 12)),
)
def test_selection_rules_with_many_ties(backend, values, ratio, threshold, capacity):
    """The dot product with one channel makes the similarity any value."""
    name, device = backend
    assume(ratio is not None or threshold is not None)
    places = len(values)
    capacity = None if capacity is None else min(capacity, places)
    feature = torch.tensor(values, device=device).view(1, places, 1)
    reference = torch.ones(places, 1, device=device)
    out = select_changed(
        feature, reference, ratio=ratio, threshold=threshold, max_changed=capacity, metric="dot",
        backend=name,
    )  # fmt: skip
    k = 0 if ratio is None else int(places * ratio)
    k = max(1, k) if threshold is None else k
    limit = None if threshold is None else float(torch.tensor(threshold, dtype=torch.float32))
    chosen = set(least_similar(out.similarity[0], k))
    if limit is not None:
        chosen |= {i for i, v in enumerate(values) if math.isnan(v) or v < limit}
    room = capacity or (k if threshold is None else places)
    ranked = [
        i
        for n in range(1, places + 1)
        for i in set(least_similar(out.similarity[0], n))
        - set(least_similar(out.similarity[0], n - 1))
    ]
    wanted = sorted([i for i in ranked if i in chosen][:room])  # fmt: skip
    assert int(out.count) == len(chosen)
    assert out.index[0].tolist() == wanted + [-1] * (room - len(wanted))


@each_backend("select_changed")
def test_a_frame_does_not_depend_on_the_others(backend):
    name, device = backend
    feature, reference = pair(5, 64, 48, device=device)
    together = select_changed(feature, reference, ratio=0.3, backend=name)
    for f in range(5):
        alone = select_changed(feature[f : f + 1], reference, ratio=0.3, backend=name)
        assert_same_bits(alone.similarity[0], together.similarity[f])
        assert_same_bits(alone.index[0], together.index[f])


# gather_rows and merge_rows.


def lists_of(frames, places, length, *, seed=0, device="cpu", holes=True):
    """Ascending unique indices, shorter lists padded with -1."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.full((frames, length), -1, dtype=torch.int32)
    for f in range(frames):
        used = int(torch.randint(0, length + 1, (), generator=generator)) if holes else length
        index[f, :used] = torch.randperm(places, generator=generator)[:used].sort().values.int()
    return tensors.strided(index).to(device)


@each_backend("gather_rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("frames", "places", "width", "k"), [(3, 21, 33, 9), (1, 1, 1, 1)])
def test_gather(backend, dtype, frames, places, width, k):
    name, device = backend
    x = tensors.randn((frames, places, width), dtype, device=device)
    index = lists_of(frames, places, k, device=device)
    got = gather_rows(x, index, backend=name)
    for f in range(frames):
        for j in range(k):
            i = int(index[f, j])
            wanted = x[f, i] if i >= 0 else torch.zeros(width, dtype=dtype, device=device)
            assert_same_bits(got[f, j], wanted.contiguous())


@each_backend("merge_rows")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("frames", "places", "width", "k"), [(3, 21, 33, 9), (1, 1, 1, 1)])
def test_merge(backend, dtype, shared, residual, frames, places, width, k):
    name, device = backend
    base = tensors.randn((places, width) if shared else (frames, places, width), dtype,
                         device=device)  # fmt: skip
    rows = tensors.randn((frames, k, width), dtype, seed=1, device=device)
    index = lists_of(frames, places, k, device=device)
    added = tensors.randn((frames, places, width), dtype, seed=2, device=device)
    before = base.clone()
    got = merge_rows(base, rows, index, residual=added if residual else None, backend=name)
    wanted = base.expand(frames, places, width).clone()
    for f in range(frames):
        for j in range(k):
            if index[f, j] >= 0:
                wanted[f, int(index[f, j])] = rows[f, j]
    if residual:
        wanted = wanted + added  # torch adds in float32 and rounds once
    assert_same_bits(got, wanted.contiguous())
    assert_same_bits(base.contiguous(), before.contiguous(), name="base")


@each_backend("merge_rows")
def test_full_lists_give_the_rows(backend):
    """Ratio 1: nothing of the base is left, so reuse equals the plain layer bit for bit."""
    name, device = backend
    feature, reference = pair(2, 30, 16, device=device)
    out = select_changed(feature, reference, ratio=1.0, backend=backends_name(name))
    rows = gather_rows(feature, out.index, backend=backends_name(name))
    assert_same_bits(merge_rows(reference, rows, out.index, backend=name), feature.contiguous())


def backends_name(name):
    """The other two ops need not have every backend that merge_rows has."""
    return name if name == "reference" else "auto"


@each_backend("merge_rows")
@pytest.mark.parametrize("outside", [-2, 7, 2**31 - 1, -(2**31)])
def test_indices_out_of_range_touch_nothing(backend, outside, monkeypatch):
    monkeypatch.setattr("vicostream_kernels.checks.CHECK_VALUES", False)
    name, device = backend
    base = tensors.randn((7, 5), device=device)
    rows = tensors.randn((2, 3, 5), seed=1, device=device)
    index = torch.tensor([[1, outside, 6], [outside, 0, -1]], dtype=torch.int32, device=device)
    got = merge_rows(base, rows, index, backend=name)
    wanted = torch.stack([base, base])
    wanted[0, 1], wanted[0, 6], wanted[1, 0] = rows[0, 0], rows[0, 2], rows[1, 1]
    assert_same_bits(got, wanted)
    taken = gather_rows(got, index, backend=backends_name(name))
    assert (taken[0, 1] == 0).all() and (taken[1, 0] == 0).all()
    assert_same_bits(taken[0, 2], got[0, 6])


@each_backend("merge_rows")
def test_nan_in_replaced_base_rows_does_not_leak(backend):
    name, device = backend
    base = torch.full((4, 3), math.nan, device=device)
    rows = tensors.randn((1, 4, 3), device=device)
    index = torch.arange(4, dtype=torch.int32, device=device).view(1, 4)
    residual = tensors.randn((1, 4, 3), seed=3, device=device)
    got = merge_rows(base, rows, index, residual=residual, backend=name)
    assert_same_bits(got, (rows + residual).contiguous())


def test_values_are_checked_on_request(monkeypatch):
    monkeypatch.setattr("vicostream_kernels.checks.CHECK_VALUES", True)
    base, rows = torch.zeros(4, 3), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="index holds 4, allowed: -1 or 0 to N-1=3"):
        merge_rows(base, rows, torch.tensor([[0, 4]]).int())
    with pytest.raises(ValueError, match="index holds the same row twice"):
        merge_rows(base, rows, torch.tensor([[2, 2]]).int())
    with pytest.raises(ValueError, match="gather_rows: index holds -2"):
        gather_rows(base[None], torch.tensor([[-2]]).int())
    merge_rows(base, rows, torch.tensor([[-1, -1]]).int())


# The ops.


def op_arguments(word):
    feature, reference = pair(2, 9, 16)
    index = lists_of(2, 9, 4)
    rows = tensors.randn((2, 4, 16))
    return {
        "select_changed": (feature, reference, 3, 0.5, 6, "cosine", None),
        "gather_rows": (feature, index),
        "merge_rows": (reference, rows, index, feature),
    }[word]


@pytest.mark.parametrize("word", ["select_changed", "gather_rows", "merge_rows"])
def test_ops_are_well_behaved(word):
    op = getattr(torch.ops.vicostream, word).default
    check_op(op, op_arguments(word))
    check_refuses_grad(op, op_arguments(word))


def test_fullgraph():
    def layer(feature, reference, base, residual):
        changed = select_changed(feature, reference, ratio=0.4)
        rows = gather_rows(feature, changed.index) * 2
        return merge_rows(base, rows, changed.index, residual=residual), changed.count

    feature, reference = pair(2, 9, 16)
    check_fullgraph(layer, feature, reference, tensors.randn((9, 16)), feature)


F, R = torch.zeros(2, 5, 8), torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(), ValueError, "give ratio, threshold or both"),
        (dict(ratio=1.5), ValueError, r"ratio=1.5 is outside \[0, 1\]"),
        (dict(ratio=-0.1), ValueError, "ratio=-0.1"),
        (dict(ratio=math.nan), ValueError, "ratio=nan"),
        (dict(threshold=1.5), ValueError, "threshold=1.5 is outside"),
        (dict(threshold=0.1, metric="l1"), ValueError, "threshold=0.1 is outside"),
        (dict(threshold=math.nan, metric="dot"), ValueError, "threshold=nan"),
        (dict(ratio=0.5, max_changed=0), ValueError, "max_changed=0"),
        (dict(ratio=0.5, max_changed=6), ValueError, "max_changed=6"),
        (dict(ratio=0.5, metric="gaussian"), ValueError, "metric='gaussian' is not one of"),
        (dict(ratio=0.5, feature=R), ValueError, r"feature must be a tensor \[F, N, C\]"),
        (dict(ratio=0.5, feature=F.double()), TypeError, "feature has dtype float64"),
        (dict(ratio=0.5, feature=torch.zeros(2, 0, 8)), ValueError, "sizes >= 1"),
        (dict(ratio=0.5, reference=R[:4]), ValueError, "reference has shape"),
        (dict(ratio=0.5, reference=R.half()), TypeError, "reference has dtype float16"),
        (dict(ratio=0.5, force=torch.zeros(5)), TypeError, "force has dtype"),
        (dict(ratio=0.5, force=torch.zeros(3, 5).bool()), ValueError, "force has shape"),
        (dict(ratio=0.5, backend="gpu"), ValueError, "backend='gpu'"),
    ],
)
def test_select_refuses(kwargs, error, message):
    arguments = dict(feature=F, reference=R) | kwargs
    with pytest.raises(error, match=message):
        select_changed(arguments.pop("feature"), arguments.pop("reference"), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((R, F[:, :3], torch.zeros(2, 4).int()), ValueError, "index has shape"),
        ((R, F[:, :3, :7], torch.zeros(2, 3).int()), ValueError, "rows has shape"),
        ((R, F[:, :3].half(), torch.zeros(2, 3).int()), TypeError, "rows has dtype"),
        ((R, F[:, :3], torch.zeros(2, 3).long()), TypeError, "index has dtype int64"),
        ((F[:1], F[:, :3], torch.zeros(2, 3).int()), ValueError, "rows has shape"),
        ((R, F[:, :3], torch.zeros(2, 3).int(), R), ValueError, "residual must have 3"),
    ],
)
def test_merge_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        torch.ops.vicostream.merge_rows(*arguments)
