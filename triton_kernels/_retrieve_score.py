"""retrieve: scores of blocks.

Channels come in chunks: a KV head with its d channels, or CHUNK channels of a vector of any origin.
The heads that choose together score one sum, so their queries are added before a block is read:
`queries_kernel` makes the vectors that `score_kernel` multiplies. For "bound" these are two, the
positive and the negative channels, since max(q kmin, q kmax) is q kmax for the former and q kmin
for the latter.
"""

import triton
import triton.language as tl

from vicostream_kernels.triton_kernels._compact import wide
from vicostream_kernels.triton_kernels._sums import product

_EPS = tl.constexpr(1e-8)


@triton.jit
def tokens_of(cu_seqlens_ptr, cu_stride, s, tokens):
    """The query tokens of stream s: its own one, or those between two entries."""
    first = s
    stop = s + 1
    if cu_seqlens_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + s * cu_stride), 0), tokens)
        stop = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + (s + 1) * cu_stride), 0), tokens)
    return first, stop


@triton.jit(do_not_specialize=["tokens", "chunks", "heads"])
def queries_kernel(
    query_ptr,
    cu_seqlens_ptr,
    vectors_ptr,  # [units, chunks, rows, planes, CHUNK] float32
    norms_ptr,  # [units, chunks, rows] float32: sums of squares
    tokens,
    chunks,
    heads,  # query heads of a chunk
    total,
    query_stride_t,
    query_stride_chunk,
    query_stride_h,
    query_stride_d,
    cu_stride,
    STEP: tl.constexpr,  # channels of a chunk
    CHUNK: tl.constexpr,
    POOLED: tl.constexpr,  # units are streams, averaged over their tokens; else single tokens
    SUMMED: tl.constexpr,  # the heads of a chunk are one row; else a row each
    BOUND: tl.constexpr,
):
    """One program: one chunk of one unit. What bounds it: latency, it reads the queries once."""
    unit = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    rows = heads
    if SUMMED:
        rows = 1
    c = tl.arange(0, CHUNK)
    inside = (c < STEP) & (chunk * STEP + c < total)
    query_ptr += chunk * query_stride_chunk + c.to(tl.int64) * query_stride_d
    first = unit
    stop = unit + 1
    if POOLED:
        first, stop = tokens_of(cu_seqlens_ptr, cu_stride, unit, tokens)
    made = (unit * chunks + chunk) * rows
    planes: tl.constexpr = 2 if BOUND else 1

    plus = tl.zeros((CHUNK,), tl.float32)
    minus = tl.zeros((CHUNK,), tl.float32)
    squares = 0.0
    for j in range(0, heads):
        pooled = tl.zeros((CHUNK,), tl.float32)
        for t in range(first, stop):
            at = wide(t) * query_stride_t + wide(j) * query_stride_h
            pooled += tl.load(query_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if POOLED:
            amount = tl.zeros((CHUNK,), tl.float32) + tl.maximum(stop - first, 1)
            pooled = tl.where(stop > first, tl.div_rn(pooled, amount), float("nan"))
            pooled = tl.where(inside, pooled, 0.0)
        if SUMMED:
            squares += tl.sum(product(pooled, pooled), 0)
        else:
            plus = tl.zeros((CHUNK,), tl.float32)
            minus = tl.zeros((CHUNK,), tl.float32)
            squares = tl.sum(product(pooled, pooled), 0)
        if BOUND:
            plus += tl.where(pooled >= 0.0, pooled, 0.0)
            minus += tl.where(pooled >= 0.0, 0.0, pooled)  # NaN goes here
        else:
            plus += pooled
        if (SUMMED == 0) | (j == heads - 1):
            row = made
            if SUMMED == 0:
                row = made + j
            tl.store(vectors_ptr + row * (planes * CHUNK) + c, plus)
            if BOUND:
                tl.store(vectors_ptr + row * (planes * CHUNK) + CHUNK + c, minus)
            tl.store(norms_ptr + row, squares)


@triton.jit
def _score(
    summary_ptr,
    summary_max_ptr,
    vectors_ptr,
    norms_ptr,
    b,
    known,
    summary_stride_chunk,
    summary_stride_d,
    from_chunk,
    to_chunk,
    rows,
    total,
    repeats,
    SCORE: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Sums over the chunks of the blocks b: product, norm of the blocks, of the query, emptiness.

    The pointers are those of the blocks and of the row's vectors.
    """
    dot = tl.zeros((BLOCKS,), tl.float32)
    block_squares = tl.zeros((BLOCKS,), tl.float32)
    query_squares = 0.0
    empty = tl.zeros((BLOCKS,), tl.int32)
    c = tl.arange(0, CHUNK)
    planes: tl.constexpr = 2 if SCORE == "bound" else 1
    for chunk in range(from_chunk, to_chunk):
        far = wide(chunk)
        there = (c < STEP) & (far * STEP + c < total)
        at = far * summary_stride_chunk + c.to(tl.int64) * summary_stride_d
        mask = known[:, None] & there[None, :]
        low = tl.load(summary_ptr[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
        vector_ptr = vectors_ptr + far * rows * (planes * CHUNK) + c
        vector = tl.load(vector_ptr)[None, :]
        if SCORE == "bound":
            high = tl.load(summary_max_ptr[:, None] + at[None, :], mask=mask, other=0.0)
            high = high.to(tl.float32)
            minus = tl.load(vector_ptr + CHUNK)[None, :]
            # A channel without such queries takes no part, however large its keys are.
            terms = tl.where(vector != 0.0, vector * high, 0.0)
            terms += tl.where(minus != 0.0, minus * low, 0.0)
            dot += tl.sum(terms, 1)
            empty = tl.maximum(empty, tl.max((low > high).to(tl.int32), 1))
        else:
            dot += tl.sum(product(low, vector), 1)
        if SCORE == "cosine":
            block_squares += tl.sum(product(low, low), 1)
            query_squares += tl.load(norms_ptr + far * rows)
    return dot, block_squares * repeats, query_squares, empty


@triton.jit(
    do_not_specialize=[
        "tokens", "blocks", "tiles", "chunks", "rows", "parts",
        "count_stride_s",  # grows with the history
    ],
    do_not_specialize_on_alignment=["count_ptr"],  # a layer's row of a table that grows
)  # fmt: skip
def score_kernel(
    summary_ptr,
    summary_max_ptr,
    count_ptr,  # [S, NB] int32: the summary holds sums; or None
    vectors_ptr,
    norms_ptr,
    cu_seqlens_ptr,
    num_blocks_ptr,
    scores_ptr,
    tokens,
    blocks,
    tiles,
    chunks,
    rows,
    parts,
    total,
    repeats,  # query heads that share each KV head in one row
    summary_stride_s,
    summary_stride_n,
    summary_stride_part,
    summary_stride_chunk,
    summary_stride_d,
    summary_max_stride_s,
    summary_max_stride_n,
    summary_max_stride_part,
    count_stride_s,
    count_stride_n,
    cu_stride,
    num_blocks_stride,
    SCORE: tl.constexpr,
    POOL: tl.constexpr,
    WHOLE: tl.constexpr,  # a row takes all chunks together (one row a stream)
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program: BLOCKS blocks of a stream, for all chunks (WHOLE) or for the rows of one.

    scores are [S, R, NB] with -inf at and beyond num_blocks, or for POOL "softmax" [Q, R, NB], a
    row for each token. What bounds it: memory, the summaries are read once; with several rows or
    tokens their products, for which a tile comes from the cache again.
    """
    groups = chunks
    if WHOLE:
        groups = 1
    s = (tl.program_id(0) // (tiles * groups)).to(tl.int64)
    group = tl.program_id(0) // tiles % groups
    b = tl.program_id(0) % tiles * BLOCKS + tl.arange(0, BLOCKS)
    limit = blocks
    if num_blocks_ptr is not None:
        limit = tl.minimum(tl.maximum(tl.load(num_blocks_ptr + s * num_blocks_stride), 0), blocks)
    known = b < limit
    wide_b = b.to(tl.int64)
    summary_ptr += s * summary_stride_s + wide_b * summary_stride_n
    if summary_max_ptr is not None:
        summary_max_ptr += s * summary_max_stride_s + wide_b * summary_max_stride_n
    share = tl.full((BLOCKS,), 1.0, tl.float32)
    if count_ptr is not None:
        count_ptr += s * count_stride_s + wide_b * count_stride_n
        share = tl.load(count_ptr, mask=known, other=1).to(tl.float32)
    from_chunk = group
    to_chunk = group + 1
    if WHOLE:
        from_chunk = 0
        to_chunk = chunks

    first = s
    stop = s + 1
    if POOL != "mean":
        first, stop = tokens_of(cu_seqlens_ptr, cu_stride, s, tokens)
    for r in range(0, rows):
        row = group * rows + r
        pooled = tl.full((BLOCKS,), float("-inf"), tl.float32)
        for t in range(first, stop):
            of_token = (wide(t) * chunks * rows) + r
            planes: tl.constexpr = 2 if SCORE == "bound" else 1
            best = tl.full((BLOCKS,), float("-inf"), tl.float32)
            all_empty = tl.full((BLOCKS,), 1, tl.int32)
            for part in range(0, parts):
                low_ptr = summary_ptr + wide(part) * summary_stride_part
                high_ptr = low_ptr
                if SCORE == "bound":
                    high_ptr = summary_max_ptr + wide(part) * summary_max_stride_part
                dot, block_squares, query_squares, empty = _score(
                    low_ptr,
                    high_ptr,
                    vectors_ptr + of_token * (planes * CHUNK),
                    norms_ptr + of_token,
                    b,
                    known,
                    summary_stride_chunk,
                    summary_stride_d,
                    from_chunk,
                    to_chunk,
                    rows,
                    total,
                    repeats,
                    SCORE,
                    STEP,
                    CHUNK,
                    BLOCKS,
                )
                value = dot
                if count_ptr is not None:
                    mean = tl.div_rn(dot, tl.where(share == 0.0, 1.0, share))
                    value = tl.where(share == 0.0, float("nan"), mean)
                if SCORE == "cosine":
                    norm = tl.sqrt_rn(block_squares)
                    if count_ptr is not None:
                        norm = tl.div_rn(norm, tl.where(share == 0.0, 1.0, share))
                    # NaN in either vector is in the dot product too.
                    query_norm = tl.sqrt_rn(tl.zeros((BLOCKS,), tl.float32) + query_squares)
                    norms = tl.maximum(query_norm, _EPS) * tl.maximum(norm, _EPS)
                    value = tl.div_rn(value, norms)
                value = tl.where(empty != 0, float("-inf"), value)
                all_empty = tl.minimum(all_empty, empty)
                best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
            best = tl.where(all_empty != 0, float("nan"), best)
            if POOL == "softmax":
                out = (wide(t) * chunks * rows + row) * blocks + b
                tl.store(scores_ptr + out, tl.where(known, best, float("-inf")), mask=b < blocks)
            pooled = tl.maximum(pooled, best, propagate_nan=tl.PropagateNan.ALL)
        if POOL != "softmax":
            if POOL == "max":
                pooled = tl.where(stop > first, pooled, float("nan"))
            out = (s * groups * rows + row) * blocks + b
            tl.store(scores_ptr + out, tl.where(known, pooled, float("-inf")), mask=b < blocks)


@triton.jit(do_not_specialize=["tokens", "streams", "heads", "blocks"])
def shares_kernel(
    logits_ptr,  # [Q, H, NB] float32, -inf for blocks that are not there
    peaks_ptr,  # [Q, H] float32: the largest logit
    sums_ptr,  # [Q, H] float32: the sum of exp(scale * (logit - peak))
    blocks,
    scale,
    TILE: tl.constexpr,
):
    """One program: what the softmax of one token and head needs. What bounds it: memory."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * blocks
    peaks = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, blocks, TILE):
        i = start + tl.arange(0, TILE)
        logit = scale * tl.load(logits_ptr + i, mask=i < blocks, other=float("-inf"))
        peaks = tl.maximum(peaks, tl.where(logit == logit, logit, float("-inf")))
    peak = tl.max(peaks, 0)
    sums = tl.zeros((TILE,), tl.float32)
    for start in range(0, blocks, TILE):
        i = start + tl.arange(0, TILE)
        logit = scale * tl.load(logits_ptr + i, mask=i < blocks, other=float("-inf"))
        counted = (logit == logit) & (logit > float("-inf"))
        sums += tl.where(counted, tl.exp(logit - peak), 0.0)
    tl.store(peaks_ptr + row, peak)
    tl.store(sums_ptr + row, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["tokens", "rows", "heads", "blocks", "tiles"])
def average_kernel(
    logits_ptr,
    peaks_ptr,
    sums_ptr,
    cu_seqlens_ptr,
    num_blocks_ptr,
    scores_ptr,  # [S, R, NB]
    tokens,
    rows,
    heads,  # query heads of a row
    blocks,
    tiles,
    scale,
    cu_stride,
    num_blocks_stride,
    TILE: tl.constexpr,
):
    """One program: the shares of TILE blocks, averaged over the tokens and heads of a row.

    What bounds it: memory, each logit read once more.
    """
    s = (tl.program_id(0) // (tiles * rows)).to(tl.int64)
    r = tl.program_id(0) // tiles % rows
    i = tl.program_id(0) % tiles * TILE + tl.arange(0, TILE)
    limit = blocks
    if num_blocks_ptr is not None:
        limit = tl.minimum(tl.maximum(tl.load(num_blocks_ptr + s * num_blocks_stride), 0), blocks)
    first, stop = tokens_of(cu_seqlens_ptr, cu_stride, s, tokens)
    total = tl.zeros((TILE,), tl.float32)
    for t in range(first, stop):
        for h in range(0, heads):
            at = (wide(t) * rows + r) * heads + h
            logit = scale * tl.load(logits_ptr + at * blocks + i, mask=i < limit, other=0.0)
            share = tl.exp(logit - tl.load(peaks_ptr + at)) / tl.load(sums_ptr + at)
            total += share
    amount = tl.zeros((TILE,), tl.float32) + tl.maximum((stop - first) * heads, 1).to(tl.float32)
    mean = tl.where(stop > first, tl.div_rn(total, amount), float("nan"))
    mean = tl.where(i < limit, mean, float("-inf"))
    tl.store(scores_ptr + (s * rows + r) * blocks + i, mean, mask=i < blocks)
