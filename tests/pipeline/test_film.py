"""--show-pruning: what the pictures show, for any size, length and end of a run."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from pipeline_kit import SMALL, pictures, small_engine, tiny_runner, write_video

from vicostream_kernels.pipeline import film as film_module
from vicostream_kernels.pipeline.errors import InputError, PipelineError
from vicostream_kernels.pipeline.film import PruningFilm, canvas_size, dim
from vicostream_kernels.pipeline.report import SCHEMA_FILE
from vicostream_kernels.pipeline.run import RunOptions, run
from vicostream_kernels.pipeline.screen import Screen
from vicostream_kernels.pipeline.stages import ChunkFrames, ChunkMask, HostCopy

av = pytest.importorskip("av")
jsonschema = pytest.importorskip("jsonschema")


def chunk(images, mask, start_s=0.0, end_s=0.7, frames_per_step=2):
    """``mask`` bool [T, rows, columns], or None with a grid of 2 x 2."""
    images = torch.from_numpy(np.ascontiguousarray(images))
    source = ChunkFrames(images, start_s, end_s, 1.0)
    if mask is None:
        return ChunkMask(source, (-(-len(images) // frames_per_step), 2, 2), frames_per_step, None)
    mask = torch.as_tensor(mask)
    return ChunkMask(source, tuple(mask.shape), frames_per_step, HostCopy(mask))


def decoded(path):
    """Frames uint8 [H, W, 3] and their times."""
    with av.open(str(path)) as container:
        frames = [(f.to_ndarray(format="rgb24"), f.time) for f in container.decode(video=0)]
        assert container.streams.video[0].codec_context.name == "h264"
    return [image for image, _ in frames], [time_s for _, time_s in frames]


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(48, 80, 3, 5), (7, 11, 2, 3)])
def test_dim_darkens_exactly_the_dropped_cells(height, width, rows, columns):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    kept = rng.random((rows, columns)) < 0.5
    got = dim(image, kept)
    for y in range(height):
        for x in range(width):
            stays = kept[y * rows // height, x * columns // width]
            wanted = image[y, x] if stays else (image[y, x] * 0.28).astype(np.uint8)
            assert (got[y, x] == wanted).all()
    assert kept.any() and not kept.all()


def test_the_video_shows_each_step_with_its_own_mask(tmp_path):
    film = PruningFilm(tmp_path)
    masks = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    white = np.full((5, 96, 128, 3), 255, np.uint8)
    film.watch(chunk(white, masks[:3]))  # 5 frames: the last step has one
    film.draw()
    film.watch(chunk(white[:4], masks[3:], 0.8, 1.1))
    video, sheet = film.close("a title")
    images, times = decoded(video)
    assert times == pytest.approx([0, 0.175, 0.35, 0.525, 0.7, 0.8, 0.9, 1.0, 1.1], abs=1e-3)
    shown = [masks[i] for i in (0, 0, 1, 1, 2, 3, 3, 4, 4)]
    for image, mask in zip(images, shown):
        height, width = image.shape[0] // 3, image.shape[1] // 4
        cells = image[: 3 * height, : 4 * width].reshape(3, height, 4, width, 3).mean((1, 3, 4))
        assert ((cells > 165) == mask.numpy()).all()
    with open(sheet, "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pruned.mp4", "pruned.png"]


@pytest.mark.parametrize(
    ("size", "canvas"),
    [((360, 640), (360, 640)), ((1, 1), (320, 320)), ((1080, 1921), (720, 1280)), ((1, 200), None)],
)
def test_the_canvas_is_even_and_of_the_frames_shape(size, canvas):
    height, width = canvas_size(*size)
    assert height % 2 == width % 2 == 0 and min(height, width) >= 16
    assert canvas is None or (height, width) == canvas


def test_any_sizes_in_one_stream(tmp_path):
    film = PruningFilm(tmp_path)
    for i, size in enumerate([(47, 81), (1, 1), (200, 1), (1, 200), (300, 2000)]):
        images = np.full((3, *size, 3), 255, np.uint8)
        film.watch(chunk(images, None, i, i + 0.2))
    images, times = decoded(film.close()[0])
    assert len(images) == 15 and times == sorted(times)
    assert {image.shape for image in images} == {(*canvas_size(47, 81), 3)}
    tall = images[6]  # 200 x 1: fitted, with bars
    assert tall.max(axis=(1, 2)).min() > 150 and tall[:, :40].mean() < 30


def test_thousands_of_frames_stay_in_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(film_module, "_SMALLEST", 16)
    film = PruningFilm(tmp_path)
    images = np.zeros((8, 16, 16, 3), np.uint8)
    for i in range(500):
        film.watch(chunk(images, np.ones((4, 2, 2), bool), i, i + 0.9))
        film.draw()
        assert len(film._sheet.rows) <= film_module._SHEET_ROWS and not film._waiting
    starts = [row[0] for row in film._sheet.rows]
    assert starts == list(range(0, 500, starts[1])) and len(starts) > film_module._SHEET_ROWS // 2
    assert len(decoded(film.close()[0])[0]) == 4000


def test_equal_and_rounded_times_keep_their_order(tmp_path):
    film = PruningFilm(tmp_path)
    images = np.zeros((4, 32, 32, 3), np.uint8)
    for start, end in ((0.0, 0.0), (0.0, 0.0), (0.0001, 0.0002)):
        film.watch(chunk(images, None, start, end))
    assert len(decoded(film.close()[0])[0]) == 12


def test_the_engine_hands_out_its_masks(tmp_path):
    seen = []
    with small_engine() as engine, engine.open(on_pruned=seen.append) as stream:
        stream.ingest(pictures(20))
        stream.flush()
        kept = [c["kept"] for c in stream.report()["chunks"]]
    assert [int(c.kept().sum()) for c in seen] == kept and 0 < sum(kept) < 40 * 8
    assert [c.source.frames for c in seen] == [8, 8, 4]
    with small_engine("full-history") as engine, engine.open(on_pruned=seen.append) as stream:
        stream.ingest(pictures(8))
    assert seen[-1].kept().all() and seen[-1].kept().size == stream.report()["tokens"]["seen"]


# The command.


@pytest.fixture
def loads_at_once(monkeypatch):
    monkeypatch.setattr("vicostream_kernels.models.load_model", lambda *_, **__: tiny_runner())


def go(tmp_path, video, folder, **options):
    err = io.StringIO()
    code = run(
        RunOptions(
            video=str(video),
            settings=[f"{key}={value}" for key, value in SMALL.items()],
            report=str(tmp_path / "report"),
            show_pruning=str(folder),
            **options,
        ),
        Screen(io.StringIO(), err),
    )
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(report)
    return code, err.getvalue(), report


@pytest.mark.usefixtures("loads_at_once")
@pytest.mark.parametrize("preset", ["vicostream", "full-history"])
def test_the_command_writes_both_and_reports_them(tmp_path, preset):
    video = write_video(tmp_path / "a.mp4", pictures(19))
    code, said, report = go(tmp_path, video, tmp_path / "shown", preset=preset)
    assert code == 0, said
    assert report["pictures"] == {
        "video": str(tmp_path / "shown" / "pruned.mp4"),
        "contact_sheet": str(tmp_path / "shown" / "pruned.png"),
    }
    assert report["pictures"]["video"] in said
    images, times = decoded(report["pictures"]["video"])
    assert len(images) == 19 and times[-1] == pytest.approx(1.8)


@pytest.mark.usefixtures("loads_at_once")
def test_a_folder_that_cannot_be_made_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, said, report = go(tmp_path, tmp_path / "a.mp4", tmp_path / "file")
    assert code == 2 and said.startswith("vicostream: error: --show-pruning")
    assert report["pictures"] is None and "loading" not in said
    with pytest.raises(InputError, match="--show-pruning"):
        PruningFilm(tmp_path / "file" / "below")


@pytest.mark.usefixtures("loads_at_once")
def test_a_run_without_frames_leaves_no_pictures(tmp_path):
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "pruned.png").write_text("of an earlier run")
    video = write_video(tmp_path / "a.mkv", [])
    code, _, report = go(tmp_path, video, shown)
    assert code == 2 and report["pictures"] is None and not list(shown.iterdir())


@pytest.mark.usefixtures("loads_at_once")
def test_drawing_that_fails_does_not_end_the_stream(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(film_module._Video, "add", full)
    video = write_video(tmp_path / "a.mp4", pictures(24))
    code, said, report = go(tmp_path, video, tmp_path / "shown", questions=("end What?",))
    assert code == 1 and said.count("No space left") == 1
    assert report["frames"]["processed"] == 24 and len(report["questions"]) == 1
    assert [e["where"] for e in report["errors"]] == ["pictures"] and report["pictures"] is None
    assert not list((tmp_path / "shown").iterdir())


def test_without_an_encoder_it_says_so(tmp_path, monkeypatch):
    def none(name, mode):
        raise ValueError(name)

    monkeypatch.setattr(av.codec, "Codec", none)
    with pytest.raises(PipelineError, match="no H.264 encoder"):
        PruningFilm(tmp_path)
