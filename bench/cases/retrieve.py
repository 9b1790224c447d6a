"""retrieve: scores and choice of blocks, and the list of their pages, against torch's forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vicostream_kernels import backends, select_pages, topk_blocks, topk_pages
from vicostream_kernels.bench.flashinfer_providers import (
    PACKAGE,
    TOP_K_DTYPES,
    beside,
    top_k,
    top_k_pages,
)
from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider, case
from vicostream_kernels.reference import retrieve as reference

_NO_RULE = {"ratio": None, "mass": None, "token_budget": None, "tokens_per_block": None}
_ALL_FREE = {"min_k": 1, "group": 1, "force_first": 0, "force_last": 0}
_CHOICE_ALONE = "its top-k, the rest torch's"


def _providers(op: str, run: Any, rivals: list[Provider], device: torch.device) -> list[Provider]:
    ours = [
        Provider(f"ours:{name}", partial(run, backend=name), optional=name == "reference")
        for name in backends.served_by(op, device.type)
    ]
    return [*ours, *rivals]


def _chosen_scores(inputs: Inputs, result: tuple[torch.Tensor, torch.Tensor]) -> Outputs:
    """The scores of all blocks, and of the chosen ones in order of size.

    Indices are not compared: two scores within rounding may change places.
    """
    index, scores = result
    found = scores.gather(-1, index.long()).sort(dim=-1).values
    return {"scores": scores, "chosen": found}


def _truth(inputs: Inputs) -> Outputs:
    summary, summary_max = inputs["summary"], inputs.get("summary_max")
    score, scope = ("dot", "stream") if summary_max is None else ("bound", "query_head")
    index, _, scores = reference.topk_blocks(
        inputs["query"], summary, summary_max, None, None, None, None, None,
        score, "mean", scope, None, k=inputs["k"], **_NO_RULE, **_ALL_FREE, capacity=inputs["k"],
    )  # fmt: skip
    return _chosen_scores(inputs, (index, scores))


# --- dot: one mean vector a block ----------------------------------------------------------------


def _make_dot(
    device: torch.device, seed: int, *, blocks: int, width: int, k: int, dtype: torch.dtype
) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    return {
        "query": torch.randn(1, width, generator=random).to(device, dtype),
        "summary": torch.randn(1, blocks, width, generator=random).to(device, dtype),
        "k": k,
    }


def _ours_dot(inputs: Inputs, *, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = topk_blocks(inputs["query"], inputs["summary"], k=inputs["k"], backend=backend)
    return found.block_index, found.scores


def _dots(inputs: Inputs) -> torch.Tensor:
    return inputs["summary"][0] @ inputs["query"][0]


def _torch_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.topk(k).indices


def _torch_dot(
    inputs: Inputs, *, choose: Callable[[torch.Tensor, int], torch.Tensor] = _torch_top_k
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _dots(inputs)
    index = choose(scores, inputs["k"]).sort().values.int()
    return index[None], scores.float()[None]


def _dot_case(
    blocks: int, width: int, k: int, dtype: torch.dtype = torch.float32, *, smoke: bool = False
) -> Case:
    axes = dict(blocks=blocks, width=width, k=k)
    made = Case(
        name=f"retrieve/dot-{blocks}n-{width}w-{k}k/{str(dtype).removeprefix('torch.')}",
        word="retrieve",
        op="topk_blocks",
        axes=axes,
        dtype=dtype,
        bytes=(blocks + 1) * width * dtype.itemsize + 4 * (blocks + k),
        flops=2 * blocks * width,
        make=partial(_make_dot, dtype=dtype, **axes),
        providers=partial(_providers, "topk_blocks", _ours_dot, [Provider("torch", _torch_dot)]),
        reference=_truth,
        outputs=_chosen_scores,
        smoke=smoke,
        reads=True,
    )
    rival = Provider(PACKAGE, partial(_torch_dot, choose=top_k), note=_CHOICE_ALONE)
    return beside(made, rival, dtypes=TOP_K_DTYPES)


# --- bound: the smallest and largest key of each page --------------------------------------------


def _make_bound(
    device: torch.device, seed: int, *, pages: int, heads: int, kv_heads: int, head_dim: int, k: int
) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    low = torch.randn(1, pages, 1, kv_heads, head_dim, generator=random)
    high = low + torch.rand(low.shape, generator=random)
    return {
        "query": torch.randn(1, heads, head_dim, generator=random).to(device),
        "summary": low.to(device),
        "summary_max": high.to(device),
        "k": k,
    }


def _ours_bound(inputs: Inputs, *, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = topk_blocks(
        inputs["query"], (inputs["summary"], inputs["summary_max"]), k=inputs["k"],
        score="bound", scope="query_head", backend=backend,
    )  # fmt: skip
    return found.block_index, found.scores


def _torch_bound(inputs: Inputs, *, queries_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batched products: positive parts with the maxima, negative ones with the minima."""
    low, high = (inputs[name][0, :, 0].transpose(0, 1) for name in ("summary", "summary_max"))
    query = inputs["query"].view(low.shape[0], -1, low.shape[-1])
    above, below = query.clamp_min(0), query.clamp_max(0)
    if queries_first:
        scores = torch.bmm(below, low.transpose(1, 2)).baddbmm_(above, high.transpose(1, 2))
    else:
        scores = torch.bmm(low, below.transpose(1, 2)).baddbmm_(high, above.transpose(1, 2))
        scores = scores.transpose(1, 2)
    scores = scores.reshape(1, inputs["query"].shape[1], -1)
    return scores.topk(inputs["k"]).indices.sort().values.int(), scores


def _bound_case(
    pages: int, heads: int, kv_heads: int, head_dim: int, k: int, *, smoke: bool = False
) -> Case:
    axes = dict(pages=pages, heads=heads, kv_heads=kv_heads, head_dim=head_dim, k=k)
    rivals = [
        Provider("torch", partial(_torch_bound, queries_first=True)),
        Provider("torch:keys-first", partial(_torch_bound, queries_first=False)),
    ]
    bounds = 2 * pages * kv_heads * head_dim
    return Case(
        name=f"retrieve/bound-{pages}p-{heads}h-{kv_heads}g-{head_dim}d-{k}k/float32",
        word="retrieve",
        op="topk_blocks",
        axes=axes,
        dtype=torch.float32,
        bytes=4 * (bounds + heads * (head_dim + pages + k)),
        flops=2 * pages * heads * head_dim,
        make=partial(_make_bound, **axes),
        providers=partial(_providers, "topk_blocks", _ours_bound, rivals),
        reference=_truth,
        outputs=_chosen_scores,
        smoke=smoke,
        reads=True,
    )


# --- pages ---------------------------------------------------------------------------------------


def _make_pages(
    device: torch.device, seed: int, *, blocks: int, width: int, chosen: int, sinks: int,
    recent: int,
) -> Inputs:  # fmt: skip
    """Blocks scattered over a pool; their pages, the sinks and the recent window share none."""
    random = torch.Generator().manual_seed(seed)
    pool = torch.randperm(blocks * width + sinks + recent, generator=random).int()
    index = torch.randperm(blocks, generator=random)[:chosen].sort().values.int()
    listed = pool[: blocks * width].view(1, blocks, width)
    rest = pool[blocks * width :][None]
    return {
        "block_index": index[None].to(device),
        "block_pages": listed.to(device),
        "sink_pages": rest[:, :sinks].contiguous().to(device),
        "recent_pages": rest[:, sinks:].contiguous().to(device),
    }


def _ours_pages(inputs: Inputs, *, backend: str) -> torch.Tensor:
    return select_pages(**inputs, backend=backend)


def _torch_pages(inputs: Inputs) -> torch.Tensor:
    """Each page once, by page number: what cat, unique and sort give; the order of time is lost."""
    pages = inputs["block_pages"][0].index_select(0, inputs["block_index"][0]).flatten()
    listed = torch.cat((inputs["sink_pages"][0], pages, inputs["recent_pages"][0]))
    return listed.unique().sort().values[None]


def _page_set(inputs: Inputs, result: torch.Tensor) -> Outputs:
    return {"pages": result.sort(dim=-1).values}


def _pages_truth(inputs: Inputs) -> Outputs:
    return _page_set(inputs, reference.select_pages(**inputs))


def _pages_case(
    blocks: int, width: int, chosen: int, sinks: int, recent: int, *, smoke: bool = False
) -> Case:
    axes = dict(blocks=blocks, width=width, chosen=chosen, sinks=sinks, recent=recent)
    return Case(
        name=f"retrieve/pages-{blocks}n-{width}m-{chosen}k-{sinks}s-{recent}r/int32",
        word="retrieve",
        op="select_pages",
        axes=axes,
        dtype=torch.float32,
        bytes=4 * (chosen + 2 * (chosen * width + sinks + recent)),
        flops=0,
        make=partial(_make_pages, **axes),
        providers=partial(
            _providers, "select_pages", _ours_pages, [Provider("torch", _torch_pages)]
        ),
        reference=_pages_truth,
        outputs=_page_set,
        smoke=smoke,
    )


# --- from the question to the page list ----------------------------------------------------------


def _make_list(
    device: torch.device, seed: int, *, blocks: int, width: int, k: int, pages: int, sinks: int,
    recent: int, dtype: torch.dtype,
) -> Inputs:  # fmt: skip
    asked = _make_dot(device, seed, blocks=blocks, width=width, k=k, dtype=dtype)
    listed = _make_pages(
        device, seed, blocks=blocks, width=pages, chosen=k, sinks=sinks, recent=recent
    )
    return {**asked, **{n: listed[n] for n in ("block_pages", "sink_pages", "recent_pages")}}


def _ours_list(inputs: Inputs, *, backend: str) -> tuple[torch.Tensor, ...]:
    table, found = topk_pages(**inputs, backend=backend)
    return found.block_index, found.scores, table


def _listed(inputs: Inputs, index: torch.Tensor) -> torch.Tensor:
    """The list of ascending ``index`` [1, K]: no page has two places here."""
    pages = inputs["block_pages"][0].index_select(0, index[0]).flatten()
    return torch.cat((inputs["sink_pages"][0], pages, inputs["recent_pages"][0]))[None]


def _torch_list(inputs: Inputs, **choice: Any) -> tuple[torch.Tensor, ...]:
    index, scores = _torch_dot(inputs, **choice)
    return index, scores, _listed(inputs, index)


def _flashinfer_list(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    scores = _dots(inputs)
    index, table = top_k_pages(inputs, scores, inputs["k"])
    return index, scores.float()[None], table


def _flashinfer_lister(pages: int, extra: int) -> Provider:
    """Its kernel that chooses and looks up has one entry a score, and nothing around them."""
    if pages == 1 and not extra:
        note = "torch's product, then choice and look-up in one kernel, in no order"
        return Provider(PACKAGE, _flashinfer_list, note=note)
    return Provider(PACKAGE, partial(_torch_list, choose=top_k), note=_CHOICE_ALONE)


def _list_outputs(inputs: Inputs, result: tuple[torch.Tensor, ...]) -> Outputs:
    """As for the choice, and whether the list is that of it."""
    index, scores, table = result
    right = (table == _listed(inputs, index)).to(scores.dtype)
    return {**_chosen_scores(inputs, (index, scores)), "right": right}


def _list_truth(inputs: Inputs) -> Outputs:
    found = _truth(inputs)
    extra = inputs["sink_pages"].shape[1] + inputs["recent_pages"].shape[1]
    length = inputs["k"] * inputs["block_pages"].shape[2] + extra
    return {**found, "right": torch.ones(1, length, dtype=torch.float64)}


def _list_providers(device: torch.device, *, launches: dict[str, str]) -> list[Provider]:
    made = _providers("topk_pages", _ours_list, [Provider("torch", _torch_list)], device)
    return [replace(p, note=launches.get(p.name.removeprefix("ours:"), "")) for p in made]


def _list_case(
    blocks: int, width: int, k: int, pages: int, sinks: int, recent: int,
    dtype: torch.dtype = torch.float32, *, smoke: bool = False,
) -> Case:  # fmt: skip
    """score + top-k + page list."""
    axes = dict(blocks=blocks, width=width, k=k, pages=pages, sinks=sinks, recent=recent)
    launches = {
        "cuda": f"{2 if blocks <= 20_000 else 3} launches",
        "triton": "6 launches and torch's top-k",
        "cpu": "one native call",
    }
    listed = 2 * (k * pages + sinks + recent)
    made = Case(
        name=f"retrieve/list-{blocks}n-{width}w-{k}k-{pages}m/{str(dtype).removeprefix('torch.')}",
        word="retrieve",
        op="topk_pages",
        axes=axes,
        dtype=dtype,
        bytes=(blocks + 1) * width * dtype.itemsize + 4 * (blocks + k + listed),
        flops=2 * blocks * width,
        make=partial(_make_list, dtype=dtype, **axes),
        providers=partial(_list_providers, launches=launches),
        reference=_list_truth,
        outputs=_list_outputs,
        smoke=smoke,
        reads=True,
    )
    return beside(made, _flashinfer_lister(pages, sinks + recent), dtypes=TOP_K_DTYPES)


@case
def cases() -> Iterator[Case]:
    """A question to an hour of chunks, Quest's pages at 128 Ki tokens, and a long history; pages
    that are chosen one by one, of which alone the list is made."""
    yield _dot_case(100, 256, 16, smoke=True)
    yield _dot_case(4096, 2048, 64)
    yield _dot_case(4096, 2048, 64, torch.bfloat16)
    yield _dot_case(262144, 256, 1024)
    yield _bound_case(64, 8, 2, 64, 8, smoke=True)
    yield _bound_case(8192, 32, 8, 128, 64)
    yield _list_case(100, 256, 16, 3, 2, 5, smoke=True)
    # More than one block of threads holds the keys of.
    yield _list_case(20480, 32, 64, 3, 2, 5, smoke=True)
    yield _list_case(4096, 2048, 64, 5, 4, 40)
    yield _list_case(4096, 2048, 64, 5, 4, 40, torch.bfloat16)
    yield _list_case(262144, 256, 1024, 5, 4, 40)
    yield _list_case(8192, 256, 64, 1, 0, 0)
    yield _pages_case(50, 3, 8, 2, 5, smoke=True)
    yield _pages_case(4096, 5, 64, 4, 40)
    yield _pages_case(262144, 5, 1024, 4, 40)
