"""What the retrieval ops refuse, and the sizes of what they return (contracts: retrieve.py)."""

from __future__ import annotations

import math
import warnings

import torch

from vicostream_kernels import checks

SCORES = ("dot", "cosine", "bound")
POOLS = ("mean", "max", "softmax")
SCOPES = ("stream", "kv_head", "query_head")


@checks.remember
def check_summarize(
    k_pages: torch.Tensor, block_pages: torch.Tensor, page_fill: torch.Tensor, kind: str, sub: int
) -> None:
    dims = checks.Dims("summarize_blocks")
    dims.bind("k_pages", k_pages, "P B G d", checks.FLOAT_DTYPES)
    checks.check_head_dim("summarize_blocks", dims["d"])
    dims.bind("block_pages", block_pages, "S NB M", torch.int32, k_pages.device)
    dims.bind("page_fill", page_fill, "P", torch.int32, k_pages.device)
    checks.check_choice("summarize_blocks", "kind", kind, ("mean", "minmax"))
    checks.check_range("summarize_blocks", "page size", dims["B"], 1)
    checks.check_range("summarize_blocks", "sub", sub, 1, dims["B"])
    if kind == "mean" and sub != 1:
        raise ValueError(f"summarize_blocks: sub={sub} needs kind='minmax', got kind='mean'")


def _check_scoring(
    op, dims, query, summary, summary_max, summary_count, cu_seqlens, score, pool, scope, sm_scale
) -> torch.Tensor:  # fmt: skip
    """Binds S, NB (and G, H where there are heads); returns the tensor that sets the device."""
    for name, value in (("query", query), ("summary", summary)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{op}: {name} must be a tensor where there is no external_score, "
                f"got {type(value).__name__}"
            )
    if (score == "bound") != (summary_max is not None):
        raise ValueError(
            f"{op}: score={score!r} needs a "
            + (
                "(kmin, kmax) pair"
                if score == "bound"
                else "mean or external summary, a pair 'bound'"
            )
        )
    tokens = "S" if cu_seqlens is None else "Q"
    if query.dim() not in (2, 3):
        raise ValueError(
            f"{op}: query must have 2 dimensions [{tokens}, D] or 3 [{tokens}, H, d], got shape "
            f"{tuple(query.shape)}"
        )
    floats, device = checks.FLOAT_DTYPES, query.device
    if query.dim() == 2:
        if scope != "stream" or score == "bound":
            raise ValueError(
                f"{op}: query [{tokens}, D] has no heads, so scope must be 'stream' and score "
                f"'dot' or 'cosine', got scope={scope!r}, score={score!r}"
            )
        dims.bind("query", query, f"{tokens} D", floats)
        checks.check_range(op, "D, the channels of the query,", dims["D"], 1)
        dims.bind("summary", summary, "S NB D", floats, device)
    else:
        dims.bind("query", query, f"{tokens} H d", floats)
        checks.check_head_dim(op, dims["d"])
        form = "S NB sub G d" if score == "bound" else "S NB G d"
        dims.bind("summary", summary, form, floats, device)
        if dims["G"] == 0 or dims["H"] % dims["G"]:
            raise ValueError(
                f"{op}: query has H={dims['H']} heads, which must be a multiple of the "
                f"summary's G={dims['G']}"
            )
        if score == "bound":
            checks.check_range(op, "sub-pages of the summary", dims["sub"], 1)
    if summary_max is not None:
        dims.bind("kmax", summary_max, "S NB sub G d", summary.dtype, device)
    if summary_count is not None:
        if score == "bound":
            raise ValueError(f"{op}: a count belongs to sums, not to score='bound'")
        dims.bind("summary_count", summary_count, "S NB", torch.int32, device)
    if cu_seqlens is not None:
        dims.bind("cu_seqlens", cu_seqlens, "_", torch.int32, device)
        if cu_seqlens.shape[0] != dims["S"] + 1:
            raise ValueError(
                f"{op}: cu_seqlens has {cu_seqlens.shape[0]} entries, expected S+1={dims['S'] + 1}"
            )
    if sm_scale is not None and pool != "softmax":
        raise ValueError(f"{op}: sm_scale={sm_scale} needs pool='softmax', got pool={pool!r}")
    return query


def check_topk(
    op, query, summary, summary_max, summary_count, cu_seqlens, num_blocks, external_score,
    block_tokens, score, pool, scope, sm_scale, k, ratio, mass, token_budget, tokens_per_block,
    max_blocks, min_k, group, force_first, force_last,
) -> checks.Dims:  # fmt: skip
    """Raises for the first wrong argument; returns the bound sizes (S, NB, R)."""
    checks.check_choice(op, "score", score, SCORES)
    checks.check_choice(op, "pool", pool, POOLS)
    checks.check_choice(op, "scope", scope, SCOPES)
    dims = checks.Dims(op)
    if external_score is None:
        first = _check_scoring(
            op, dims, query, summary, summary_max, summary_count, cu_seqlens,
            score, pool, scope, sm_scale,
        )  # fmt: skip
        heads = {"stream": 1, "kv_head": dims.sizes.get("G"), "query_head": dims.sizes.get("H")}
        dims.sizes["R"] = heads[scope]
    else:
        if not (query is None and summary is None and cu_seqlens is None):
            raise ValueError(
                f"{op}: external_score takes the place of query, summary and cu_seqlens; "
                "give None for them"
            )
        form = "S NB" if scope == "stream" else "S R NB"
        first = dims.bind("external_score", external_score, form, checks.FLOAT_DTYPES)
        dims.sizes.setdefault("R", 1)
    if num_blocks is not None:
        dims.bind("num_blocks", num_blocks, "S", torch.int32, first.device)
    if block_tokens is not None:
        dims.bind("block_tokens", block_tokens, "S NB", torch.int32, first.device)
    _check_selection(
        op, k, ratio, mass, token_budget, tokens_per_block, block_tokens, max_blocks, min_k, group,
        force_first, force_last,
    )  # fmt: skip
    return dims


def _check_selection(
    op, k, ratio, mass, token_budget, tokens_per_block, block_tokens, max_blocks, min_k, group,
    force_first, force_last,
) -> None:  # fmt: skip
    rules = {"k": k, "ratio": ratio, "mass": mass, "token_budget": token_budget}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{op}: give exactly one of {', '.join(rules)}, got {', '.join(given) or 'none'}"
        )
    for name, value in (("group", group), ("k", k), ("block_tokens", tokens_per_block)):
        if value is not None:
            checks.check_range(op, name, value, 1)
    for name, value in (("min_k", min_k), ("force_first", force_first), ("force_last", force_last)):
        checks.check_range(op, name, value, 0)
    if token_budget is not None:
        checks.check_range(op, "token_budget", token_budget, 0)
    for name, value in (("ratio", ratio), ("mass", mass)):
        if value is not None and not 0 < value <= 1:
            raise ValueError(f"{op}: {name}={value} is outside (0, 1]")
    has_tokens = block_tokens is not None or tokens_per_block is not None
    if token_budget is not None and not has_tokens:
        raise ValueError(
            f"{op}: token_budget={token_budget} needs block_tokens, the tokens of each block"
        )
    if has_tokens and token_budget is None and (mass is None or block_tokens is None):
        raise ValueError(
            f"{op}: block_tokens goes with token_budget, or as a tensor with mass; "
            f"got {given[0]}={rules[given[0]]}"
        )
    if block_tokens is not None and tokens_per_block is not None:
        raise ValueError(f"{op}: give block_tokens or tokens_per_block, not both")
    for name, value in (("k", k), ("max_blocks", max_blocks)):
        if value is not None and value % group:
            raise ValueError(
                f"{op}: {name}={value} counts blocks and must be a multiple of group={group}"
            )
    least = group * _least_units(min_k, group, force_first, force_last)
    if max_blocks is not None and max_blocks < max(least, 1):
        raise ValueError(
            f"{op}: max_blocks={max_blocks} is less than the {max(least, 1)} blocks that min_k, "
            "force_first and force_last may take"
        )


def _least_units(min_k: int, group: int, force_first: int, force_last: int) -> int:
    """The groups that ``min_k`` and the forced blocks may take; the last ones may stand astride."""
    first = -(-force_first // group)
    last = (force_last + group - 2) // group + 1 if force_last else 0
    return max(-(-min_k // group), first + last)


def capacity_of(
    blocks: int, k, ratio, mass, token_budget, tokens_per_block, max_blocks, min_k, group,
    force_first, force_last,
) -> int:  # fmt: skip
    """K, the width of ``block_index``: a function of shapes and options alone."""
    if k is not None:
        wanted = k // group
    elif ratio is not None:
        wanted = math.floor(blocks * ratio) // group
    elif tokens_per_block is not None:
        wanted = token_budget // tokens_per_block // group
    else:
        wanted = -(-blocks // group)
    units = max(wanted, _least_units(min_k, group, force_first, force_last))
    if max_blocks is not None:
        units = min(units, max_blocks // group)
    return units * group


# --- checks that read the device, with VICO_CHECK=1 only -----------------------------------------


def check_topk_values(
    op, query, summary, cu_seqlens, num_blocks, external_score, block_tokens
) -> None:  # fmt: skip
    blocks = summary.shape[1] if external_score is None else external_score.shape[-1]
    if num_blocks is not None and bool(((num_blocks < 0) | (num_blocks > blocks)).any()):
        raise ValueError(f"{op}: num_blocks={num_blocks.tolist()} must lie in [0, NB={blocks}]")
    if block_tokens is not None and bool((block_tokens < 0).any()):
        raise ValueError(f"{op}: block_tokens holds {int(block_tokens.min())}, allowed: 0 or more")
    if cu_seqlens is not None:
        steps = cu_seqlens.tolist()
        if steps[0] < 0 or steps[-1] > query.shape[0] or sorted(steps) != steps:
            raise ValueError(f"{op}: cu_seqlens={steps} must ascend within [0, Q={query.shape[0]}]")


def warn_of_nan(op: str, scores: torch.Tensor, summary_count: torch.Tensor | None) -> None:
    """Names blocks that score NaN although they are not known to be empty."""
    nan = scores.isnan()
    nan = nan.any(1) if scores.dim() == 3 else nan
    if summary_count is not None:
        nan = nan & (summary_count > 0)
    if bool(nan.any()):
        where = nan.nonzero().tolist()
        warnings.warn(
            f"{op}: {len(where)} blocks score NaN (empty, or NaN in query, summary or "
            f"external_score) and rank last; the first [stream, block]: {where[:8]}",
            RuntimeWarning,
            stacklevel=2,
        )


def _check_lists(dims: checks.Dims, sink_pages, recent_pages, device: torch.device) -> None:
    for name, pages, form in (
        ("sink_pages", sink_pages, "S Ms"),
        ("recent_pages", recent_pages, "S Mr"),
    ):
        if pages is not None:
            dims.bind(name, pages, form, torch.int32, device)


def check_select_pages(block_index, block_pages, sink_pages, recent_pages) -> None:
    op = "select_pages"
    dims = checks.Dims(op)
    dims.bind("block_pages", block_pages, "S NB M", torch.int32)
    device = block_pages.device
    if isinstance(block_index, torch.Tensor) and block_index.dim() == 2:
        dims.bind("block_index", block_index, "S K", torch.int32, device)
    else:
        dims.bind("block_index", block_index, "S R K", torch.int32, device)
    _check_lists(dims, sink_pages, recent_pages, device)


def check_index_values(
    op: str, name: str, index: torch.Tensor | None, size: int | None, least: int = -1
) -> None:
    """``size`` None: as many as there are, which nobody here knows."""
    if index is None or index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    above = size is not None and high >= size
    if above or low < least:
        allowed = "-1 or " if least < 0 else ""
        allowed += "0 and more" if size is None else f"[0, {size})"
        raise ValueError(f"{op}: {name} holds {high if above else low}, allowed: {allowed}")


def check_page_lists(op: str, block_pages, sink_pages, recent_pages) -> None:
    for name, pages in (
        ("block_pages", block_pages),
        ("sink_pages", sink_pages),
        ("recent_pages", recent_pages),
    ):
        check_index_values(op, name, pages, None)


def check_topk_pages(tensors, block_pages, sink_pages, recent_pages, options) -> checks.Dims:
    dims = check_topk("topk_pages", *tensors, *options)
    device = (tensors[0] if tensors[6] is None else tensors[6]).device
    dims.bind("block_pages", block_pages, "S NB M", torch.int32, device)
    _check_lists(dims, sink_pages, recent_pages, device)
    return dims
