"""What cutting a stream's keys into runs may get wrong: long lists, gaps, seams, odd addresses."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import Case, check, inverse_frequencies, make_case

import vicostream_kernels as vk
from kit.backends import backends_of
from kit.compare import assert_same_bits

each_backend = pytest.mark.parametrize("backend", backends_of("sink_window_attention"))
WIDE = 16  # most rows of a stream that decode is made for


def long_case(keys: int, *, page_size: int = 16, queries: int = 1, **options) -> Case:
    """One stream over scattered pages whose fills vary, with single and long runs of -1."""
    random = torch.Generator().manual_seed(keys)
    pages = 2 * keys // page_size + 4
    fill = torch.randint(0, page_size + 1, (pages,), generator=random)
    table, listed = [], 0
    for page in torch.randperm(pages, generator=random).tolist():
        if listed >= keys:
            break
        table += [page] + [-1] * int(torch.randint(0, 2, (1,), generator=random))
        listed += int(fill[page])
        if len(table) % 50 == 0:
            table += [-1, pages + 3] * 40  # longer than a warp looks ahead
    options = {"kv_heads": 1, "group": 2, "head_dim": 16, "page_fill": fill.int()} | options
    return make_case([queries], [table], pages=pages, page_size=page_size, **options)


@each_backend
@pytest.mark.parametrize("keys", (63, 64, 65, 255, 256, 257, 1000, 4100))
def test_lists_of_any_length(backend, keys):
    check(long_case(keys), backend)


@each_backend
def test_more_keys_than_the_shortest_runs_hold(backend):
    """64 runs of 256 keys are 16,384: from there on the runs grow."""
    check(long_case(21_000, page_size=64, group=1, head_dim=8), backend)


@each_backend
@pytest.mark.parametrize(
    ("sinks", "window"), ((1, 1), (64, 64), (70, 500), (300, 129), (1500, 100), (0, 700)), ids=str
)
@pytest.mark.parametrize("queries", (1, 5))
def test_the_gap_between_sinks_and_window(backend, sinks, window, queries):
    case = long_case(1500, queries=queries, sink_tokens=sinks, window=window, head_dim=8)
    check(case, backend)


@each_backend
def test_keys_of_the_gap_are_not_read(backend):
    case = long_case(900, sink_tokens=70, window=200)
    out, lse = case.run(backend)
    keys = torch.arange(int(case.options["page_fill"][listed(case)].sum()))
    hidden = (keys >= 70) & (keys <= len(keys) - 1 - 200)
    assert hidden.any()
    pages, offsets = slots(case)
    for pool in (case.k_pages, case.v_pages):
        pool[pages[hidden], offsets[hidden]] = torch.nan
    again, lse_again = case.run(backend)
    assert_same_bits(again, out)
    assert_same_bits(lse_again, lse)


def listed(case: Case) -> torch.Tensor:
    """The pages of the first stream in order."""
    table = case.page_table[0].long()
    return table[(table >= 0) & (table < case.k_pages.shape[0])]


def slots(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and offset of each logical key of the first stream."""
    found = [(p, o) for p in listed(case).tolist() for o in range(case.options["page_fill"][p])]
    return tuple(torch.tensor(found).T)


@each_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("page_size", (1, 7, 32))
def test_shifts_change_within_a_tile(backend, dtype, page_size):
    case = long_case(150, page_size=page_size, head_dim=64, dtype=dtype, queries=2)
    random = torch.Generator().manual_seed(3)
    shape = (*case.page_table.shape, 3)
    shift = torch.randint(-(10**7), 10**7, shape, generator=random).int()
    shift[:, ::3] = 0  # where they were written
    shift[:, 1::5, 1:] = 0
    options = {"page_shift": shift, "inv_freq": inverse_frequencies(64)}
    check(case.changed(**options), backend)
    check(case.changed(**options, mrope_section=[8, 12, 12]), backend)


@each_backend
@pytest.mark.parametrize("head_dim", (40, 72, 104, 136, 200, 256))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_shifts_at_head_dims_between_the_classes(backend, head_dim, dtype):
    case = long_case(90, head_dim=head_dim, dtype=dtype)
    shift = torch.arange(case.page_table.numel() * 3, dtype=torch.int32)
    options = {"inv_freq": inverse_frequencies(head_dim)}
    check(case.changed(page_shift=shift.view(*case.page_table.shape, 3), **options), backend)


@each_backend
@pytest.mark.parametrize(("queries", "group"), ((WIDE, 8), (WIDE, 1), (3, 7), (11, 3)), ids=str)
def test_rows_that_fill_several_tiles(backend, queries, group):
    case = long_case(300, queries=queries, group=group, window=100, sink_tokens=9)
    out, lse = check(case, backend)
    for hint in (1, queries):
        again, lse_again = case.run(backend, max_seqlen_q=hint)
        assert_same_bits(again, out)
        assert_same_bits(lse_again, lse)


@each_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_keys_at_addresses_that_no_wide_copy_takes(backend, dtype):
    case = long_case(130, dtype=dtype, head_dim=24)
    wanted, _ = check(case, backend)
    name, device = backend
    pools = []
    for pool in (case.k_pages, case.v_pages):
        room = torch.full((pool.numel() * 2 + 1,), torch.nan, dtype=dtype, device=device)
        pages, size, heads, d = pool.shape
        odd = room[1:].as_strided(pool.shape, (size * heads * (d + 1), heads * (d + 1), d + 1, 1))
        pools.append(odd.copy_(pool))
    moved = [x.to(device) for x in (case.page_table, case.cu_seqlens_q, case.options["page_fill"])]
    got = vk.sink_window_attention(
        case.q.to(device), *pools, *moved[:2], page_fill=moved[2], backend=name
    )
    torch.testing.assert_close(got.cpu(), wanted)


@each_backend
def test_forty_streams_of_different_lengths(backend):
    lengths = [(37 * s) % 90 for s in range(40)]
    tables = [[(7 * s + n) % 50 for n in range(12)] for s in range(40)]
    case = make_case([s % 2 for s in range(40)], tables, pages=50, page_size=8, kv_len=lengths)
    out, _ = case.run(backend, max_seqlen_q=1)
    few = [3, 17, 39]
    for s in few:
        alone = make_case([1], [tables[s]], pages=50, page_size=8, kv_len=[lengths[s]])
        row = int(case.cu_seqlens_q[s])
        alone = alone.changed(q=case.q[row : row + 1], k_pages=case.k_pages, v_pages=case.v_pages)
        assert_same_bits(alone.run(backend)[0], out[row : row + 1], name=f"stream {s}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ("cuda", "triton"))
class TestOnADevice:
    def call(self, case: Case, name: str, out: torch.Tensor) -> torch.Tensor:
        q, k, v, table, cu = (
            getattr(case, n).cuda()
            for n in ("q", "k_pages", "v_pages", "page_table", "cu_seqlens_q")
        )
        fill = case.options["page_fill"].cuda()

        def run() -> None:
            vk.sink_window_attention(
                q, k, v, table, cu, page_fill=fill, window=300, sink_tokens=5, out=out,
                max_seqlen_q=1, backend=name,
            )  # fmt: skip

        return run

    def test_a_captured_graph_gives_the_same_bits(self, name):
        case = long_case(900, dtype=torch.bfloat16, head_dim=128, kv_heads=2, group=8)
        eager, out = (torch.empty(case.q.shape, dtype=case.q.dtype).cuda() for _ in range(2))
        self.call(case, name, eager)()
        run = self.call(case, name, out)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for _ in range(3):
            out.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(out.cpu(), eager.cpu())

    def test_it_runs_on_the_callers_stream(self, name):
        case = long_case(900, dtype=torch.float16, head_dim=64)
        wanted, out = (torch.empty(case.q.shape, dtype=case.q.dtype).cuda() for _ in range(2))
        self.call(case, name, wanted)()
        run = self.call(case, name, out)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # the copy below must wait for it, so must the kernels
            out.fill_(torch.nan)
            run()
            got = out.clone()
        side.synchronize()
        assert_same_bits(got.cpu(), wanted.cpu())

    def test_nothing_waits_for_the_device(self, name):
        case = long_case(900, dtype=torch.float16, head_dim=64)
        out = torch.empty(case.q.shape, dtype=case.q.dtype).cuda()
        run = self.call(case, name, out)
        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
