"""Every configuration of the prune kernels compiles for sm_80 and sm_90 without a spill."""

from __future__ import annotations

import pytest
import torch

from kit import interpreter

pytest.importorskip("triton")
if interpreter.ACTIVE:
    pytest.skip("in the interpreter nothing is compiled", allow_module_level=True)

from triton_calls import BF16, FP16, FP32, empty, prune_call  # noqa: E402

from kit.cubin import compile_launch, compiled_for, record_launches  # noqa: E402
from vicostream_kernels import PruneRule  # noqa: E402
from vicostream_kernels.triton_kernels import prune  # noqa: E402

CHUNK_INTRA = PruneRule(threshold=0.25, reduce="any", always_keep="first")


def names_of(launches):
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


RULES = {
    "chunk-intra": (CHUNK_INTRA, BF16, 2048, 90, {}, ["score", "decide", "compact"]),
    "two-tokens": (
        PruneRule(reference=("previous", "last_kept"), metric=("l1", "l2"), threshold=0.5),
        FP32, 2048, 80, dict(state=True, shapes=(4, 135, 2, 70)), ["score", "decide", "compact"],
    ),
    "gaussian-tokens": (
        PruneRule(reference=("previous", "chunk_first"), metric="gaussian", threshold=1.0),
        FP16, 3584, 80, dict(state=True), ["score", "decide", "compact"],
    ),
    "groups-of-the-call": (
        PruneRule(ratio=0.3, scope="call", reduce="any", external=0.5), BF16, 1280, 90,
        dict(groups=True, masked=True), ["score", "rank", "decide", "compact"],
    ),
    "stc": (
        PruneRule(reference=("running_mean", "frame_mean"), metric="gaussian", ratio=0.25,
                  channels=0.5, history="chunk"),
        FP32, 2048, 80, dict(state=True),
        ["squares", "means", "running", "spread", "channels", "squares", "means", "score", "rank",
         "decide", "compact"],
    ),
    "means-by-step": (
        PruneRule(reference=("running_mean", "frame_mean"), metric=("cosine", "l2"), k=40,
                  scope="chunk"),
        BF16, 2048, 90, dict(state=True, shapes=(4, 135, 4, 135)),
        ["squares", "means", "running", "score", "rank", "decide", "compact"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    rule, dtype, width, capability, options, wanted = RULES[name]
    launches = record_launches(prune_call(rule, dtype, width, **options))
    assert names_of(launches) == wanted
    for launch in launches:
        compile_launch(launch, capability).check()


def test_one_chunk_has_a_program_for_each_step_and_many_share_what_they_read():
    score, _, compact = record_launches(prune_call(CHUNK_INTRA, BF16, 2048))
    assert score.grid == (4 * 135,) and compact.grid == (4 * 135,)
    score, _, compact = record_launches(prune_call(CHUNK_INTRA, BF16, 2048, shapes=(4, 135) * 64))
    assert score.grid == (64 * 135,)
    ptx = compile_launch(score, 90).ptx
    assert ptx.count("ld.global.v4.b32") == 2 * 8, "a row and its reference, 16 bytes a thread"
    assert "bar.sync" not in ptx, "a row is summed by one warp"
    # Equal rows score exactly 1 if their three sums round alike, whatever the compiler would fuse.
    ptx = compile_launch(score, 90, enable_fp_fusion=False).ptx
    assert ptx.count("fma.rn.f32") >= 3 * 2048 // 32
    assert "st.global.v4.b32" in compile_launch(compact, 90).ptx


@pytest.mark.parametrize(("width", "apart"), ((2048, 2048), (500, 512)))
def test_a_step_is_added_up_as_a_whole_call_is(width, apart):
    """How wide the loads of a kernel are settles its order of additions."""
    steps, places = 4, 136
    # Between steps something odd lies; the rows of the second width start evenly in it.
    lies = empty(steps * places * apart + 16, dtype=BF16)
    x = lies.as_strided((steps, places, width), (places * apart + 4, apart, 1))
    whole = torch.empty_like(x, memory_format=torch.contiguous_format)
    rule = PruneRule(reference=("running_mean", "frame_mean"), channels=0.5, k=40, scope="chunk")

    def loads(x):
        total = x.shape[0] * places
        launches = record_launches(
            lambda: prune.prune_tokens(
                x, empty(3, x.shape[0], places), rule, None, empty(total, width, dtype=BF16),
                empty(3, total), empty(total), empty(2), empty(*x.shape[:2], dtype=torch.bool),
            )
        )  # fmt: skip
        keys = map(compiled_for, launches)
        return [
            (name, {k: v for k, v in key.items() if k.startswith("x_")})
            for name, key in keys
            if "x_ptr" in key
        ]

    wanted = loads(whole)
    assert [name for name, _ in wanted] == [
        f"{name}_kernel" for name in ("squares", "means", "spread", "score", "compact")
    ]
    for part in (whole[:1], whole[1:2], whole.transpose(0, 1).clone().transpose(0, 1), x, x[:1]):
        assert loads(part) == wanted
    assert loads(x[1:2]) == wanted, "its rows start oddly"
    assert loads(x.transpose(1, 2).clone().transpose(1, 2)) == wanted, "channel by channel"
