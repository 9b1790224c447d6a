"""page_shift: pages that moved act as if their keys had been rotated at the new positions."""

from __future__ import annotations

import random

import pytest
import torch
from attention_oracle import check, inverse_frequencies, make_case

import vicostream_kernels as vk
from kit import tensors
from kit.backends import backends_of
from kit.compare import assert_same_bits

each_backend = pytest.mark.parametrize("backend", backends_of("sink_window_attention"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
B, G, H, D = 4, 2, 4, 32
SECTION = [6, 5, 5]
FREQUENCIES = inverse_frequencies(D)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("section", (None, [4, 2, 2], [8, 0, 0], [0, 3, 5]), ids=str)
def test_sections_and_dtypes(backend, dtype, section):
    shift = tensors.ints((2, 3, 3), -500, 500, seed=3)
    case = make_case(
        [3, 1],
        [[4, -1, 3], [3, 5, 4]],
        kv_len=[7, 11],
        dtype=dtype,
        page_shift=shift,
        inv_freq=inverse_frequencies(16),
        mrope_section=section,
    )
    check(case, backend)


@each_backend
@pytest.mark.parametrize("head_dim", (8, 64, 80, 96, 128, 256))
def test_head_dims(backend, head_dim):
    case = make_case(
        [2],
        [[4, 0, 3]],
        page_fill=[4, 0, 0, 2, 3] + [0] * 7,
        head_dim=head_dim,
        page_shift=tensors.ints((1, 3, 3), -40, 40, seed=4),
        inv_freq=inverse_frequencies(head_dim),
    )
    check(case, backend)


@each_backend
@pytest.mark.parametrize("tables", (2, 4))
def test_a_page_moves_differently_in_each_heads_list(backend, tables):
    lists = [[[3, 1, 3], [0, -1, 3], [3, 3, 1], [-1, 0, 0]][:tables]] * 2
    case = make_case(
        [2, 1],
        lists,
        page_fill=[4, 2, 0, 3] + [0] * 8,
        page_shift=tensors.ints((2, tables, 3, 3), -90, 90, seed=5),
        inv_freq=inverse_frequencies(16),
        mrope_section=[2, 3, 3],
    )
    check(case, backend)


@each_backend
def test_shifts_of_missing_entries_are_ignored(backend):
    shift = tensors.ints((1, 3, 3), -90, 90, seed=6)
    case = make_case(
        [2],
        [[3, -1, 1]],
        kv_len=[6],
        page_shift=shift,
        inv_freq=inverse_frequencies(16),
    )
    wanted, _ = check(case, backend)
    other = shift.clone()
    other[0, 1] = 2**31 - 1
    assert_same_bits(case.run(backend, page_shift=other)[0], wanted)


@each_backend
@pytest.mark.parametrize("rows", ([3, 1], [20, 2]), ids=str)
def test_a_table_longer_than_its_window(backend, rows):
    """Most entries are hidden, some are sinks, and one straddles both ends of what is hidden."""
    choice = random.Random(9)
    table = [[choice.choice((-1, *range(12))) for _ in range(200)] for _ in rows]
    case = make_case(
        rows,
        table,
        page_fill=[4, 1, 0, 3, 2, 4, 4, 0, 1, 2, 4, 3],
        page_shift=tensors.ints((2, 200, 3), -900, 900, seed=12),
        inv_freq=inverse_frequencies(16),
        mrope_section=[2, 3, 3],
        sink_tokens=9,
        window=25,
    )
    check(case, backend)


@each_backend
def test_the_sign(backend):
    """One key at position 0 turned by +1 meets a query at position 1 as if both stood at 1."""
    q = torch.zeros(1, 1, 8)
    q[0, 0, 0], q[0, 0, 4] = torch.cos(torch.tensor(1.0)), torch.sin(torch.tensor(1.0))
    key = torch.zeros(1, 1, 1, 8)
    key[0, 0, 0, 0] = 1.0  # angle 0 in the plane of channels 0 and 4
    table, cu = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    fill = torch.ones(1, dtype=torch.int32)
    name, device = backend
    for shift, score in ((1, 1.0), (0, 0.5403023), (-1, -0.4161468)):  # cos 0, cos 1, cos 2
        moved = torch.tensor([[[shift, 77, 77]]], dtype=torch.int32)
        inputs = [x.to(device) for x in (q, key, key, table, cu, fill, moved)]
        _, lse = vk.sink_window_attention(
            *inputs[:5],
            page_fill=inputs[5],
            page_shift=inputs[6],
            inv_freq=inverse_frequencies(8).to(device),
            sm_scale=1.0,
            return_lse=True,
            backend=name,
        )
        assert float(lse) == pytest.approx(score, abs=1e-6)


class MovingStream:
    """Pages written once at their first positions, then moved; what remains can be written anew."""

    def __init__(self, seed: int, start: int) -> None:
        self.random = random.Random(seed)
        self.start = start
        self.pool = [torch.full((40, B, G, D), torch.nan) for _ in range(2)]
        self.fill = torch.zeros(40, dtype=torch.int32)
        self.free = list(range(40))
        self.random.shuffle(self.free)
        self.pages: list[dict] = []  # page id, raw k and v, written positions [3, n], now at [3]
        self.next = 0

    def write(self, k, v, positions, k_pages, v_pages, page) -> None:
        n = k.shape[0]
        slots = (page * B + torch.arange(n)).int()
        q = torch.zeros(n, H, D)
        vk.rope_append(q, k, v, positions.int(), FREQUENCIES, SECTION, k_pages, v_pages, slots)

    def append(self) -> None:
        n = self.random.randint(1, B)
        seed = self.random.randrange(1 << 30)
        k, v = tensors.randn((n, G, D), seed=seed), tensors.randn((n, G, D), seed=seed + 1)
        offsets = torch.tensor([[self.random.randint(0, 30) for _ in range(n)] for _ in range(3)])
        base = torch.tensor([self.start + self.next, self.start, self.start // 3])[:, None]
        page = self.free.pop()
        self.write(k, v, base + offsets, *self.pool, page)
        self.fill[page] = n
        self.pages.append({"page": page, "k": k, "v": v, "first": base, "at": base, "rel": offsets})
        self.next += 31

    def evict_and_rebase(self) -> None:
        for _ in range(self.random.randint(1, max(1, len(self.pages) // 3))):
            gone = self.pages.pop(self.random.randrange(len(self.pages) - 1))
            self.free.append(gone["page"])
        base = torch.tensor([self.random.randint(0, 10_000_000) for _ in range(3)])[:, None]
        for n, page in enumerate(self.pages):
            page["at"] = base + torch.tensor([31 * n, self.random.randint(0, 50), 3 * n])[:, None]

    def outputs(self, backend, q) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the moved pages, and over pages written anew where they now stand."""
        fresh = [torch.full_like(x, torch.nan) for x in self.pool]
        for page in self.pages:
            self.write(page["k"], page["v"], page["at"] + page["rel"], *fresh, page["page"])
        table = torch.tensor([[page["page"] for page in self.pages]], dtype=torch.int32)
        shift = torch.stack([(page["at"] - page["first"])[:, 0] for page in self.pages])[None].int()
        cu = torch.tensor([0, q.shape[0]], dtype=torch.int32)
        name, device = backend
        fixed = [x.to(device) for x in (table, cu)]
        common = {"page_fill": self.fill.to(device), "backend": name}
        moved = vk.sink_window_attention(
            q.to(device),
            *[x.to(device) for x in self.pool],
            *fixed,
            **common,
            page_shift=shift.to(device),
            inv_freq=FREQUENCIES.to(device),
            mrope_section=SECTION,
        )
        anew = vk.sink_window_attention(
            q.to(device), *[x.to(device) for x in fresh], *fixed, **common
        )
        return moved.cpu(), anew.cpu()


@each_backend
@pytest.mark.parametrize("start", (0, 9_000_000))
@pytest.mark.parametrize("seed", range(4))
def test_evictions_and_any_number_of_moves_equal_a_fresh_run(backend, seed, start):
    stream = MovingStream(seed, start)
    for _ in range(6):
        stream.append()
    for turn in range(5):
        stream.append()
        stream.append()
        stream.evict_and_rebase()
        at = stream.pages[-1]["at"].expand(3, 3) + torch.arange(3)
        raw = tensors.randn((3, H, D), seed=100 * seed + turn)
        scratch = torch.zeros(1, 1, 1, D)
        nothing = torch.zeros(3, 1, D), torch.zeros(3, 1, D)
        slots = torch.full((3,), -1, dtype=torch.int32)
        q = vk.rope_append(
            raw, *nothing, at.int(), FREQUENCIES, SECTION, scratch, scratch.clone(), slots
        )
        moved, anew = stream.outputs(backend, 3.0 * q)
        error = float((moved - anew).abs().max() / anew.abs().max())
        assert error <= 1e-5, f"turn {turn}: relative error {error:.2e}"
        still = torch.tensor([float((p["at"] - p["first"]).abs().max()) for p in stream.pages])
        assert still.max() > 1000, "no page moved: nothing was tested"


@each_backend
def test_ten_million_positions_away(backend):
    """Written at 0, moved by 10 million; the angle of the fastest pair is 10 million radians."""
    stream = MovingStream(7, 0)
    for _ in range(5):
        stream.append()
    for page in stream.pages:
        page["at"] = page["first"] + torch.tensor([10_000_000, 9_999_999, 9_999_991])[:, None]
    moved, anew = stream.outputs(backend, 3.0 * tensors.randn((2, H, D), seed=8))
    error = float((moved - anew).abs().max() / anew.abs().max())
    assert error <= 1e-5, f"relative error {error:.2e}"
