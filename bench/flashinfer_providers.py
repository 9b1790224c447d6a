"""FlashInfer beside our kernels: rows on a GPU where its package is installed.

FlashInfer prepares once what serves many calls. Its providers do that in the first call on a set of
inputs, which nobody times: the package is imported, kernels are compiled (minutes, once a machine),
the page table is compacted, ``plan`` divides the work. Every later call, so every timed one, is
``run`` alone, over the pages where they lie, into a new output as ours. No key is moved: the pages
of these cases are full but each stream's last, and FlashInfer can't serve others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch

from vicostream_kernels.bench.registry import Case, Inputs, Provider

PACKAGE = "flashinfer"
_LAYOUT = "NHD"  # [page, slot, head, dim], as our pools
_HALVES = (torch.float16, torch.bfloat16)
#: Of FlashInfer's attention, for what is divided over the keys; 128 MiB are advised.
_WORKSPACE_BYTES = 256 << 20


def beside(case: Case, *providers: Provider, dtypes: tuple[torch.dtype, ...] = _HALVES) -> Case:
    """The case with these providers where FlashInfer can run them, else with the reason."""

    def offered(device: torch.device) -> list[Provider]:
        there = () if refusal(case, device, dtypes) else providers
        return [*case.providers(device), *there]

    def absent(device: torch.device) -> dict[str, str]:
        reason = refusal(case, device, dtypes)
        return {PACKAGE: reason} if reason else {}

    return replace(case, providers=offered, absent=absent)


def refusal(case: Case, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why FlashInfer isn't beside the case on this device, or "". Does not import it."""
    if device.type != "cuda":
        return "it runs on CUDA tensors"
    if find_spec(PACKAGE) is None:
        return "it is not installed: pip install flashinfer-python"
    if case.smoke:
        return "smoke cases start at once, its kernels are compiled first"
    if case.dtype not in dtypes:
        return f"it does not serve {str(case.dtype).removeprefix('torch.')} here"
    return ""


def _once(inputs: Inputs, prepare: Callable[[Inputs], Any]) -> Any:
    """What ``prepare`` made in the first call on these inputs; each provider has its own copy."""
    if PACKAGE not in inputs:
        inputs[PACKAGE] = prepare(inputs)
    return inputs[PACKAGE]


# ---------------------------------------------------------------- attention


def attention_providers(queries: int) -> tuple[Provider, ...]:
    """For pages in place. Decode on tensor cores is what FlashInfer advises for 8 query heads to a
    KV head, without them it is more to compile. Of a prefill it chooses the kernels of Hopper on a
    Hopper; those of Ampere, which decode needs too, divide the keys of a short one."""
    note = "pages in place, planned ahead"
    if queries == 1:
        plain = partial(_decode, tensor_cores=False)
        return (
            Provider(PACKAGE, partial(_decode, tensor_cores=True), note=note),
            Provider(
                f"{PACKAGE}:cuda-cores", plain, optional=True, note=f"{note}, no tensor cores"
            ),
        )
    return (
        Provider(PACKAGE, partial(_prefill, backend="auto"), note=note),
        Provider(
            f"{PACKAGE}:fa2", partial(_prefill, backend="fa2"), note=f"{note}, kernels of Ampere"
        ),
    )


def compacted(
    page_table: torch.Tensor, kv_len: torch.Tensor, pool_pages: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's page table of ours [S, L]: where each stream's pages start, the pages that hold
    visible keys without gaps, and how many each last one holds; int32."""
    device = page_table.device
    listed = [row[(row >= 0) & (row < pool_pages)] for row in page_table.cpu()]
    lengths = [min(length, len(row) * page_size) for length, row in zip(kv_len.tolist(), listed)]
    counts = torch.tensor([-(-length // page_size) for length in lengths])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    pages = torch.cat([row[:count] for row, count in zip(listed, counts.tolist())])
    last = torch.tensor(lengths) - (counts - 1).clamp(min=0) * page_size
    return tuple(x.to(device, torch.int32) for x in (starts, pages, last))


@lru_cache(maxsize=1)
def _workspace(device: torch.device) -> torch.Tensor:
    """Zeros, as FlashInfer wants it at first. One for all: calls follow each other on a stream."""
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _table(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    pages, slots = inputs["k_pages"].shape[:2]
    return compacted(inputs["page_table"], inputs["kv_len"], pages, slots)


def _shape(inputs: Inputs) -> tuple[int, ...]:
    """Query heads, KV heads, head dim, page size."""
    q, pages = inputs["q"], inputs["k_pages"]
    return q.shape[1], pages.shape[2], q.shape[2], pages.shape[1]


def _run(planned: Any, inputs: Inputs) -> torch.Tensor:
    q = inputs["q"]
    # An output of its own prefill would be filled with zeros first.
    return planned.run(q, (inputs["k_pages"], inputs["v_pages"]), out=torch.empty_like(q))


def _decode(inputs: Inputs, *, tensor_cores: bool) -> torch.Tensor:
    def plan(inputs: Inputs) -> Any:
        import flashinfer

        dtype = inputs["q"].dtype
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(inputs["q"].device), _LAYOUT, use_tensor_cores=tensor_cores
        )
        wrapper.plan(*_table(inputs), *_shape(inputs), q_data_type=dtype, kv_data_type=dtype)
        return wrapper

    return _run(_once(inputs, plan), inputs)


def _prefill(inputs: Inputs, *, backend: str) -> torch.Tensor:
    def plan(inputs: Inputs) -> Any:
        import flashinfer

        dtype = inputs["q"].dtype
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            _workspace(inputs["q"].device), _LAYOUT, backend=backend
        )
        wrapper.plan(
            inputs["cu_seqlens_q"], *_table(inputs), *_shape(inputs),
            causal=True, q_data_type=dtype, kv_data_type=dtype,
        )  # fmt: skip
        return wrapper

    return _run(_once(inputs, plan), inputs)


# ---------------------------------------------------------------- retrieve

#: Its top-k takes what the scores come in.
TOP_K_DTYPES = (torch.float32, *_HALVES)


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices [k] of the largest of ``scores`` [N], in no order."""
    import flashinfer

    return flashinfer.top_k(scores[None], k)[1][0]


def top_k_pages(inputs: Inputs, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and pages [1, k] of the blocks with the largest of ``scores`` [N], in no order, by
    one kernel that chooses and looks up; a block is one page."""
    import flashinfer

    def prepare(inputs: Inputs) -> dict[str, torch.Tensor]:
        pages = inputs["block_pages"].flatten(1)
        lengths = torch.full((1,), pages.shape[1], dtype=torch.int32, device=pages.device)
        return {"pages": pages, "lengths": lengths}

    given = _once(inputs, prepare)
    index = torch.empty(1, k, dtype=torch.int32, device=scores.device)
    pages = flashinfer.top_k_page_table_transform(
        scores[None], given["pages"], given["lengths"], k, out_raw_indices=index
    )
    return index, pages


# ---------------------------------------------------------------- append


def append(inputs: Inputs) -> torch.Tensor:
    """Rotation of q and k, then k and v into their pages: two launches. Where each token goes and
    the cosines and sines of its position, three axes mixed, are given: FlashInfer's rotation takes
    a table with a row for each position, here of each token."""
    import flashinfer

    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    given = _once(inputs, _places)
    q_out, k_out = flashinfer.apply_rope_with_cos_sin_cache(
        given["rows"], q.flatten(1), k.flatten(1), q.shape[2], given["cos_sin"]
    )
    flashinfer.append_paged_kv_cache(
        k_out.view_as(k), v, given["streams"], given["rows"],
        (inputs["k_pages"], inputs["v_pages"]), *given["table"], _LAYOUT,
    )  # fmt: skip
    return q_out.view_as(q)


def _places(inputs: Inputs) -> dict[str, Any]:
    slots, (pool_pages, page_size) = inputs["slots"], inputs["k_pages"].shape[:2]
    tokens, device = slots.shape[0], slots.device
    angles = inputs["positions"][inputs["axis"]].T.double() * inputs["inv_freq"]
    listed, length = slots[None, ::page_size] // page_size, torch.tensor([tokens])
    starts, pages, last = compacted(listed, length, pool_pages, page_size)
    return {
        "rows": torch.arange(tokens, dtype=torch.int32, device=device),
        "streams": torch.zeros(tokens, dtype=torch.int32, device=device),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=1).float(),
        "table": (pages, starts, last),
    }
