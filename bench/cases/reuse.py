"""select_changed, gather_rows, merge_rows: one pass each, against torch's several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from vicostream_kernels import backends, gather_rows, merge_rows, select_changed
from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider, case
from vicostream_kernels.reference import reuse as truth

_RATIO = 0.25


def _make(
    device: torch.device, seed: int, *, frames: int, places: int, width: int, dtype: torch.dtype
) -> Inputs:
    """Frames that differ from a reference by amounts of their own, and a quarter of their rows."""
    random = torch.Generator().manual_seed(seed)
    k = max(1, int(places * _RATIO))
    reference = torch.randn(places, width, generator=random)
    amount = 2 * torch.rand(frames, places, 1, generator=random)
    feature = reference + amount * torch.randn(frames, places, width, generator=random)
    index = torch.stack(
        [torch.randperm(places, generator=random)[:k].sort().values for _ in range(frames)]
    )
    flat = (index + torch.arange(frames).unsqueeze(1) * places).flatten()
    inputs = {
        "feature": feature.to(dtype),
        "reference": reference.to(dtype),
        "rows": torch.randn(frames, k, width, generator=random).to(dtype),
        "residual": torch.randn(frames, places, width, generator=random).to(dtype),
        "index": index.int(),
        "flat": flat,  # index_select takes this at once; a stack keeps it so
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


# select_changed


def _select(inputs: Inputs, *, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    changed = select_changed(inputs["feature"], inputs["reference"], ratio=_RATIO, backend=backend)
    return changed.index, changed.similarity


def _select_torch(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """With vecdot: einsum and cosine_similarity take several times as long here."""
    # A half type's own sums would choose otherwise than the definition does.
    feature, reference = inputs["feature"].float(), inputs["reference"].float()
    dot = torch.linalg.vecdot
    norms = dot(feature, feature) * dot(reference, reference)
    similarity = dot(feature, reference) * norms.rsqrt()
    k = inputs["index"].shape[1]
    return similarity.topk(k, dim=1, largest=False).indices.sort(1).values, similarity


def _select_reference(inputs: Inputs) -> Outputs:
    k = inputs["index"].shape[1]
    index, _, similarity = truth.select_changed(
        inputs["feature"], inputs["reference"], k, None, k, "cosine"
    )
    return {"index": index, "similarity": similarity}


def _select_outputs(inputs: Inputs, result: Any) -> Outputs:
    return {"index": result[0].int(), "similarity": result[1]}


# gather_rows


def _gather(inputs: Inputs, *, backend: str) -> torch.Tensor:
    return gather_rows(inputs["feature"], inputs["index"], backend=backend)


def _gather_torch(inputs: Inputs) -> torch.Tensor:
    feature = inputs["feature"]
    rows = feature.flatten(0, 1).index_select(0, inputs["flat"])
    return rows.view(feature.shape[0], -1, feature.shape[-1])


# merge_rows


def _merge(inputs: Inputs, *, backend: str) -> torch.Tensor:
    return merge_rows(
        inputs["reference"],
        inputs["rows"],
        inputs["index"],
        residual=inputs["residual"],
        backend=backend,
    )


def _merge_torch(inputs: Inputs) -> torch.Tensor:
    """Adds first and then adds the replaced rows again: fewer bytes than a copy of the base."""
    residual, index = inputs["residual"], inputs["flat"]
    out = inputs["reference"] + residual
    rows = residual.flatten(0, 1).index_select(0, index).add_(inputs["rows"].flatten(0, 1))
    out.flatten(0, 1).index_copy_(0, index, rows)
    return out


def _merge_torch_copy(inputs: Inputs) -> torch.Tensor:
    residual = inputs["residual"]
    out = inputs["reference"].expand_as(residual).clone()
    out.flatten(0, 1).index_copy_(0, inputs["flat"], inputs["rows"].flatten(0, 1))
    return out.add_(residual)


def _merge_reference(inputs: Inputs) -> Outputs:
    names = ("reference", "rows", "index", "residual")
    return {"out": truth.merge_rows(*(inputs[name] for name in names))}


def _one_output(inputs: Inputs, result: torch.Tensor) -> Outputs:
    return {"out": result}


_Run = Callable[..., Any]
#: op -> ours, the baselines, the truth, the outputs.
_OPS: dict[str, tuple[_Run, dict[str, _Run], _Run, _Run]] = {
    "select_changed": (
        _select,
        {"torch": _select_torch},
        _select_reference,
        _select_outputs,
    ),
    "gather_rows": (
        _gather,
        {"torch": _gather_torch},
        lambda inputs: {"out": truth.gather_rows(inputs["feature"], inputs["index"])},
        _one_output,
    ),
    "merge_rows": (
        _merge,
        {"torch": _merge_torch, "torch:copy": _merge_torch_copy},
        _merge_reference,
        _one_output,
    ),
}


def _providers(device: torch.device, *, op: str) -> list[Provider]:
    ours, baselines, _, _ = _OPS[op]
    made = [
        Provider(f"ours:{name}", partial(ours, backend=name), optional=name == "reference")
        for name in backends.served_by(op, device.type)
    ]
    return made + [Provider(name, run) for name, run in baselines.items()]


def _case(
    op: str, frames: int, places: int, width: int, dtype: torch.dtype, *, smoke: bool = False
) -> Case:
    axes = dict(frames=frames, places=places, width=width)
    k = max(1, int(places * _RATIO))
    row, listed = width * dtype.itemsize, frames * k
    moved = {
        "select_changed": (frames + 1) * places * row + frames * (places + k + 1) * 4,
        "gather_rows": 2 * listed * row + listed * 4,
        # All residual rows in, all rows out; replaced rows in, and the base rows that stay.
        "merge_rows": (2 * frames * places + listed + places) * row + listed * 4,
    }[op]
    flops = {"select_changed": 4, "gather_rows": 0, "merge_rows": 1}[op]
    name = str(dtype).removeprefix("torch.")
    return Case(
        name=f"reuse/{op}/{frames}f-{places}n-{width}c/{name}",
        word="reuse",
        op=op,
        axes=axes,
        dtype=dtype,
        bytes=moved,
        flops=flops * frames * places * width,
        make=partial(_make, dtype=dtype, **axes),
        providers=partial(_providers, op=op),
        reference=_OPS[op][2],
        outputs=_OPS[op][3],
        smoke=smoke,
    )


@case
def cases() -> Iterator[Case]:
    """The four steps of a chunk in Qwen2.5-VL's ViT, a quarter of the patches changed."""
    for dtype in (torch.float32, torch.bfloat16):
        for op in _OPS:
            yield _case(op, 2, 19, 72, dtype, smoke=True)
            yield _case(op, 4, 540, 1280, dtype)
