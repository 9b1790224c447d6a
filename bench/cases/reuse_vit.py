"""Qwen2.5-VL's ViT with reuse against the plain one: a full call and three between, as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from vicostream_kernels import backends
from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider, Tolerance, case
from vicostream_kernels.methods.rules import ReuseRule
from vicostream_kernels.models.reuse import EncoderLayout, EncoderState, Vit, reuse_forward
from vicostream_kernels.models.vision import VisionShape, vision_forward, vision_grid
from vicostream_kernels.models.weights import Block, Linear, Mlp, Norm, VisionWeights

_EPS = 1e-6
_RULE = ReuseRule(ratio=0.25, interval=4, skip_tolerance=None)
Axes = dict[str, int]


def _make(device: torch.device, seed: int, *, axes: Axes, dtype: torch.dtype) -> Inputs:
    """Random weights, and patches of a camera that stands still: sensor noise everywhere, and an
    object over a ninth of the patches that moves on at every step."""
    random = torch.Generator().manual_seed(seed)
    width, inner, n = axes["width"], axes["inner"], axes["height"] * axes["across"]

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=random) / columns**0.5

    def linear(rows: int, columns: int, gain: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        return gain * matrix(rows, columns), 0.02 * torch.randn(rows, generator=random)

    # As deep networks are made: what the layers add up to does not grow with their number.
    branch = (2 * axes["layers"]) ** -0.5

    layers = [
        {
            "qkv": linear(3 * width, width),
            "out": linear(width, width, branch),
            "gate_up": linear(2 * inner, width),
            "down": linear(width, inner, branch),
        }
        for _ in range(axes["layers"])
    ]
    steps = axes["calls"] * axes["steps"]
    clip = torch.randn(n, 1176, generator=random).repeat(steps, 1, 1)
    clip += 0.02 * torch.randn(steps, n, 1176, generator=random)
    for step in range(steps):
        first = step * max(1, n // steps)
        clip[step, first : first + max(1, n // 9)] = torch.randn(1176, generator=random)
    inputs = {
        "patches": clip.view(axes["calls"], -1, 1176),
        "patch": matrix(width, 1176),
        "layers": layers,
        "merger": (linear(4 * width, 4 * width), linear(axes["hidden"], 4 * width)),
        "ones": torch.ones(width),
    }

    def place(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype).to(device)
        if isinstance(value, dict):
            return {name: place(item) for name, item in value.items()}
        return type(value)(place(item) for item in value)

    return place(inputs)


def _shape(axes: Axes) -> VisionShape:
    # One layer of eight attends to the full frame, as 7, 15, 23 and 31 of 32 do.
    full = frozenset(range(axes["layers"]))
    full = frozenset(layer for layer in full if layer % 8 == min(7, axes["layers"] - 1))
    return VisionShape(axes["heads"], axes["width"] // axes["heads"], 2, 4, full)


def _vit(inputs: Inputs, axes: Axes, backend: str) -> Vit:
    norm = Norm(inputs["ones"], _EPS)
    blocks = tuple(
        Block(
            norm,
            Linear(*layer["qkv"]),
            Linear(*layer["out"]),
            norm,
            Mlp(Linear(*layer["gate_up"]), Linear(*layer["down"]), F.silu),
        )
        for layer in inputs["layers"]
    )
    first, second = (Linear(*parts) for parts in inputs["merger"])
    weights = VisionWeights(
        Linear(inputs["patch"], None), blocks, norm, lambda x: second(F.gelu(first(x)))
    )
    shape = _shape(axes)
    return Vit(weights, shape, shape.inv_freq().to(inputs["ones"].device), backend)


class _Grids:
    """Indices by (grid, device), made outside the timed calls as a runner keeps them."""

    made: dict[Any, Any] = {}

    @classmethod
    def of(cls, axes: Axes, device: torch.device, steps: int) -> Any:
        key = steps, axes["height"], axes["across"], str(device)
        if key not in cls.made:
            cls.made[key] = vision_grid(*key[:3], 2, 4, device)
        return cls.made[key]


def _plain(inputs: Inputs, *, axes: Axes, backend: str = "auto") -> list[torch.Tensor]:
    vit, patches = _vit(inputs, axes, backend), inputs["patches"]
    grid = _Grids.of(axes, patches.device, axes["steps"])
    return [vision_forward(*vit[:3], call, grid, backend) for call in patches]


def _reuse(inputs: Inputs, *, axes: Axes, rule: ReuseRule, backend: str) -> list[torch.Tensor]:
    """A state of its own each time, so that every run begins with the full call."""
    vit, patches = _vit(inputs, axes, backend), inputs["patches"]
    layout = EncoderLayout(
        layers=axes["layers"],
        width=axes["width"],
        hidden_size=axes["hidden"],
        merge_size=2,
        temporal_patch_size=2,
        dtype=patches.dtype,
        device=patches.device,
    )
    state = EncoderState(rule, layout)
    state.settle(axes["height"], axes["across"])
    grid_of = partial(_Grids.of, axes, patches.device)
    made = [reuse_forward(vit, state, call, axes["steps"], None, grid_of) for call in patches]
    return [tokens.flatten(0, 1) for tokens in made]


def _reference(inputs: Inputs, *, axes: Axes) -> Outputs:
    """The full call in plain float64 torch."""
    grid = _Grids.of(axes, torch.device("cpu"), axes["steps"])
    shape = _shape(axes)
    heads, width = shape.heads, axes["width"]

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + _EPS).rsqrt()

    angles = grid.positions[:2].double()[:, :, None] * shape.inv_freq().double().chunk(2)[0]
    angles = torch.cat((angles[0], angles[1]), 1).repeat(1, 2)[:, None]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-high, low), -1) * angles.sin()

    patches = inputs["patches"][0]
    x = (patches @ inputs["patch"].T).view(-1, 4, width)[grid.order].view(-1, width)
    for number, layer in enumerate(inputs["layers"]):
        q, k, v = F.linear(norm(x), *layer["qkv"]).view(-1, 3, heads, shape.head_dim).unbind(1)
        q, k = rotated(q), rotated(k)
        ends = (grid.frames if number in shape.full_layers else grid.windows).tolist()
        parts = [
            F.scaled_dot_product_attention(*(part[a:b].transpose(0, 1) for part in (q, k, v)))
            for a, b in zip(ends, ends[1:])
        ]
        attended = torch.cat([part.transpose(0, 1) for part in parts]).reshape(-1, width)
        x = x + F.linear(attended, *layer["out"])
        gate, up = F.linear(norm(x), *layer["gate_up"]).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, *layer["down"])
    first, second = inputs["merger"]
    merged = F.linear(F.gelu(F.linear(norm(x).view(-1, 4 * width), *first)), *second)
    return {"full_call": merged[grid.raster], "follows": torch.tensor(1)}


def _outputs(inputs: Inputs, result: list[torch.Tensor], *, axes: Axes) -> Outputs:
    """The full call, to be right; and whether the last step of the last call comes twice as near to
    the plain ViT's as the reference is.

    That what is between is the published algorithm, tests/models/test_reuse.py checks.
    """
    n = axes["height"] * axes["across"]
    vit = _vit(inputs, axes, "auto")
    grid = _Grids.of(axes, inputs["patches"].device, 1)
    plain = vision_forward(*vit[:3], inputs["patches"][-1, -n:], grid, "auto").double()
    reached, stale = ((made[-n // 4 :].double() - plain).norm() for made in (result[-1], result[0]))
    return {"full_call": result[0], "follows": (reached < 0.5 * stale).int().cpu()}


def _providers(device: torch.device, *, axes: Axes) -> list[Provider]:
    served = backends.served_by("merge_rows", device.type)
    name = next(iter(served))
    made = [
        Provider("plain", partial(_plain, axes=axes), note="every patch, our ops"),
        Provider(f"ours:{name}", partial(_reuse, axes=axes, rule=_RULE, backend="auto")),
    ]
    for change in ({"selection": "shared"}, {"max_age": 3}, {"ratio": 0.5}):
        rule = ReuseRule(**{"skip_tolerance": None, **change})
        label = ",".join(f"{key}={value}" for key, value in change.items())
        run = partial(_reuse, axes=axes, rule=rule, backend="auto")
        made.append(Provider(f"ours:{label}", run, optional=True))
    return made


def _case(name: str, dtype: torch.dtype, *, smoke: bool = False, device: str = "", **axes: int):
    n = axes["height"] * axes["across"] * axes["steps"] * axes["calls"]
    width, inner = axes["width"], axes["inner"]
    # Linear layers of the plain ViT; reuse does about a half of it.
    layers = axes["layers"] * (4 * width * width + 3 * width * inner) + 1176 * width
    merger = 16 * width * width + 4 * width * axes["hidden"]  # of four patches at once
    dtype_name = str(dtype).removeprefix("torch.")
    return Case(
        name=f"reuse/{name}/{axes['calls']}x{axes['steps']}s-{axes['layers']}l/{dtype_name}",
        word="reuse",
        op="vit",
        axes=axes,
        dtype=dtype,
        bytes=(axes["calls"] * (layers + merger) + n * 1176) * dtype.itemsize,
        flops=2 * n * (layers + merger // 4),
        make=partial(_make, axes=axes, dtype=dtype),
        providers=partial(_providers, axes=axes),
        reference=partial(_reference, axes=axes),
        outputs=partial(_outputs, axes=axes),
        baseline="plain",
        smoke=smoke,
        heavy=not smoke,
        devices=(device,) if device else ("cpu", "cuda"),
        # Eight layers of one rounding each; the selection may tip where two patches tie.
        tolerance=Tolerance(4 * Tolerance.of(dtype).relative, factor=4.0, floor=64.0),
    )


@case
def cases() -> Iterator[Case]:
    """The 3B model's ViT at 252 x 420 (18 x 30 patches). On a CPU a step a call (preset stc) and 8
    of the 32 layers, or a run takes minutes; on a GPU also the four steps of preset vicostream+stc.
    """
    tiny = dict(height=6, across=10, width=64, inner=96, heads=2, hidden=48, layers=2)
    real = dict(height=18, across=30, width=1280, inner=3420, heads=16, hidden=2048)
    yield _case("vit-tiny", torch.float32, smoke=True, steps=2, calls=4, **tiny)
    for dtype in (torch.float32, torch.bfloat16):
        yield _case("vit-3b", dtype, device="cpu", steps=1, calls=4, layers=8, **real)
        for steps in (1, 4):
            yield _case("vit-3b", dtype, device="cuda", steps=steps, calls=4, layers=32, **real)
