"""prune in Triton: the launches.

`prune_tokens` has the semantics of the raw op `vicostream::prune_tokens`; the contract, and the
checks of its arguments, are in `vicostream_kernels.ops.prune`. Every rule of the family is served.
A rule between tokens is three launches: score, decide, compact; a ranking adds one, with
`reduce="any"` still one more, and means and selected channels add those that make them. Nothing
here waits for the device.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch

from vicostream_kernels.triton_kernels._launch import cdiv, on, strides
from vicostream_kernels.triton_kernels._prune_compact import compact_kernel
from vicostream_kernels.triton_kernels._prune_decide import decide_kernel, rank_kernel
from vicostream_kernels.triton_kernels._prune_layout import BLOCK, Layout, constants
from vicostream_kernels.triton_kernels._prune_means import (
    channels_kernel,
    means_kernel,
    running_kernel,
    spread_kernel,
    squares_kernel,
)
from vicostream_kernels.triton_kernels._prune_score import score_kernel
from vicostream_kernels.triton_kernels._similarity import regular, row_tile, sum_tiles

# From so many programs on, each takes all steps of its places: a GPU has work enough then.
_MANY = 1024


def _float32(value: float | None) -> float:
    """As a kernel gets it; the interpreter would compute in float64."""
    return 0.0 if value is None else ctypes.c_float(value).value


def _bits(value: float) -> int:
    """A float64 as the integer of its bits; 0 as -0, whose bits need 64 of them as well."""
    return struct.unpack("<q", struct.pack("<d", value or -0.0))[0]


def _bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    """One value for each token, one after the other."""
    if x is None:
        return None
    return (x.view(torch.uint8) if x.dtype == torch.bool else x).reshape(-1).contiguous()


def _places(x: torch.Tensor, name: str, axes: str, packed: bool) -> dict[str, int]:
    """Strides of [.., T, N, ..], or of the packed [.., M, ..], whose steps have no stride."""
    if packed:
        axes = axes.replace("t", "")
    made = strides(x, name, axes)
    return made | ({f"{name}_stride_t": 0} if packed else {})


class _Means:
    """Means, running means and selected channels of a call, each made where the rule needs it."""

    def __init__(self, x: torch.Tensor, rule: Any, layout: Layout, common: dict[str, Any]) -> None:
        self.x, self.rule, self.layout, self.common = x, rule, layout, common
        self.width = x.shape[-1]
        self.channels: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def _squares(self) -> torch.Tensor:
        made = self._empty(self.layout.total)
        rows, chunk = row_tile(self.width)
        tiles = cdiv(self.layout.steps * self.layout.places, rows)
        squares_kernel[(self.layout.segments * tiles,)](
            channels_ptr=self.channels,
            squares_ptr=made,
            tiles=tiles,
            ROWS=rows,
            CHUNK=chunk,
            num_warps=4,
            enable_fp_fusion=True,
            **self.common,
        )
        return made

    def _means(
        self, squares: torch.Tensor, scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = (self.layout.step_count, self.width)
        means, sums = self._empty(*shape), self._empty(*shape)
        counts = self._empty(self.layout.step_count, dtype=torch.int32)
        tiles = cdiv(self.width, 64)
        means_kernel[(self.layout.segments * self.layout.steps * tiles,)](
            squares_ptr=squares,
            scales_ptr=scales,
            channels_ptr=None if scales is None else self.channels,
            means_ptr=means,
            sums_ptr=sums,
            counts_ptr=counts,
            max_steps=self.layout.steps,
            tiles=tiles,
            ROWS=32,
            CHUNK=64,
            num_warps=4,
            enable_fp_fusion=True,
            **self.common,
        )
        return means, sums, counts

    def make(
        self, mean: torch.Tensor | None, mean_count: torch.Tensor | None
    ) -> list[torch.Tensor | None]:
        """The anchors of each term (None where it has none); moves the state's mean on."""
        rule, layout = self.rule, self.layout
        terms = rule.terms
        some = max(1, int(self.width * rule.channels))
        selected = some < self.width and bool(terms)
        unit = any(r == "frame_mean" and m == "gaussian" for r, m, _ in terms)
        raw = any(
            r == "running_mean" or (r == "frame_mean" and m != "gaussian") for r, m, _ in terms
        )
        if not (selected or unit or raw):
            return [None, None]
        squares = self._squares()
        anchors: dict[str, torch.Tensor] = {}
        if raw or selected:
            anchors["raw"], sums, self.counts = self._means(squares, None)
        common = {k: v for k, v in self.common.items() if not k.startswith("x_")}
        of_layout = common | {
            "tiles": cdiv(self.width, 64),
            "CHUNK": 64,
            "num_warps": 4,
            "enable_fp_fusion": True,
        }
        grid = (layout.segments * of_layout["tiles"],)
        if any(r == "running_mean" for r, _, _ in terms):
            by_step = rule.history == "step"
            seen = self._empty(layout.step_count if by_step else layout.segments, self.width)
            running_kernel[grid](
                means_ptr=anchors["raw"],
                sums_ptr=sums,
                counts_ptr=self.counts,
                mean_ptr=mean,
                mean_count_ptr=mean_count,
                seen_ptr=seen,
                mean_stride_s=0 if mean is None else mean.stride(0),
                BY_STEP=by_step,
                **{k: v for k, v in of_layout.items() if k != "PACKED"},
            )
            anchors["running"] = seen
        if selected:
            spread = self._empty(layout.segments, self.width)
            spread_kernel[grid](
                squares_ptr=squares,
                sums_ptr=sums,
                counts_ptr=self.counts,
                spread_ptr=spread,
                ROWS=32,
                **of_layout,
                **{k: v for k, v in self.common.items() if k.startswith("x_")},
            )
            chosen = self._empty(layout.segments, self.width, dtype=torch.uint8)
            channels_kernel[grid](
                spread_ptr=spread,
                channels_ptr=chosen,
                tiles=of_layout["tiles"],
                width=self.width,
                wanted=some,
                CHUNK=64,
                num_warps=4,
                enable_fp_fusion=True,
            )
            self.channels = chosen
        if unit:
            scales = self._squares() if selected else squares
            anchors["unit"], _, counts = self._means(squares, scales)
            self.counts = counts if self.counts is None else self.counts
        made: list[torch.Tensor | None] = [None, None]
        for k, (reference, metric, _) in enumerate(terms):
            if reference == "running_mean":
                made[k] = anchors["running"]
            elif reference == "frame_mean":
                made[k] = anchors["unit" if metric == "gaussian" else "raw"]
        return made


def prune_tokens(
    x: torch.Tensor,
    positions: torch.Tensor,
    rule: Any,
    shapes: Sequence[int] | None,
    tokens: torch.Tensor,
    out_positions: torch.Tensor,
    index: torch.Tensor,
    cu_count: torch.Tensor,
    mask: torch.Tensor,
    steps: torch.Tensor | None = None,
    previous: torch.Tensor | None = None,
    last_kept: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    mean_count: torch.Tensor | None = None,
    external_score: torch.Tensor | None = None,
    external_mask: torch.Tensor | None = None,
    group_ids: torch.Tensor | None = None,
    group_k: torch.Tensor | None = None,
) -> None:
    """Keeps the tokens of x [T, N, D] or [M, D] that the rule chooses; writes into its arguments.

    The arguments are those of the raw op `vicostream::prune_tokens`, the rule read; any strides,
    but tokens that lie oddly are copied.
    """
    with on(x):  # whose stream may be capturing
        x = regular(x)
        layout = Layout.of(x, shapes)
    packed = shapes is not None
    width = x.shape[-1]
    terms = rule.terms
    i32 = dict(dtype=torch.int32, device=x.device)
    at_layout = layout.arguments() | {"BLOCK": BLOCK, "PACKED": packed}
    at_x = {"x_ptr": x, "width": width, **_places(x, "x", "tnd", packed)}
    rows, chunk = row_tile(width)
    # A warp copies a wide row alone: most of what it issues is to find out where to.
    tile = {
        "ROWS": rows,
        "CHUNK": chunk,
        "num_warps": 1 if rows == 1 else 4,
        "enable_fp_fusion": True,
    }
    kept = mask.view(torch.uint8)
    at_kept = {"kept_ptr": kept, **_places(kept, "kept", "tn", packed)}
    score = torch.empty((layout.total,), dtype=torch.float32, device=x.device)
    marks = torch.empty((layout.total,), dtype=torch.uint8, device=x.device)
    counts = torch.empty((layout.blocks,), **i32)
    means = _Means(x, rule, layout, {**at_layout, **at_x})

    with on(x):
        anchors = means.make(mean, mean_count)
        by_term: dict[str, Any] = {}
        for k in range(2):
            reference, metric, weight = terms[k] if k < len(terms) else ("none", "none", 0.0)
            state = {"previous": previous, "last_kept": last_kept}.get(reference)
            by_term |= {
                f"state{k}_ptr": state,
                f"mean{k}_ptr": anchors[k],
                f"weight{k}": _float32(weight),
                f"state{k}_stride_s": 0 if state is None else state.stride(0),
                f"state{k}_stride_n": 0 if state is None else state.stride(1),
                f"REFERENCE{k}": reference,
                f"METRIC{k}": metric,
            }
        # As many tiles at once as there are registers for: of the tokens, and of each reference
        # what lies in x and what lies in its state or mean.
        loaded = 1 + sum(1 + (by_term[f"state{k}_ptr"] is not None) for k in range(len(terms)))
        at_sums = sum_tiles(width, max(1, 32 // (x.element_size() * loaded)))
        tiles = cdiv(layout.places, at_sums["ROWS"])
        sequential = any(reference == "last_kept" for reference, _, _ in terms)
        whole = sequential or layout.segments * tiles >= _MANY
        span = layout.steps if whole else 1
        spans = cdiv(layout.steps, span)
        score_kernel[(layout.segments * tiles * spans,)](
            channels_ptr=means.channels,
            external_ptr=_bytes(external_score),
            mask_ptr=_bytes(external_mask),
            seen_steps_ptr=steps,
            score_ptr=score,
            marks_ptr=marks,
            tiles=tiles,
            spans=spans,
            span=span,
            compared=float(max(1, int(width * rule.channels))),
            external_weight=_float32(rule.external),
            threshold=_float32(rule.threshold),
            TERMS=len(terms),
            MEAN_BY_CHUNK=rule.history == "chunk",
            ALWAYS=rule.always_keep,
            MASK_OR=rule.mask == "or",
            KEEP=rule.keep,
            **by_term,
            **at_layout,
            **at_x,
            **at_sums,
        )
        chosen = None
        if rule.ranked:
            chosen = _rank(x, rule, layout, at_layout, score, marks, group_ids, group_k)
        tiles = cdiv(layout.steps * layout.places, BLOCK)
        decide_kernel[(layout.segments * tiles,)](
            score_ptr=score,
            marks_ptr=marks,
            chosen_ptr=chosen,
            counts_ptr=counts,
            tiles=tiles,
            threshold=_float32(rule.threshold),
            KEEP="all" if rule.threshold is None else rule.keep,
            ANY=rule.reduce == "any",
            num_warps=4,
            enable_fp_fusion=True,
            **at_kept,
            **at_layout,
        )
        tiles = cdiv(layout.steps * layout.places, rows)
        programs = layout.segments * tiles
        compact_kernel[(programs,)](
            positions_ptr=positions,
            counts_ptr=counts,
            tokens_ptr=tokens,
            out_positions_ptr=out_positions,
            index_ptr=index,
            cu_count_ptr=cu_count,
            seen_steps_ptr=steps,
            previous_ptr=previous,
            last_kept_ptr=last_kept,
            mean_count_ptr=mean_count,
            step_counts_ptr=means.counts,
            segments=layout.segments,
            tiles=tiles,
            blocks=layout.blocks,
            capacity=index.shape[0],
            share=cdiv(index.shape[0], programs),
            **_places(positions, "positions", "atn", packed),
            tokens_stride_c=tokens.stride(0),
            out_positions_stride_a=out_positions.stride(0),
            previous_stride_s=0 if previous is None else previous.stride(0),
            previous_stride_n=0 if previous is None else previous.stride(1),
            last_kept_stride_s=0 if last_kept is None else last_kept.stride(0),
            last_kept_stride_n=0 if last_kept is None else last_kept.stride(1),
            BY_STEP=rule.history == "step",
            SCAN=256,
            **at_kept,
            **at_layout,
            **at_x,
            **tile,
        )


def _rank(
    x: torch.Tensor,
    rule: Any,
    layout: Layout,
    at_layout: dict[str, Any],
    score: torch.Tensor,
    marks: torch.Tensor,
    group_ids: torch.Tensor | None,
    group_k: torch.Tensor | None,
) -> torch.Tensor:
    """What a number or a share of the tokens chooses, [M] uint8."""
    chosen = torch.empty((layout.total,), dtype=torch.uint8, device=x.device)
    if group_k is None and isinstance(rule.k, tuple):
        group_k = constants(rule.k, len(rule.k), x.device)[0]
    quota, share = ("ratio", rule.ratio) if rule.ratio is not None else ("drop", rule.drop_ratio)
    if rule.k is not None:
        quota, share = "k", 0.0
    groups = 0 if group_k is None else group_k.shape[-1]
    by_unit = group_k is not None and group_k.dim() == 2
    tiles = cdiv(layout.steps * layout.places, 64)
    rank_kernel[(layout.segments * tiles,)](
        score_ptr=score,
        marks_ptr=marks,
        groups_ptr=_bytes(group_ids),
        quotas_ptr=group_k,
        chosen_ptr=chosen,
        tiles=tiles,
        total=layout.total,
        k=rule.k if isinstance(rule.k, int) else 0,
        ratio_bits=_bits(share),
        multiple=rule.drop_multiple,
        groups=groups,
        quotas_stride_u=group_k.stride(0) if by_unit else 0,
        quotas_stride_g=0 if group_k is None else group_k.stride(-1),
        LOW=int(rule.keeps_low),
        QUOTA=quota,
        SCOPE=rule.scope,
        TILE=64,
        OTHERS=32,
        num_warps=4,
        enable_fp_fusion=True,
        **{name: value for name, value in at_layout.items() if name != "PACKED"},
    )
    return chosen
