"""Faults planted into what Triton compiled: each must be found, else the machine proves nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")

from attention_oracle import Case, check, make_case  # noqa: E402
from ptx import triton_driver  # noqa: E402
from ptx.memory import Fault  # noqa: E402

from kit import emulation, interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(
    interpreter.ACTIVE or emulation.ACTIVE or torch.cuda.is_available(),
    reason="what is compiled here runs in an ordinary process without a GPU",
)
TRITON = ("triton", "cpu")


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
            assert made != ptx, "nothing was planted"
            return made

        monkeypatch.setattr(triton_driver, "altered", altered)

    return planted


def prefill() -> Case:
    """Two tiles of keys and more, on tensor cores."""
    order = [[7, 2, 9, 0, 5, 3, 1, 8], [4, 6, 11, 10, -1, -1, -1, -1]]
    return make_case(
        [67, 33], order, page_size=32, kv_len=[200, 90], head_dim=64, dtype=torch.bfloat16
    )


def test_as_compiled_it_is_right_on_tensor_cores(monkeypatch, capability):
    seen: list[str] = []

    def look(ptx: str) -> str:
        seen.append(ptx)
        return ptx

    monkeypatch.setattr(triton_driver, "altered", look)
    check(prefill(), TRITON)
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    assert any(instruction in ptx for ptx in seen)


def test_without_barriers_warps_race(alter):
    alter("prefill_kernel", lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx))
    with pytest.raises(Fault, match="with no barrier between"):
        check(prefill(), TRITON)


def test_copies_that_nobody_waits_for(alter):
    alter("prefill_kernel", lambda ptx: re.sub(r"cp\.async\.wait_group\s+\d+;", "", ptx))
    with pytest.raises((Fault, AssertionError)):
        check(prefill(), TRITON)


def test_a_wait_that_comes_a_copy_early(alter):
    def later(ptx: str) -> str:
        return re.sub(
            r"cp\.async\.wait_group\s+(\d+);",
            lambda found: f"cp.async.wait_group {int(found[1]) + 1};",
            ptx,
        )

    alter("prefill_kernel", later)
    with pytest.raises((Fault, AssertionError)):
        check(prefill(), TRITON)


def test_a_mask_that_is_left_out(alter):
    alter("prefill_kernel", lambda ptx: re.sub(r"@%p\d+ (ld\.global)", r"\1", ptx))
    with pytest.raises(Fault, match="outside|before all"):
        check(prefill(), TRITON)


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
    with pytest.raises((AssertionError, Fault)):
        check(prefill(), TRITON)
