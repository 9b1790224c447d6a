"""Calls of the Triton kernels at the sizes of models, on meta tensors, for the compile gates.

Each function returns a call for ``kit.cubin.record_launches``.
"""

from __future__ import annotations

import pytest
import torch

from kit.cubin import Cubin, compile_launch, record_launches
from vicostream_kernels.triton_kernels import (
    append,
    attention,
    preprocess,
    prune,
    retrieve,
    reuse,
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def empty(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def append_call(dtype, d, *, raw=False, sums=False, sub=0, summary_raw=False, gaps=False):
    """The shapes of a 7B model's layer: 320 tokens, 28 query and 4 key heads, pages of 64."""
    n, h, g, pages, page_size, blocks = 320, 28, 4, 32, 64, 100

    def make(*shape, dtype=dtype):
        if gaps:
            shape = (*shape[:-1], shape[-1] * 3)
        made = torch.empty(shape, dtype=dtype, device="meta")
        return made[..., ::3] if gaps else made

    i32 = torch.int32
    pool = (pages, page_size, g, d)
    return lambda: append.rope_append(
        make(n, h, d), make(n, g, d), make(n, g, d), make(3, n, dtype=i32),
        make(d // 2, dtype=FP32), [d // 8, d // 8, d // 4], make(*pool), make(*pool),
        make(n, dtype=i32), make(n, h, d), make(*pool) if raw else None,
        make(blocks, g, d, dtype=FP32) if sums else None,
        make(blocks, dtype=i32) if sums else None,
        make(blocks, sub, g, d, dtype=FP32) if sub else None,
        make(blocks, sub, g, d, dtype=FP32) if sub else None,
        summary_raw, make(pages, dtype=i32) if sums or sub else None,
    )  # fmt: skip


def paged_call(
    dtype, d, *, rows=320, window=False, shift=False, logits=False, per_head=False, page=64,
    heads=(28, 4),
):  # fmt: skip
    """A layer of a 7B model: 28 query heads, 4 key heads, 256 listed pages."""
    (h, g), pages, listed = heads, 300, 256
    table = (1, g, listed) if per_head else (1, listed)
    return lambda: attention.sink_window_attention(
        empty(rows, h, d, dtype=dtype), empty(pages, page, g, d, dtype=dtype),
        empty(pages, page, g, d, dtype=dtype), empty(*table), empty(2),
        empty(rows, h, d, dtype=dtype), empty(rows, h, dtype=FP32), None, empty(pages),
        4 if window else 0, 4096 if window else None, empty(1) if window else None, None,
        empty(h, dtype=FP32) if logits else None, empty(*table, 3) if shift else None,
        empty(d // 2, dtype=FP32) if shift else None, [d // 8, d // 8, d // 4] if shift else None,
    )  # fmt: skip


def varlen_call(dtype, d):
    """A frame of the ViT in windows of 64 patches."""
    x = empty(1280, 16, d, dtype=dtype)
    return lambda: attention.varlen_attention(x, x, x, empty(21), empty(21), 64, 64)


def build_attention(call, capability, only=None) -> dict[str, Cubin]:
    """What the call would run on such a device, by the kernels' names; all or one of them."""
    cores = {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_tensor_cores", lambda device: cores)
        launches = record_launches(call)
    return {
        launch.kernel.__name__: compile_launch(launch, capability)
        for launch in launches
        if only in (None, launch.kernel.__name__)
    }


def check_attention(built: dict[str, Cubin], dtype, capability) -> None:
    for name, cubin in built.items():
        wanted = None
        if dtype != FP32 and name in ("prefill_kernel", "varlen_kernel"):
            wanted = {9: "wgmma", 10: "tcgen05"}.get(capability // 10, "mma")
        if dtype != FP32 and name == "split_kernel":
            wanted = "mma"  # 16 rows; the others take 64
        cubin.check(expect_instruction=wanted)


def prune_call(rule, dtype, width, *, state=False, shapes=None, groups=False, masked=False):
    """A chunk of four steps of 135 tokens, or packed segments."""
    steps, places = (4, 135) if shapes is None else (shapes[0], max(shapes[1::2]))
    total = steps * places if shapes is None else sum(
        t * n for t, n in zip(shapes[::2], shapes[1::2])
    )  # fmt: skip
    segments = 1 if shapes is None else len(shapes) // 2
    flat = (4, 135) if shapes is None else (total,)
    carried = [None] * 5
    if state:
        needs = rule.needs
        carried = [empty(segments)] + [
            empty(segments, places, width, dtype=dtype) if name in needs else None
            for name in ("previous", "last_kept")
        ]
        carried += [empty(segments, width, dtype=FP32), empty(segments)] if "mean" in needs else [
            None, None,
        ]  # fmt: skip
    return lambda: prune.prune_tokens(
        empty(*flat, width, dtype=dtype), empty(3, *flat), rule, shapes,
        empty(total, width, dtype=dtype), empty(3, total), empty(total), empty(segments + 1),
        empty(*flat, dtype=torch.bool), *carried,
        empty(*flat, dtype=FP32) if rule.external else None,
        empty(*flat, dtype=torch.bool) if masked else None,
        empty(*flat) if groups else None,
    )  # fmt: skip


def select_call(dtype, width, *, metric="cosine"):
    """Four frames of Qwen2.5-VL's ViT and a shared reference; lists of a quarter of the rows."""
    x, reference = empty(4, 540, width, dtype=dtype), empty(540, width, dtype=dtype)
    force = empty(540, dtype=torch.bool) if metric == "l2" else None
    threshold = None if metric == "cosine" else -0.5
    return lambda: reuse.select_changed(x, reference, 135, threshold, 135, metric, force)


def topk_call(query, summary, kmax=None, count=None, cu=None, *, score="dot", pool="mean",
         scope="stream", num_blocks=None, sizes=None, **rule):  # fmt: skip
    rules = dict(k=None, ratio=None, mass=None, token_budget=None, tokens_per_block=None)
    rules |= dict(min_k=1, group=1, force_first=1, force_last=1, capacity=64) | rule
    return lambda: retrieve.topk_blocks(
        query, summary, kmax, count, cu, num_blocks, None, sizes, score, pool, scope, None, **rules
    )


def preprocess_call(source, size, patch, merge, dtype):
    frames = empty(8, *source, 3, dtype=torch.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return lambda: preprocess.preprocess_frames(frames, *size, mean, std, patch, merge, 2, dtype)
