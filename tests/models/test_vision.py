"""The ViT's indices and outputs against transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_kit import relative_error

from vicostream_kernels.methods import ReuseRule
from vicostream_kernels.models import load_model
from vicostream_kernels.models.vision import vision_grid


@pytest.fixture(scope="module")
def runner():
    return load_model("tiny-random")


@settings(max_examples=40, deadline=None)
@given(t=st.integers(1, 3), h=st.integers(1, 11), w=st.integers(1, 11), window=st.integers(1, 5))
def test_grid_is_transformers_window_order(t: int, h: int, w: int, window: int) -> None:
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    thw = torch.tensor([[t, 2 * h, 2 * w]])
    order, windows = get_vision_window_index(thw, 2, window * 2 * 14, 14)
    grid = vision_grid(t, 2 * h, 2 * w, 2, window, "cpu")
    assert torch.equal(grid.order, order)
    assert torch.equal(grid.order[grid.raster], torch.arange(order.numel()))
    assert grid.windows.tolist() == windows.tolist()
    assert grid.longest_window == int((windows[1:] - windows[:-1]).max())
    assert grid.frames.tolist() == [step * 4 * h * w for step in range(t + 1)]
    places = get_vision_position_ids(thw, 2).view(-1, 4, 2)[order].view(-1, 2)
    assert torch.equal(grid.positions[:2].T.long(), places) and not grid.positions[2].any()


@pytest.mark.parametrize("grid", [(1, 2, 2), (4, 18, 30), (3, 10, 22), (1, 8, 8)])
def test_encode_is_transformers_vit(runner, grid: tuple[int, int, int]) -> None:
    t, h, w = grid
    patches = torch.randn(t * h * w, 1176, generator=torch.Generator().manual_seed(h))
    with torch.no_grad():
        expected = runner.model.model.visual(patches, grid_thw=torch.tensor([grid])).pooler_output
    got = runner.encode(patches, grid)
    assert got.shape == (t, h * w // 4, runner.hidden_size)
    assert relative_error(got.flatten(0, 1), expected) <= 1e-5


@pytest.mark.parametrize("reused", [False, True])
def test_whoever_watches_sees_what_the_merger_reads(runner, reused: bool) -> None:
    """Transformers' merger reads in window order; who watches sees raster order, skipped or not."""
    t, h, w = grid = (3, 10, 14)
    patches = torch.randn(t * h * w, 1176, generator=torch.Generator().manual_seed(7))
    read = []
    visual = runner.model.model.visual
    hook = visual.merger.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    with torch.no_grad(), hook:
        visual(patches, grid_thw=torch.tensor([grid]))
    order = vision_grid(t, h, w, 2, runner._vit.shape.window, "cpu").order
    expected = torch.empty_like(read[0].view(len(order), -1))
    expected[order] = read[0].view(len(order), -1)
    state, seen = None, []
    if reused:  # a full call, then one between full calls, of all patches
        rule = ReuseRule(ratio=0.5, threshold=1.0, interval=None, skip_tolerance=None)
        state = runner.encoder_state(rule)
        runner.encode(patches.flip(0), grid, state=state, watch=seen.append)
    runner.encode(patches, grid, state=state, watch=seen.append)
    assert len(seen) == 1 + reused and not torch.equal(order, torch.arange(len(order)))
    assert relative_error(seen[-1].view_as(expected), expected) <= 1e-5


def test_a_chunk_is_encoded_on_its_own(runner) -> None:
    """Steps never see each other: one call of two steps is two calls of one."""
    patches = torch.randn(2 * 48, 1176, generator=torch.Generator().manual_seed(0))
    both = runner.encode(patches, (2, 6, 8))
    apart = torch.cat([runner.encode(half, (1, 6, 8)) for half in patches.chunk(2)])
    torch.testing.assert_close(both, apart, rtol=1e-5, atol=1e-5)


def test_patches_that_do_not_fit_the_grid(runner) -> None:
    with pytest.raises(ValueError, match="patches: .*grid_thw"):
        runner.encode(torch.zeros(10, 1176), (1, 4, 4))
    with pytest.raises(ValueError, match="grid_thw"):
        runner.encode(torch.zeros(12, 1176), (1, 3, 4))


def test_indices_are_kept_per_shape(runner) -> None:
    patches = torch.zeros(16, 1176)
    runner.encode(patches, (1, 4, 4))
    before = runner._grid.cache_info().misses
    for _ in range(3):
        runner.encode(patches, (1, 4, 4))
    assert runner._grid.cache_info().misses == before
    assert runner._grid.cache_info().maxsize is not None
