"""prune_tokens: score, decision and compaction in one pass, against torch's several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from vicostream_kernels import PrunedTokens, PruneRule, backends, prune_tokens
from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider, case
from vicostream_kernels.reference.prune import prune_tokens as truth

CHUNK_INTRA = PruneRule(threshold=0.25, reduce="any", always_keep="first")
STC = PruneRule(
    reference=("running_mean", "frame_mean"), metric="gaussian", ratio=0.25, channels=0.5,
    history="chunk",
)  # fmt: skip
_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _make(
    device: torch.device, seed: int, *, steps: int, places: int, width: int, dtype: torch.dtype
) -> Inputs:
    """A static scene with noise in which a quarter of the places change at each step."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, places, width, generator=random).repeat(steps, 1, 1)
    for step in range(1, steps):
        changed = torch.rand(places, generator=random) < 0.25
        x[step:, changed] = torch.randn(int(changed.sum()), width, generator=random)
    x += 0.3 * torch.randn(steps, places, width, generator=random)
    positions = torch.randint(0, 1000, (3, steps, places), generator=random)
    return {"x": x.to(dtype).to(device), "positions": positions.int().to(device)}


def _ours(inputs: Inputs, *, rule: PruneRule, backend: str) -> PrunedTokens:
    return prune_tokens(inputs["x"], inputs["positions"], rule, backend=backend)


def _kept(inputs: Inputs, mask: torch.Tensor) -> Kept:
    """The kept tokens only: no padding is written, the host reads the count."""
    x = inputs["x"]
    index = mask.flatten().nonzero().squeeze(1)
    tokens = x.flatten(0, 1).index_select(0, index)
    return tokens, inputs["positions"].flatten(1).index_select(1, index), index, mask


def _chunk_intra(
    inputs: Inputs, *, dot: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Kept:
    # A half type's own sums would decide otherwise than the definition does.
    x = inputs["x"].float()
    squares = dot(x, x)
    similarity = dot(x[1:], x[:-1]) * (squares[1:] * squares[:-1]).rsqrt()
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    mask[1:] = (similarity < CHUNK_INTRA.threshold).any(0)
    return _kept(inputs, mask)


def _einsum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tnd,tnd->tn", a, b)


def _stc(inputs: Inputs, *, expanded: bool) -> Kept:
    """``expanded``: distances from dot products (fewer passes, less exact) or from differences."""
    x = inputs["x"]
    steps, places, width = x.shape
    spread, mean = torch.var_mean(x.flatten(0, 1), 0, correction=0)
    channels = spread.argsort(stable=True)[: int(width * STC.channels)].sort().values
    x, mean = x.index_select(-1, channels), torch.nn.functional.normalize(mean[channels], dim=0)
    inverse = torch.linalg.vecdot(x, x).rsqrt()
    if expanded:
        frame = torch.bmm(inverse.unsqueeze(1), x) / places
        to_mean = 2 - 2 * (x @ mean) * inverse
        to_frame = torch.bmm(x, frame.mT).squeeze(-1) * inverse
        to_frame = 1 - 2 * to_frame + frame.square().sum(-1)
    else:
        x = x * inverse.unsqueeze(-1)
        from_mean, from_frame = x - mean, x - x.mean(1, keepdim=True)
        to_mean = torch.linalg.vecdot(from_mean, from_mean)
        to_frame = torch.linalg.vecdot(from_frame, from_frame)
    score = sum((-to_mean / s).exp() + (-to_frame / s).exp() for s in _SCALES)
    least = score.topk(int(places * STC.ratio), largest=False, sorted=False).indices
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, least, True)
    return _kept(inputs, mask)


_BASELINES: dict[str, tuple[PruneRule, dict[str, Callable[[Inputs], Kept]]]] = {
    "chunk-intra": (
        CHUNK_INTRA,
        {
            "torch": partial(_chunk_intra, dot=torch.linalg.vecdot),
            "torch:einsum": partial(_chunk_intra, dot=_einsum),
        },
    ),
    "stc-gaussian": (
        STC,
        {
            "torch": partial(_stc, expanded=True),
            "torch:differences": partial(_stc, expanded=False),
        },
    ),
}


def _providers(device: torch.device, *, method: str) -> list[Provider]:
    rule, baselines = _BASELINES[method]
    ours = [
        Provider(f"ours:{name}", partial(_ours, rule=rule, backend=name), name == "reference")
        for name in backends.served_by("prune_tokens", device.type)
    ]
    note = "kept tokens only, without the padding that ours writes"
    return ours + [Provider(name, run, note=note) for name, run in baselines.items()]


def _outputs(inputs: Inputs, result: PrunedTokens | Kept) -> Outputs:
    if isinstance(result, PrunedTokens):
        n = int(result.count)
        result = (result.tokens[:n], result.positions[:, :n], result.index[:n], result.mask)
    names = ("tokens", "positions", "index", "mask")
    made = dict(zip(names, result))
    return made | {"index": made["index"].int(), "mask": made["mask"].int()}


def _reference(inputs: Inputs, *, rule: PruneRule) -> Outputs:
    x = inputs["x"]
    total = x.shape[:2].numel()
    tokens, positions = torch.empty_like(x.flatten(0, 1)), inputs["positions"].flatten(1).clone()
    index, mask = torch.empty(total, dtype=torch.int32), torch.empty(x.shape[:2], dtype=torch.bool)
    cu_count = torch.empty(2, dtype=torch.int32)
    truth(x, inputs["positions"], rule, None, tokens, positions, index, cu_count, mask)
    return _outputs(
        inputs, PrunedTokens(tokens, positions, index, cu_count[1], mask, cu_count)
    )  # fmt: skip


def _case(
    method: str, steps: int, places: int, width: int, dtype: torch.dtype, *, smoke: bool = False
) -> Case:
    rule = _BASELINES[method][0]
    axes = dict(steps=steps, places=places, width=width)
    tokens = steps * places
    # x read and the output written whole (kept rows and padding); positions, index, mask.
    moved = 2 * tokens * width * dtype.itemsize + tokens * (3 + 3 + 1) * 4 + tokens
    name = str(dtype).removeprefix("torch.")
    return Case(
        name=f"prune/{method}/{steps}t-{places}n-{width}d/{name}",
        word="prune",
        op="prune_tokens",
        axes={"method": method, **axes},
        dtype=dtype,
        bytes=moved,
        flops=tokens * width * (4 if method == "chunk-intra" else 16),
        make=partial(_make, dtype=dtype, **axes),
        providers=partial(_providers, method=method),
        reference=partial(_reference, rule=rule),
        outputs=_outputs,
        smoke=smoke,
    )


@case
def cases() -> Iterator[Case]:
    """ViCoStream's chunk of four steps, STC-Pruner's eight frames, and a size bound by memory."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("chunk-intra", 3, 17, 72, dtype, smoke=True)
        yield _case("chunk-intra", 4, 135, 2048, dtype)
        yield _case("chunk-intra", 4, 135 * 16, 2048, dtype)
    yield _case("stc-gaussian", 2, 24, 64, torch.float32, smoke=True)
    yield _case("stc-gaussian", 8, 196, 2048, torch.float32)
