"""preprocess_frames against Pillow, transformers' own processor, and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_matches, assert_same_bits
from kit.ops import check_fullgraph, check_op
from vicostream_kernels.ops.preprocess import preprocess_frames, smart_resize
from vicostream_kernels.reference import preprocess as reference
from vicostream_kernels.reference._precision import accumulate_in

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORM = {"mean": MEAN, "std": STD}
#: (H, W, height, width): shrink, grow, one pixel, one row, an odd factor, nothing to do.
RESIZES = [
    (360, 640, 252, 420),
    (17, 25, 56, 84),
    (1, 1, 28, 28),
    (1, 100, 28, 280),
    (253, 431, 224, 392),
    (28, 56, 28, 56),
]


#: Share of levels that may differ: where the exact value is (nearly) a half, fixed-point weights
#: fall on either side. Ramps meet exact halves often: the middle between two odd-spaced levels.
MAY_DIFFER = {"noise": 0.02, "dots": 0.02, "smooth": 0.06}


def pictures(frames: int, height: int, width: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Noise, black and white dots (the worst case for overshoot), or a smooth scene."""
    if kind == "noise":
        return tensors.ints((frames, height, width, 3), 0, 256, dtype=torch.uint8, seed=seed)
    if kind == "dots":
        dots = tensors.ints((frames, height, width, 3), 0, 2, dtype=torch.uint8, seed=seed)
        return dots * 255
    y = torch.linspace(0, 6, height)[:, None, None]
    x = torch.linspace(0, 9, width)[:, None]
    phase = torch.arange(frames * 3).view(frames, 1, 1, 3) * 1.3 + seed
    return (128 + 60 * (torch.sin(2 * y + phase) + torch.cos(3 * x + y))).clamp(0, 255).byte()


def levels_of(patches: torch.Tensor) -> torch.Tensor:
    """The uint8 levels behind normalised patches [rows, 3*...], as [rows, 3, ...] integers."""
    values = patches.double().unflatten(1, (3, -1))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None] for v in (MEAN, STD))
    exact = (values * std + mean) * 255
    assert (exact - exact.round()).abs().max() < 1e-3, "values do not stand for whole levels"
    return exact.round().int()


def pillow(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pillow's resize with the width first (Pillow 13 alone may take the height first)."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(frame.numpy()))
    across = picture.resize((width, frame.shape[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(
        np.asarray(across.resize((width, height), Image.Resampling.BICUBIC)).copy()
    )


@pytest.mark.parametrize("kind", ["noise", "dots", "smooth"])
@pytest.mark.parametrize("size", RESIZES, ids=str)
def test_the_definition_is_pillows_resize(size, kind):
    frames = pictures(1, *size[:2], kind)
    ours = reference.resize_to_levels(frames, *size[2:], torch.float64)[0].int()
    off = (ours - pillow(frames[0], *size[2:]).int()).abs()
    assert off.max() <= 2
    assert (off > 0).float().mean() < MAY_DIFFER[kind]


@pytest.mark.parametrize("backend", backends_of("preprocess_frames"))
@pytest.mark.parametrize("kind", ["noise", "dots", "smooth"])
@pytest.mark.parametrize("size", RESIZES, ids=str)
def test_levels_are_the_definitions_within_two(size, kind, backend):
    name, device = backend
    frames = pictures(3, *size[:2], kind)
    args = (*size[2:], MEAN, STD, 14, 2, 2)
    got = torch.ops.vicostream.preprocess_frames(frames.to(device), *args, backend=name).cpu()
    with accumulate_in(torch.float64):
        truth = reference.preprocess_frames(frames, *args, torch.float64)
    off = (levels_of(got) - levels_of(truth)).abs()
    assert off.max() <= 2
    assert (off > 0).float().mean() < MAY_DIFFER[kind]


@pytest.mark.parametrize("backend", backends_of("preprocess_frames"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_normalisation_is_one_rounding_from_the_truth(dtype, backend):
    name, device = backend
    frames = pictures(3, 56, 84, "noise")  # already the target size: levels are the input's
    args = (56, 84, MEAN, STD, 14, 2, 2)
    got = torch.ops.vicostream.preprocess_frames(
        frames.to(device), *args, dtype=dtype, backend=name
    )
    assert got.dtype == dtype and got.is_contiguous()
    with accumulate_in(torch.float64):
        truth = reference.preprocess_frames(frames, *args, torch.float64)
    assert_matches(got, truth)


@pytest.mark.parametrize("backend", backends_of("preprocess_frames"))
@pytest.mark.parametrize(
    "patch,merge,temporal,frames", [(14, 2, 2, 3), (4, 3, 2, 2), (5, 1, 3, 4), (2, 2, 1, 1)]
)
def test_order_of_rows_and_columns(patch, merge, temporal, frames, backend):
    name, device = backend
    rows, columns = 2 * merge, 3 * merge
    height, width = rows * patch, columns * patch
    pixels = pictures(frames, height, width, "noise")
    got, grid = preprocess_frames(
        pixels.to(device), min_pixels=1, max_pixels=height * width, mean=(0, 0, 0),
        std=(1 / 255,) * 3, patch=patch, merge=merge, temporal=temporal, backend=name,
    )  # fmt: skip
    steps = -(-frames // temporal)
    assert grid == (steps, rows, columns)
    wanted = []
    for t in range(steps):
        for merged_row in range(rows // merge):
            for merged_column in range(columns // merge):
                for row in range(merged_row * merge, (merged_row + 1) * merge):
                    for column in range(merged_column * merge, (merged_column + 1) * merge):
                        y, x = row * patch, column * patch
                        cube = [
                            pixels[min(t * temporal + f, frames - 1), y : y + patch, x : x + patch]
                            for f in range(temporal)
                        ]
                        wanted.append(torch.stack(cube).permute(3, 0, 1, 2).flatten())
    assert_matches(got, torch.stack(wanted).double())


def test_matches_transformers_processor():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    bounds = {"shortest_edge": 90_000, "longest_edge": 90_000}
    theirs = module.Qwen2VLImageProcessorPil(size=bounds)
    for size, kind in [((360, 640), "noise"), ((640, 360), "dots"), ((90, 70), "smooth")]:
        frames = pictures(1, *size, kind).contiguous()
        wanted = theirs(images=[frames[0].numpy()], input_data_format="channels_last")
        got, grid = preprocess_frames(
            frames, min_pixels=90_000, max_pixels=90_000,
            mean=theirs.image_mean, std=theirs.image_std,
        )  # fmt: skip
        assert list(grid) == np.asarray(wanted["image_grid_thw"])[0].tolist()
        off = levels_of(got) - levels_of(torch.as_tensor(np.asarray(wanted["pixel_values"])))
        assert off.abs().max() <= 2, (size, kind)
        assert (off != 0).float().mean() < MAY_DIFFER[kind], (size, kind)


def test_smart_resize_is_transformers():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

    @settings(max_examples=400, deadline=None)
    @given(
        st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([1, 14, 28, 32]),
        st.integers(1, 200_000), st.integers(0, 1_000_000),
    )  # fmt: skip
    def same(height, width, factor, low, more):
        try:
            wanted = module.smart_resize(height, width, factor, low, low + more)
        except ValueError:
            with pytest.raises(ValueError, match="aspect ratio"):
                smart_resize(height, width, factor, low, low + more)
            return
        assert smart_resize(height, width, factor, low, low + more) == wanted

    same()


@pytest.mark.parametrize(
    "size,once,twice",
    [
        ((360, 640), (224, 392), (252, 420)),
        ((480, 640), (252, 336), (280, 364)),
        ((300, 300), (280, 280), (308, 308)),
    ],
)
def test_vicostreams_pixel_budget(size, once, twice):
    # ViCoStream: 90,000 px are both bounds, and its frames pass the rule twice (112 -> 135
    # tokens a step at 16:9, 108 -> 130 at 4:3, 100 -> 121 of a square).
    assert smart_resize(*size, 28, 90_000, 90_000) == once
    assert smart_resize(*once, 28, 90_000, 90_000) == twice


@pytest.mark.parametrize("backend", backends_of("preprocess_frames"))
def test_a_frame_does_not_depend_on_its_neighbours(backend):
    name, device = backend
    frames = pictures(3, 45, 61, "noise").to(device)
    kwargs = {"min_pixels": 1, "max_pixels": 56 * 56, "temporal": 1, "backend": name, **NORM}
    whole, (_, h, w) = preprocess_frames(frames, **kwargs)
    for f in range(3):
        alone, _ = preprocess_frames(frames[f : f + 1], **kwargs)
        assert_same_bits(alone, whole[f * h * w : (f + 1) * h * w])


@pytest.mark.parametrize("backend", backends_of("preprocess_frames"))
def test_strides_do_not_matter(backend):
    name, device = backend
    planar = tensors.ints((4, 3, 30, 44), 0, 256, dtype=torch.uint8, gaps=False).to(device)
    kwargs = {"min_pixels": 1, "max_pixels": 90_000, "backend": name, **NORM}
    for view in (planar.permute(0, 2, 3, 1), planar.permute(0, 2, 3, 1).flip(3)[::2]):
        wanted, _ = preprocess_frames(view.contiguous(), **kwargs)
        assert_same_bits(preprocess_frames(view, **kwargs)[0], wanted)


def test_registration_and_fullgraph():
    frames = pictures(3, 30, 40, "noise")
    op = torch.ops.vicostream.preprocess_frames.default
    check_op(op, (frames, 28, 56, MEAN, STD), {"dtype": torch.float16})

    def run(x):
        return preprocess_frames(x, min_pixels=1, max_pixels=90_000, **NORM)

    check_fullgraph(run, frames)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"frames": torch.zeros(2, 30, 40, 3)}, TypeError, "frames has dtype float32.*uint8"),
        ({"frames": torch.zeros(30, 40, 3).byte()}, ValueError, "frames must have 4 dim"),
        ({"frames": torch.zeros(2, 3, 30, 40).byte()}, ValueError, r"expected \[F=2, .*, 3\]"),
        ({"frames": torch.zeros(0, 30, 40, 3).byte()}, ValueError, "at least one frame"),
        ({"frames": torch.zeros(2, 0, 40, 3).byte()}, ValueError, "height=0"),
        ({"frames": torch.zeros(1, 2, 402, 3).byte()}, ValueError, "aspect ratio of 201.0.* 200"),
        ({"frames": [[0]]}, TypeError, "frames must be a tensor, got list"),
        ({"min_pixels": 0}, ValueError, "min_pixels=0"),
        ({"min_pixels": 100, "max_pixels": 99}, ValueError, r"max_pixels=99 is outside \[100"),
        ({"patch": 0}, ValueError, "patch=0"),
        ({"merge": -1}, ValueError, "merge=-1"),
        ({"temporal": 0}, ValueError, "temporal=0"),
        ({"mean": (0.5,)}, ValueError, "mean=.*three finite"),
        ({"mean": (0.5, float("nan"), 0.5)}, ValueError, "mean=.*three finite"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "std=.*above 0"),
        ({"dtype": torch.float64}, ValueError, "dtype=torch.float64"),
        ({"backend": "fast"}, ValueError, "backend='fast'"),
    ],
)
def test_bad_input_is_named(change, error, match):
    good = {
        "frames": torch.zeros(2, 30, 40, 3, dtype=torch.uint8), "min_pixels": 1,
        "max_pixels": 90_000, **NORM,
    }  # fmt: skip
    given = {**good, **change}
    with pytest.raises(error, match=match):
        preprocess_frames(given.pop("frames"), **given)


def test_the_raw_op_refuses_a_size_that_patches_do_not_fill():
    frames = torch.zeros(2, 30, 40, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="width=30 must be a positive multiple of .*28"):
        torch.ops.vicostream.preprocess_frames(frames, 28, 30, MEAN, STD)


@pytest.mark.parametrize(
    "height, width, once, twice",
    [(360, 640, 112, 135), (480, 640, 108, 130), (500, 500, 100, 121)],
    ids=["16:9", "4:3", "square"],
)
def test_the_rule_applied_twice_gives_the_published_token_counts(height, width, once, twice):
    """ViCoStream at 90,000 pixels: tokens a step after one and after two resizes."""
    frames = torch.zeros(2, height, width, 3, dtype=torch.uint8)
    for resizes, tokens in ((1, once), (2, twice)):
        _, (t, h, w) = preprocess_frames(
            frames, min_pixels=90_000, max_pixels=90_000, mean=[0.5] * 3, std=[0.5] * 3,
            resizes=resizes,
        )  # fmt: skip
        assert t * h * w // 4 == tokens


def test_the_cpu_backend_gives_the_bits_of_the_definition_on_a_cpu():
    frames = pictures(5, 90, 122, "smooth").permute(0, 2, 1, 3)
    kwargs = {"min_pixels": 1, "max_pixels": 90_000, **NORM}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got, _ = preprocess_frames(frames, dtype=dtype, backend="cpu", **kwargs)
        wanted, _ = preprocess_frames(frames, dtype=dtype, backend="reference", **kwargs)
        assert_same_bits(got, wanted)
