"""What only a device can show of the Triton kernels of append."""

from __future__ import annotations

import pytest
import torch

from kit import interpreter
from kit.compare import assert_same_bits
from vicostream_kernels.reference import append as reference

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(interpreter.ACTIVE, reason="in the interpreter nothing runs on a device"),
]


def test_addresses_do_not_wrap_at_32_bits():
    from vicostream_kernels.triton_kernels import append

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8, dtype=torch.float16, device="cuda") for _ in range(3))
    i32 = dict(dtype=torch.int32, device="cuda")
    # Page 1 lies more than 2^31 elements behind page 0.
    far = torch.zeros(2**31 + 64, dtype=torch.float16, device="cuda")
    pages = far.as_strided((2, 1, 1, 8), (2**31 + 8, 8, 8, 1))
    near = torch.zeros(2, 1, 1, 8, dtype=torch.float16, device="cuda")
    rest = (torch.zeros(3, 1, **i32), torch.ones(4, device="cuda"), None)
    slots = torch.tensor([1], **i32)
    append.rope_append(q, k, v, *rest, pages, near, slots, torch.empty_like(q))
    assert_same_bits(pages[1, 0], k[0], name="the key at position 0, which turns by nothing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source_raw", [False, True], ids=["rotated", "raw"])
def test_a_prompt_of_many_blocks_has_the_summary_of_its_stored_keys(dtype, source_raw):
    from vicostream_kernels.triton_kernels import append

    torch.manual_seed(0)
    n, g, d, page_size, blocks = 8192 + 5, 4, 128, 16, 7
    pages = n // page_size + 2
    on = dict(device="cuda")
    q, k, v = (torch.randn(n, g, d, dtype=dtype, **on) for _ in range(3))
    positions = torch.randint(0, 10**7, (3, n), dtype=torch.int32, **on)
    inv_freq = (1e6 ** (-torch.arange(0, d, 2, **on) / d)).float()
    slots = torch.randperm(pages * page_size, **on)[:n].int()
    slots[::11] = -1
    block_of_page = torch.randint(-1, blocks + 1, (pages,), dtype=torch.int32, **on)

    def outputs(device):
        on = dict(device=device)
        pool = (pages, page_size, g, d)
        return [
            *(torch.zeros(pool, dtype=dtype, **on) for _ in range(2)),
            torch.zeros(blocks, g, d, **on),
            torch.zeros(blocks, dtype=torch.int32, **on),
            torch.full((blocks, 2, g, d), torch.inf, **on),
            torch.full((blocks, 2, g, d), -torch.inf, **on),
        ]

    got, again = outputs("cuda"), outputs("cuda")
    inputs = (q, k, v, positions, inv_freq, [16, 24, 24])
    for k_pages, v_pages, *summary in (got, again):
        append.rope_append(
            *inputs, k_pages, v_pages, slots, torch.empty_like(q), None, *summary, source_raw,
            block_of_page,
        )  # fmt: skip
    names = ("k_pages", "v_pages", "sum", "count", "kmin", "kmax")
    for name, one, other in zip(names, got, again):
        assert_same_bits(one, other, name=f"{name}, the same call twice")

    # From the keys that the kernel stored: the summary itself allows no difference at all.
    wanted = outputs("cpu")
    still = torch.zeros(3, n, dtype=torch.int32)
    stored = k.cpu()
    if not source_raw:
        flat = got[0].cpu().reshape(-1, g, d)
        stored = flat[slots.cpu().clamp(min=0).long()]
    reference.rope_append(
        q.cpu(), stored, v.cpu(), still, inv_freq.cpu(), None, wanted[0], wanted[1], slots.cpu(),
        torch.empty_like(stored), None, *wanted[2:], False, block_of_page.cpu(),
    )  # fmt: skip
    for name, one, other in zip(names[1:], got[1:], wanted[1:]):
        assert_same_bits(one.cpu(), other, name=name)
