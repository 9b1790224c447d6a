"""A toy op with a right, a wrong and a failing provider: what the machinery is tested on."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from vicostream_kernels.bench.registry import Case, Inputs, Outputs, Provider


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> None:
    """Timing inside a busy suite: threads that wait for each other would take most of it."""
    torch.set_num_threads(1)


def _make(device: torch.device, seed: int) -> Inputs:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(33, 7, generator=random).to(device)
    return {"x": x, "written": torch.full((33, 7), torch.nan, device=device), "sizes": [33, 7]}


def _outputs(inputs: Inputs, result: torch.Tensor) -> Outputs:
    return {"doubled": result, "written": inputs["written"]}


def double(inputs: Inputs) -> torch.Tensor:
    inputs["written"][:5].copy_(inputs["x"][:5])
    return inputs["x"] * 2


def slow(inputs: Inputs) -> torch.Tensor:
    time.sleep(0.002)
    return double(inputs)


def off_by_little(inputs: Inputs) -> torch.Tensor:
    return double(inputs) + 1e-3


def writes_too_far(inputs: Inputs) -> torch.Tensor:
    inputs["written"][5] = 0
    return double(inputs)


def leaves_a_hole(inputs: Inputs) -> torch.Tensor:
    inputs["written"][:5].copy_(inputs["x"][:5])
    out = torch.empty_like(inputs["x"])
    torch.mul(inputs["x"][:-1], 2, out=out[:-1])
    return out


def raises(inputs: Inputs) -> torch.Tensor:
    raise RuntimeError("no such kernel\nsecond line")


@pytest.fixture
def toy() -> Callable[..., Case]:
    """``toy(torch=double, fast=other, ...)``: a case with these providers."""

    def build(
        name: str = "append/toy", *, smoke: bool = True, optional: tuple[str, ...] = (), **runs
    ) -> Case:
        providers = [
            Provider(key.replace("_", ":"), run, optional=key in optional)
            for key, run in runs.items()
        ]
        return Case(
            name=name,
            word=name.split("/")[0],
            op="toy_op",
            axes={"rows": 33},
            dtype=torch.float32,
            bytes=2 * 33 * 7 * 4,
            flops=33 * 7,
            make=_make,
            providers=lambda device: providers,
            reference=lambda inputs: _outputs(inputs, double(inputs)),
            outputs=_outputs,
            smoke=smoke,
            devices=("cpu",),
        )

    return build


@pytest.fixture
def providers() -> dict[str, Callable[[Inputs], torch.Tensor]]:
    return {
        run.__name__: run
        for run in (double, slow, off_by_little, writes_too_far, leaves_a_hole, raises)
    }
