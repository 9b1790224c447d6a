"""STC-Cacher inside the ViT: against the published algorithm in float64 loops, and its promises."""

from __future__ import annotations

import pytest
import torch
from model_kit import relative_error, save_checkpoint, small_model
from reuse_oracle import CacherOracle

from vicostream_kernels.methods import ReuseRule
from vicostream_kernels.models import load_model


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """Four layers, two of them over full frames; windows of 4 x 4 patches."""
    model = small_model(vision_depth=4, vision_fullatt_block_indexes=[1, 3], vision_window_size=56)
    return load_model(save_checkpoint(tmp_path_factory.mktemp("vit"), model))


def moving(calls, t, h, w, *, share=0.3, seed=0):
    """Patches of some calls: a still background with noise, and a region that changes strongly."""
    random = torch.Generator().manual_seed(seed)
    n = h * w
    base = torch.randn(n, 1176, generator=random)
    for _ in range(calls):
        steps = []
        for _ in range(t):
            amount = 0.1 * torch.rand(n, 1, generator=random)
            amount[torch.rand(n, 1, generator=random) < share] = 1.0
            steps.append(base + amount * torch.randn(n, 1176, generator=random))
        yield torch.cat(steps)


def computed(state, before):
    """Patches that a call computed, layer by layer."""
    return (state.recomputed - before).tolist()


RULES = [
    {},
    {"ratio": 0.4, "selection": "shared"},
    {"ratio": 0.0, "interval": 3},
    {"ratio": None, "threshold": 0.8},
    {"ratio": 0.1, "threshold": 0.9, "max_ratio": 0.5},
    {"ratio": 0.25, "interval": None, "max_age": 3},
    {"ratio": 0.1, "interval": None, "max_age": 2, "selection": "shared"},
    {"ratio": None, "threshold": 0.7, "interval": 5, "max_age": 4, "max_ratio": 0.2},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: ",".join(f"{k}={v}" for k, v in r.items()))
@pytest.mark.parametrize("grid", [(2, 6, 10), (1, 4, 4)])
def test_the_published_algorithm(runner, rule, grid):
    """Six calls, two full layers, windows of which the last are not full; counts and features."""
    t, h, w = grid
    oracle = CacherOracle(runner.model.model.visual, **rule)
    state = runner.encoder_state(ReuseRule(**rule))
    for patches in moving(6, t, h, w):
        before = state.recomputed.clone()
        got = runner.encode(patches, grid, state=state)
        expected = oracle.encode(patches, *grid)
        wanted = [sum(len(step) for step in layer) for layer in oracle.log[-1]]
        assert computed(state, before) == wanted
        assert relative_error(got.double(), expected) <= 2e-5


@pytest.mark.parametrize("rule", [{"ratio": 1.0}, {"ratio": 1.0, "threshold": 0.5}])
def test_ratio_one_is_the_plain_vit(runner, rule):
    state = runner.encoder_state(ReuseRule(**rule))
    for patches in moving(3, 2, 6, 10):
        plain = runner.encode(patches, (2, 6, 10))
        assert torch.equal(runner.encode(patches, (2, 6, 10), state=state), plain)
    assert computed(state, 0) == [3 * 2 * 60] * 4


def test_the_path_between_full_calls_is_the_plain_vit_when_all_changed(runner):
    """What ratio 1 does not go through: lists that name every patch."""
    state = runner.encoder_state(ReuseRule(ratio=None, threshold=1.0, interval=None))
    for call, patches in enumerate(moving(3, 2, 6, 10, share=1.0)):
        before = state.recomputed.clone()
        got = runner.encode(patches, (2, 6, 10), state=state)
        assert computed(state, before) == [120] * 4
        assert state.counts["full_calls"] == 1 and state.counts["calls"] == call + 1
        assert relative_error(got, runner.encode(patches, (2, 6, 10))) <= 1e-5


def test_full_calls_are_the_plain_vit_bit_for_bit(runner):
    state = runner.encoder_state(ReuseRule(ratio=0.25, interval=3))
    for call, patches in enumerate(moving(7, 2, 4, 6)):
        got, plain = (
            runner.encode(patches, (2, 4, 6), state=state),
            runner.encode(patches, (2, 4, 6)),
        )
        assert torch.equal(got, plain) == (call % 3 == 0)
    assert (state.counts["full_calls"], state.counts["calls"]) == (3, 7)


@pytest.mark.parametrize("selection", ["layer", "shared"])
def test_an_unchanged_frame_gives_the_references_features(runner, selection):
    """Also without skipping: what is computed again comes out as it was."""
    state = runner.encoder_state(ReuseRule(selection=selection, interval=None))
    first = next(moving(1, 3, 6, 10))
    reference = runner.encode(first, (3, 6, 10), state=state)[-1]
    again = runner.encode(first[-60:].repeat(2, 1), (2, 6, 10), state=state)
    assert state.counts["full_calls"] == 1
    for step in again:
        assert relative_error(step, reference) <= 1e-5


def test_error_falls_with_the_ratio(runner):
    calls = list(moving(2, 2, 8, 10, share=0.4))
    errors = []
    for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
        state = runner.encoder_state(ReuseRule(ratio=ratio))
        for patches in calls:
            got = runner.encode(patches, (2, 8, 10), state=state)
        plain = runner.encode(calls[-1], (2, 8, 10))
        errors.append(float((got - plain).norm() / plain.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0.0 and errors[0] > 0.1


def test_calls_of_any_number_of_steps_share_a_reference(runner):
    """The reference is the last step of the last full call, whatever came between."""
    parts = list(moving(4, 3, 6, 6))
    state = runner.encoder_state(ReuseRule(interval=None))
    one = runner.encoder_state(ReuseRule(interval=None))
    runner.encode(parts[0], (3, 6, 6), state=state)
    runner.encode(parts[0][-36:], (1, 6, 6), state=one)
    for patches in parts[1:]:
        together = runner.encode(patches, (3, 6, 6), state=state)
        alone = [runner.encode(step, (1, 6, 6), state=one)[0] for step in patches.split(36)]
        assert relative_error(together, torch.stack(alone)) <= 1e-5


def test_streams_do_not_mix(runner):
    rule = ReuseRule(max_age=3)
    clips = [list(moving(5, 2, 4, 6, seed=seed)) for seed in (1, 2)]
    alone = []
    for clip in clips:
        state = runner.encoder_state(rule)
        alone.append([runner.encode(patches, (2, 4, 6), state=state) for patches in clip])
    states = [runner.encoder_state(rule) for _ in clips]
    for call in range(5):
        for clip, state, wanted in zip(clips, states, alone):
            assert torch.equal(runner.encode(clip[call], (2, 4, 6), state=state), wanted[call])


# The bound on drift.


@pytest.mark.parametrize(("ratio", "max_age"), [(0.25, 3), (0.05, 3), (0.6, 1), (0.25, 100)])
def test_no_reused_row_is_older_than_max_age(runner, ratio, max_age):
    """Whatever the ratio: a row of the reference is as new as the promise, in every layer."""
    n, grid = 40, (1, 4, 10)
    state = runner.encoder_state(ReuseRule(ratio=ratio, interval=None, max_age=max_age))
    age = None
    for call, patches in enumerate(moving(12, *grid)):
        before = state.branches.clone()
        runner.encode(patches, grid, state=state)
        if call == 0:
            age = torch.zeros(4, 4, n, dtype=torch.int64)
            continue
        renewed = (state.branches != before).any(-1)[:, :, :n]
        assert renewed.any() or max_age == 100
        age = torch.where(renewed, 0, age + 1)
        assert int(age.max()) <= max_age
        most = max(1, int(n * ratio), -(-n // (max_age + 1)))
        assert state.computed_most == most


def test_a_still_patch_is_computed_in_its_turn(runner):
    """With one changed patch and max_age 4 a fifth of the others is computed in each call."""
    state = runner.encoder_state(
        ReuseRule(ratio=None, threshold=0.99, interval=None, max_age=4, skip_tolerance=None)
    )
    patches = next(moving(1, 1, 4, 10))
    for call in range(6):
        before = state.recomputed.clone()
        runner.encode(patches, (1, 4, 10), state=state)
        assert computed(state, before) == [8 if call else 40] * 4


# Steps that are skipped.


def clip(values, height=56, width=84):
    """uint8 frames, two a value: the same picture, brighter by the value."""
    random = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 200, (height, width, 3), generator=random, dtype=torch.uint8)
    return torch.stack([picture + value for value in values for _ in range(2)])


def patches_of(runner, frames):
    from vicostream_kernels.ops.preprocess import preprocess_frames

    return preprocess_frames(
        frames,
        min_pixels=56 * 84,
        max_pixels=56 * 84,
        mean=runner.image_mean,
        std=runner.image_std,
    )


def test_unchanged_steps_are_skipped(runner):
    state = runner.encoder_state(ReuseRule(interval=None))
    frames = clip([3, 0])
    first = runner.encode(*patches_of(runner, frames), state=state, frames=frames)
    frames = clip([0, 5, 0, 0])
    before = state.recomputed.clone()
    second = runner.encode(*patches_of(runner, frames), state=state, frames=frames)
    for step in (0, 2, 3):
        assert torch.equal(second[step], first[-1])
    assert not torch.equal(second[1], first[-1])
    assert computed(state, before) == [6] * 4  # a quarter of the 24 patches of one step
    assert state.figures() == {
        "calls": 2,
        "full_calls": 1,
        "steps": 6,
        "skipped_steps": 3,
        "layers": [{"recomputed": 48 + 6, "reused": 18}] * 4,
    }


@pytest.mark.parametrize(("tolerance", "skipped"), [(None, 0), (0, 1), (2, 2), (4, 3), (255, 4)])
def test_the_tolerance_is_the_largest_difference(runner, tolerance, skipped):
    state = runner.encoder_state(ReuseRule(skip_tolerance=tolerance))
    frames = clip([0])
    runner.encode(*patches_of(runner, frames), state=state, frames=frames)
    frames = clip([0, 2, 3, 9])
    frames[1, 0, 0, 0] += 0 if tolerance != 2 else 2
    runner.encode(*patches_of(runner, frames), state=state, frames=frames)
    assert state.counts["skipped_steps"] == skipped


def test_one_frame_of_a_step_is_enough_to_change_it(runner):
    state = runner.encoder_state(ReuseRule())
    frames = clip([0])
    runner.encode(*patches_of(runner, frames), state=state, frames=frames)
    for frame in (0, 1):
        other = frames.clone()
        other[frame, 5, 5, 1] ^= 1
        runner.encode(*patches_of(runner, other), state=state, frames=other)
    assert state.counts["skipped_steps"] == 0


def test_an_odd_last_frame_counts_twice(runner):
    state = runner.encoder_state(ReuseRule())
    for _ in range(2):
        frames = clip([0, 4])[:3]
        runner.encode(*patches_of(runner, frames), state=state, frames=frames)
    assert (state.counts["steps"], state.counts["skipped_steps"]) == (4, 1)
    still = clip([4])
    runner.encode(*patches_of(runner, still), state=state, frames=still)
    assert state.counts["skipped_steps"] == 2


def test_a_full_call_keeps_a_reference_that_still_shows_the_same(runner):
    """Otherwise skipped content would creep within the tolerance."""
    state = runner.encoder_state(ReuseRule(interval=1, skip_tolerance=2))
    for value in range(0, 10, 2):
        frames = clip([value])
        runner.encode(*patches_of(runner, frames), state=state, frames=frames)
    assert state.counts["skipped_steps"] == 2  # 0, (2), 4, (6), 8


def test_a_skipped_step_of_a_full_call_gets_the_reference_it_was_compared_with(runner):
    """Not the reference that the call's own last step becomes."""
    state = runner.encoder_state(ReuseRule(interval=1))
    frames = clip([90, 0])
    reference = runner.encode(*patches_of(runner, frames), state=state, frames=frames)[-1].clone()
    frames = clip([0, 90])
    patches, grid = patches_of(runner, frames)
    got = runner.encode(patches, grid, state=state, frames=frames)
    assert state.counts["skipped_steps"] == 1 and not torch.equal(got[1], reference)
    assert torch.equal(got[0], reference)
    torch.testing.assert_close(got, runner.encode(patches, grid), rtol=1e-5, atol=1e-5)
    assert torch.equal(state.tokens, got[1])


def test_a_call_whose_steps_are_all_skipped_is_not_full(runner):
    """It has its place in the schedule: the next full call comes an interval later."""
    state = runner.encoder_state(ReuseRule(interval=2))
    full = []
    for value in (0, 5, 0, 5, 5):
        frames = clip([value])
        runner.encode(*patches_of(runner, frames), state=state, frames=frames)
        full.append(state.counts["full_calls"])
    assert full == [1, 1, 1, 1, 2] and state.counts["skipped_steps"] == 1


def test_without_frames_nothing_is_skipped(runner):
    state = runner.encoder_state(ReuseRule())
    frames = clip([0])
    for given in (frames, None, frames):
        runner.encode(*patches_of(runner, frames), state=state, frames=given)
    assert state.counts["skipped_steps"] == 1


# State: sizes, saving, refusal.


def test_another_size_starts_anew(runner):
    state = runner.encoder_state(ReuseRule())
    for call, grid in enumerate([(2, 4, 6), (2, 4, 6), (2, 6, 4), (1, 4, 6), (3, 4, 6)]):
        patches = next(moving(1, *grid, seed=call))
        full = torch.equal(runner.encode(patches, grid, state=state), runner.encode(patches, grid))
        assert full == (call in (0, 2, 3))
    assert state.counts["full_calls"] == 3 and state.grid == (4, 6)


@pytest.mark.parametrize("saved_after", [0, 1, 3])
def test_a_state_goes_on_where_it_was_saved(runner, saved_after):
    rule = ReuseRule(interval=3, max_age=2)
    frames = clip([0, 7, 1, 0, 0, 0])
    state = runner.encoder_state(rule)

    def feed(state, step):
        part = frames[2 * step : 2 * step + 2]
        return runner.encode(*patches_of(runner, part), state=state, frames=part)

    for step in range(saved_after):
        feed(state, step)
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    wanted = [feed(state, step) for step in range(saved_after, 6)]
    other = runner.encoder_state(rule)
    feed(other, 1)  # what it held before does not matter
    other.load(saved)
    for step, expected in zip(range(saved_after, 6), wanted):
        assert torch.equal(feed(other, step), expected)
    assert other.figures() == state.figures()


def test_what_does_not_fit_is_not_loaded(runner):
    state = runner.encoder_state(ReuseRule())
    patches = next(moving(1, 1, 4, 6))
    wanted = runner.encode(patches, (1, 4, 6), state=state)
    good = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for name, wrong in (
        ("branches", good["branches"][:2]),
        ("branches", good["branches"].half()),
        ("tokens", good["tokens"][1:]),
        ("counts", good["counts"][1:]),
        ("counts", -good["counts"]),
        ("frames", good["tokens"]),
        ("extra", good["tokens"]),
    ):
        with pytest.raises(ValueError, match=f"EncoderState.load: .*{name}"):
            state.load({**good, name: wrong})
    with pytest.raises(ValueError, match="EncoderState.load: tokens is missing"):
        state.load({name: tensor for name, tensor in good.items() if name != "tokens"})
    assert torch.equal(state.tokens, wanted[-1]) and state.counts["calls"] == 1


def test_arguments_that_do_not_fit(runner):
    patches = torch.zeros(24, 1176)
    state = runner.encoder_state(ReuseRule())
    other = load_model("tiny-random").encoder_state(ReuseRule())
    with pytest.raises(ValueError, match="state: made for another model"):
        runner.encode(patches, (1, 4, 6), state=other)
    for frames in (torch.zeros(4, 56, 84, 3).byte(), torch.zeros(2, 56, 84, 3), clip([0])[0]):
        with pytest.raises(ValueError, match="frames: .* expected uint8"):
            runner.encode(patches, (1, 4, 6), state=state, frames=frames)
    assert state.counts["calls"] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_patch_is_computed_and_heals(runner, bad):
    """NaN ranks as changed; the next full call has forgotten it."""
    state = runner.encoder_state(ReuseRule(ratio=0.1, interval=2))
    good = next(moving(1, 1, 4, 6))
    runner.encode(good, (1, 4, 6), state=state)
    broken = good.clone()
    broken[3] = bad
    assert runner.encode(broken, (1, 4, 6), state=state).isnan().any()
    assert torch.equal(runner.encode(good, (1, 4, 6), state=state), runner.encode(good, (1, 4, 6)))


def test_one_patch_square_and_one_step(runner):
    state = runner.encoder_state(ReuseRule(ratio=0.0))
    for patches in moving(3, 1, 2, 2):
        assert runner.encode(patches, (1, 2, 2), state=state).shape == (1, 1, runner.hidden_size)
    assert computed(state, 0) == [4 + 1 + 1] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "rule",
    [{}, {"max_age": 3}, {"threshold": 0.8, "max_ratio": 0.5}, {"selection": "shared"}],
    ids=str,
)
def test_a_call_between_full_calls_can_be_captured(rule):
    """No wait for the GPU and no shape that depends on its data: replays equal eager calls."""
    runner = load_model("tiny-random", device="cuda")
    rule = ReuseRule(interval=None, skip_tolerance=None, **rule)
    grid = (2, 8, 10)
    calls = [patches.cuda() for patches in moving(6, *grid)]
    eager, captured = runner.encoder_state(rule), runner.encoder_state(rule)
    wanted = [runner.encode(patches, grid, state=eager) for patches in calls]
    for patches in calls[:2]:
        runner.encode(patches, grid, state=captured)
    static = calls[2].clone()
    held = {name: tensor.clone() for name, tensor in captured.tensors().items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        runner.encode(static, grid, state=captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = runner.encode(static, grid, state=captured)
    for name, tensor in captured.tensors().items():  # as they were before the two calls
        if tensor.is_cuda:
            tensor.copy_(held[name])
    for patches, expected in zip(calls[2:], wanted[2:]):
        static.copy_(patches)
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(captured.recomputed, eager.recomputed)
