"""Presets of pruning methods: each around the plain model, and variants of ViCoStream's.

``--set prune=NAME`` takes the pruning of a preset, its scorer included, into another one.
"""

from __future__ import annotations

from dataclasses import replace

from vicostream_kernels.methods import prune_rules
from vicostream_kernels.methods.pixel import PixelDifference
from vicostream_kernels.methods.rules import EngineRule, Method
from vicostream_kernels.methods.spatial import SpatialEntropy, SpatialPool
from vicostream_kernels.methods.stc import AsReleased
from vicostream_kernels.methods.streamingtom import StaticDynamic

_DTD = "TimeChat-Online, arXiv 2504.17343; DTD, settings of the README and the launchers"
_STC = "STC-Pruner, arXiv 2512.00891; settings of the README"
#: The launchers of TimeChat-Online fix 448 x 448 pixels.
_TIMECHAT = EngineRule(pixels=448 * 448)

PRUNING = (
    Method("timechat-online", _DTD, prune=prune_rules.DTD_FEATURE, engine=_TIMECHAT),
    Method(
        "timechat-online-pixel",
        _DTD,
        prune=prune_rules.DTD_PIXEL,
        scorer=PixelDifference(),
        engine=_TIMECHAT,
    ),
    Method("stc-pruner", _STC, prune=prune_rules.STC_GAUSSIAN_PER_CHUNK),
    Method("stc-pruner-dual-anchor", _STC, prune=prune_rules.STC_DUAL_ANCHOR_PER_CHUNK),
    Method(
        "stc-pruner-as-released",
        _STC + ", history as the released code keeps it",
        prune=prune_rules.STC_AS_RELEASED_PER_CHUNK,
        scorer=AsReleased(),
    ),
    # A chunk is the call: of 16 steps four are kept, of four steps only the first would be.
    Method(
        "evs",
        "EVS, arXiv 2510.14624; three quarters pruned",
        prune=prune_rules.evs_per_call(0.75),
        engine=EngineRule(frames_per_chunk=32),
    ),
    Method(
        "streamingtom-ctr",
        "StreamingTOM, arXiv 2510.18269; the causal temporal reduction",
        prune=prune_rules.STREAMINGTOM,
        scorer=StaticDynamic(),
    ),
)


def vicostream_variants(base: Method) -> tuple[Method, ...]:
    """ViCoStream as launched for its benchmarks, and with its optional spatial stage."""
    ovo, ego4d = (prune_rules.chunk_intra(name) for name in ("ovo-bench", "vstream-ego4d"))
    return (
        replace(
            base,
            name="vicostream-streamingbench",
            source=base.source + " for StreamingBench",
            retrieve=replace(base.retrieve, k=32),
        ),
        replace(
            base,
            name="vicostream-ovo",
            source=base.source + " for OVO-Bench, ETBench, StreamBench, VStream-MovieNet",
            prune=ovo,
        ),
        replace(
            base,
            name="vicostream-ego4d",
            source=base.source + " for VStream-Ego4D",
            prune=ego4d,
            engine=replace(base.engine, window_chunks=16),
        ),
        replace(
            base,
            name="vicostream-avg",
            source=base.source + ", spatial stage avg",
            scorer=SpatialPool("avg"),
        ),
        replace(
            base,
            name="vicostream-max",
            source=base.source + ", spatial stage max",
            scorer=SpatialPool("max"),
        ),
        replace(
            base,
            name="vicostream-entropy",
            source=base.source + ", spatial stage entropy with half of the patches",
            scorer=SpatialEntropy(),
        ),
    )
