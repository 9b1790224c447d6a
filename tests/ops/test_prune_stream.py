"""prune_tokens over a stream: pieces give the bits of one call; packed equals separate."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import interpreter, tensors
from kit.backends import backends_of
from kit.compare import assert_same_bits
from vicostream_kernels import PruneRule, PruneState, backends, prune_tokens

# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([] if interpreter.ACTIVE else [torch.bfloat16])
each_backend = pytest.mark.parametrize("backend", backends_of("prune_tokens"))

CAUSAL = [
    PruneRule(threshold=0.4),
    PruneRule(threshold=0.4, keep="at_most", always_keep="first_of_stream"),
    PruneRule(reference="last_kept", metric="l1", threshold=0.9, keep="above"),
    PruneRule(reference=("frame_mean", "last_kept"), threshold=0.4, weights=(0.25, 1.0)),
    PruneRule(reference="frame_mean", metric="l2", k=3, keep="above"),
    PruneRule(reference=("running_mean", "frame_mean"), metric="gaussian", ratio=0.4),
    PruneRule(reference=("running_mean", "previous"), drop_ratio=0.6),
]
BY_CHUNK = [
    PruneRule(threshold=0.25, reduce="any", always_keep="first"),
    PruneRule(reference="running_mean", metric="gaussian", k=3, channels=0.5, history="chunk"),
    PruneRule(
        metric="l1", keep="above", threshold=1.35, reduce="any", always_keep="first_of_stream"
    ),
    PruneRule(reference=("chunk_first", "previous"), ratio=0.5, scope="chunk"),
]


def scene(t, n, d, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, d, generator=generator) + torch.randn(t, n, d, generator=generator)
    return tensors.strided(x.to(dtype))


def feed(backend, x, positions, rule, cuts, state, **kwargs):
    """The results of the pieces of x between ``cuts``, joined without their padding."""
    kept = {"tokens": [], "positions": [], "index": [], "mask": []}
    for start, end in zip(cuts[:-1], cuts[1:]):
        part = prune_tokens(
            x[start:end], positions[:, start:end], rule, state=state, backend=backend,
            **{name: value[start:end] for name, value in kwargs.items()},
        )  # fmt: skip
        count = int(part.count)
        kept["tokens"].append(part.tokens[:count])
        kept["positions"].append(part.positions[:, :count])
        kept["index"].append(part.index[:count] + start * x.shape[1])
        kept["mask"].append(part.mask)
    joined = {name: torch.cat(parts, dim=-1 if name == "positions" else 0)
              for name, parts in kept.items()}  # fmt: skip
    return joined


def assert_same_state(one, other):
    for field in dataclasses.fields(PruneState):
        first, second = getattr(one, field.name), getattr(other, field.name)
        assert (first is None) == (second is None)
        if first is not None:
            assert_same_bits(first, second, name=f"state.{field.name}")


@each_backend
@pytest.mark.parametrize("rule", CAUSAL, ids=lambda rule: rule.text())
@settings(max_examples=2 if backends.INTERPRET else 12, deadline=None, derandomize=True)
@given(
    data=st.data(),
    t=st.integers(1, 7),
    n=st.sampled_from([1, 5, 13, 64]),
    d=st.sampled_from([1, 7, 33, 128]),
    dtype=st.sampled_from(DTYPES),
)
def test_steps_in_any_pieces_give_the_bits_of_one_call(backend, rule, data, t, n, d, dtype):
    assert rule.causal
    name, device = backend
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, t - 1)))), t] if t > 1 else [0, 1]
    x = scene(t, n, d, data.draw(st.integers(0, 99)), dtype).to(device)
    spoilt = data.draw(st.booleans())
    if spoilt:
        x[t // 2, n // 2, 0] = float("nan")
    positions = tensors.ints((3, t, n), 0, 1000, device=device)
    states = [PruneState.empty(rule, n, d, dtype=dtype, device=device) for _ in range(2)]
    whole = feed(name, x, positions, rule, [0, t], states[0])
    pieces = feed(name, x, positions, rule, cuts, states[1])
    for part in whole:
        assert_same_bits(pieces[part], whole[part], name=part)
    assert_same_state(states[1], states[0])
    stateless = prune_tokens(x, positions, rule, backend=name)
    assert torch.equal(stateless.mask, whole["mask"]), "an empty state is no state"


@each_backend
@pytest.mark.parametrize("rule", CAUSAL + BY_CHUNK, ids=lambda rule: rule.text())
@settings(max_examples=2 if backends.INTERPRET else 8, deadline=None, derandomize=True)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from([1, 6, 17])), min_size=1, max_size=4
    ),
    d=st.sampled_from([3, 40]),
    rounds=st.integers(1, 2),
)  # fmt: skip
def test_packed_equals_separate(backend, rule, shapes, d, rounds):
    """Several streams in one call, twice in a row with states of their own."""
    name, device = backend
    widest = max(n for _, n in shapes)
    packed_state = PruneState.empty(rule, widest, d, streams=len(shapes), device=device)
    own_states = [PruneState.empty(rule, n, d, device=device) for _, n in shapes]
    for turn in range(rounds):
        parts = [scene(t, n, d, 7 * turn + i).to(device) for i, (t, n) in enumerate(shapes)]
        x = torch.cat([part.reshape(-1, d) for part in parts])
        positions = tensors.ints((3, x.shape[0]), 0, 1000, device=device)
        packed = prune_tokens(
            x, positions, rule, shapes=tuple(shapes), state=packed_state, backend=name
        )
        start = 0
        for i, ((t, n), part) in enumerate(zip(shapes, parts)):
            own = positions[:, start : start + t * n].reshape(3, t, n)
            alone = prune_tokens(part, own, rule, state=own_states[i], backend=name)
            first, last, count = *packed.cu_count[i : i + 2].tolist(), int(alone.count)
            assert last - first == count
            assert_same_bits(packed.tokens[first:last], alone.tokens[:count])
            assert_same_bits(packed.positions[:, first:last], alone.positions[:, :count])
            assert (packed.index[first:last] == alone.index[:count] + start).all()
            assert torch.equal(packed.mask[start : start + t * n], alone.mask.flatten())
            start += t * n
        assert int(packed.count) == int(packed.cu_count[-1])
        assert (packed.tokens[int(packed.count) :] == 0).all()
    for i, (_, n) in enumerate(shapes):
        for field in dataclasses.fields(PruneState):
            mine = getattr(packed_state, field.name)
            if mine is None:
                continue
            row = (
                mine[i : i + 1, :n] if field.name in ("previous", "last_kept") else mine[i : i + 1]
            )
            assert_same_bits(row, getattr(own_states[i], field.name), name=field.name)


@each_backend
@pytest.mark.parametrize("rule", CAUSAL, ids=lambda rule: rule.text())
def test_bits_at_the_size_of_a_model(backend, rule):
    """Large enough that a backend splits the work among threads."""
    name, device = backend
    x = scene(4, 196, 1024, 0).to(device)
    positions = tensors.ints((3, 4, 196), 0, 1000, device=device)
    states = [PruneState.empty(rule, 196, 1024, device=device) for _ in range(2)]
    whole = feed(name, x, positions, rule, [0, 4], states[0])
    pieces = feed(name, x, positions, rule, [0, 1, 4], states[1])
    assert torch.equal(whole["mask"], pieces["mask"])
    assert_same_state(states[1], states[0])


@each_backend
@pytest.mark.parametrize("rule", BY_CHUNK, ids=lambda rule: rule.text())
def test_rules_over_a_chunk_say_that_they_are_not_causal(backend, rule):
    name, device = backend
    assert not rule.causal
    x = scene(6, 29, 20, 3).to(device)
    positions = tensors.ints((3, 6, 29), 0, 1000, device=device)
    states = [PruneState.empty(rule, 29, 20, device=device) for _ in range(2)]
    whole = feed(name, x, positions, rule, [0, 6], states[0])
    pieces = feed(name, x, positions, rule, [0, 1, 3, 6], states[1])
    assert not torch.equal(whole["mask"], pieces["mask"]), "the cut makes no difference"


@each_backend
def test_external_score_and_mask_stream_too(backend):
    name, device = backend
    rule = PruneRule(reference="last_kept", threshold=0.6, external=0.5)
    x = scene(6, 11, 9, 1).to(device)
    positions = tensors.ints((3, 6, 11), 0, 1000, device=device)
    extra = {
        "external_score": tensors.randn((6, 11), seed=4, device=device),
        "external_mask": tensors.randn((6, 11), seed=5, device=device) > -0.5,
    }
    states = [PruneState.empty(rule, 11, 9, device=device) for _ in range(2)]
    whole = feed(name, x, positions, rule, [0, 6], states[0], **extra)
    pieces = feed(name, x, positions, rule, [0, 2, 3, 6], states[1], **extra)
    assert torch.equal(whole["mask"], pieces["mask"])
    assert 0 < int(whole["mask"].sum()) < 66
    assert_same_state(states[0], states[1])


@each_backend
def test_capacity_over_packed_segments_cuts_the_tail(backend):
    name, device = backend
    x = scene(1, 24, 8, 0).reshape(24, 8).to(device)
    positions = tensors.ints((3, 24), 0, 1000, device=device)
    shapes = ((2, 5), (1, 4), (5, 2))
    out = prune_tokens(
        x, positions, PruneRule(reference=()), shapes=shapes, capacity=12, backend=name
    )
    assert out.cu_count.tolist() == [0, 10, 14, 24] and int(out.count) == 24
    assert out.index.tolist() == list(range(12))
    assert_same_bits(out.tokens, x[:12].contiguous())


@each_backend
def test_scope_call_counts_over_all_segments(backend):
    name, device = backend
    score = tensors.randn((24,), seed=2, device=device)
    rule = PruneRule(reference=(), external=1.0, keep="above", k=7, scope="call")
    x = scene(1, 24, 8, 0).reshape(24, 8).to(device)
    positions = tensors.ints((3, 24), 0, 1000, device=device)
    out = prune_tokens(
        x, positions, rule, shapes=((2, 5), (1, 4), (5, 2)), external_score=score, backend=name
    )
    assert out.index[:7].tolist() == score.topk(7).indices.sort().values.tolist()
    assert int(out.count) == 7


@each_backend
def test_last_kept_remembers_what_was_kept_not_what_came_last(backend):
    """A slow drift: each step is close to the one before and far from what was kept."""
    name, device = backend
    angle = torch.arange(10) * 0.3
    x = torch.stack((angle.cos(), angle.sin()), dim=-1).view(10, 1, 2).to(device)
    positions = tensors.ints((3, 10, 1), 0, 1000, device=device)
    limit = 0.75  # cos 0.6 = 0.825, cos 0.9 = 0.62
    last = prune_tokens(
        x, positions, PruneRule(reference="last_kept", threshold=limit), backend=name
    )
    assert last.index[: int(last.count)].tolist() == [0, 3, 6, 9]
    previous = prune_tokens(x, positions, PruneRule(threshold=limit), backend=name)
    assert previous.index[: int(previous.count)].tolist() == [0]


@each_backend
def test_two_terms_decide_together_what_was_kept(backend):
    """Distance and cosine to the last kept token, whose sum alone says what that token is."""
    name, device = backend
    rule = PruneRule(
        reference=("last_kept", "last_kept"), metric=("cosine", "l1"), weights=(-0.5, 1.0),
        keep="above", threshold=0.9,
    )  # fmt: skip
    x = scene(9, 23, 6, 5).to(device)
    out = prune_tokens(x, tensors.ints((3, 9, 23), 0, 9, device=device), rule, backend=name)
    z = x.double().cpu()
    wanted = torch.ones(9, 23, dtype=torch.bool)
    for place in range(23):
        last = z[0, place]
        for step in range(1, 9):
            token = z[step, place]
            cosine = float(token @ last / (token.norm() * last.norm()))
            score = float((token - last).abs().mean()) - 0.5 * cosine
            assert abs(score - 0.9) > 1e-5, "choose another seed: a decision hangs on round-off"
            wanted[step, place] = score > 0.9
            last = token if score > 0.9 else last
    assert torch.equal(out.mask.cpu(), wanted)
    assert not wanted.all() and wanted[1:].any(), "the example decides nothing"
