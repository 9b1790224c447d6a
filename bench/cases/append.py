"""rope_append: one pass of rotation, page writes and summary updates, against torch's several."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch

from vicostream_kernels import KeySummary, backends, rope_append
from vicostream_kernels.bench import flashinfer_providers
from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider, case
from vicostream_kernels.reference.append import rope_append as truth

_PAGE = 64
_FLOPS_PER_PAIR = 6
#: Below this many tokens torch is fastest with fewer launches, above with fewer passes (measured).
_FEW_TOKENS = 64


def _sections(head_dim: int) -> list[int]:
    """Qwen2.5-VL's shares of the frequencies: 16, 24, 24 of 64."""
    half = head_dim // 2
    t = half // 4
    h = (half - t) // 2
    return [t, h, half - t - h]


def _make(
    device: torch.device,
    seed: int,
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    raw: bool,
    summary: bool,
) -> Inputs:
    """A chunk whose pages lie scattered in a pool twice its size; the pool holds NaN."""
    random = torch.Generator().manual_seed(seed)
    pages = -(-tokens // _PAGE)
    pool = 2 * pages
    listed = torch.randperm(pool, generator=random)[:pages]
    slots = (listed[:, None] * _PAGE + torch.arange(_PAGE)).flatten()[:tokens]
    half = head_dim // 2
    section = _sections(head_dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    inv_freq = 1e6 ** (-torch.arange(half) / half)
    side = max(1, int(tokens**0.5))
    grid = torch.arange(tokens)
    positions = 100 + torch.stack((grid // (side * side), grid // side % side, grid % side))
    inputs: Inputs = {
        "q": torch.randn(tokens, heads, head_dim, generator=random).to(dtype),
        "k": torch.randn(tokens, kv_heads, head_dim, generator=random).to(dtype),
        "v": torch.randn(tokens, kv_heads, head_dim, generator=random).to(dtype),
        "positions": positions.int(),
        "inv_freq": inv_freq,
        "k_pages": torch.full((pool, _PAGE, kv_heads, head_dim), torch.nan, dtype=dtype),
        "v_pages": torch.full((pool, _PAGE, kv_heads, head_dim), torch.nan, dtype=dtype),
        "slots": slots.int(),
        "slots_long": slots,  # index_copy_ takes nothing else; a stack keeps them so
        "axis": axis,
    }
    angles = positions[axis].T * inv_freq
    inputs["cos"] = angles.cos().repeat(1, 2)[:, None].to(dtype)
    inputs["sin"] = angles.sin().repeat(1, 2)[:, None].to(dtype)
    if raw:
        inputs["raw_k_pages"] = torch.full_like(inputs["k_pages"], torch.nan)
    if summary:
        inputs["sum"] = torch.zeros(1, kv_heads, head_dim)
        inputs["count"] = torch.zeros(1, dtype=torch.int32)
        rows = torch.full((pool,), -1, dtype=torch.int32)
        rows[listed] = 0
        inputs["block_of_page"] = rows
    return {
        **{name: tensor.to(device) for name, tensor in inputs.items()},
        "mrope_section": section,
    }


def _ours(inputs: Inputs, *, backend: str) -> torch.Tensor:
    summary = None
    if "sum" in inputs:
        summary = KeySummary(sum=inputs["sum"], count=inputs["count"])
    return rope_append(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        inputs["positions"],
        inputs["inv_freq"],
        inputs["mrope_section"],
        inputs["k_pages"],
        inputs["v_pages"],
        inputs["slots"],
        raw_k_pages=inputs.get("raw_k_pages"),
        summary=summary,
        block_of_page=inputs.get("block_of_page"),
        backend=backend,
    )


def _rotate_few_launches(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rotate_few_passes(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _torch(inputs: Inputs, *, given: bool = False, passes: bool | None = None) -> torch.Tensor:
    """What a stack writes without this package: angles, rotation in the model's dtype, index_copy_.

    ``given``: cos and sin are there already, as where a model computes them once for all layers.
    """
    q, k = inputs["q"], inputs["k"]
    if given:
        cos, sin = inputs["cos"], inputs["sin"]
    else:
        angles = inputs["positions"][inputs["axis"]].T * inputs["inv_freq"]
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    if passes is None:
        passes = q.shape[0] >= _FEW_TOKENS
    rotate = _rotate_few_passes if passes else _rotate_few_launches
    rotated = rotate(k, cos, sin)
    slots = inputs["slots_long"]
    inputs["k_pages"].flatten(0, 1).index_copy_(0, slots, rotated)
    inputs["v_pages"].flatten(0, 1).index_copy_(0, slots, inputs["v"])
    if "raw_k_pages" in inputs:
        inputs["raw_k_pages"].flatten(0, 1).index_copy_(0, slots, k)
    if "sum" in inputs:
        rows = inputs["block_of_page"][slots // _PAGE]
        inputs["sum"].index_add_(0, rows, rotated.float())
        inputs["count"].index_add_(0, rows, torch.ones_like(rows))
    return rotate(q, cos, sin)


@lru_cache(maxsize=1)
def _compile(shapes: tuple[Any, ...]) -> Any:
    """The baseline through the compiler, made anew for each case: its cache holds few shapes."""
    torch.compiler.reset()
    return torch.compile(partial(_torch, passes=False), fullgraph=True, dynamic=False)


def _compiled(inputs: Inputs) -> torch.Tensor:
    return _compile((inputs["q"].shape, inputs["q"].dtype, "sum" in inputs))(inputs)


def _providers(device: torch.device) -> list[Provider]:
    ours = [
        Provider(f"ours:{name}", partial(_ours, backend=name), optional=name == "reference")
        for name in backends.served_by("rope_append", device.type)
    ]
    return [
        *ours,
        Provider("torch", _torch),
        Provider("torch:given", partial(_torch, given=True), note="cos and sin are given"),
        Provider("torch:compile", _compiled, optional=True),
    ]


def _outputs(inputs: Inputs, result: torch.Tensor) -> Outputs:
    names = ("k_pages", "v_pages", "raw_k_pages", "sum", "count")
    return {"q": result, **{name: inputs[name] for name in names if name in inputs}}


def _reference(inputs: Inputs) -> Outputs:
    q_out = torch.full_like(inputs["q"], torch.nan)
    names = ("raw_k_pages", "sum", "count", "block_of_page")
    truth(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        inputs["positions"],
        inputs["inv_freq"],
        inputs["mrope_section"],
        inputs["k_pages"],
        inputs["v_pages"],
        inputs["slots"],
        q_out,
        **{name: inputs.get(name) for name in names},
    )
    return _outputs(inputs, q_out)


def _case(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    raw: bool = False,
    summary: bool = False,
    smoke: bool = False,
) -> Case:
    axes = dict(
        tokens=tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim, raw=raw, summary=summary
    )
    pairs = tokens * head_dim // 2
    key = tokens * kv_heads * head_dim * dtype.itemsize
    moved = 2 * tokens * heads * head_dim * dtype.itemsize  # q in, q out
    moved += (5 if raw else 4) * key  # k and v in, k and v out, raw k out
    moved += tokens * (3 + 1) * 4 + head_dim // 2 * 4  # positions, slots; frequencies
    if summary:
        moved += 2 * (kv_heads * head_dim + 1) * 4
    extra = "+raw" * raw + "+sum" * summary
    name = str(dtype).removeprefix("torch.")
    made = Case(
        name=f"append/{tokens}t-{heads}h-{kv_heads}g-{head_dim}d/{name}{extra}",
        word="append",
        op="rope_append",
        axes=axes,
        dtype=dtype,
        bytes=moved,
        flops=pairs * (heads + kv_heads) * _FLOPS_PER_PAIR,
        make=partial(_make, dtype=dtype, **axes),
        providers=_providers,
        reference=_reference,
        outputs=_outputs,
        smoke=smoke,
    )
    if raw or summary:  # FlashInfer's append keeps neither
        return made
    note = "cos, sin and places are given, two launches"
    return flashinfer_providers.beside(
        made, Provider(flashinfer_providers.PACKAGE, flashinfer_providers.append, note=note)
    )


@case
def cases() -> Iterator[Case]:
    """A chunk of 320 tokens (3B and 7B heads), decode, and a size bound by memory."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(37, 4, 2, 64, dtype, raw=True, summary=True, smoke=True)
        for extra in (False, True):
            yield _case(320, 16, 2, 128, dtype, raw=extra, summary=extra)
            yield _case(320, 28, 4, 128, dtype, raw=extra, summary=extra)
            yield _case(1, 28, 4, 128, dtype, raw=extra, summary=extra)
            yield _case(8192, 28, 4, 128, dtype, raw=extra, summary=extra)
