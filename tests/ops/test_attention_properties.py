"""sink_window_attention over any page layout that Hypothesis finds, against the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import Case, check_small, inverse_frequencies, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vicostream_kernels as vk
from kit import interpreter
from kit.backends import backends_of
from kit.compare import assert_same_bits
from vicostream_kernels import backends

each_backend = pytest.mark.parametrize("backend", backends_of("sink_window_attention"))
# The interpreter is slow, and for a GPU Triton compiles a kernel for almost every example: few, and
# on a GPU the same ones each time, which its cache has then.
quick = settings(
    max_examples=8 if backends.INTERPRET or torch.cuda.is_available() else 60,
    derandomize=torch.cuda.is_available(),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Triton's interpreter computes bfloat16 wrongly, so it is refused there.
DTYPES = (torch.float32, torch.float16) + (() if interpreter.ACTIVE else (torch.bfloat16,))
FLOATS = st.sampled_from(DTYPES)


@st.composite
def cases(draw: st.DrawFn, dtypes: st.SearchStrategy = FLOATS) -> Case:
    """Any tables (holes, repeats, foreign ids), fills, windows, shifts; few and small."""
    streams, length = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    page_size, pages = draw(st.sampled_from((1, 2, 3, 5))), draw(st.integers(1, 6))
    head_dim = draw(st.sampled_from((8, 16, 24)))
    lists = draw(st.sampled_from((None, None, kv_heads, kv_heads * group)))
    shape = (streams, length) if lists is None else (streams, lists, length)
    page_ids = st.integers(-1, pages + 1) | st.integers(0, pages - 1)

    def numbers(of: st.SearchStrategy, *sizes: int) -> torch.Tensor:
        count = math.prod(sizes)
        flat = draw(st.lists(of, min_size=count, max_size=count))
        return torch.tensor(flat, dtype=torch.int32).view(sizes)

    options = {
        "sink_tokens": draw(st.integers(0, 6)),
        "window": draw(st.none() | st.integers(0, 9)),
        "sm_scale": draw(st.sampled_from((None, 0.7))),
    }
    if lists is None and draw(st.booleans()):
        options["kv_len"] = numbers(st.integers(0, length * page_size), streams)
    else:
        options["page_fill"] = numbers(st.integers(0, page_size), pages)
    if draw(st.booleans()):
        options["window_start"] = numbers(st.integers(-1, 12), streams)
    if draw(st.booleans()):
        logits = st.floats(-3, 3, width=16) | st.just(-math.inf)
        heads = kv_heads * group
        options["sink_logits"] = draw(st.lists(logits, min_size=heads, max_size=heads))
    if draw(st.booleans()):
        options["page_shift"] = numbers(st.integers(-10_000_000, 10_000_000), *shape, 3)
        options["inv_freq"] = inverse_frequencies(head_dim)
        third = head_dim // 8
        sections = (None, [head_dim // 2 - 2 * third, third, third])
        options["mrope_section"] = draw(st.sampled_from(sections))
    return make_case(
        draw(st.lists(st.integers(0, 4), min_size=streams, max_size=streams)),
        numbers(page_ids, *shape),
        pages=pages,
        page_size=page_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=draw(dtypes),
        padding=draw(st.integers(0, 2)),
        seed=draw(st.integers(0, 1000)),
        **options,
    )


@each_backend
@quick
@given(case=cases())
def test_any_layout(backend, case):
    check_small(case, backend)


@each_backend
@quick
@given(case=cases(), data=st.data())
def test_each_streams_bits_are_its_own(backend, case, data):
    streams = case.page_table.shape[0]
    if streams == 0:
        return
    s = data.draw(st.integers(0, streams - 1))
    starts = case.cu_seqlens_q.tolist()
    rows = slice(starts[s], starts[s + 1])
    per_stream = ("kv_len", "window_start", "page_shift")
    own = {name: case.options[name][s : s + 1] for name in per_stream if name in case.options}
    alone = case.changed(
        q=case.q[rows],
        page_table=case.page_table[s : s + 1],
        cu_seqlens_q=torch.tensor([0, starts[s + 1] - starts[s]], dtype=torch.int32),
        **own,
    )
    for return_lse in (True, False):
        together = case.run(backend, return_lse=return_lse)
        got = alone.run(backend, return_lse=return_lse)
        assert_same_bits(got[0], together[0][rows], name="out")
        assert_same_bits(got[1], together[1][rows], name="lse")


@each_backend
@quick
@given(case=cases(st.just(torch.float32)), split=st.integers(0, 14))
def test_two_parts_merge_to_the_whole(backend, case, split):
    """Keys before ``split`` by sink_tokens, the others by window_start; in place of any window."""
    whole = case.changed(sink_tokens=0, window=None, window_start=None, sink_logits=None)
    streams = case.page_table.shape[0]
    starts = torch.full((streams,), split, dtype=torch.int32)
    head = whole.run(backend, sink_tokens=split, window=0)
    tail = whole.run(backend, window_start=starts)
    out, lse = vk.merge_states(*head, *tail, backend="reference")
    wanted, wanted_lse = whole.run(backend)
    torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=2e-5, atol=2e-5)


@each_backend
@quick
@given(case=cases(), data=st.data())
def test_where_the_pages_lie_does_not_matter(backend, case, data):
    """The same logical sequence in other physical pages gives the same bits."""
    order = data.draw(st.permutations(range(case.k_pages.shape[0])))
    new_id = {old: new for new, old in enumerate(order)}
    moved = case.page_table.clone()
    for place in range(moved.numel()):
        moved.view(-1)[place] = new_id.get(int(case.page_table.reshape(-1)[place]), -1)
    fields = {
        "k_pages": case.k_pages[list(order)],
        "v_pages": case.v_pages[list(order)],
        "page_table": moved,
    }
    if "page_fill" in case.options:
        fields["page_fill"] = case.options["page_fill"][list(order)]
    got, lse = case.changed(**fields).run(backend)
    wanted, wanted_lse = case.run(backend)
    assert_same_bits(got, wanted)
    assert_same_bits(lse, wanted_lse)
