"""Faults planted into what Triton compiled: each must be found, else the machine proves nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from ptx import triton_driver  # noqa: E402
from ptx.memory import Fault  # noqa: E402

from kit import emulation, interpreter  # noqa: E402
from vicostream_kernels import sink_window_attention  # noqa: E402

pytestmark = pytest.mark.skipif(
    interpreter.ACTIVE or emulation.ACTIVE or torch.cuda.is_available(),
    reason="what is compiled here runs in an ordinary process without a GPU",
)
#: What a planted fault is found by: wrong numbers, or an access at the wrong time.
FOUND = "wrong by|where a copy arrives|no barrier between"


@pytest.fixture(params=(80, 90), autouse=True)
def capability(request) -> Iterator[int]:
    with triton_driver.compiled_for(request.param):
        yield request.param


@pytest.fixture
def alter(monkeypatch) -> Callable[..., None]:
    """Alters the text of the kernels whose name begins so; fails if it did not change."""

    def planted(kernel: str, change: Callable[[str], str]) -> None:
        def altered(ptx: str) -> str:
            if f".entry {kernel}" not in ptx:
                return ptx
            made = change(ptx)
            if made == ptx:
                pytest.fail("nothing was planted")  # which no test takes for a fault that is found
            return made

        monkeypatch.setattr(triton_driver, "altered", altered)

    return planted


@dataclass
class Prefill:
    """Several tiles of keys on tensor cores, from pages as a cache has them: dense and aligned."""

    q: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor

    def check(self) -> None:
        table = torch.tensor([[7, 2, 5, 0, 3, 1]], dtype=torch.int32)
        starts = torch.tensor([0, len(self.q)], dtype=torch.int32)
        keys = torch.tensor([181], dtype=torch.int32)
        arguments = (self.q, self.k_pages, self.v_pages, table, starts)
        exact = [x.float() if x.is_floating_point() else x for x in arguments]
        truth = sink_window_attention(*exact, kv_len=keys, backend="reference")
        got = sink_window_attention(*arguments, kv_len=keys, backend="triton")
        error = (got.float() - truth).abs().max()
        assert error < 0.02, f"wrong by {error}"


def prefill() -> Prefill:
    random = torch.Generator().manual_seed(3)
    made = (torch.randn(*shape, generator=random).bfloat16()
            for shape in ((70, 2, 128), (8, 32, 1, 128), (8, 32, 1, 128)))  # fmt: skip
    return Prefill(*made)


def test_as_compiled_it_is_right_on_tensor_cores(monkeypatch, capability):
    seen: list[str] = []

    def look(ptx: str) -> str:
        seen.append(ptx)
        return ptx

    monkeypatch.setattr(triton_driver, "altered", look)
    prefill().check()
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    assert any(instruction in ptx for ptx in seen)


def test_without_barriers_warps_race(alter):
    alter("prefill_kernel", lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx))
    with pytest.raises(Fault, match="with no barrier between"):
        prefill().check()


def test_copies_that_nobody_waits_for(alter):
    alter("prefill_kernel", lambda ptx: re.sub(r"cp\.async\.wait_group\s+\d+;", "", ptx))
    with pytest.raises((Fault, AssertionError), match=FOUND):
        prefill().check()


def test_a_wait_that_comes_a_copy_early(alter):
    def later(ptx: str) -> str:
        return re.sub(
            r"cp\.async\.wait_group\s+(\d+);",
            lambda found: f"cp.async.wait_group {int(found[1]) + 1};",
            ptx,
        )

    alter("prefill_kernel", later)
    with pytest.raises((Fault, AssertionError), match=FOUND):
        prefill().check()


def test_a_mask_that_is_left_out(alter):
    alter("prefill_kernel", lambda ptx: re.sub(r"@%p\d+ (ld\.global)", r"\1", ptx))
    with pytest.raises(Fault, match="outside|before all"):
        prefill().check()


def test_a_matrix_read_in_another_layout(alter, capability):
    def other(ptx: str) -> str:
        if capability == 90:  # the swizzle of a descriptor
            return re.sub(
                r"(or\.b64\s+%rd\d+, %rd\d+, )(-?\d+);",
                lambda found: f"{found[1]}{int(found[2]) ^ 1 << 62};",
                ptx,
            )
        return ptx.replace(".x4.trans.shared.b16", ".x4.shared.b16")

    alter("prefill_kernel", other)
    with pytest.raises((Fault, AssertionError), match=FOUND):
        prefill().check()
