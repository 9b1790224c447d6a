"""The Triton kernels of append against a plain numpy oracle that shares nothing with them.

The contract itself is tested on every backend in tests/ops; here is what is particular to the
kernels: the arithmetic of the angles, tiles that do not fit, layouts, and who owns a block.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kit import tensors
from kit.compare import assert_same_bits

pytest.importorskip("triton")

TWO_PI = np.longdouble("6.28318530717958647692528676655900577")


def kernel():
    from vicostream_kernels.triton_kernels import append

    return append


class Call:
    """Arguments of one call, by the names of the launch function."""

    def __init__(
        self, n, h, g, d, *, pages=6, page_size=5, dtype=torch.float32, section=None, blocks=3,
        sub=0, sums=False, summary_raw=False, raw=False, block_of_page=None, seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.q = tensors.randn((n, h, d), dtype, seed=seed)
        self.k = tensors.randn((n, g, d), dtype, seed=seed + 1)
        self.v = tensors.randn((n, g, d), dtype, seed=seed + 2)
        self.positions = tensors.ints((3, n), -3, 10_000_000, seed=seed + 3)
        self.inv_freq = (1e6 ** (-torch.arange(0, d, 2).double() / d)).float()
        self.mrope_section = section
        pool = (pages, page_size, g, d)
        self.k_pages = tensors.randn(pool, dtype, seed=seed + 4)
        self.v_pages = tensors.randn(pool, dtype, seed=seed + 5)
        self.slots = torch.randperm(pages * page_size, generator=generator)[:n].int()
        self.q_out = torch.full((n, h, d), torch.nan, dtype=dtype)
        self.raw_k_pages = tensors.randn(pool, dtype, seed=seed + 6) if raw else None
        self.sum = tensors.randn((blocks, g, d), seed=seed + 7) if sums else None
        self.count = torch.arange(blocks, dtype=torch.int32) if sums else None
        bounds = (blocks, sub, g, d)
        self.kmin = tensors.strided(torch.full(bounds, torch.inf)) if sub else None
        self.kmax = tensors.strided(torch.full(bounds, -torch.inf)) if sub else None
        self.summary_raw = summary_raw
        if block_of_page is None:
            block_of_page = [p * 7 % (blocks + 2) - 1 for p in range(pages)]
        self.block_of_page = torch.tensor(block_of_page, dtype=torch.int32) if sums or sub else None

    def run(self):
        kernel().rope_append(**vars(self))

    def copy(self):
        made = object.__new__(Call)
        for name, value in vars(self).items():
            copied = value
            if isinstance(value, torch.Tensor):
                copied = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
                copied.copy_(value)
            setattr(made, name, copied)
        return made

    def part(self, start, stop):
        """The same call for the tokens start to stop, writing into the same pages and summary."""
        made = object.__new__(Call)
        made.__dict__.update(vars(self))
        for name in ("q", "k", "v", "slots", "q_out"):
            setattr(made, name, getattr(self, name)[start:stop])
        made.positions = self.positions[:, start:stop]
        return made


def rotated(call, x):
    """x [N, heads, d] rotated in extended precision, as float64."""
    n, _, d = x.shape
    half = d // 2
    axis = np.repeat([0, 1, 2], call.mrope_section or [half, 0, 0])
    positions = call.positions.numpy().astype(np.longdouble)[axis].T
    angle = positions * call.inv_freq.numpy().astype(np.longdouble)
    angle = (angle - np.rint(angle / TWO_PI) * TWO_PI).astype(np.float64)[:, None]
    values = x.double().numpy()
    low, high = values[..., :half], values[..., half:]
    return np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)],
        axis=-1,
    )


def expect_close(got, truth, name):
    """Within one rounding of the dtype of the truth, plus the error of fp32 angles."""
    eps = torch.finfo(got.dtype).eps
    error = np.abs(got.double().numpy() - truth)
    allowed = eps / 2 * np.abs(truth) + 2e-6
    worst = np.unravel_index(np.nanargmax(error - allowed), error.shape)
    assert not np.isnan(error).any(), f"{name} has NaN"
    assert (error <= allowed).all(), f"{name}{list(worst)}: {error[worst]} > {allowed[worst]}"


def expect_pages(call, before):
    """The written slots hold the keys and values, all others what they held before."""
    pages, page_size = call.k_pages.shape[:2]
    keys = rotated(call, call.k)
    untouched = np.ones((pages, page_size), bool)
    for n, slot in enumerate(call.slots.tolist()):
        if not 0 <= slot < pages * page_size:
            continue
        page, offset = divmod(slot, page_size)
        untouched[page, offset] = False
        expect_close(call.k_pages[page, offset], keys[n], f"k_pages of token {n}, ")
        assert_same_bits(call.v_pages[page, offset], call.v[n], name=f"v_pages of token {n}")
        if call.raw_k_pages is not None:
            assert_same_bits(call.raw_k_pages[page, offset], call.k[n], name=f"raw key of {n}")
    for name in ("k_pages", "v_pages", "raw_k_pages"):
        if getattr(call, name) is not None:
            now, then = getattr(call, name)[untouched], getattr(before, name)[untouched]
            assert_same_bits(now, then, name=f"{name} outside of the slots")


def expected_summary(call, before):
    """sum, count, kmin, kmax by a loop over the tokens in order, in fp32, from the stored keys."""
    pages, page_size = call.k_pages.shape[:2]
    made = {
        name: None if getattr(before, name) is None else getattr(before, name).clone()
        for name in ("sum", "count", "kmin", "kmax")
    }
    blocks = next(t.shape[0] for t in made.values() if t is not None)
    for n, slot in enumerate(call.slots.tolist()):
        if not 0 <= slot < pages * page_size:
            continue
        page, offset = divmod(slot, page_size)
        block = int(call.block_of_page[page])
        if not 0 <= block < blocks:
            continue
        key = (call.k[n] if call.summary_raw else call.k_pages[page, offset]).float()
        if call.sum is not None:
            made["sum"][block] += key
            made["count"][block] += 1
        if call.kmin is not None:
            part = offset * call.kmin.shape[1] // page_size
            made["kmin"][block, part] = torch.minimum(made["kmin"][block, part], key)
            made["kmax"][block, part] = torch.maximum(made["kmax"][block, part], key)
    return made


def expect_summary(call, before):
    for name, wanted in expected_summary(call, before).items():
        if wanted is not None:
            assert_same_bits(getattr(call, name), wanted, name=name)


@pytest.mark.parametrize("position", [0, 1, 4097, 10_000_000, 2**31 - 1, -1, -(2**31)])
def test_angles_hold_at_every_position(position):
    # A key (1, 0) rotates into (cos, sin): what comes out are the angles themselves.
    d = 64
    call = Call(1, 0, 1, d, pages=1, page_size=1)
    call.k.fill_(0.0)[..., : d // 2] = 1.0
    call.positions.fill_(position)
    call.run()
    truth = rotated(call, call.k)[0, 0]
    error = np.abs(call.k_pages[0, 0, 0].double().numpy() - truth).max()
    assert error <= 2.5e-7, f"{error} radians at position {position}"


@pytest.mark.parametrize("low", [-1.0, 0.0, 1.9])
def test_angles_hold_for_frequencies_above_one_and_below_zero(low):
    call = Call(9, 1, 1, 32, pages=2)
    call.inv_freq = torch.linspace(low, low + 2.0, 16)
    call.run()
    expect_close(call.q_out, rotated(call, call.q), "q_out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "h", "g", "d", "section"),
    [
        (1, 1, 1, 8, None),
        (3, 5, 3, 8, [1, 2, 1]),
        (19, 3, 5, 24, None),
        (7, 9, 2, 80, [16, 12, 12]),
        (5, 4, 4, 256, [0, 128, 0]),
    ],
)
def test_matches_the_oracle(dtype, n, h, g, d, section):
    call = Call(n, h, g, d, dtype=dtype, section=section, raw=True)
    before = call.copy()
    call.run()
    expect_close(call.q_out, rotated(call, call.q), "q_out")
    expect_pages(call, before)


def test_skipped_slots_leave_the_pages_and_still_rotate_the_query():
    call = Call(11, 2, 2, 16, raw=True, sums=True, sub=2)
    # The pool goes on behind the last page: what lands there is seen.
    behind = torch.full((3, 1, *call.k_pages.shape[1:]), -7.0)
    for name, page in zip(("k_pages", "v_pages", "raw_k_pages"), behind):
        setattr(call, name, torch.cat((getattr(call, name), page))[:-1])
    call.slots[:4] = torch.tensor([-1, 30, 2**31 - 1, -(2**31)])
    before = call.copy()
    call.run()
    for pages in (call.k_pages, call.v_pages, call.raw_k_pages):
        after = pages.as_strided(pages.shape[1:], pages.stride()[1:], pages.numel())
        assert (after == -7.0).all(), "a token at slot P * B was written behind the pages"
    expect_close(call.q_out, rotated(call, call.q), "q_out")
    expect_pages(call, before)
    expect_summary(call, before)


def test_every_stride_is_honoured():
    call = Call(6, 3, 2, 16, raw=True, sums=True, sub=3)
    for name, value in list(vars(call).items()):
        if isinstance(value, torch.Tensor):
            # Axes in the opposite order in memory, and gaps in the innermost.
            shape = tuple(reversed((*value.shape[:-1], value.shape[-1] * 2)))
            fill = torch.nan if value.is_floating_point() else -7
            base = torch.full(shape, fill, dtype=value.dtype)
            view = base.permute(*reversed(range(value.dim())))[..., ::2]
            setattr(call, name, view.copy_(value))
    assert call.k_pages.stride(-1) != 1 and call.k_pages.stride(0) == 1
    before = call.copy()
    call.run()
    expect_close(call.q_out, rotated(call, call.q), "q_out")
    expect_pages(call, before)
    expect_summary(call, before)


@pytest.mark.parametrize("summary_raw", [False, True], ids=["rotated", "raw"])
@pytest.mark.parametrize(("sums", "sub"), [(True, 0), (False, 1), (True, 3), (False, 4)])
def test_summaries_add_in_token_order(summary_raw, sums, sub):
    # Random slots: blocks alternate from token to token, and come back.
    dtype = torch.float16 if sums else torch.float32
    call = Call(17, 1, 2, 16, dtype=dtype, sums=sums, sub=sub, summary_raw=summary_raw)
    before = call.copy()
    call.run()
    expect_summary(call, before)


def test_one_block_may_span_many_tiles():
    # One block, longer than what a program scans at once, interrupted by another at both ends.
    n = 300
    call = Call(n, 0, 1, 8, pages=75, page_size=4, sums=True, blocks=2,
                block_of_page=[1] + [0] * 73 + [1])  # fmt: skip
    call.slots = torch.arange(n, dtype=torch.int32)
    before = call.copy()
    call.run()
    assert call.count.tolist() == [0 + 292, 1 + 8]
    expect_summary(call, before)


def test_a_call_in_pieces_gives_the_bits_of_one_call():
    whole = Call(21, 2, 2, 16, sums=True, sub=2)
    pieces = whole.copy()
    whole.run()
    for start, stop in [(0, 1), (1, 8), (8, 8), (8, 21)]:
        pieces.part(start, stop).run()
    for name in ("q_out", "k_pages", "v_pages", "sum", "count", "kmin", "kmax"):
        assert_same_bits(getattr(pieces, name), getattr(whole, name), name=name)


def test_the_order_of_the_programs_does_not_matter(shuffled_programs):
    call = Call(37, 6, 5, 80, pages=9, raw=True, sums=True, sub=2, blocks=5)
    before = call.copy()
    call.run()
    assert len(shuffled_programs) > 20 and shuffled_programs != sorted(shuffled_programs)
    expect_close(call.q_out, rotated(call, call.q), "q_out")
    expect_pages(call, before)
    expect_summary(call, before)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_signed_zeros_come_out_as_torch_has_them():
    call = Call(6, 1, 1, 8, pages=2, sums=True, sub=1, summary_raw=True, blocks=1,
                block_of_page=[0, 0])  # fmt: skip
    call.sum.fill_(-0.0)
    call.k.fill_(-0.0)
    call.k[2, 0, 3] = torch.nan
    call.k[4, 0, 5] = torch.inf
    call.k[5, 0, 5] = -torch.inf
    before = call.copy()
    call.run()
    wanted = expected_summary(call, before)
    assert_same_bits(call.sum[..., :3], wanted["sum"][..., :3], name="sum")
    for name in ("sum", "kmin", "kmax"):
        torch.testing.assert_close(
            getattr(call, name), wanted[name], rtol=0, atol=0, equal_nan=True, msg=name
        )


def test_no_tokens_launch_nothing():
    call = Call(0, 2, 1, 8, sums=True)
    before = call.copy()
    call.run()
    assert_same_bits(call.k_pages, before.k_pages, name="k_pages")
    assert_same_bits(call.sum, before.sum, name="sum")
