"""Outputs of megabytes, which go around the cache on the CPU: the same rows as small ones."""

from __future__ import annotations

import pytest
import torch

from kit.compare import assert_same_bits
from vicostream_kernels import (
    PruneRule,
    backends,
    gather_rows,
    merge_rows,
    prune_tokens,
    rope_append,
    select_changed,
)

pytestmark = pytest.mark.skipif(
    "cpu" not in backends.served_by("gather_rows", "cpu"), reason="the compiled module is missing"
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Whole cache lines, and rows that begin in the middle of one.
WIDTHS = [1056, 1050]


def rows_of(shape, dtype, seed):
    """Includes NaN, inf, sums that overflow a half type and subnormal ones."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made[0, :8, :5] = torch.tensor([float("nan"), float("inf"), 6.5e4, 3.3e38, 3e-8])
    made[1, 3] *= 1e-7
    return made.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [128, 80, 24])
def test_append(dtype, width):
    tokens, heads = 1100, 4 * (1056 // width)
    q = rows_of((tokens, heads, width), dtype, 0)
    assert q.numel() * q.element_size() > 4 << 20
    k, v = torch.randn(2, tokens, 2, width).to(dtype)
    inv_freq, sections = torch.rand(width // 2), [width // 2 - 8, 4, 4]
    ids = torch.randint(0, 10_000, (3, tokens), dtype=torch.int32)
    slots = torch.randperm(tokens).int()

    def appended(pieces):
        pages = torch.zeros(2, 11, 100, 2, width, dtype=dtype).unbind()
        made = [
            rope_append(
                *(x[part] for x in (q, k, v)), ids[:, part], inv_freq, sections, *pages,
                slots[part], backend="cpu",
            )
            for part in pieces
        ]  # fmt: skip
        return torch.cat(made), *pages

    whole = appended([slice(0, tokens)])
    for one, other in zip(whole, appended([slice(i, i + 50) for i in range(0, tokens, 50)])):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_merge_and_gather(dtype, width):
    frames, places = 4, 1100
    base, residual = (rows_of((frames, places, width), dtype, seed) for seed in (0, 1))
    generator = torch.Generator().manual_seed(2)
    index = torch.stack([torch.randperm(places, generator=generator) for _ in range(frames)])
    index = index[:, : places - 1].sort(dim=1).values.int()
    index[2, 5:9] = -1
    flat = index.clamp(min=0).long().unsqueeze(-1).expand(-1, -1, width)
    wanted = base.gather(1, flat) * (index >= 0).unsqueeze(-1)
    wanted[index < 0] = 0
    got = gather_rows(base, index, backend="cpu")
    assert got.numel() * got.element_size() > 4 << 20
    assert torch.equal(got.view(torch.int8), wanted.view(torch.int8))

    rows = rows_of(got.shape, dtype, 3)
    replaced = base.clone()
    for f in range(frames):
        replaced[f, index[f][index[f] >= 0].long()] = rows[f][index[f] >= 0]
    plain = merge_rows(base, rows, index, backend="cpu")
    assert torch.equal(plain.view(torch.int8), replaced.view(torch.int8))
    added = merge_rows(base, rows, index, residual=residual, backend="cpu")
    assert_same_bits(added, replaced + residual)  # torch adds in float32 and rounds once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("capacity", [None, 700, 2400])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_prune_keeps_every_row_whole(dtype, width, capacity, threads):
    """Two chunks of different shapes; what changed lies in the last places of each."""
    shapes = ((4, 310), (2, 480))
    x = []
    for number, (steps, places) in enumerate(shapes):
        generator = torch.Generator().manual_seed(number)
        chunk = torch.randn(1, places, width, generator=generator).repeat(steps, 1, 1)
        chunk[1:, 2 * places // 3 :] *= -1
        x.append(chunk.to(dtype).flatten(0, 1))
    x = torch.cat(x)
    x[7, 3], x[650, 0] = float("nan"), float("inf")
    positions = torch.arange(3 * len(x), dtype=torch.int32).view(3, -1)
    rule = PruneRule(threshold=0.25, reduce="any", always_keep="first")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = prune_tokens(x, positions, rule, shapes=shapes, capacity=capacity, backend="cpu")
    finally:
        torch.set_num_threads(before)
    kept = got.mask.nonzero().squeeze(1)
    assert int(got.count) == len(kept) and 700 < len(kept) < len(x)
    listed, size = kept[: capacity or len(x)], capacity or len(x)
    n = len(listed)
    assert len(got.tokens) == size and got.index[:n].tolist() == listed.tolist()
    assert torch.equal(got.tokens[:n].view(torch.int8), x[listed].view(torch.int8))
    assert torch.equal(got.positions[:, :n], positions[:, listed])
    assert not got.tokens[n:].any() and not got.positions[:, n:].any()
    assert (got.index[n:] == -1).all()


def test_select_is_the_same_at_any_thread_count():
    feature = rows_of((3, 700, 1056), torch.float32, 0)
    reference = rows_of((3, 700, 1056), torch.float32, 1)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(select_changed(feature, reference[0], ratio=0.3, backend="cpu"))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(other.similarity, found[0].similarity)
        assert_same_bits(other.index, found[0].index)
