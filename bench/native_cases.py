"""Small runs that reach every kernel of ``csrc/cuda``, for compute-sanitizer to watch.

The benchmark's smoke cases are of a few types and shapes; these have the other types and head dims,
pools that are not aligned, and what an op can be asked for. `tests/cuda/test_native_cases.py` shows
that together they launch every kernel that is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from vicostream_kernels import (
    KeySummary,
    rope_append,
    select_pages,
    sink_window_attention,
    summarize_blocks,
    topk_blocks,
)
from vicostream_kernels.bench.inputs import map_tensors
from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: ``(inputs, backend) -> outputs``.
_Run = Callable[[Inputs, str], Outputs]


def native_cases() -> Iterator[Case]:
    """Cases like the registry's, of the native kernels alone."""
    yield from _attention()
    yield from _append()
    yield from _retrieve()


def _case(
    name: str, op: str, dtype: torch.dtype, make: Callable[[torch.Generator], Inputs], run: _Run
) -> Case:
    word = name.partition("/")[0]

    def made(device: torch.device, seed: int) -> Inputs:
        inputs = make(torch.Generator().manual_seed(seed))
        return map_tensors(inputs, lambda tensor: tensor.to(device))

    def reference(inputs: Inputs) -> Outputs:
        # The ops take no float64; what was rounded to `dtype` is exact in float32.
        inputs = map_tensors(inputs, lambda x: x.float() if x.is_floating_point() else x)
        return map_tensors(run(inputs, "reference"), lambda x: x.double())

    return Case(
        name=f"{name}/{str(dtype).removeprefix('torch.')}",
        word=word,
        op=op,
        axes={},
        dtype=dtype,
        bytes=1,
        flops=0,
        make=made,
        providers=lambda device: [Provider("ours:cuda", partial(run, backend="cuda"))],
        reference=reference,
        outputs=lambda inputs, result: result,
        baseline="ours:cuda",
        smoke=True,
    )


# --- attention -----------------------------------------------------------------------------------


def _attention() -> Iterator[Case]:
    """Each type and head dim, whole classes and others; what else there is in turn."""
    turn = 0
    for dtype in _DTYPES:
        for head_dim in (64, 128, 256, 24, 80, 136):
            yield _case(
                f"attention/native-{head_dim}d-{turn}",
                "sink_window_attention",
                dtype,
                partial(_make_attention, dtype=dtype, head_dim=head_dim, turn=turn),
                _attend,
            )
            turn += 1
    # A pool that begins between two vectors' addresses.
    yield _case(
        "attention/native-128d-odd",
        "sink_window_attention",
        torch.bfloat16,
        partial(_make_attention, dtype=torch.bfloat16, head_dim=128, turn=1, odd=True),
        _attend,
    )


def _make_attention(
    random: torch.Generator, *, dtype: torch.dtype, head_dim: int, turn: int, odd: bool = False
) -> Inputs:
    streams, heads, kv_heads, page, pages, length = 2, 8, 2, 16, 48, 20
    queries = (1, 3, 2)[turn % 3]
    pool = pages * page * kv_heads * head_dim
    inputs: Inputs = {"q": _normal(random, (streams * queries, heads, head_dim), dtype)}
    for name in ("k", "v"):
        inputs[name] = _normal(random, (pool + odd,), dtype)
    inputs["pool"] = (int(odd), (pages, page, kv_heads, head_dim))
    shape = (streams, heads, length) if turn % 4 == 3 else (streams, length)
    table = torch.stack([torch.randperm(pages, generator=random)[:length] for _ in range(streams)])
    if len(shape) == 3:
        table = table[:, None].expand(shape).clone()
    more: Inputs = {"cu_seqlens_q": (torch.arange(streams + 1) * queries).int()}
    if turn % 2 or len(shape) == 3:
        table[..., 3] = -1
        more["page_fill"] = torch.randint(1, page + 1, (pages,), generator=random).int()
    else:
        more["kv_len"] = torch.tensor([length * page - 5, 7], dtype=torch.int32)
    if turn % 3:
        more |= {"sink_tokens": 5, "window": 70}
        more["window_start"] = torch.tensor([3, 0], dtype=torch.int32)
    if turn % 5 < 2:
        more["sink_logits"] = torch.randn(heads, generator=random)
    if turn % 4 in (1, 2, 3):
        more["page_shift"] = torch.randint(-500, 500, (*table.shape, 3), generator=random).int()
        more["inv_freq"] = 1e6 ** (-torch.arange(0, head_dim, 2) / head_dim)
        more["mrope_section"] = [head_dim // 8, head_dim // 8, head_dim // 4]
    return {**inputs, "page_table": table.int(), "more": more}


def _attend(inputs: Inputs, backend: str) -> Outputs:
    at, shape = inputs["pool"]
    k, v = (inputs[name][at:].view(shape) for name in ("k", "v"))
    more = dict(inputs["more"])
    cu_seqlens = more.pop("cu_seqlens_q")
    out, lse = sink_window_attention(
        inputs["q"], k, v, inputs["page_table"], cu_seqlens, **more, return_lse=True,
        backend=backend,
    )  # fmt: skip
    return {"out": out, "lse": lse}


# --- append --------------------------------------------------------------------------------------


def _append() -> Iterator[Case]:
    """Summaries of every kind, and rows that are read in wide, narrow and single pieces."""
    for at, dtype in enumerate(_DTYPES):
        for kind, head_dim, odd in (("minmax", 64, 0), ("both", 40, 4), ("mean", 24, 1)):
            yield _case(
                f"append/native-{kind}-{head_dim}d-{odd}",
                "rope_append",
                dtype,
                partial(
                    _make_append,
                    dtype=dtype,
                    kind=kind,
                    head_dim=head_dim,
                    odd=odd,
                    source="raw" if at == 1 else "rotated",
                ),
                _write,
            )


def _make_append(
    random: torch.Generator, *, dtype: torch.dtype, kind: str, head_dim: int, odd: int, source: str
) -> Inputs:
    tokens, heads, kv_heads, page, pages = 70, 4, 2, 16, 9
    pool = (pages, page, kv_heads, head_dim)
    inputs: Inputs = {
        name: _normal(random, (tokens, n, head_dim), dtype)
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }
    for name in ("k_pages", "v_pages", "raw_k_pages"):
        inputs[name] = torch.zeros(odd + torch.Size(pool).numel(), dtype=dtype)
    inputs["pool"] = (odd, pool)
    slots = torch.randperm(pages, generator=random)[:, None] * page + torch.arange(page)
    inputs["slots"] = slots.flatten()[:tokens].int()
    inputs["slots"][tokens // 2] = -1
    inputs["positions"] = torch.randint(0, 9_000_000, (3, tokens), generator=random).int()
    inputs["inv_freq"] = 1e6 ** (-torch.arange(0, head_dim, 2) / head_dim)
    inputs["section"] = [head_dim // 8, head_dim // 8, head_dim // 4]
    inputs["block_of_page"] = (torch.arange(pages) % 3 - 1).int()
    summary = KeySummary.empty(2, kv_heads, head_dim, kind=kind, sub=2)
    inputs["summary"] = {
        name: tensor
        for name in ("sum", "count", "kmin", "kmax")
        if (tensor := getattr(summary, name)) is not None
    }
    return {**inputs, "source": source}


def _write(inputs: Inputs, backend: str) -> Outputs:
    at, shape = inputs["pool"]
    pools = {n: inputs[n][at:].view(shape) for n in ("k_pages", "v_pages", "raw_k_pages")}
    q = rope_append(
        inputs["q"], inputs["k"], inputs["v"], inputs["positions"], inputs["inv_freq"],
        inputs["section"], pools["k_pages"], pools["v_pages"], inputs["slots"],
        raw_k_pages=pools["raw_k_pages"],
        summary=KeySummary(**inputs["summary"], source=inputs["source"]),
        block_of_page=inputs["block_of_page"], backend=backend,
    )  # fmt: skip
    return {"q": q, **pools, **inputs["summary"]}


# --- retrieve ------------------------------------------------------------------------------------


_MEAN_DOT = {"score": "dot", "pool": "mean", "scope": "stream"}


def _retrieve() -> Iterator[Case]:
    for dtype in _DTYPES:
        for kind in ("mean", "minmax"):
            yield _case(
                f"retrieve/native-summarize-{kind}",
                "summarize_blocks",
                dtype,
                partial(_make_summarize, dtype=dtype, kind=kind),
                _summarize,
            )
        for score, pool, scope in (
            ("dot", "max", "query_head"),
            ("cosine", "mean", "kv_head"),
            tuple(_MEAN_DOT.values()),
            ("bound", "max", "query_head"),
        ):
            yield _case(
                f"retrieve/native-{score}-{pool}-{scope}",
                "topk_blocks",
                dtype,
                partial(_make_topk, dtype=dtype, score=score, pool=pool, scope=scope),
                _topk,
            )
    # More blocks than one block of threads holds the keys of, and a list for a table that does not
    # fit into shared memory.
    yield _case(
        "retrieve/native-large",
        "topk_blocks",
        torch.float32,
        partial(_make_topk, dtype=torch.float32, **_MEAN_DOT, nb=40_000),
        _topk,
    )
    yield _case("retrieve/native-pages", "select_pages", torch.float32, _make_pages, _list_pages)


def _make_summarize(random: torch.Generator, *, dtype: torch.dtype, kind: str) -> Inputs:
    listed = torch.randperm(21, generator=random)[:20].view(1, 5, 4).int()
    listed[0, 1, 2] = -1
    return {
        "k_pages": _normal(random, (21, 16, 2, 72), dtype),
        "block_pages": listed,
        "page_fill": torch.randint(0, 17, (21,), generator=random).int(),
        "kind": kind,
    }


def _summarize(inputs: Inputs, backend: str) -> Outputs:
    kind = inputs["kind"]
    found = summarize_blocks(
        inputs["k_pages"], inputs["block_pages"], inputs["page_fill"], kind=kind,
        sub=2 if kind == "minmax" else 1, backend=backend,
    )  # fmt: skip
    tensors: Sequence[Any] = found if isinstance(found, tuple) else (found,)
    return {str(at): tensor for at, tensor in enumerate(tensors)}


def _make_topk(
    random: torch.Generator, *, dtype: torch.dtype, score: str, pool: str, scope: str, nb: int = 300
) -> Inputs:
    few = nb > 1000
    streams, heads, kv_heads, d = (1, 2, 1, 8) if few else (2, 8, 2, 40)
    low = _normal(random, (streams, nb, kv_heads, d), dtype)
    summary: Any = low
    if score == "bound":
        low = low.unsqueeze(2)
        summary = (low, low + _normal(random, low.shape, dtype).abs())
    lengths = [1] * streams if few else [5, 2]
    return {
        "query": _normal(random, (sum(lengths), heads, d), dtype),
        "summary": summary,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "num_blocks": torch.tensor([nb, nb - 7][:streams]).int(),
        "choice": {"score": score, "pool": pool, "scope": scope, "k": min(1000, nb // 10)},
    }


def _topk(inputs: Inputs, backend: str) -> Outputs:
    named = {name: inputs[name] for name in ("cu_seqlens", "num_blocks")}
    found = topk_blocks(
        inputs["query"], inputs["summary"], **named, **inputs["choice"], backend=backend
    )
    # Not the indices: two scores within rounding may change places.
    chosen = found.scores.gather(-1, found.block_index.clamp_min(0).long()).sort(dim=-1).values
    return {"scores": found.scores, "chosen": chosen, "count": found.count}


def _make_pages(random: torch.Generator) -> Inputs:
    blocks, width = 9000, 1
    pool = torch.randperm(blocks * width + 8, generator=random).int()
    return {
        "block_index": torch.arange(0, blocks).int()[None],
        "block_pages": pool[: blocks * width].view(1, blocks, width),
        "sink_pages": pool[None, blocks * width :][:, :4].contiguous(),
        "recent_pages": pool[None, blocks * width + 3 :].contiguous(),
    }


def _list_pages(inputs: Inputs, backend: str) -> Outputs:
    return {"pages": select_pages(**inputs, backend=backend)}


def _normal(random: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=random).to(dtype)
