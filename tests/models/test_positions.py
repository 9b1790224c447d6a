"""M-RoPE ids against the rule token by token, and against transformers where the two agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_kit import Text, Visual, position_oracle, small_model

from vicostream_kernels.models import positions as p


@given(
    t=st.integers(1, 6),
    h=st.integers(1, 7),
    w=st.integers(1, 7),
    seconds=st.floats(0.01, 30.0),
    rate=st.sampled_from([1, 2, 25]),
    lead=st.integers(0, 5),
)
def test_segments_chain_by_the_rule(t, h, w, seconds, rate, lead) -> None:
    grid = (t, 2 * h, 2 * w)
    segment = Visual(torch.empty(0), grid, seconds)
    expected = position_oracle([Text(range(lead)), segment, segment, Text([0, 0])], rate)

    parts, base = [p.text_positions(lead, 0)], lead
    for _ in range(2):
        after = base + 1 + p.video_span(*grid, seconds, tokens_per_second=rate)
        inside = p.video_positions(*grid, base + 1, seconds, tokens_per_second=rate)
        assert inside.shape == (3, t, h * w) and inside.dtype == torch.int32
        parts += [p.text_positions(1, base), inside.flatten(1), p.text_positions(1, after)]
        base = after + 1
    parts.append(p.text_positions(2, base))
    assert torch.equal(torch.cat(parts, 1).long(), expected)


def test_equal_to_transformers_inside_a_segment() -> None:
    """transformers' own ids for one segment; behind it the two rules differ by intent."""
    model = small_model().model
    config = model.config
    grid, seconds = (5, 8, 6), 1.5
    n = 5 * 4 * 3
    ids = [1, 2, config.vision_start_token_id, *[config.video_token_id] * n]
    kinds = torch.tensor([[0, 0, 0, *[2] * n]])
    theirs, _ = model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=kinds,
        video_grid_thw=torch.tensor([grid]),
        second_per_grid_ts=torch.tensor([2.0 if _takes_int(model) else seconds]),
    )
    seconds = 2.0 if _takes_int(model) else seconds
    ours = p.video_positions(*grid, 3, seconds, tokens_per_second=2).flatten(1)
    assert torch.equal(ours.long(), theirs[:, 0, 3:])


def _takes_int(model) -> bool:
    """transformers before 5.18 rounds the seconds of a step to an int."""
    import transformers

    return tuple(int(x) for x in transformers.__version__.split(".")[:2]) < (5, 18)


@pytest.mark.parametrize(("h", "w"), [(0, 4), (3, 4), (4, 5), (-2, 4)])
def test_grid_that_does_not_divide(h: int, w: int) -> None:
    with pytest.raises(ValueError, match="grid_thw"):
        p.video_positions(1, h, w, 0, 1.0, tokens_per_second=2)
    with pytest.raises(ValueError, match="grid_thw"):
        p.video_span(1, h, w, 1.0, tokens_per_second=2)
