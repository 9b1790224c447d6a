"""Every pruning method in the engine: by preset, and as the pruning of another preset."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipeline_kit import SMALL, pictures, small_engine, tiny_runner

from vicostream_kernels import methods
from vicostream_kernels.ops.prune import prune_tokens
from vicostream_kernels.pipeline.engine import StreamEngine, check_supported
from vicostream_kernels.pipeline.errors import InputError

#: Those that reuse as well encode other features (tests/pipeline/test_reuse.py); streamingtom has
#: the pruning of streamingtom-ctr.
PRUNING = [
    name
    for name in methods.names()
    if methods.get(name).prune is not None
    and methods.get(name).reuse is None
    and name != "streamingtom"
]
#: Few tokens a frame here: budgets that leave something to drop.
FEWER = {
    "stc-pruner": {"prune.k": 3},
    "stc-pruner-dual-anchor": {"prune.k": 3},
    "stc-pruner-as-released": {"prune.k": 3},
    "streamingtom-ctr": {"scorer.budget": 3},
}


def masks(preset, overrides, frames=19, sizes=((48, 80),)):
    """What is kept of each chunk, and the report: eight frames that move, the rest stand still."""
    seen = []
    method = methods.get(preset, {**SMALL, **overrides})
    with StreamEngine(tiny_runner(), method) as engine:
        with engine.open(on_pruned=lambda chunk: seen.append(chunk.kept())) as stream:
            for height, width in sizes:
                moving = pictures(8, height, width)
                still = pictures(1, height, width, start=8).repeat(frames - 8, 0)
                stream.ingest(np.concatenate((moving, still)))
            stream.flush()
            report = stream.report()
    assert [int(m.sum()) for m in seen] == [c["kept"] for c in report["chunks"]]
    return seen, report


def steps(kept):
    """The masks of all chunks, step by step."""
    return torch.cat([torch.from_numpy(m).flatten(1) for m in kept])


@pytest.mark.parametrize("name", PRUNING)
def test_each_preset_drops_something_and_not_all(name):
    kept, report = masks(name, FEWER.get(name, {}))
    assert 0 < report["tokens"]["kept"] < report["tokens"]["seen"]
    assert kept[0].any()  # a chunk that stands still may keep nothing
    scorer = methods.get(name).scorer
    assert (report["config"]["scorer"] or {}).get("name") == (scorer and scorer.name)


@pytest.mark.parametrize("name", PRUNING)
def test_its_pruning_alone_can_be_taken(name):
    changes = {"engine.frames_per_chunk": 8, "engine.resizes": 1, **FEWER.get(name, {})}
    own, _ = masks(name, {**changes, "retrieve": "none"})
    taken, _ = masks("full-history", {"prune": name, **changes})
    assert torch.equal(steps(own), steps(taken))
    with_window = methods.get("streaming-llm", {"prune": name})
    assert with_window.scorer == methods.get(name).scorer and with_window.attention.sink_tokens == 4


def test_a_scorer_travels_with_its_rule():
    pixel = methods.get("timechat-online-pixel")
    assert methods.get("vicostream", {"prune": "timechat-online-pixel"}).scorer == pixel.scorer
    assert methods.get("timechat-online-pixel", {"prune": "vicostream"}).scorer is None
    assert methods.get("timechat-online-pixel", {"prune": "none"}).scorer is None
    assert methods.get("streamingtom-ctr", {"scorer.tau": "0.8"}).scorer.tau == 0.8
    mixed = methods.get("vicostream", {"prune": "vicostream-ovo", "scorer": "vicostream-max"})
    assert (mixed.prune.threshold, mixed.scorer.kind) == (0.15, "max")


@pytest.mark.parametrize(
    ("preset", "changes", "said"),
    [
        ("streamingtom-ctr", {"scorer.tau": 2}, "tau=2.0 is outside"),
        ("streamingtom-ctr", {"scorer.name": "x"}, "scorer.name"),
        ("vicostream", {"scorer.tau": 0.5}, "'vicostream' has no scorer step"),
        ("vicostream", {"scorer": "streamingtom-ctr"}, "gives a score, but prune.external=0.0"),
        ("vicostream-avg", {"prune.external": 1}, "gives no score"),
        ("full-history", {"scorer": "vicostream-avg"}, "no prune step"),
        ("vicostream-entropy", {"reuse": "stc"}, "set reuse.skip_tolerance=none"),
        ("vicostream-entropy", {"scorer.share": 0}, "share=0.0"),
        ("streamingtom-ctr", {"prune.k": "none", "prune.ratio": 0.5}, "set prune.k"),
    ],
)
def test_a_scorer_that_does_not_fit_its_rule(preset, changes, said):
    with pytest.raises(methods.InvalidValue, match=said):
        methods.get(preset, changes)


def test_scores_and_groups_without_a_scorer_are_refused():
    for changes, said in (
        ({"prune.external": 1}, "external score"),
        ({"prune.threshold": None, "prune.k": (1, 2), "prune.reduce": "none"}, "no groups"),
    ):
        with pytest.raises(InputError, match=said):
            check_supported(methods.get("vicostream", changes))


@pytest.mark.parametrize("name", ["timechat-online", "timechat-online-pixel", "streamingtom-ctr"])
def test_causal_methods_do_not_depend_on_the_chunks(name):
    """Steps encoded in other chunks are the same up to round-off, so the masks are."""
    changes = FEWER.get(name, {})
    few, _ = masks(name, {**changes, "engine.frames_per_chunk": 2}, frames=16)
    many, _ = masks(name, {**changes, "engine.frames_per_chunk": 16}, frames=16)
    assert len(few) == 8 and len(many) == 1
    assert torch.equal(steps(few), steps(many))


@pytest.mark.parametrize("name", PRUNING)
def test_another_frame_size_starts_anew(name):
    """Two shapes with the same number of tokens: places of one mean nothing in the other."""
    both, _ = masks(name, FEWER.get(name, {}), 8, ((48, 96), (96, 48)))
    alone, _ = masks(name, FEWER.get(name, {}), 8, ((96, 48),))
    assert both[0].size == both[1].size and both[0].shape != both[1].shape
    assert (both[1] == alone[0]).all()


def test_the_engine_prunes_as_the_op_does():
    """Through preprocessing and the ViT, by hand."""
    from vicostream_kernels.methods import ScoredChunk

    method = methods.get("timechat-online-pixel", SMALL)
    kept, _ = masks("timechat-online-pixel", {}, 8)
    runner = tiny_runner()
    with small_engine("timechat-online-pixel") as engine, engine.open() as stream:
        from vicostream_kernels.pipeline.stages import ChunkFrames

        frames = ChunkFrames(torch.from_numpy(pictures(8).copy()), 0.0, 0.7, 1.0)
        made = stream._preprocess.run(frames)
        tokens = stream._encode.run(made).tokens
    t, h, w = made.grid
    grid = (t, h // 2, w // 2)
    chunk = ScoredChunk(tokens, grid, made.patches, runner.image_mean, runner.image_std)
    positions = torch.zeros(3, *tokens.shape[:2], dtype=torch.int32)
    out = prune_tokens(
        tokens, positions, method.prune, external_score=method.scorer(chunk, {}).score
    )
    assert torch.equal(out.mask, torch.from_numpy(kept[0]).flatten(1))
