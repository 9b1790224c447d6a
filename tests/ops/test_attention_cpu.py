"""What is special about attention in C++: splits, instruction sets, threads, memory left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from attention_oracle import check, inverse_frequencies, make_case

import vicostream_kernels as vk
from kit import tensors
from kit.compare import assert_same_bits
from vicostream_kernels import backends

_MISSING = backends.why_not("sink_window_attention", "cpu", "cpu")
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
CPU = ("cpu", "cpu")
SPLIT = 512  # logical keys of a split of a decode step
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def long_case(keys: int, queries: int = 1, *, page_size: int = 64, **options):
    pages = -(-keys // page_size)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(keys)).tolist()
    options = {"kv_heads": 2, "group": 3, "head_dim": 16, **options}
    return make_case([queries], [order], pages=pages, page_size=page_size, kv_len=[keys], **options)


@pytest.mark.parametrize("keys", (SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 33))
def test_lengths_around_the_splits(keys):
    check(long_case(keys, 2), CPU)


@pytest.mark.parametrize(
    ("window", "sinks"),
    [
        (SPLIT, 0),  # begins inside one split, ends inside the next
        (100, 4),  # a split between sinks and window that nobody sees
        (3 * SPLIT, SPLIT + 1),  # they overlap
        (40, SPLIT),
        (1, 1),
    ],
)
def test_windows_and_sinks_across_splits(window, sinks):
    case = long_case(3 * SPLIT + 70, 3)
    check(case.changed(window=window, sink_tokens=sinks, sink_logits=torch.arange(6.0)), CPU)


@pytest.mark.parametrize("keys", (31, 63, 64, 65, 127, 128, 129, 300))
@pytest.mark.parametrize(("queries", "head_dim"), [(1, 80), (2, 24), (3, 96), (7, 128), (29, 40)])
def test_bf16_around_the_borders_of_tiles(keys, queries, head_dim):
    """Tiles of 64 and of 128 keys, blocks of 8, 16 and 32 rows, columns of 32 and what is left."""
    options = {"head_dim": head_dim, "dtype": torch.bfloat16, "page_size": 16}
    case = long_case(keys, queries, **options)
    check(case, CPU)
    check(case.changed(window=70, sink_tokens=9, sink_logits=torch.arange(6.0)), CPU)
    moves = tensors.ints((1, case.page_table.shape[1], 3), -500, 500, seed=keys)
    check(case.changed(page_shift=moves, inv_freq=inverse_frequencies(head_dim)), CPU)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("score", (5e4, 1e10))
def test_equal_scores_weigh_the_same_in_every_tile(score, dtype):
    """However large they are: full tiles, and one with a mask at the end."""
    case = long_case(296, 1, dtype=dtype, sm_scale=0.7)
    case.q[:], case.k_pages[:], case.v_pages[:] = 0, 0, 0
    case.q[..., 0], case.k_pages[..., 0] = score**0.5, score**0.5
    for j in range(256, 296):
        case.v_pages[case.page_table[0, j // 64], j % 64] = 1
    out, lse = case.run(CPU)
    assert (out.float() - 40 / 296).abs().max() <= torch.finfo(dtype).eps * 40 / 296
    assert lse.isfinite().all()


def test_running_out_of_memory_leaves_the_next_call_whole(tmp_path):
    assert run_alone(OUT_OF_MEMORY, tmp_path) == "whole"


@pytest.mark.parametrize(
    ("queries", "kv_heads", "group"),
    [(1, 40, 5), (1, 1, 40), (7, 3, 5), (33, 2, 8), (130, 1, 1), (300, 1, 3)],
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
def test_rows_beyond_one_task(queries, kv_heads, group, dtype):
    """Several KV heads a task, several row groups a stream, splits of several lengths."""
    case = long_case(1100, queries, kv_heads=kv_heads, group=group, head_dim=8, dtype=dtype)
    check(case, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_bits_do_not_depend_on_threads(dtype):
    tables = [torch.randperm(40).tolist(), torch.randperm(40).tolist()]
    case = make_case(
        [1, 140], tables, pages=40, page_size=64, kv_len=[2500, 1800], dtype=dtype, head_dim=64
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.run(CPU))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert_same_bits(out, results[0][0], name="out")
        assert_same_bits(lse, results[0][1], name="lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_pools_of_any_strides(dtype):
    """Heads before slots, heads apart by more than d, a last dimension that is not dense."""
    case = make_case(
        [2], [[3, 1, 4]], page_size=5, kv_len=[13], kv_heads=3, head_dim=24, dtype=dtype
    )
    wanted, _ = case.run(CPU)
    for change in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.cat((x, x), 2)[:, :, ::2] * 0 + x,
        lambda x: torch.stack((x, x), 3).flatten(2, 3)[:, :, ::2],
        lambda x: torch.stack((x, x), -1)[..., 0],
    ):
        moved = case.changed(k_pages=change(case.k_pages), v_pages=change(case.v_pages))
        assert_same_bits(moved.run(CPU)[0], wanted)


def test_exp_is_within_two_ulp():
    """One query on two keys of scores 0 and x: out is e^x / (1 + e^x), three roundings later."""
    x = -torch.linspace(0, 87, 20001)
    k = torch.zeros(2 * len(x), 1, 8)
    k[1::2, 0, 0] = x
    v = torch.zeros(2 * len(x), 1, 8)
    v[1::2] = 1.0
    q = torch.zeros(len(x), 1, 8)
    q[..., 0] = 1.0
    starts = torch.arange(len(x) + 1, dtype=torch.int32)
    out = vk.varlen_attention(
        q, k, v, starts, 2 * starts, max_seqlen_q=1, max_seqlen_k=2, sm_scale=1.0, backend="cpu"
    )
    wanted = x.double().sigmoid()
    error = (out[:, 0, 0].double() / wanted - 1).abs().max() / 2**-23
    assert error <= 4.0, f"{float(error):.2f} ulp"


ISAS = """
import torch, vicostream_kernels as vk
from attention_oracle import check, inverse_frequencies, make_case
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for d, group, queries in ((8, 1, 1), (24, 3, 5), (40, 2, 9), (80, 5, 1), (256, 1, 37)):
        tables = [torch.randperm(12).tolist(), [3, -1, 2, 99] + [-1] * 8]
        case = make_case([queries, 1], tables, page_size=7, kv_len=[80, 12], dtype=dtype,
                         head_dim=d, group=group, window=33, sink_tokens=5)
        check(case, ("cpu", "cpu"))
    shift = torch.randint(-1000, 1000, (2, 12, 3), dtype=torch.int32)
    check(case.changed(page_shift=shift, inv_freq=inverse_frequencies(256)), ("cpu", "cpu"))
    q, k, v = (torch.randn(n, 3, 80).to(dtype) for n in (40, 90, 90))
    starts = [torch.tensor(s, dtype=torch.int32) for s in ([0, 3, 3, 40], [0, 64, 70, 90])]
    a, b = (vk.varlen_attention(q, k, v, *starts, max_seqlen_q=37, max_seqlen_k=64, backend=name)
            for name in ("cpu", "reference"))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(a, b, rtol=2 * eps, atol=8 * eps)
    lse = torch.randn(2, 40, 3)
    a, both = vk.merge_states(q, lse[0], q.flip(0), lse[1], backend="cpu")
    part = lse.double().softmax(0)[..., None] * torch.stack((q, q.flip(0))).double()
    # In units of the terms' size: fp32 has two exponentials (2 ulp each) and a quotient, the others
    # only the last rounding. Over 400 seeds 3.4 and 0.4994.
    error = ((a.double() - part.sum(0)).abs() / part.abs().sum(0)).max() / eps
    assert error <= (4 if dtype == torch.float32 else 0.51), (dtype, error)
    torch.testing.assert_close(both.double(), lse.double().logsumexp(0), rtol=0, atol=2**-22)
from vicostream_kernels import backends
print(backends.native()[0].build_info()["isa"])
"""

GUARDED = """
import ctypes, mmap, torch, vicostream_kernels as vk
PAGE, L, d = 4096, 160, 32  # a page of 16 slots x 2 heads x 32 floats is one page of memory
libc = ctypes.CDLL(None, use_errno=True)
pools = []
for n in range(2):
    memory = mmap.mmap(-1, L * PAGE)
    pool = torch.frombuffer(memory, dtype=torch.float32).view(L, 16, 2, d)
    pool.normal_()
    pools.append(pool)
order = torch.randperm(L)
table = order[:120].int()[None]  # the other 40 are listed nowhere
fill = torch.full((L,), 16, dtype=torch.int32)
fill[table[0, 5]] = 0
q = torch.randn(2, 6, d)
cu = torch.tensor([0, 2], dtype=torch.int32)
start = torch.tensor([1700], dtype=torch.int32)
def run(backend):
    return vk.sink_window_attention(q, *pools, table, cu, page_fill=fill, sink_tokens=20,
                                    window=600, window_start=start, backend=backend)
wanted = run("reference")
# logical 0..19 are sinks (entries 0, 1), 1700.. on is the window (entry 5 is empty)
seen = {int(page) for n, page in enumerate(table[0]) if n < 2 or (n - 1) * 16 + 15 >= 1700}
assert 10 < len(seen) < 20, len(seen)
for pool in pools:
    for page in set(range(L)) - seen:
        at = ctypes.c_void_p(pool[page].data_ptr())
        assert libc.mprotect(at, ctypes.c_size_t(PAGE), 0) == 0
torch.testing.assert_close(run("cpu"), wanted, rtol=1e-5, atol=1e-6)
print("untouched", flush=True)
import os
os._exit(0)  # before anything frees the pools
"""


OUT_OF_MEMORY = """
import resource, torch, vicostream_kernels as vk
torch.set_num_threads(1)
def call(rows, keys):
    q, pages = torch.randn(rows, 16, 128), torch.zeros(8, 64, 1, 128)
    table = torch.zeros(1, keys // 64, dtype=torch.int32)
    cu = torch.tensor([0, rows], dtype=torch.int32)
    length = torch.tensor([keys], dtype=torch.int32)
    attend = vk.sink_window_attention
    return lambda: attend(q, pages, pages, table, cu, kv_len=length, backend="cpu")
small, large = call(1, 640), call(16, 1600 * 64)
wanted = small()
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), most))
try:
    large()
except MemoryError:
    pass
else:
    raise SystemExit("there was memory")
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert torch.equal(small(), wanted)
print("whole")
"""


def run_alone(program: str, tmp_path) -> str:
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    return done.stdout.strip()


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512", "avx512bf16", "amx"))
def test_every_instruction_set_gives_the_oracle(torch_process, isa, tmp_path):
    """The variants of the CPU code are picked once per process, so each runs in its own."""
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = torch_process.run(ISAS, tmp_path, [tests], TRITON_INTERPRET="0", VICO_ISA=isa)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    used = done.stdout.strip()
    if used != isa:
        pytest.skip(f"this processor has {used} at most")


def test_hidden_pages_are_never_touched(tmp_path):
    """Reading a page that no query sees would end the process: it is unreadable memory."""
    assert run_alone(GUARDED, tmp_path) == "untouched"


def test_a_page_that_moved_reads_the_same_with_any_page_size():
    """The rotation of a tile that spans several entries, each with a shift of its own."""
    shift = tensors.ints((1, 40, 3), -300, 300, seed=3)
    check(
        make_case(
            [2], [list(range(40))], pages=40, page_size=3, kv_len=[120], head_dim=64,
            page_shift=shift, inv_freq=inverse_frequencies(64),
        ),
        CPU,
    )  # fmt: skip
