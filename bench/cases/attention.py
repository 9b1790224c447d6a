"""Paged attention (decode, prefill) and packed windows, against torch on gathered pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from vicostream_kernels import backends, sink_window_attention, varlen_attention
from vicostream_kernels.bench.flashinfer_providers import attention_providers, beside
from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider, case
from vicostream_kernels.native.attention import not_decode
from vicostream_kernels.reference import attention as truth

_PAGE = 64


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- sink_window_attention


def _make_paged(
    device: torch.device,
    seed: int,
    *,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    streams: int = 1,
    shifted: bool = False,
) -> Inputs:
    """Streams whose pages lie scattered in a pool an eighth larger; unlisted slots hold NaN.
    ``shifted``: every page has moved since its keys were rotated."""
    random = torch.Generator().manual_seed(seed)
    pages = -(-keys // _PAGE)
    pool = streams * pages + max(1, streams * pages // 8)
    listed = torch.randperm(pool, generator=random)[: streams * pages].view(streams, pages)
    shape = (pool, _PAGE, kv_heads, head_dim)
    rows = streams * queries
    inputs: Inputs = {"q": torch.randn(rows, heads, head_dim, generator=random).to(dtype)}
    slots = (listed[..., None] * _PAGE + torch.arange(_PAGE)).flatten(1)[:, :keys].flatten()
    for name in ("k_pages", "v_pages"):
        inputs[name] = torch.full(shape, torch.nan, dtype=dtype)
        values = torch.randn(streams * keys, kv_heads, head_dim, generator=random).to(dtype)
        inputs[name].flatten(0, 1)[slots] = values
    inputs["page_table"] = listed.int()
    inputs["listed"] = listed.flatten()  # index_select wants it long; a stack keeps it so
    inputs["cu_seqlens_q"] = (torch.arange(streams + 1) * queries).int()
    inputs["kv_len"] = torch.full((streams,), keys, dtype=torch.int32)
    if queries > 1:
        logical = torch.arange(keys)
        inputs["visible"] = logical <= logical[keys - queries :, None]
    if shifted:
        inputs["page_shift"] = torch.randint(-2000, 2000, (streams, pages, 3), generator=random)
        inputs["page_shift"] = inputs["page_shift"].int()
        inputs["inv_freq"] = 1e6 ** (-torch.arange(0, head_dim, 2) / head_dim)
    moved = {name: x.to(device) for name, x in inputs.items()}
    return {**moved, "keys": keys, "queries": queries, "streams": streams}


def _shift(inputs: Inputs) -> dict[str, Any]:
    if "page_shift" not in inputs:
        return {}
    d = inputs["q"].shape[-1]
    named = {name: inputs[name] for name in ("page_shift", "inv_freq")}
    return {**named, "mrope_section": [d // 8, 3 * d // 16, 3 * d // 16]}


def _paged(inputs: Inputs, *, backend: str) -> torch.Tensor:
    return sink_window_attention(
        inputs["q"], inputs["k_pages"], inputs["v_pages"], inputs["page_table"],
        inputs["cu_seqlens_q"], kv_len=inputs["kv_len"], max_seqlen_q=inputs["queries"],
        **_shift(inputs), backend=backend,
    )  # fmt: skip


def _gathered(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [streams, keys, G, d] of the listed pages in order, copied together."""
    both = (inputs[name][inputs["listed"]] for name in ("k_pages", "v_pages"))
    k, v = (x.unflatten(0, (inputs["streams"], -1)) for x in both)
    if "page_shift" in inputs:
        k = _turned(k, **_shift(inputs))
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    return k[:, : inputs["keys"]], v[:, : inputs["keys"]]


def _turned(
    k: torch.Tensor, page_shift: torch.Tensor, inv_freq: torch.Tensor, mrope_section: list[int]
) -> torch.Tensor:
    """Keys [S, pages, B, G, d] rotated on by what each page has moved."""
    # Without a list that is copied to the device: who copies can't be captured.
    axes = [torch.full((n,), axis, device=k.device) for axis, n in enumerate(mrope_section)]
    axes = torch.cat(axes)
    angles = (page_shift[..., axes].double() * inv_freq)[:, :, None, None]
    sine, cosine = angles.sin().float(), angles.cos().float()
    one, other = k.float().chunk(2, dim=-1)
    turned = torch.cat((one * cosine - other * sine, other * cosine + one * sine), dim=-1)
    return turned.to(k.dtype)


def _sdpa(inputs: Inputs) -> torch.Tensor:
    k, v = (x.transpose(1, 2) for x in _gathered(inputs))
    q = inputs["q"].unflatten(0, (inputs["streams"], -1)).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=inputs.get("visible"), enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def _rows(inputs: Inputs, kv_heads: int) -> torch.Tensor:
    """[S Q, H, d] as [S, G, (H/G) * Q, d]: the query heads of a KV head are more rows of it."""
    q = inputs["q"].unflatten(1, (kv_heads, -1)).unflatten(0, (inputs["streams"], -1))
    return q.permute(0, 2, 3, 1, 4).flatten(2, 3)


def _heads(out: torch.Tensor, queries: int) -> torch.Tensor:
    return out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def _sdpa_rows(inputs: Inputs) -> torch.Tensor:
    k, v = (x.transpose(1, 2) for x in _gathered(inputs))
    q = _rows(inputs, k.shape[1])
    visible = inputs.get("visible")
    if visible is not None:
        visible = visible.repeat(q.shape[2] // visible.shape[0], 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return _heads(out, inputs["queries"])


def _matmul(inputs: Inputs) -> torch.Tensor:
    k, v = _gathered(inputs)
    q = _rows(inputs, k.shape[2])
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.permute(0, 2, 3, 1))
    visible = inputs.get("visible")
    if visible is not None:
        split = scores.unflatten(2, (-1, visible.shape[0]))
        scores = split.masked_fill(~visible, -torch.inf).flatten(2, 3)
    return _heads(scores.softmax(-1) @ v.transpose(1, 2), inputs["queries"])


def _providers(op: str, ours: Any, *others: Provider, device: torch.device) -> list[Provider]:
    served = backends.served_by(op, device.type)
    made = [
        Provider(f"ours:{name}", partial(ours, backend=name), optional=name == "reference")
        for name in served
    ]
    return [*made, *others]


def _paged_providers(device: torch.device, *, queries: int) -> list[Provider]:
    made = _providers(
        "sink_window_attention",
        _paged,
        Provider("torch:sdpa", _sdpa, note="gathered pages, enable_gqa"),
        Provider("torch:sdpa-rows", _sdpa_rows, note="gathered pages, GQA heads as rows"),
        Provider("torch:matmul", _matmul, note="gathered pages, grouped matmul"),
        device=device,
    )
    left_out = "ours:cuda" if not_decode(queries, None) else None
    return [provider for provider in made if provider.name != left_out]


# Of a long prefill others may have the visible keys in order already, copied by nobody: the best
# that they could do.


def _make_long(device: torch.device, seed: int, **axes: Any) -> Inputs:
    inputs = _make_paged(device, seed, **axes)
    del inputs["visible"]
    k, v = (x.transpose(1, 2).contiguous() for x in _gathered(inputs))
    return {**inputs, "k_in_order": k, "v_in_order": v}


def _in_order(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = inputs["q"].unflatten(0, (inputs["streams"], -1)).transpose(1, 2)
    return q, inputs["k_in_order"], inputs["v_in_order"]


def _sdpa_in_order(inputs: Inputs) -> torch.Tensor:
    bias = causal_lower_right(inputs["queries"], inputs["keys"])
    out = F.scaled_dot_product_attention(*_in_order(inputs), attn_mask=bias, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _flex_in_order(inputs: Inputs) -> torch.Tensor:
    run = _flex(inputs["queries"], inputs["keys"], inputs["q"].device)
    return run(*_in_order(inputs)).transpose(1, 2).flatten(0, 1)


@cache
def _flex(queries: int, keys: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """FlexAttention with the mask of such a prefill; compiled at its first call on a GPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(batch, head, query, key):
        return key <= query + (keys - queries)

    mask = create_block_mask(seen, None, None, queries, keys, device=device)
    run = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
    return partial(run, block_mask=mask, enable_gqa=True)


def _long_providers(device: torch.device, *, queries: int) -> list[Provider]:
    return [
        *(p for p in _paged_providers(device, queries=queries) if p.ours),
        Provider("torch:sdpa-in-order", _sdpa_in_order, note="visible keys in order already"),
        Provider("torch:flex-in-order", _flex_in_order, note="the same, FlexAttention"),
    ]


def _long_case(queries: int, keys: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    """A prefill for a GPU alone, beside the best that torch has for it (and FlashInfer)."""
    case = _paged_case("prefill", queries, keys, heads, kv_heads, head_dim, torch.bfloat16)
    case = replace(
        case,
        make=partial(_make_long, dtype=case.dtype, **case.axes),
        providers=partial(_long_providers, queries=queries),
        baseline="torch:sdpa-in-order",
        devices=("cuda",),
    )
    return beside(case, *attention_providers(queries))


def _outputs(inputs: Inputs, result: torch.Tensor) -> Outputs:
    return {"out": result}


def _paged_truth(inputs: Inputs) -> Outputs:
    out = torch.full_like(inputs["q"], torch.nan)
    names = ("q", "k_pages", "v_pages", "page_table", "cu_seqlens_q")
    given = [inputs[n] for n in names]
    truth.sink_window_attention(*given, out, kv_len=inputs["kv_len"], **_shift(inputs))
    return {"out": out}


def _paged_case(
    kind: str,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    streams: int = 1,
    shifted: bool = False,
    smoke: bool = False,
) -> Case:
    axes = dict(queries=queries, keys=keys, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    pairs = queries * keys - queries * (queries - 1) // 2
    elements = 2 * keys * kv_heads * head_dim + 2 * queries * heads * head_dim
    if streams > 1:
        axes["streams"] = streams
        kind = f"{kind}-{streams}s"
    if shifted:
        axes["shifted"] = True
        kind = f"{kind}-shifted"
    made = Case(
        name=f"attention/{kind}-{queries}q-{keys}k-{heads}h-{kv_heads}g-{head_dim}d/{_name(dtype)}",
        word="attention",
        op="sink_window_attention",
        axes=axes,
        dtype=dtype,
        bytes=streams * (elements * dtype.itemsize + -(-keys // _PAGE) * 4),
        flops=4 * streams * pairs * heads * head_dim,
        reads=queries == 1,
        make=partial(_make_paged, dtype=dtype, **axes),
        providers=partial(_paged_providers, queries=queries),
        reference=_paged_truth,
        outputs=_outputs,
        # the faster one for the size, measured on the CPU
        baseline="torch:sdpa-rows" if queries == 1 else "torch:sdpa",
        smoke=smoke,
        devices=("cpu", "cuda") if streams == 1 else ("cuda",),
    )
    # FlashInfer has no keys that turn while they are read.
    return made if shifted else beside(made, *attention_providers(queries))


# ---------------------------------------------------------------- varlen_attention


def _make_windows(
    device: torch.device,
    seed: int,
    *,
    windows: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> Inputs:
    random = torch.Generator().manual_seed(seed)

    def rows(count: int) -> torch.Tensor:
        return torch.randn(windows * count, heads, head_dim, generator=random).to(dtype).to(device)

    inputs: Inputs = {"q": rows(queries), "k": rows(keys), "v": rows(keys)}
    for name, each in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
        inputs[name] = (torch.arange(windows + 1) * each).int().to(device)
    return {**inputs, "max_seqlen_q": queries, "max_seqlen_k": keys}


_VARLEN = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")


def _windows(inputs: Inputs, *, backend: str) -> torch.Tensor:
    most = {name: inputs[name] for name in ("max_seqlen_q", "max_seqlen_k")}
    return varlen_attention(*(inputs[name] for name in _VARLEN), **most, backend=backend)


def _sdpa_batched(inputs: Inputs) -> torch.Tensor:
    windows = inputs["cu_seqlens_q"].shape[0] - 1
    q, k, v = (inputs[n].unflatten(0, (windows, -1)).transpose(1, 2) for n in "qkv")
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def _windows_providers(device: torch.device) -> list[Provider]:
    sdpa = Provider("torch:sdpa", _sdpa_batched, note="windows known to be of one length")
    return _providers("varlen_attention", _windows, sdpa, device=device)


def _windows_truth(inputs: Inputs) -> Outputs:
    most = (inputs["max_seqlen_q"], inputs["max_seqlen_k"])
    return {"out": truth.varlen_attention(*(inputs[name] for name in _VARLEN), *most)}


def _windows_case(
    windows: int,
    queries: int,
    keys: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    smoke: bool = False,
) -> Case:
    axes = dict(windows=windows, queries=queries, keys=keys, heads=heads, head_dim=head_dim)
    name = f"varlen-{windows}w-{queries}q-{keys}k-{heads}h-{head_dim}d"
    return Case(
        name=f"attention/{name}/{_name(dtype)}",
        word="attention",
        op="varlen_attention",
        axes=axes,
        dtype=dtype,
        bytes=2 * windows * (queries + keys) * heads * head_dim * dtype.itemsize,
        flops=4 * windows * queries * keys * heads * head_dim,
        make=partial(_make_windows, dtype=dtype, **axes),
        providers=_windows_providers,
        reference=_windows_truth,
        outputs=_outputs,
        baseline="torch:sdpa",
        smoke=smoke,
    )


@case
def cases() -> Iterator[Case]:
    """Decode and prefill of the 3B model's heads; the ViT's windows, frames and reused frames."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _paged_case("decode", 1, 150, 4, 2, 64, dtype, smoke=True)
        yield _paged_case("prefill", 37, 150, 4, 2, 64, dtype, smoke=True)
        yield _windows_case(3, 16, 16, 2, 80, dtype, smoke=True)
        yield _paged_case("decode", 1, 13000, 16, 2, 128, dtype)
        yield _paged_case("decode", 1, 13000, 16, 2, 128, dtype, shifted=True)
        yield _paged_case("decode", 1, 13000, 16, 2, 128, dtype, streams=16)
        yield _paged_case("prefill", 320, 1600, 16, 2, 128, dtype)
        yield _paged_case("prefill", 320, 1600, 16, 2, 128, dtype, shifted=True)
        yield _windows_case(34, 64, 64, 16, 80, dtype)
        yield _windows_case(2, 1080, 1080, 16, 80, dtype)
        yield _windows_case(34, 16, 64, 16, 80, dtype)
        yield _windows_case(34, 64, 64, 2, 32, dtype)
    yield _long_case(2048, 16384, 16, 2, 128)
